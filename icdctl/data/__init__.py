"""Data sets: uint8 images in memory, and the cropped and flipped views of them for training.

`DATASETS` is the one table of them. `describe` says what is known of a `Request` without reading images, `load` reads
them; `icdctl.config.dataset_request` checks what the user wants and makes the request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from icdctl import files
from icdctl.data import cifar100, cub200, digits100, imagefolder
from icdctl.data.dataset import UNLABELED, Dataset, DatasetInfo, OnImages, Preprocessing, Request
from icdctl.data.names import IMAGE_FOLDER, DatasetName
from icdctl.data.release import Release
from icdctl.data.split_record import SplitRecord
from icdctl.data.views import Augmentation, ImageStore, Views
from icdctl.errors import UsageError, unknown_name

__all__ = [
    "DATASETS",
    "IMAGE_FOLDER",
    "UNLABELED",
    "Augmentation",
    "Dataset",
    "DatasetInfo",
    "DatasetName",
    "DatasetRow",
    "ImageStore",
    "OnImages",
    "Preprocessing",
    "Request",
    "SplitRecord",
    "Views",
    "describe",
    "is_there",
    "load",
    "public_name",
    "resolve",
    "row_of",
]

_DIR_EXAMPLE = "e.g. `--dataset imagefolder:photos`"


@dataclass(frozen=True)
class DatasetRow:
    """A row of `icdctl list datasets`."""

    description: DatasetInfo | None
    """What is known without its files; None for a folder of images, which must be read first."""
    load: Callable[[Request, OnImages], Dataset]
    train_images: int | None = None
    """The published number; None where it depends on the request."""
    test_images: int | None = None
    release: Release | None = None
    """What `icdctl fetch-data` downloads; None where there is nothing to download."""

    @property
    def source(self) -> str:
        """Where the pixels come from."""
        return self.description.source if self.description is not None else imagefolder.SOURCE

    @property
    def licence(self) -> str:
        """What the publisher says about their use."""
        return self.description.licence if self.description is not None else imagefolder.LICENCE


def resolve(name: str) -> str:
    """The name in `DATASETS`, or `imagefolder:` and the folder's absolute path.

    Raises:
        UsageError: no data set has this name, or no folder is named.
    """
    typed = DatasetName.parse(name.strip())
    folded = typed.kind.lower().replace("-", "").replace("_", "")
    if folded not in DATASETS:
        if name and files.user_path(name).is_dir():
            raise UsageError(f"unknown data set `{name}`", hint=f"for your own images, write `imagefolder:{name}`")
        raise unknown_name("data set", name, DATASETS, listing="icdctl list datasets")
    if folded != IMAGE_FOLDER:
        if typed.folder is not None:
            raise UsageError(
                f"`{folded}` takes no folder: `{name}`", hint=f"pass `--dataset {folded}`, with `--data-dir DIR`"
            )
        return folded
    if not typed.folder:
        raise UsageError(f"`{name}` names no folder", hint=_DIR_EXAMPLE)
    path = files.user_path(typed.folder)
    # A link keeps its own name, which reports show; `..` has no name and is resolved.
    return str(DatasetName(folded, str(path.resolve() if ".." in path.parts else path.absolute())))


def row_of(name: str) -> DatasetRow | None:
    """The row for a name as typed, as resolved, or as in weights and reports; None where icdctl does not know it."""
    return DATASETS.get(DatasetName.parse(name).kind)


def public_name(name: str) -> str:
    """A resolved name as weights and reports show it: a folder of images without its path, which is private."""
    return str(DatasetName.parse(name).public)


def describe(wanted: Request) -> DatasetInfo:
    """What is known of a data set without reading its images: classes, preprocessing, source and licence.

    Raises:
        ArtifactError: the folder of an `imagefolder` does not exist, or has no classes.
    """
    row = DATASETS[DatasetName.parse(wanted.name).kind]
    return row.description if row.description is not None else imagefolder.describe(wanted)


def load(wanted: Request, *, on_images: OnImages = lambda here, total: None) -> Dataset:
    """Read a whole data set into memory on the CPU.

    Args:
        wanted: from `icdctl.config.dataset_request`.
        on_images: called with the progress while images are decoded.

    Raises:
        ArtifactError: its files are missing or broken; the hint says how to get or fix them.
    """
    return DATASETS[DatasetName.parse(wanted.name).kind].load(wanted, on_images)


def is_there(name: str, folder: Path) -> bool:
    """Whether the files of a published data set exist; their content is not read. True for data sets without files.

    Args:
        name: the resolved name.
        folder: the folder that holds the published data sets.
    """
    published = DATASETS[DatasetName.parse(name).kind].release
    return published is None or all((folder / published.folder / needed).is_file() for needed in published.needed)


DATASETS: dict[str, DatasetRow] = {
    "cifar100": DatasetRow(cifar100.DESCRIPTION, cifar100.load, 50_000, 10_000, release=cifar100.RELEASE),
    "cub200": DatasetRow(cub200.DESCRIPTION, cub200.load, cub200.NUM_TRAIN, cub200.NUM_TEST, release=cub200.RELEASE),
    "digits100": DatasetRow(digits100.DESCRIPTION, digits100.load),
    IMAGE_FOLDER: DatasetRow(None, imagefolder.load),
}
