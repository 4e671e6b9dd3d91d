"""The image files of each part of a folder, and what is wrong with them taken together.

A file's hash finds the same image twice; its pixels show that it is nearly black.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DARK = 15
"""The highest byte of a value of 12 bits that is stored in 16."""
_CHUNK = 512


@dataclass(frozen=True)
class PartFiles:
    """The image files for one use, without those that were left out."""

    use: str
    """"training", "validation", "testing" or "unlabelled"."""
    names: tuple[str, ...]
    """N paths relative to DIR, in POSIX form."""
    classes: tuple[str, ...]
    """N names of classes; empty for unlabelled images."""
    hashes: tuple[str, ...]
    """N hashes of the files' content."""


def duplicates(parts: Sequence[PartFiles]) -> list[str]:
    """Warnings about images that are in two parts or in two classes, found by the hashes of their files."""
    first_of: dict[str, str] = {}
    for part in parts:
        if part.use in ("training", "unlabelled"):
            for name, sha256 in zip(part.names, part.hashes, strict=True):
                first_of.setdefault(sha256, name)
    held_out = {part.use: part for part in parts if part.use in ("validation", "testing")}
    found = [_in_two_parts(part, first_of, "training") for part in held_out.values()]
    if len(held_out) == 2:
        of_val = dict(zip(held_out["validation"].hashes, held_out["validation"].names, strict=True))
        found.append(_in_two_parts(held_out["testing"], of_val, "validation"))
    found.append(_in_two_classes(parts))
    return [message for message in found if message is not None]


def _in_two_parts(part: PartFiles, others: Mapping[str, str], use: str) -> str | None:
    same = [(name, others[sha256]) for name, sha256 in zip(part.names, part.hashes, strict=True) if sha256 in others]
    if not same:
        return None
    number = f"{len(same):,} of {len(part.names):,} images for {part.use}"
    return (
        f"{number} {'is' if len(same) == 1 else 'are'} for {use} too, e.g. `{same[0][0]}` is the same file as "
        f"`{same[0][1]}`: the accuracy on them is too high; keep one of the two"
    )


def _in_two_classes(parts: Sequence[PartFiles]) -> str | None:
    first_of: dict[str, tuple[str, str]] = {}
    found: dict[str, tuple[str, str]] = {}
    for part in parts:
        for name, class_name, sha256 in zip(part.names, part.classes, part.hashes, strict=False):
            first_class, first_name = first_of.setdefault(sha256, (class_name, name))
            if class_name != first_class:
                found.setdefault(sha256, (first_name, name))
    if not found:
        return None
    first, second = next(iter(found.values()))
    images = _images(len(found))
    return f"{images} in two classes, e.g. `{first}` is the same file as `{second}`: one of the labels is wrong"


def nearly_black(named: Sequence[tuple[Sequence[str], Tensor]]) -> str | None:
    """A warning about images that are nearly black; None where there are none.

    Args:
        named: for each part, N names and their images [N, H, W, 3] uint8.
    """
    dark = [name for names, images in named for name in _dark(names, images)]
    return None if not dark else nearly_black_message(dark)


def nearly_black_message(names: Sequence[str]) -> str:
    """The warning for nearly black images with these names."""
    return (
        f"{_images(len(names))} nearly black, e.g. `{names[0]}`: no value is above {_DARK} of 255, as with 12-bit data "
        "in a 16-bit file; scale their values to the whole range, or write TIFFs that state their bits"
    )


def is_dark(brightest: int) -> bool:
    """Whether an image is nearly black, by its largest value of 0 to 255."""
    return brightest <= _DARK


def _dark(names: Sequence[str], images: Tensor) -> list[str]:
    brightest = [part.flatten(1).amax(dim=1) for part in torch.split(images, _CHUNK)]
    return [name for name, value in zip(names, torch.cat(brightest).tolist(), strict=True) if is_dark(value)]


def _images(number: int) -> str:
    return "1 image is" if number == 1 else f"{number:,} images are"
