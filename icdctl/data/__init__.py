"""Data sets: whole uint8 images in memory, and the views of them that training sees.

`DATASETS` is the one table; `load` gives a `Dataset`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icdctl import files
from icdctl.data import cifar100, digits100
from icdctl.data.dataset import Dataset, Preprocessing
from icdctl.data.release import Release
from icdctl.data.views import ImageStore, Views, epoch_views, plain_views
from icdctl.errors import UsageError, unknown_name

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetRow",
    "ImageStore",
    "Preprocessing",
    "Views",
    "epoch_views",
    "load",
    "plain_views",
    "resolve",
]

DEFAULT_TRAIN_IMAGES = 4000
DEFAULT_TEST_IMAGES = 2000


@dataclass(frozen=True)
class DatasetRow:
    """A row of `icdctl list datasets`."""

    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    train_images: int
    """As published; `digits100` makes as many as asked for."""
    test_images: int
    embedded: bool
    """Made on this machine, without a download."""
    source: str
    licence: str
    load: Callable[[Path, int, int], Dataset]
    """(folder of data sets, training images, test images) -> the data set."""
    release: Release | None = None
    """What `icdctl fetch-data` brings; None where there is nothing to bring."""


def resolve(name: str) -> str:
    """The name in `DATASETS`.

    Raises:
        UsageError: no such data set.
    """
    folded = name.strip().lower().replace("-", "")
    if folded not in DATASETS:
        raise unknown_name("data set", name, DATASETS, listing="icdctl list datasets")
    return folded


def load(
    name: str,
    *,
    folder: Path | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
) -> Dataset:
    """A data set, whole, on the CPU.

    Args:
        name: in `DATASETS`.
        folder: what holds the data sets' folders; `ICDCTL_DATA` or the state folder otherwise.
        train_images: how many training images to make; for `digits100` alone.
        test_images: likewise, for testing.

    Raises:
        UsageError: no such data set, or a size for one whose size is fixed.
        ArtifactError: its files are missing or broken; the hint says how to get them.
    """
    row = DATASETS[resolve(name)]
    if not row.embedded and (train_images is not None or test_images is not None):
        raise UsageError(
            f"`{name}` has a fixed size, {row.train_images} training and {row.test_images} test images",
            hint="leave `--train-images` out; it is for `--dataset digits100`",
        )
    chosen_train = row.train_images if train_images is None else train_images
    chosen_test = row.test_images if test_images is None else test_images
    if chosen_train < 1 or chosen_test < 1:
        raise UsageError(f"{chosen_train} training and {chosen_test} test images", hint="ask for at least 1 of each")
    return row.load(folder or files.data_folder(), chosen_train, chosen_test)


def _load_digits100(folder: Path, train_images: int, test_images: int) -> Dataset:
    """From the cache, or made (in about two seconds) and cached; `folder` is not read."""
    name = f"digits100-v{digits100.RECIPE_VERSION}-{train_images}-{test_images}.safetensors"
    path = files.state_folder() / "cache" / name
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    tensors, sha256 = _read_cache(path, keys)
    if not tensors or _fingerprint(*tensors) != sha256:  # absent or damaged: made anew
        train = digits100.make_split(train_images, seed=1, test=False)
        test = digits100.make_split(test_images, seed=2, test=True)
        arrays = (train.images, train.labels, test.images, test.labels)
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        sha256 = _fingerprint(*tensors)
        files.write_bytes(path, save(dict(zip(keys, tensors, strict=True)), metadata={"sha256": sha256}))
    return _dataset("digits100", tensors, sha256=sha256)


def _read_cache(path: Path, keys: Sequence[str]) -> tuple[tuple[Tensor, ...], str]:
    """The tensors of a cache file and the hash that it states, or nothing where it can't be read."""
    try:
        with safe_open(path, framework="pt") as cache:
            return tuple(cache.get_tensor(key) for key in keys), cache.metadata()["sha256"]
    except (OSError, SafetensorError, KeyError, TypeError):
        return (), ""


def _load_cifar100(folder: Path, train_images: int, test_images: int) -> Dataset:
    """From the unpacked archive; the sizes are the files' own."""
    train_pixels, train_labels, train_published = cifar100.read_split(folder, "train")
    test_pixels, test_labels, test_published = cifar100.read_split(folder, "test")
    caveat = None
    if not (train_published and test_published):
        caveat = f"`{folder / cifar100.FOLDER}` is not the published CIFAR-100 (other md5): results can't be compared"
    tensors = tuple(torch.from_numpy(array) for array in (train_pixels, train_labels, test_pixels, test_labels))
    return _dataset("cifar100", tensors, sha256=_fingerprint(*tensors), caveat=caveat)


def _dataset(name: str, tensors: Sequence[Tensor], *, sha256: str, caveat: str | None = None) -> Dataset:
    """The record of a row of `DATASETS` with its images and labels."""
    row = DATASETS[name]
    train_images, train_labels, test_images, test_labels = tensors
    return Dataset(
        name=name,
        class_names=row.class_names,
        preprocessing=row.preprocessing,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        source=row.source,
        licence=row.licence,
        sha256=sha256,
        caveat=caveat,
    )


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()


DATASETS: dict[str, DatasetRow] = {
    "cifar100": DatasetRow(
        cifar100.CLASS_NAMES,
        Preprocessing((cifar100.SIDE, cifar100.SIDE), cifar100.MEAN, cifar100.STD),
        50_000,
        10_000,
        False,
        cifar100.SOURCE,
        cifar100.LICENCE,
        _load_cifar100,
        cifar100.RELEASE,
    ),
    "digits100": DatasetRow(
        digits100.CLASS_NAMES,
        Preprocessing((digits100.SIDE, digits100.SIDE), digits100.MEAN, digits100.STD),
        DEFAULT_TRAIN_IMAGES,
        DEFAULT_TEST_IMAGES,
        True,
        digits100.SOURCE,
        digits100.LICENCE,
        _load_digits100,
    ),
}
