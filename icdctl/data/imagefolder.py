"""A folder of a person's own images: a folder a class, of any sizes and formats.

DIR/train/<class>/...   and DIR/val/<class>/..., which is the test set;
                        with DIR/test/ as well, DIR/val/ is for validation
DIR/<class>/...         alone: a share of each class becomes the test set
DIR/unlabeled/...       images without a label, for distillation
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icdctl.data.decode import SUFFIXES
from icdctl.data.split import stratified
from icdctl.errors import ArtifactError

PREFIX = "imagefolder:"
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's, as is the custom: known before any image is read, and what pretrained models expect."""
SOURCE = "a folder of one's own images"
LICENCE = "not known to icdctl"
DEFAULT_TEST_SPLIT = 0.2
_TRAIN, _TEST = "train", "test"
_VAL = ("val", "valid", "validation")
_UNLABELED = ("unlabeled", "unlabelled")
_PARTS = frozenset({_TRAIN, _TEST, *_VAL, "training", "testing"})
"""Never classes, in capitals or not: a model that tells `Train` from `Val` is nobody's wish."""


@dataclass(frozen=True)
class Part:
    """Some of the images."""

    names: tuple[str, ...]
    """N paths below DIR, in POSIX form."""
    labels: Tensor
    """[N] int64."""

    def __getitem__(self, rows: Tensor) -> Part:
        return Part(tuple(self.names[row] for row in rows.tolist()), self.labels[rows])


@dataclass(frozen=True)
class Division:
    """Which images are for what."""

    train: Part
    test: Part
    val: Part | None
    unlabeled: tuple[str, ...]
    has_own_test: bool
    """False where test images were taken from the training images' classes."""


def folder_of(name: str) -> Path:
    """DIR of `imagefolder:DIR`."""
    return Path(name.removeprefix(PREFIX))


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the classes, sorted: those of the folders that training images lie in.

    Raises:
        ArtifactError: the folder is not there, has fewer than two classes, or a class has a name that is no text.
    """
    base = folder / _TRAIN if (folder / _TRAIN).is_dir() else folder
    found = _folders_in(base)
    if base == folder:
        found = [name for name in found if name.lower() not in _UNLABELED]
        misplaced = [name for name in found if name.lower() in _PARTS]
        if misplaced:
            raise ArtifactError(
                f"`{folder}` has a folder `{misplaced[0]}` but no folder `{_TRAIN}`",
                hint=f"put the training images into `{_TRAIN}/`, with a folder for each class",
            )
    if len(found) < 2:
        raise ArtifactError(
            f"`{base}` has {len(found)} folders of images, a classifier needs 2 classes or more",
            hint="put the images of each class into a folder of their own, named like the class",
        )
    unreadable = [name for name in found if not name.isprintable()]
    if unreadable:
        raise ArtifactError(
            f"`{base}` has a class whose name can't be printed: {unreadable[0]!a}", hint="rename its folder"
        )
    return tuple(found)


def _folders_in(base: Path) -> list[str]:
    """Names of the folders in `base`, sorted, without hidden ones."""
    try:
        return sorted(path.name for path in base.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise ArtifactError(
            f"image folder `{base}` can't be read: {error.strerror or error}",
            hint="name a folder with `train/` and `val/`, or with a folder for each class: `--dataset imagefolder:DIR`",
        ) from error


def divide(folder: Path, *, test_split: float, val_split: float, seed: int) -> Division:
    """Say which images are for training, validation and testing. No image is opened.

    Args:
        folder: DIR.
        test_split: share of each class for testing, where DIR has no `val/` or `test/`.
        val_split: share of each class's training images for validation, 0 for none.
        seed: of both.

    Raises:
        ArtifactError: the folder or a class has no images, or validation or test images have classes of their own.
    """
    classes = class_names(folder)
    has_train = (folder / _TRAIN).is_dir()
    train = _part(folder, folder / _TRAIN if has_train else folder, classes)
    _check_filled(folder, train, classes)
    own_val = _own_val(folder) if has_train else None
    own_test = folder / _TEST if has_train and (folder / _TEST).is_dir() else None
    if own_test is None:
        own_test, own_val = own_val, None
    if own_test is not None:
        test = _part(folder, own_test, classes)
        if not test.names:
            raise ArtifactError(
                f"`{own_test}` holds no images",
                hint=f"fill it, or remove it: {test_split:.0%} of each class are then taken for testing",
            )
    else:
        kept, held = stratified(train.labels, test_split, seed=seed, names=train.names)
        train, test = train[kept], train[held]
        if not test.names:
            raise ArtifactError(
                f"`{folder}` has one image a class: none is left for testing",
                hint="add images, or put test images into `val/` beside `train/`",
            )
    val = None
    if own_val is not None:
        if val_split:
            raise ArtifactError(
                f"`{own_val}` holds the validation images, and `--val-split` asks for others",
                hint="leave `--val-split` out",
            )
        val = _part(folder, own_val, classes)
    elif val_split:
        kept, held = stratified(train.labels, val_split, seed=seed, names=train.names)
        train, val = train[kept], train[held]
    if val is not None and not val.names:
        raise ArtifactError(
            f"`{folder}` has no image for validation",
            hint=f"fill `{own_val}`" if own_val is not None else "leave `--val-split` out, or add images",
        )
    return Division(train, test, val, _unlabeled(folder), has_own_test=own_test is not None)


def _own_val(folder: Path) -> Path | None:
    found = [folder / name for name in _VAL if (folder / name).is_dir()]
    if len(found) > 1:
        raise ArtifactError(
            f"`{folder}` has both `{found[0].name}/` and `{found[1].name}/`", hint="put the images into one of them"
        )
    return found[0] if found else None


def _part(folder: Path, base: Path, classes: Sequence[str]) -> Part:
    """All images below the classes' folders of `base`."""
    others = set(_folders_in(base)) - set(classes)
    if base != folder and others:
        raise ArtifactError(
            f"`{base}` has classes that the training images do not have: {', '.join(sorted(others)[:5])}",
            hint="name the folders of classes alike everywhere",
        )
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_images_below(folder, base / name))
        names += found
        labels += [label] * len(found)
    return Part(tuple(names), torch.tensor(labels, dtype=torch.int64))


def _check_filled(folder: Path, train: Part, classes: Sequence[str]) -> None:
    counts = torch.bincount(train.labels, minlength=len(classes)).tolist()
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        shown = ", ".join(f"`{name}`" for name in empty[:5])
        raise ArtifactError(
            f"{len(empty)} of {len(classes)} classes in `{folder}` have no training images: {shown}",
            hint=f"remove these folders, or fill them; images end in {' '.join(sorted(SUFFIXES))}",
        )


def _unlabeled(folder: Path) -> tuple[str, ...]:
    kinds = [name for name in _folders_in(folder) if name.lower() in _UNLABELED]
    return tuple(sorted(name for kind in kinds for name in _images_below(folder, folder / kind)))


def _images_below(folder: Path, base: Path) -> Iterator[str]:
    """Paths below `folder`, of the images at any depth below `base`; links are followed, but never in circles.

    A link upwards would bring in the images of other classes, so what `base` lies in counts as seen.
    """
    if not base.is_dir():
        return
    seen = {os.path.realpath(above) for above in (*base.parents, *base.resolve().parents)}
    for place, folders, names in os.walk(base, followlinks=True, onerror=_refuse_unreadable):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield Path(place, name).relative_to(folder).as_posix()


def _refuse_unreadable(error: OSError) -> None:
    """A folder that is left out in silence would be a data set of another size."""
    raise ArtifactError(
        f"image folder `{error.filename}` can't be read: {error.strerror or error}", hint="check its permissions"
    ) from error
