"""Predictions for image files: the most probable classes of each. Shapes: B images, K classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from icdctl import files
from icdctl.data import Preprocessing
from icdctl.data.decode import (
    BrokenImage,
    Pixels,
    broken_images_message,
    check_sizes,
    decode_in_order,
    state_of,
)
from icdctl.data.folder_scan import LeftOut, images_below
from icdctl.data.image_formats import SUFFIXES
from icdctl.errors import ArtifactError, IcdctlError
from icdctl.evaluation import Predict

_BATCH_SIZE = 64


class Guess(NamedTuple):
    """A class and its probability."""

    class_name: str
    probability: float
    """Softmax of the logits, in [0, 1]; `icdctl eval` shows how far such numbers can be trusted (ece)."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image file."""

    image: Path
    top: tuple[Guess, ...]
    """The most probable classes, in descending order."""


@dataclass(frozen=True)
class PredictionResult:
    """The predictions for many image files."""

    target: str
    """The classifier, as the user named it."""
    predictions: tuple[Prediction, ...]
    skipped: tuple[BrokenImage, ...]
    """Files that could not be decoded."""

    def as_json(self) -> dict[str, object]:
        """The JSON object that `--json` prints."""
        return {
            "target": self.target,
            "predictions": [
                {
                    "image": str(each.image),
                    "class": each.top[0].class_name,
                    "probability": each.top[0].probability,
                    "top": [{"class": guess.class_name, "probability": guess.probability} for guess in each.top],
                }
                for each in self.predictions
            ],
            "skipped": [{"image": str(each.path), "reason": each.reason} for each in self.skipped],
        }


def image_files(given: Sequence[str | Path], left_out: LeftOut) -> list[Path]:
    """The given files, and all images at any depth below the given folders, sorted within each folder.

    Args:
        given: files and folders.
        left_out: counts the other files in the folders.

    Raises:
        ArtifactError: a path is missing, or a folder holds no images.
    """
    found: list[Path] = []
    for each in given:
        path = files.user_path(str(each))
        if not path.is_dir():
            state_of(path, "check its path")
            found.append(path)
            continue
        below = sorted(images_below(path, left_out))
        if not below:
            raise ArtifactError(
                f"`{path}` holds no images" + (f"; files that are not read: {left_out}" if left_out.count else ""),
                hint=f"name a folder of files that end in {' '.join(sorted(SUFFIXES))}",
            )
        found += below
    if not found:
        raise ArtifactError("no images are named", hint="name image files, or folders of them")
    return found


def predict_files(
    predict: Predict,
    paths: Sequence[Path],
    *,
    target: str,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    top: int,
    skip_broken: bool,
    on_images: Callable[[int], None],
) -> PredictionResult:
    """Decode image files in the same way as training images, and classify them in batches.

    Args:
        predict: the classifier: images [B, H, W, 3] uint8 to logits [B, K].
        paths: the image files.
        target: the classifier's name in messages and in the result.
        preprocessing: the classifier's preprocessing.
        class_names: K names.
        top: number of classes to report per image; all of them where K is smaller.
        skip_broken: leave out images that can't be decoded.
        on_images: called with the number of further images that are done.

    Raises:
        ArtifactError: a file is missing or can't be read; an image can't be decoded and `skip_broken` is not set; or
            the classifier has not K classes.
        IcdctlError: the logits are not finite.
    """
    size, resize = preprocessing.size, preprocessing.resize
    check_sizes(resize or size, size)
    predictions: list[Prediction] = []
    broken: list[BrokenImage] = []
    batch: list[tuple[Path, Pixels]] = []

    def classify() -> None:
        logits = predict(torch.from_numpy(np.stack([pixels for _, pixels in batch]))).double()
        _check_logits(logits, target, len(class_names))
        found = _most_probable(logits, class_names, top)
        predictions.extend(Prediction(path, guesses) for (path, _), guesses in zip(batch, found, strict=True))
        on_images(len(batch))
        batch.clear()

    with closing(decode_in_order(paths, resize=resize or size, crop=None if resize is None else size)) as results:
        for path, result in zip(paths, results, strict=True):
            if isinstance(result, BrokenImage):
                broken.append(result)
                on_images(1)
                continue
            if broken and not skip_broken:  # the rest are decoded only to name all broken ones
                continue
            batch.append((path, result.pixels))
            if len(batch) == _BATCH_SIZE:
                classify()
    if broken and not skip_broken:
        raise ArtifactError(
            broken_images_message(broken, len(paths)), hint="fix them, or leave them out with `--skip-broken`"
        )
    if batch:
        classify()
    return PredictionResult(target, tuple(predictions), tuple(broken))


def _check_logits(logits: Tensor, target: str, num_classes: int) -> None:
    """Refuse logits [B, K] that are not finite or belong to other classes."""
    if logits.shape[1] != num_classes:
        raise ArtifactError(
            f"`{target}` has {logits.shape[1]} classes, expected the {num_classes} of its data set",
            hint="name the data set that it was trained on with `--dataset`",
        )
    if not torch.isfinite(logits).all():
        raise IcdctlError(
            f"`{target}` gives logits that are not finite", hint="check it with `icdctl validate` and `icdctl eval`"
        )


def _most_probable(logits: Tensor, class_names: Sequence[str], top: int) -> list[tuple[Guess, ...]]:
    """The `top` most probable classes of each row of logits [B, K], in descending order."""
    likeliest = logits.softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
    return [
        tuple(Guess(class_names[place], share) for place, share in zip(classes, probabilities, strict=True))
        for classes, probabilities in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]
