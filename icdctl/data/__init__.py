"""Data sets: whole uint8 images in memory, and the views of them that training sees.

`DATASETS` is the one table; `request` says what is wanted of a row, `describe` what is known of it, `load` brings it.
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
from icdctl.data.release import Release
from icdctl.data.views import Augmentation, ImageStore, Views
from icdctl.errors import UsageError, unknown_name

__all__ = [
    "DATASETS",
    "UNLABELED",
    "Augmentation",
    "Dataset",
    "DatasetInfo",
    "DatasetRow",
    "ImageStore",
    "OnImages",
    "Preprocessing",
    "Request",
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
    """What is known of it; None for a folder of one's own, which must be looked at."""
    load: Callable[[Request, OnImages], Dataset]
    train_images: int | None = None
    """As published; None where it depends on the request."""
    test_images: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings that it alone has, with their defaults."""
    release: Release | None = None
    """What `icdctl fetch-data` brings; None where there is nothing to bring."""

    @property
    def source(self) -> str:
        """Where the pixels come from."""
        return self.description.source if self.description is not None else imagefolder.SOURCE

    @property
    def licence(self) -> str:
        """What their publisher says on their use."""
        return self.description.licence if self.description is not None else imagefolder.LICENCE


def resolve(name: str) -> str:
    """The name in `DATASETS`, or `imagefolder:` and the folder's absolute path.

    Raises:
        UsageError: no such data set, or no folder is named.
    """
    kind, colon, folder = name.strip().partition(":")
    folded = kind.lower().replace("-", "").replace("_", "")
    if folded not in DATASETS:
        if name and files.user_path(name).is_dir():
            raise UsageError(f"unknown data set `{name}`", hint=f"images of your own go by `imagefolder:{name}`")
        raise unknown_name("data set", name, DATASETS, listing="icdctl list datasets")
    if folded != "imagefolder":
        if colon:
            raise UsageError(
                f"`{folded}` takes no folder: `{name}`", hint=f"`--dataset {folded}`, with `--data-dir DIR`"
            )
        return folded
    if not folder:
        raise UsageError(f"`{name}` names no folder", hint=_DIR_EXAMPLE)
    path = files.user_path(folder)
    # A link keeps its own name, which stands in reports; `..` has none.
    return imagefolder.PREFIX + str(path.resolve() if ".." in path.parts else path.absolute())


def row_of(name: str) -> DatasetRow | None:
    """The row of a name in any form: as typed, as resolved, or as in weights and reports; None for a foreign one."""
    return DATASETS.get(name.partition(":")[0])


def public_name(name: str) -> str:
    """A resolved name as weights and reports say it: where a folder of images lay is nobody's business, and changes."""
    kind, colon, folder = name.partition(":")
    return f"{kind}:{Path(folder).name}" if colon else kind


def check_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that belong to one data set or another, those that are not given at its default.

    Args:
        name: resolved.
        given: of `train_images`, `test_images`, `image_size`, `test_split` and `skip_broken`; None is not given. Text,
            as from a variable of the environment, is read as what it says.

    Returns:
        All of them, as numbers and bools; None where the data set has no such setting.

    Raises:
        UsageError: one that it does not have, or a value out of range.
    """
    row = DATASETS[name.partition(":")[0]]
    every = {key: None for other in DATASETS.values() for key in other.settings}
    chosen = {**every, **row.settings, **{key: value for key, value in given.items() if value is not None}}
    for key, value in chosen.items():
        if value is not None and key not in row.settings:
            owners = [owner for owner, other in DATASETS.items() if key in other.settings]
            raise UsageError(
                f"`--{key.replace('_', '-')}` is given, but `{name}` has no such setting",
                hint="leave it out, in the `train` section of params.yaml too; it is for "
                f"`--dataset {owners[0]}{':DIR' if owners[0] == 'imagefolder' else ''}`",
            )
    checks: dict[str, Callable[[str, Any], Any]] = {
        "train_images": partial(_whole_number, lowest=1, highest=_MOST_IMAGES),
        "test_images": partial(_whole_number, lowest=1, highest=_MOST_IMAGES),
        "image_size": partial(_whole_number, lowest=_SMALLEST_SIDE, highest=_LARGEST_SIDE),
        "test_split": _share,
        "skip_broken": _truth,
    }
    return {key: None if value is None else checks[key](key, value) for key, value in chosen.items()}


def _whole_number(key: str, value: Any, *, lowest: int, highest: int) -> int:
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


def _share(key: str, value: Any) -> float:
    """A share of images to hold out, which must leave some."""
    try:
        share = TypeAdapter(float).validate_python(value)
    except ValidationError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(
            f"`{key}` is {value}, expected a share above 0 and below 1", hint=f"e.g. `--{key.replace('_', '-')} 0.1`"
        )
    return share


def _truth(key: str, value: Any) -> bool:
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
    **settings: Any,
) -> Request:
    """What to ask `describe` and `load` for.

    Args:
        name: as typed.
        folder: what holds the data sets' folders; `ICDCTL_DATA` or the state folder otherwise.
        val_split: see `Request`, like the rest.
        split_seed: see `Request`.
        room_to_crop: see `Request`.
        unlabeled: see `Request`.
        **settings: those of the data set alone, as `check_settings` takes them.

    Raises:
        UsageError: no such data set, or a setting that it does not have.
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
    """What is known of a data set without reading its images.

    Raises:
        ArtifactError: the folder of an `imagefolder` is not there, or has no classes.
    """
    row = DATASETS[wanted.name.partition(":")[0]]
    return row.description if row.description is not None else imagefolder.describe(wanted)


def load(wanted: Request, *, on_images: OnImages = lambda here, total: None) -> Dataset:
    """A data set, whole, on the CPU.

    Args:
        wanted: from `request`.
        on_images: told of the progress of decoding, where images must be decoded.

    Raises:
        ArtifactError: its files are missing or broken; the hint says how to get or mend them.
    """
    return DATASETS[wanted.name.partition(":")[0]].load(wanted, on_images)


def is_there(name: str, folder: Path) -> bool:
    """Whether the files of a published data set are in their place, by their names alone; always, where it has none.

    Args:
        name: resolved.
        folder: what holds the data sets' folders.
    """
    published = DATASETS[name.partition(":")[0]].release
    return published is None or all((folder / published.folder / needed).is_file() for needed in published.needed)


DATASETS: dict[str, DatasetRow] = {
    "cifar100": DatasetRow(cifar100.DESCRIPTION, cifar100.load, 50_000, 10_000, release=cifar100.RELEASE),
    "cub200": DatasetRow(cub200.DESCRIPTION, cub200.load, cub200.NUM_TRAIN, cub200.NUM_TEST, release=cub200.RELEASE),
    "digits100": DatasetRow(
        digits100.DESCRIPTION, digits100.load, settings={"train_images": 4000, "test_images": 2000}
    ),
    "imagefolder": DatasetRow(
        None,
        imagefolder.load,
        settings={
            "image_size": imagefolder.DEFAULT_IMAGE_SIZE,
            "test_split": imagefolder.DEFAULT_TEST_SPLIT,
            "skip_broken": False,
        },
    ),
}
