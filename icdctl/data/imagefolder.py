"""A folder of the user's own images: one folder per class, images of any size and format.

DIR/train/<class>/...   and DIR/val/<class>/..., which is the test set;
                        with DIR/test/ as well, DIR/val/ is for validation
DIR/<class>/...         without train/: a share of each class becomes the test set
DIR/unlabeled/...       images without a label, for distillation
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icdctl.data.assemble import fingerprint_of
from icdctl.data.dataset import UNLABELED, Dataset, DatasetInfo, OnImages, Preprocessing, Request
from icdctl.data.decode import SUFFIXES, images_below
from icdctl.data.image_cache import Decoded, decode_files
from icdctl.data.names import IMAGE_FOLDER, DatasetName
from icdctl.data.split import stratified
from icdctl.errors import ArtifactError

PREFIX = f"{IMAGE_FOLDER}:"
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's numbers: known before any image is read, and what pretrained models expect."""
SOURCE = "a folder of the user's own images"
LICENCE = "not known to icdctl"
_TRAIN, _TEST = "train", "test"
_VAL = ("val", "valid", "validation")
_UNLABELED = ("unlabeled", "unlabelled")
_PARTS = frozenset({_TRAIN, _TEST, *_VAL, "training", "testing"})
"""Names of folders that are never classes, in capitals or not: a model that tells `Train` from `Val` is a mistake."""


@dataclass(frozen=True)
class Part:
    """The images for training, for validation or for testing."""

    names: tuple[str, ...]
    """N paths relative to DIR, in POSIX form."""
    labels: Tensor
    """[N] int64."""

    def __getitem__(self, rows: Tensor) -> Part:
        return Part(tuple(self.names[row] for row in rows.tolist()), self.labels[rows])


@dataclass(frozen=True)
class Division:
    """Which images are for training, testing and validation."""

    train: Part
    test: Part
    val: Part | None
    unlabeled: tuple[str, ...]
    has_own_test: bool
    """False where the test images were split off the training images."""


def folder_of(name: str) -> Path:
    """DIR of `imagefolder:DIR`."""
    return Path(DatasetName.parse(name).folder or "")


def side_of(wanted: Request) -> int:
    """Side of the square that images are resized to."""
    assert wanted.image_size is not None, "every request for a folder of images states their size"
    return wanted.image_size


def describe(wanted: Request) -> DatasetInfo:
    """What is known of the folder without opening an image.

    Raises:
        ArtifactError: the folder does not exist, or has no classes.
    """
    folder = folder_of(wanted.name)
    side = side_of(wanted)
    return DatasetInfo(
        name=PREFIX + folder.name,
        class_names=class_names(folder),
        preprocessing=Preprocessing((side, side), MEAN, STD),
        source=SOURCE,
        licence=LICENCE,
    )


def load(wanted: Request, on_images: OnImages) -> Dataset:
    """Divide the images by their files' names, then decode each part once.

    Raises:
        ArtifactError: the folder or its images can't be used.
    """
    folder = folder_of(wanted.name)
    description = describe(wanted)
    division = divide(folder, test_split=wanted.test_split or 0.0, val_split=wanted.val_split, seed=wanted.split_seed)
    side = description.preprocessing.size[0]
    larger = side + 2 * round(side / 14) if wanted.room_to_crop else side  # 224 -> 256, as is usual for ImageNet

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
        sha256=fingerprint_of([part.sha256 for part, _ in parts], *labels),
        val_images=None if val is None else val.images,
        val_labels=None if val is None else labels[2],
        notes=_notes(wanted, division, side, num_classes=description.num_classes),
        skipped_images=sum(len(part.broken) for part, _ in parts),
        caveat=_broken_caveat([part for part, _ in parts]),
    )


def _check_all_classes_left(folder: Path, labels: Tensor, class_names: Sequence[str]) -> None:
    counts = torch.bincount(labels[labels != UNLABELED], minlength=len(class_names)).tolist()
    empty = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    if empty:
        raise ArtifactError(
            f"no training image of class `{empty[0]}` in `{folder}` can be decoded", hint="fix them or add others"
        )


def _notes(wanted: Request, division: Division, side: int, *, num_classes: int) -> tuple[str, ...]:
    parts = {"training": division.train, "validation": division.val, "testing": division.test}
    counts = [f"{len(part.names):,} images for {use}" for use, part in parts.items() if part is not None]
    notes = [f"{num_classes} classes, {', '.join(counts)}", f"images are resized to {side} x {side}: `--image-size`"]
    if not division.has_own_test:
        notes.append(
            f"no `val/` or `test/`: {len(division.test.names)} images, {wanted.test_split:.0%} of each class, are the "
            f"test set (`--test-split`, `--split-seed {wanted.split_seed}`)"
        )
    if division.unlabeled and wanted.unlabeled:
        notes.append(f"images without labels, in the distillation terms alone: {len(division.unlabeled)}")
    elif division.unlabeled:
        notes.append(f"images without labels, left out because there is no teacher: {len(division.unlabeled)}")
    return tuple(notes)


def _broken_caveat(parts: Sequence[Decoded]) -> str | None:
    broken = [image for part in parts for image in part.broken]
    if not broken:
        return None
    shown = "; ".join(f"`{image.path}`: {image.reason}" for image in broken[:3])
    count = "1 image" if len(broken) == 1 else f"{len(broken)} images"
    return f"{count} left out that can't be decoded: {shown}"


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the classes, sorted: those of the folders of training images.

    Raises:
        ArtifactError: the folder does not exist, has fewer than two classes, or a class name can't be printed.
    """
    base = folder / _TRAIN if (folder / _TRAIN).is_dir() else folder
    found = _folders_in(base)
    if base == folder:
        found = [name for name in found if name.lower() not in _UNLABELED]
        misplaced = [name for name in found if name.lower() in _PARTS]
        if misplaced:
            raise ArtifactError(
                f"`{folder}` has a folder `{misplaced[0]}` but no folder `{_TRAIN}`",
                hint=f"put the training images into `{_TRAIN}/`, with one folder per class",
            )
    if len(found) < 2:
        raise ArtifactError(
            f"`{base}` has {len(found)} folders of images, a classifier needs 2 classes or more",
            hint="put the images of each class into a separate folder with the name of the class",
        )
    unreadable = [name for name in found if not name.isprintable()]
    if unreadable:
        raise ArtifactError(
            f"`{base}` has a class whose name can't be printed: {unreadable[0]!a}", hint="rename its folder"
        )
    return tuple(found)


def _folders_in(base: Path) -> list[str]:
    """The names of the folders in `base`, sorted, without hidden ones."""
    try:
        return sorted(path.name for path in base.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise ArtifactError(
            f"image folder `{base}` can't be read: {error.strerror or error}",
            hint="name a folder with `train/` and `val/`, or with one folder per class: `--dataset imagefolder:DIR`",
        ) from error


def divide(folder: Path, *, test_split: float, val_split: float, seed: int) -> Division:
    """Decide which images are for training, validation and testing. No image is opened.

    Args:
        folder: DIR.
        test_split: share of each class for testing, where DIR has no `val/` or `test/`.
        val_split: share of each class's training images for validation; 0 for none.
        seed: seed of both splits.

    Raises:
        ArtifactError: the folder or a class has no images, or validation or test images have classes that the training
            images do not have.
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
                hint=f"fill it, or remove it: {test_split:.0%} of each class then become the test set",
            )
    else:
        kept, held = stratified(train.labels, test_split, seed=seed, names=train.names)
        train, test = train[kept], train[held]
        if not test.names:
            raise ArtifactError(
                f"`{folder}` has one image per class: none is left for testing",
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
            hint="use the same class folders everywhere",
        )
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_paths_below(folder, base / name))
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
    return tuple(sorted(name for kind in kinds for name in _paths_below(folder, folder / kind)))


def _paths_below(folder: Path, base: Path) -> Iterator[str]:
    """The images at any depth below `base`, as POSIX paths relative to `folder`."""
    return (path.relative_to(folder).as_posix() for path in images_below(base))
