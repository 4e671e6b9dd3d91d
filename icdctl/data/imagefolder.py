"""A folder of the user's own images: one folder per class, images of any size and format.

DIR/train/<class>/...   and DIR/val/<class>/..., which is the test set;
                        with DIR/test/ as well, DIR/val/ is for validation
DIR/<class>/...         without train/: a share of each class becomes the test set
DIR/unlabeled/...       images without a label, for distillation
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from icdctl.data.assemble import fingerprint_of
from icdctl.data.dataset import UNLABELED, Dataset, DatasetInfo, OnImages, Preprocessing, Request
from icdctl.data.folder_layout import Division, class_names, divide
from icdctl.data.image_cache import Decoded, decode_files
from icdctl.data.names import IMAGE_FOLDER, DatasetName
from icdctl.data.part_files import PartFiles, duplicates, nearly_black
from icdctl.data.split_record import SplitRecord, part_records
from icdctl.errors import ArtifactError

__all__ = ["class_names", "describe", "divide", "folder_of", "load", "side_of"]

PREFIX = f"{IMAGE_FOLDER}:"
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's numbers: known before any image is read, and what pretrained models expect."""
SOURCE = "a folder of the user's own images"
LICENCE = "not known to icdctl"
_USES = ("training", "testing", "validation")


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
    parts = [(train, train_labels, train_names), (test, division.test.labels, division.test.names)]
    if val is not None and division.val is not None:
        parts.append((val, division.val.labels, division.val.names))
    labels = [held[part.rows] for part, held, _ in parts]
    names = [tuple(listed[row] for row in part.rows.tolist()) for part, _, listed in parts]
    _check_all_classes_left(folder, labels[0], description.class_names)
    of_parts = _files_of_parts([part for part, *_ in parts], names, labels, description.class_names)
    dark = nearly_black([(listed, part.images) for listed, (part, *_) in zip(names, parts, strict=True)])
    return Dataset(
        **vars(description),
        train_images=train.images,
        train_labels=labels[0],
        test_images=test.images,
        test_labels=labels[1],
        sha256=fingerprint_of([part.sha256 for part, *_ in parts], *labels),
        val_images=None if val is None else val.images,
        val_labels=None if val is None else labels[2],
        notes=_notes(wanted, division, side, num_classes=description.num_classes),
        warnings=(*duplicates(of_parts), *(() if dark is None else (dark,))),
        skipped_images=sum(len(part.broken) for part, *_ in parts),
        caveat=_broken_caveat([part for part, *_ in parts]),
        split=SplitRecord(
            wanted.val_split,
            wanted.split_seed,
            None if division.has_own_test else wanted.test_split,
            part_records(of_parts),
        ),
        parts=of_parts,
    )


def _files_of_parts(
    decoded: Sequence[Decoded], names: Sequence[Sequence[str]], labels: Sequence[Tensor], class_names: Sequence[str]
) -> tuple[PartFiles, ...]:
    """The image files of each part: training, testing and perhaps validation; unlabelled training images apart."""
    found = []
    for use, part, listed, held in zip(_USES, decoded, names, labels, strict=False):
        hashes = part.file_hashes or ()
        count = int((held != UNLABELED).sum())  # labelled images come first
        classes = tuple(class_names[label] for label in held[:count].tolist())
        found.append(PartFiles(use, tuple(listed[:count]), classes, hashes[:count]))
        if count < len(listed):
            found.append(PartFiles("unlabelled", tuple(listed[count:]), (), hashes[count:]))
    return tuple(found)


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
    for own, usual, use in ((division.own_test, ("val", "test"), "test"), (division.own_val, ("val",), "validation")):
        if own is not None and own not in usual:
            notes.append(f"the {use} images are those of `{own}/`")
    if not division.has_own_test:
        notes.append(
            f"no `val/` or `test/`: {len(division.test.names)} images, {wanted.test_split:.0%} of each class, are the "
            f"test set (`--test-split`, `--split-seed {wanted.split_seed}`)"
        )
    if division.unlabeled and wanted.unlabeled:
        notes.append(f"images without labels, in the distillation terms alone: {len(division.unlabeled)}")
    elif division.unlabeled:
        notes.append(f"images without labels, left out because there is no teacher: {len(division.unlabeled)}")
    not_read = division.left_out.as_note()
    return (*notes, *([not_read] if not_read is not None else []))


def _broken_caveat(parts: Sequence[Decoded]) -> str | None:
    broken = [image for part in parts for image in part.broken]
    if not broken:
        return None
    shown = "; ".join(f"`{image.path}`: {image.reason}" for image in broken[:3])
    count = "1 image" if len(broken) == 1 else f"{len(broken)} images"
    return f"{count} left out that can't be decoded: {shown}"
