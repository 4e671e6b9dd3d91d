"""The layout of a folder of images: its classes, and which images are for training, validation and testing.

Everything is decided by the names of folders and files; no image is opened.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icdctl.data.folder_scan import (
    LeftOut,
    account_for_file,
    account_for_folder,
    images_below,
    is_dangling,
    is_image,
    passed_over,
)
from icdctl.data.image_formats import SUFFIXES
from icdctl.data.split import stratified
from icdctl.errors import ArtifactError

_TRAIN, _VAL, _TEST = "train", "val", "test"
_SPELLINGS: dict[str, tuple[str, ...]] = {
    _TRAIN: ("train", "training"),
    _VAL: ("val", "valid", "validation", "dev"),
    _TEST: ("test", "testing", "eval", "evaluation"),
}
"""Part -> the names that its folder may have, in capitals or not."""
_UNLABELED = ("unlabeled", "unlabelled")
"""The names of the folder of images without labels, in capitals or not."""
_NEVER_CLASSES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
"""Names of folders that are not classes where there is no `train/`: a model that tells Train from Val is a mistake."""
_JOINERS = "\u200c\u200d"
"""Zero-width joiners, which the scripts of many languages need, and emoji."""


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
    own_test: str | None
    """The folder of the test images; None where they were split off the training images."""
    own_val: str | None
    """The folder of the validation images; None where they were split off too, or there are none."""
    left_out: LeftOut
    """The files of DIR that are not read."""

    @property
    def has_own_test(self) -> bool:
        """Whether the test images have a folder, and were not split off the training images."""
        return self.own_test is not None


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the classes, sorted: those of the folders of training images, in Unicode's form NFC.

    Raises:
        ArtifactError: the folder does not exist, has fewer than two classes, or a class name can't be printed.
    """
    return _classes_in(folder, _training_base(folder, _parts(folder)))


def _parts(folder: Path) -> dict[str, Path]:
    """Part -> its folder, for the parts that DIR has; empty where it has no `train/`.

    Raises:
        ArtifactError: DIR can't be read, or has two folders for one part.
    """
    found: dict[str, Path] = {}
    for path in _folders_in(folder):
        part = next((part for part, names in _SPELLINGS.items() if path.name.lower() in names), None)
        if part is None:
            continue
        if part in found:
            raise ArtifactError(
                f"`{folder}` has both `{found[part].name}/` and `{path.name}/`", hint="put the images into one of them"
            )
        found[part] = path
    return found if _TRAIN in found else {}


def _unlabeled_in(folder: Path) -> list[Path]:
    return [path for path in _folders_in(folder) if path.name.lower() in _UNLABELED]


def _training_base(folder: Path, parts: Mapping[str, Path]) -> Path:
    """The folder that holds the classes of training images: `train/`, or DIR itself.

    Raises:
        ArtifactError: DIR has folders for other parts, but none for training.
    """
    if _TRAIN in parts:
        return parts[_TRAIN]
    names = [path.name for path in _folders_in(folder) if path.name.lower() not in _UNLABELED]
    misplaced = [name for name in names if name.lower() in _NEVER_CLASSES]
    every_part = {spelling for spellings in _SPELLINGS.values() for spelling in spellings}
    if names and not misplaced and all(name.lower() in every_part for name in names):
        misplaced = names
    if misplaced:
        raise ArtifactError(
            f"`{folder}` has a folder `{misplaced[0]}` but no folder `{_TRAIN}`",
            hint=f"put the training images into `{_TRAIN}/`, with one folder per class",
        )
    return folder


def _classes_in(folder: Path, base: Path) -> tuple[str, ...]:
    """The names of the classes in `base`, sorted; errors as for `class_names`."""
    found = tuple(_by_class(folder, base))
    if len(found) < 2:
        raise ArtifactError(
            f"`{base}` has {len(found)} folders of images, a classifier needs 2 classes or more",
            hint="put the images of each class into a separate folder with the name of the class",
        )
    unreadable = [name for name in found if not is_printable(name)]
    if unreadable:
        raise ArtifactError(
            f"`{base}` has a class whose name can't be printed: {unreadable[0]!a}", hint="rename its folder"
        )
    return found


def _by_class(folder: Path, base: Path) -> dict[str, Path]:
    """Class name in NFC -> its folder in `base`, sorted: one file system stores `é` as one character, another as two.

    Raises:
        ArtifactError: two folders have the same name in different forms.
    """
    found: dict[str, Path] = {}
    for path in _folders_in(base):
        if base == folder and path.name.lower() in _UNLABELED:
            continue
        name = unicodedata.normalize("NFC", path.name)
        if name in found:
            raise ArtifactError(
                f"`{base}` has two folders named `{name}`, whose letters are encoded differently: "
                f"{found[name].name!a} and {path.name!a}",
                hint="put their images into one of them",
            )
        found[name] = path
    return dict(sorted(found.items()))


def is_printable(name: str) -> bool:
    """Whether a class name can be shown. A zero-width joiner may follow a letter, mark or symbol beyond ASCII."""
    before = ""
    for char in name:
        joins = char in _JOINERS and before > "\x7f" and unicodedata.category(before)[0] in "LMS"
        if not (char.isprintable() or joins):
            return False
        before = char
    return True


def _folders_in(base: Path) -> list[Path]:
    """The folders in `base`, sorted by name, without those that are passed over.

    Raises:
        ArtifactError: `base` can't be read, or holds a link to a folder that is gone: a class may be missing.
    """
    try:
        found = sorted(base.iterdir())
        gone = [path for path in found if is_dangling(path)]
        folders = [path for path in found if path.is_dir() and not passed_over(path.name)]
    except OSError as error:
        raise ArtifactError(
            f"image folder `{base}` can't be read: {error.strerror or error}",
            hint="name a folder with `train/` and `val/`, or with one folder per class: `--dataset imagefolder:DIR`",
        ) from error
    lost = [path for path in gone if not path.suffix and not passed_over(path.name)]
    if lost:
        raise ArtifactError(
            f"`{lost[0]}` is a link whose target does not exist, so a folder of images may be missing",
            hint="restore the target, e.g. mount its disk, or delete the link",
        )
    return folders


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
    parts, left_out = _parts(folder), LeftOut()
    base = _training_base(folder, parts)
    classes = _classes_in(folder, base)
    train = _part(folder, base, classes, left_out)
    _check_filled(folder, train, classes, left_out)
    own_val, own_test = parts.get(_VAL), parts.get(_TEST)
    if own_test is None:
        own_test, own_val = own_val, None
    if own_test is not None:
        test = _part(folder, own_test, classes, left_out)
        if not test.names:
            raise _no_images(own_test, f"{test_split:.0%} of each class then become the test set")
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
        val = _part(folder, own_val, classes, left_out)
        if not val.names:
            raise _no_images(own_val, "no images are then held out for validation")
    elif val_split:
        kept, held = stratified(train.labels, val_split, seed=seed, names=train.names)
        train, val = train[kept], train[held]
        if not val.names:
            raise ArtifactError(
                f"`{folder}` has no image for validation", hint="leave `--val-split` out, or add images"
            )
    unlabeled = sorted(name for path in _unlabeled_in(folder) for name in _names_below(folder, path, left_out))
    _account_for_rest(folder, parts, left_out)
    return Division(train, test, val, tuple(unlabeled), _name_of(own_test), _name_of(own_val), left_out)


def _name_of(part: Path | None) -> str | None:
    return None if part is None else part.name


def _no_images(part: Path, otherwise: str) -> ArtifactError:
    """The error for a folder of validation or test images without an image in a class's folder."""
    loose = sum(path.is_file() and is_image(path.name) for path in part.iterdir())
    if loose:
        return ArtifactError(
            f"`{part}` holds {loose} images, but none of them is in the folder of a class",
            hint=f"sort them into `{part.name}/<class>/`, or move the folder away: {otherwise}",
        )
    return ArtifactError(f"`{part}` holds no images", hint=f"fill it, or remove it: {otherwise}")


def _part(folder: Path, base: Path, classes: Sequence[str], left_out: LeftOut) -> Part:
    """All images below the classes' folders of `base`."""
    found = _by_class(folder, base)
    others = sorted(found.keys() - set(classes))
    if others:
        raise ArtifactError(
            f"`{base}` has classes that the training images do not have: {', '.join(others[:5])}",
            hint="use the same class folders everywhere",
        )
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = _names_below(folder, found[name], left_out) if name in found else []
        names += inside
        labels += [label] * len(inside)
    _account_for_files(folder, base, left_out)
    return Part(tuple(names), torch.tensor(labels, dtype=torch.int64))


def _names_below(folder: Path, base: Path, left_out: LeftOut) -> list[str]:
    """The images at any depth below `base`, sorted, as POSIX paths relative to `folder`."""
    return sorted(path.relative_to(folder).as_posix() for path in images_below(base, left_out, relative_to=folder))


def _account_for_files(folder: Path, base: Path, left_out: LeftOut) -> None:
    """Count what lies in `base` beside the folders of the classes."""
    for path in sorted(base.iterdir()):
        if path.is_dir() and passed_over(path.name):
            account_for_folder(left_out, path, folder)
        elif not path.is_dir() and is_image(path.name):
            left_out.add("images in no class's folder", path.relative_to(folder), may_be_image=True)
        elif not path.is_dir():
            account_for_file(left_out, path, folder)


def _account_for_rest(folder: Path, parts: Mapping[str, Path], left_out: LeftOut) -> None:
    """Count what lies in DIR beside `train/`, `val/`, `test/` and `unlabeled/`."""
    if _TRAIN not in parts:
        return
    _account_for_files(folder, folder, left_out)
    for path in _folders_in(folder):
        if path not in parts.values() and path.name.lower() not in _UNLABELED:
            reason = f"below `{path.name}/`, which is no folder of a part"
            left_out.add_below(reason, path, folder, may_be_image=True)


def _check_filled(folder: Path, train: Part, classes: Sequence[str], left_out: LeftOut) -> None:
    counts = Counter(train.labels.tolist())
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if empty:
        shown = ", ".join(f"`{name}`" for name in empty[:5])
        raise ArtifactError(
            f"{len(empty)} of {len(classes)} classes in `{folder}` have no training images: {shown}"
            + (f"; files that are not read: {left_out}" if left_out.count else ""),
            hint=f"remove these folders, or fill them; images end in {' '.join(sorted(SUFFIXES))}",
        )
