"""Choice of the images to hold out: a function of a seed and of the images' names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def stratified(labels: Tensor, share: float, *, seed: int, names: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    """Hold out a share of each class.

    Within a class, images are ordered by a hash of seed and name, and the first ones are held out. So when images are
    added later, nearly all others stay on their side.

    Args:
        labels: [N] int64.
        share: share of each class to hold out, above 0 and below 1, rounded to whole images: at least one, never all.
            A class with a single image keeps it.
        seed: seed of the choice.
        names: N distinct names; by default the images' numbers.

    Returns:
        The rows that stay and the rows that are held out, each ascending: [N - V] and [V] int64.
    """
    shown = names if names is not None else [str(number) for number in range(labels.shape[0])]
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        by_class.setdefault(label, []).append(row)
    held = torch.zeros(labels.shape[0], dtype=torch.bool)
    for rows in by_class.values():
        if len(rows) > 1:
            count = min(max(1, round(share * len(rows))), len(rows) - 1)
            ranked = sorted(rows, key=lambda row: _rank(seed, shown[row]))
            held[ranked[:count]] = True
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)


def _rank(seed: int, name: str) -> bytes:
    """The sort key of an image within its class; file names need not be UTF-8."""
    return hashlib.sha256(f"icdctl split {seed} {name}".encode("utf-8", "surrogateescape")).digest()
