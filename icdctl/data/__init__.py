"""Data sets: whole uint8 images in memory, and the views of them that training sees.

`DATASETS` is the one table; `request` says what is wanted of a row, `describe` what is known of it, `load` brings it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icdctl import files
from icdctl.data import cifar100, cub200, digits100, imagefolder, release
from icdctl.data.dataset import UNLABELED, Dataset, Description, OnImages, Preprocessing, Request
from icdctl.data.decode import Decoded, decode_files
from icdctl.data.release import Release
from icdctl.data.split import stratified
from icdctl.data.views import Augmentation, ImageStore, Views
from icdctl.errors import ArtifactError, UsageError, unknown_name

__all__ = [
    "DATASETS",
    "UNLABELED",
    "Augmentation",
    "Dataset",
    "DatasetRow",
    "Description",
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

    description: Description | None
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


def describe(wanted: Request) -> Description:
    """What is known of a data set without reading its images.

    Raises:
        ArtifactError: the folder of an `imagefolder` is not there, or has no classes.
    """
    row = DATASETS[wanted.name.partition(":")[0]]
    return row.description if row.description is not None else _describe_imagefolder(wanted)


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


def _load_digits100(wanted: Request, on_images: OnImages) -> Dataset:
    """From the cache, or made (in about two seconds) and cached."""
    train_images, test_images = int(wanted.train_images or 0), int(wanted.test_images or 0)
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
    return _whole(wanted, tensors, sha256=sha256)


def _read_cache(path: Path, keys: Sequence[str]) -> tuple[tuple[Tensor, ...], str]:
    """The tensors of a cache file and the hash that it states, or nothing where it can't be read."""
    try:
        with safe_open(path, framework="pt") as cache:
            return tuple(cache.get_tensor(key) for key in keys), cache.metadata()["sha256"]
    except (OSError, SafetensorError, KeyError, TypeError):
        return (), ""


def _load_cifar100(wanted: Request, on_images: OnImages) -> Dataset:
    """From the unpacked archive; the sizes are the files' own."""
    folder = wanted.folder
    train_pixels, train_labels, train_published = cifar100.read_split(folder, "train")
    test_pixels, test_labels, test_published = cifar100.read_split(folder, "test")
    caveat = None
    if not (train_published and test_published):
        caveat = f"`{folder / cifar100.FOLDER}` is not the published CIFAR-100 (other md5): results can't be compared"
    tensors = tuple(torch.from_numpy(array) for array in (train_pixels, train_labels, test_pixels, test_labels))
    return _whole(wanted, tensors, sha256=_fingerprint(*tensors), caveat=caveat)


def _load_cub200(wanted: Request, on_images: OnImages) -> Dataset:
    """From the unpacked archive, decoded once: training images whole, for crops; test images cut to their centre."""
    row = DATASETS["cub200"]
    train, test = cub200.read_lists(wanted.folder)
    place = wanted.folder / cub200.FOLDER
    content = None  # the archive's hash, where what is here is what was published
    if row.release is not None and (len(train.names), len(test.names)) == (row.train_images, row.test_images):
        is_right = release.look(row.release, wanted.folder)[0] == "right"
        content = row.release.archive.sha256 if is_right else None
    published = content is not None
    caveat = None if published else f"`{place}` is not the published CUB-200-2011: results can't be compared"
    resized, side = cub200.RESIZED, cub200.SIDE
    decoded = [
        decode_files(
            place / "images",
            split.names,
            resize=(resized, resized),
            crop=crop,
            content_key=content,
            label=label,
            skip_broken=False,
            remedy=cub200.how_to_mend(wanted.folder),
            on_images=on_images,
        )
        for split, crop, label in ((train, None, "cub200-train"), (test, (side, side), "cub200-test"))
    ]
    tensors = (decoded[0].images, train.labels, decoded[1].images, test.labels)
    sha256 = _fingerprint_of([part.sha256 for part in decoded], train.labels, test.labels)
    return _whole(wanted, tensors, sha256=sha256, caveat=caveat)


def _load_imagefolder(wanted: Request, on_images: OnImages) -> Dataset:
    """Divided by the files' names, then decoded part by part, each once."""
    folder = imagefolder.folder_of(wanted.name)
    description = _describe_imagefolder(wanted)
    division = imagefolder.divide(
        folder, test_split=wanted.test_split or 0.0, val_split=wanted.val_split, seed=wanted.split_seed
    )
    side = description.preprocessing.size[0]
    larger = side + 2 * round(side / 14) if wanted.room_to_crop else side  # 224 -> 256, as is the custom

    def decoded(names: Sequence[str], size: int, label: str) -> Decoded:
        return decode_files(
            folder,
            names,
            resize=(size, size),
            crop=None,
            content_key=None,
            label=f"imagefolder-{label}",
            skip_broken=bool(wanted.skip_broken),
            on_images=on_images,
        )

    unlabeled = division.unlabeled if wanted.unlabeled else ()
    train_names = (*division.train.names, *unlabeled)
    train_labels = torch.cat((division.train.labels, torch.full((len(unlabeled),), UNLABELED)))
    train = decoded(train_names, larger, "train")
    test = decoded(division.test.names, side, "test")
    val = None if division.val is None else decoded(division.val.names, side, "val")
    parts = [(train, train_labels), (test, division.test.labels)]
    if val is not None and division.val is not None:
        parts.append((val, division.val.labels))
    labels = [held[part.rows] for part, held in parts]
    _check_all_classes_left(folder, labels[0], description.class_names)
    return Dataset(
        **vars(description),
        train_images=train.images,
        train_labels=labels[0],
        test_images=test.images,
        test_labels=labels[1],
        sha256=_fingerprint_of([part.sha256 for part, _ in parts], *labels),
        val_images=None if val is None else val.images,
        val_labels=None if val is None else labels[2],
        notes=_imagefolder_notes(wanted, division, side),
        skipped_images=sum(len(part.broken) for part, _ in parts),
        caveat=_broken_caveat([part for part, _ in parts]),
    )


def _check_all_classes_left(folder: Path, labels: Tensor, class_names: Sequence[str]) -> None:
    counts = torch.bincount(labels[labels != UNLABELED], minlength=len(class_names)).tolist()
    empty = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    if empty:
        raise ArtifactError(
            f"no training image of class `{empty[0]}` in `{folder}` can be decoded", hint="mend them or add others"
        )


def _imagefolder_notes(wanted: Request, division: imagefolder.Division, side: int) -> tuple[str, ...]:
    notes = [f"images are resized to {side} x {side}: `--image-size`"]
    if not division.has_own_test:
        notes.append(
            f"no `val/` or `test/`: {len(division.test.names)} images, {wanted.test_split:.0%} of each class, are the "
            f"test set (`--test-split`, `--split-seed {wanted.split_seed}`)"
        )
    if division.unlabeled and wanted.unlabeled:
        notes.append(f"images without labels, in the distillation terms alone: {len(division.unlabeled)}")
    elif division.unlabeled:
        notes.append(f"images without labels, left out for there is no teacher: {len(division.unlabeled)}")
    return tuple(notes)


def _broken_caveat(parts: Sequence[Decoded]) -> str | None:
    broken = [image for part in parts for image in part.broken]
    if not broken:
        return None
    shown = "; ".join(f"`{image.path}`: {image.reason}" for image in broken[:3])
    count = "1 image" if len(broken) == 1 else f"{len(broken)} images"
    return f"{count} left out that can't be decoded: {shown}"


def _whole(wanted: Request, tensors: Sequence[Tensor], *, sha256: str, caveat: str | None = None) -> Dataset:
    """A data set that comes in two halves, and what is held out of the first for validation."""
    train_images, train_labels, test_images, test_labels = tensors
    dataset = Dataset(
        **vars(describe(wanted)),
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        sha256=sha256,
        caveat=caveat,
    )
    if not wanted.val_split:
        return dataset
    kept, held = stratified(train_labels, wanted.val_split, seed=wanted.split_seed)
    if not len(held):
        raise ArtifactError(
            f"`{wanted.name}` has one training image a class: none is left for validation",
            hint="leave `--val-split` out, or use more images",
        )
    height, width = dataset.preprocessing.size
    top, left = (round((whole - cut) / 2) for whole, cut in zip(train_images.shape[1:3], (height, width), strict=True))
    return replace(
        dataset,
        train_images=train_images[kept],
        train_labels=train_labels[kept],
        val_images=train_images[held, top : top + height, left : left + width].contiguous(),
        val_labels=train_labels[held],
    )


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()


def _fingerprint_of(hashes: Sequence[str], *labels: Tensor) -> str:
    """The same, where the hashes of the pixels are known already."""
    return hashlib.sha256(" ".join([*hashes, _fingerprint(*labels)]).encode()).hexdigest()


def _describe_imagefolder(wanted: Request) -> Description:
    folder = imagefolder.folder_of(wanted.name)
    side = wanted.image_size or _DEFAULT_IMAGE_SIZE
    return Description(
        name=public_name(wanted.name),
        class_names=imagefolder.class_names(folder),
        preprocessing=Preprocessing((side, side), imagefolder.MEAN, imagefolder.STD),
        source=imagefolder.SOURCE,
        licence=imagefolder.LICENCE,
    )


_DEFAULT_IMAGE_SIZE = 32

_CIFAR100 = Description(
    "cifar100",
    cifar100.CLASS_NAMES,
    Preprocessing((cifar100.SIDE, cifar100.SIDE), cifar100.MEAN, cifar100.STD),
    cifar100.SOURCE,
    cifar100.LICENCE,
)
_CUB200 = Description(
    "cub200",
    cub200.CLASS_NAMES,
    Preprocessing((cub200.SIDE, cub200.SIDE), cub200.MEAN, cub200.STD, (cub200.RESIZED, cub200.RESIZED)),
    cub200.SOURCE,
    cub200.LICENCE,
)
_DIGITS100 = Description(
    "digits100",
    digits100.CLASS_NAMES,
    Preprocessing((digits100.SIDE, digits100.SIDE), digits100.MEAN, digits100.STD),
    digits100.SOURCE,
    digits100.LICENCE,
)

DATASETS: dict[str, DatasetRow] = {
    "cifar100": DatasetRow(_CIFAR100, _load_cifar100, 50_000, 10_000, release=cifar100.RELEASE),
    "cub200": DatasetRow(_CUB200, _load_cub200, cub200.NUM_TRAIN, cub200.NUM_TEST, release=cub200.RELEASE),
    "digits100": DatasetRow(_DIGITS100, _load_digits100, settings={"train_images": 4000, "test_images": 2000}),
    "imagefolder": DatasetRow(
        None,
        _load_imagefolder,
        settings={
            "image_size": _DEFAULT_IMAGE_SIZE,
            "test_split": imagefolder.DEFAULT_TEST_SPLIT,
            "skip_broken": False,
        },
    ),
}
