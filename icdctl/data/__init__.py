"""Data sets: uint8 images in memory, and the cropped and flipped views of them for training.

`DATASETS` is the one table of them. `request` checks what a caller wants, `describe` says what is known without reading
images, `load` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

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
    "check_settings",
    "describe",
    "is_there",
    "load",
    "public_name",
    "request",
    "resolve",
    "row_of",
]

_DIR_EXAMPLE = "e.g. `--dataset imagefolder:photos`"
_MOST_IMAGES = 1_000_000
_SMALLEST_SIDE, _LARGEST_SIDE = 8, 1024


@dataclass(frozen=True)
class DatasetRow:
    """A row of `icdctl list datasets`."""

    description: DatasetInfo | None
    """What is known without its files; None for a folder of images, which must be read first."""
    load: Callable[[Request, OnImages], Dataset]
    train_images: int | None = None
    """The published number; None where it depends on the request."""
    test_images: int | None = None
    settings: Mapping[str, int | float] = field(default_factory=dict)
    """The settings that belong to this data set, with their defaults."""
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


def check_settings(name: str, given: Mapping[str, object]) -> dict[str, Any]:
    """Check the settings that only some data sets have, and fill in the defaults of this one.

    Args:
        name: the resolved name.
        given: values of `train_images`, `test_images`, `image_size`, `test_split` and `skip_broken`; None means not
            given. Text, as from an environment variable, is converted.

    Returns:
        All five settings, as numbers and bools; None for those that this data set does not have.

    Raises:
        UsageError: the data set does not have a given setting, or a value is out of range.
    """
    row = DATASETS[DatasetName.parse(name).kind]
    every = {key: None for other in DATASETS.values() for key in other.settings}
    chosen = {**every, **row.settings, **{key: value for key, value in given.items() if value is not None}}
    for key, value in chosen.items():
        if value is not None and key not in row.settings:
            owners = [owner for owner, other in DATASETS.items() if key in other.settings]
            raise UsageError(
                f"`--{key.replace('_', '-')}` is given, but `{name}` has no such setting",
                hint="leave it out, in the `train` section of params.yaml too; it belongs to "
                f"`--dataset {owners[0]}{':DIR' if owners[0] == IMAGE_FOLDER else ''}`",
            )
    checks: dict[str, Callable[[str, object], int | float]] = {
        "train_images": partial(_whole_number, lowest=1, highest=_MOST_IMAGES),
        "test_images": partial(_whole_number, lowest=1, highest=_MOST_IMAGES),
        "image_size": partial(_whole_number, lowest=_SMALLEST_SIDE, highest=_LARGEST_SIDE),
        "test_split": _share,
        "skip_broken": _truth,
    }
    return {key: None if value is None else checks[key](key, value) for key, value in chosen.items()}


def _whole_number(key: str, value: object, *, lowest: int, highest: int) -> int:
    try:
        number = TypeAdapter(int).validate_python(value)
    except ValidationError:
        number = lowest - 1
    if isinstance(value, bool) or not lowest <= number <= highest:
        raise UsageError(
            f"`{key}` is {value}, expected a whole number from {lowest} to {highest:,}",
            hint=f"e.g. `--{key.replace('_', '-')} {max(lowest, 32)}`",
        )
    return number


def _share(key: str, value: object) -> float:
    """A share of images to hold out: above 0 and below 1, so that both sides have some."""
    try:
        share = TypeAdapter(float).validate_python(value)
    except ValidationError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(
            f"`{key}` is {value}, expected a share above 0 and below 1", hint=f"e.g. `--{key.replace('_', '-')} 0.1`"
        )
    return share


def _truth(key: str, value: object) -> bool:
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError as error:
        raise UsageError(f"`{key}` is {value}, expected true or false", hint=f"e.g. `{key}=true`") from error


def request(
    name: str,
    *,
    folder: Path | None = None,
    val_split: float = 0.0,
    split_seed: int = 0,
    room_to_crop: bool = False,
    unlabeled: bool = False,
    **settings: object,
) -> Request:
    """Check what is wanted of a data set; `describe` and `load` take the result.

    Args:
        name: the data set's name, as typed.
        folder: holds the folders of published data sets; by default `ICDCTL_DATA`, else `data` in the state folder.
        val_split: see `Request`.
        split_seed: see `Request`.
        room_to_crop: see `Request`.
        unlabeled: see `Request`.
        **settings: the settings that only some data sets have, see `check_settings`.

    Raises:
        UsageError: no data set has this name, the data set does not have a given setting, or a value is out of range.
    """
    resolved = resolve(name)
    return Request(
        name=resolved,
        folder=folder or files.data_folder(),
        val_split=_share("val_split", val_split) if val_split else 0.0,
        split_seed=split_seed,
        room_to_crop=room_to_crop,
        unlabeled=unlabeled,
        **check_settings(resolved, settings),
    )


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
        wanted: from `request`.
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
    "digits100": DatasetRow(
        digits100.DESCRIPTION, digits100.load, settings={"train_images": 4000, "test_images": 2000}
    ),
    IMAGE_FOLDER: DatasetRow(
        None,
        imagefolder.load,
        settings={
            "image_size": imagefolder.DEFAULT_IMAGE_SIZE,
            "test_split": imagefolder.DEFAULT_TEST_SPLIT,
            "skip_broken": False,
        },
    ),
}
