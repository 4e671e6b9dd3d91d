"""How a data set was divided, and which image files each part held: a record that travels with weights.

With it, a model that leaves its run folder still says which images it was trained on, and `seen_test_images` says
whether a data set would test it on some of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from icdctl.data.part_files import PartFiles
from icdctl.data.split import stratified
from icdctl.files import sha256_bytes

METADATA_KEY = "split"
"""The key of a record in the metadata of weights."""
_USES = {"train": "training", "val": "validation", "test": "testing"}


@dataclass(frozen=True)
class PartRecord:
    """The labelled images of one part."""

    images: int
    """Number of images."""
    sha256: str
    """Hash of the list of the images' classes and file hashes, in any order and under any file names."""


@dataclass(frozen=True)
class SplitRecord:
    """How a data set was divided."""

    val_split: float
    """Share of each class's training images that was held out for validation."""
    split_seed: int
    """Seed of the images that were held out."""
    test_split: float | None = None
    """Share of each class that was split off for testing; None where the test images are given."""
    parts: Mapping[str, PartRecord] = field(default_factory=dict)
    """"train", "val" and "test" -> its images; empty for data sets whose test images are published."""

    @property
    def flags(self) -> str:
        """The flags that divide images in this way."""
        shares = {"test-split": self.test_split, "val-split": self.val_split}
        given = [f"--{name} {share:g}" for name, share in shares.items() if share]
        return " ".join([*given, f"--split-seed {self.split_seed}"])

    def as_json(self) -> dict[str, object]:
        """The JSON object that metadata hold."""
        parts = {use: {"images": part.images, "sha256": part.sha256} for use, part in self.parts.items()}
        own = {"val_split": self.val_split, "split_seed": self.split_seed}
        return {**own, **({} if self.test_split is None else {"test_split": self.test_split}), **parts}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> SplitRecord:
        """Read back what `as_json` gave.

        Raises:
            KeyError, TypeError, ValueError: `value` is not what `as_json` gives.
        """
        if not isinstance(value, Mapping):
            raise TypeError(f"it is a {type(value).__name__}")
        test_split = None if value.get("test_split") is None else _share(value["test_split"])
        parts = {use: _part(value[use]) for use in _USES if use in value}
        return SplitRecord(_share(value["val_split"]), _count(value["split_seed"]), test_split, parts)

    @staticmethod
    def from_metadata(metadata: Mapping[str, Any]) -> SplitRecord | None:
        """The record in the metadata of weights; None where an earlier version or another program wrote them.

        Raises:
            KeyError, TypeError, ValueError: the record is malformed.
        """
        return SplitRecord.from_json(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None


def _share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"share {value}")
    return float(value)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"number {value}")
    return value


def _part(value: Mapping[str, Any]) -> PartRecord:
    sha256 = value["sha256"]
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("a part without a sha256")
    return PartRecord(_count(value["images"]), sha256)


def part_records(parts: Sequence[PartFiles]) -> dict[str, PartRecord]:
    """The records of the labelled parts."""
    by_use = {part.use: part for part in parts}
    return {key: _record(by_use[use].classes, by_use[use].hashes) for key, use in _USES.items() if use in by_use}


def _record(classes: Sequence[str], hashes: Sequence[str]) -> PartRecord:
    lines = sorted(f"{name}\t{sha256}" for name, sha256 in zip(classes, hashes, strict=True))
    return PartRecord(len(lines), sha256_bytes("\n".join(lines).encode("utf-8", "surrogateescape")))


def seen_test_images(
    label: str, trained: SplitRecord | None, now: SplitRecord, parts: Sequence[PartFiles], *, dataset: str
) -> str | None:
    """What to say about test images that a model was trained on, or may have been; None where it was on none.

    Args:
        label: the model in the message, e.g. "teacher `runs/t`".
        trained: how the images were divided when it was trained; None where its weights do not say it.
        now: how they are divided now.
        parts: the image files now.
        dataset: the data set's name in the message.
    """
    test = next(part for part in parts if part.use == "testing")
    if trained is None or "train" not in trained.parts:
        return (
            f"{label} does not say which images it was trained on, so some of the {len(test.names):,} test images of "
            f"`{dataset}` may be among them: an earlier version of icdctl or another program wrote its weights"
        )
    if trained.parts.get("test") == now.parts["test"]:
        return None
    seen = _trained_on(trained, now, parts)
    if seen is None:
        then, here = trained.parts["train"].images, now.parts["train"].images
        return (
            f"{label} was trained on other images than `{dataset}` has for training now ({then:,} then, {here:,} "
            f"now), so some of the {len(test.names):,} test images may be among them"
        )
    count = sum(sha256 in seen for sha256 in test.hashes)
    if not count:
        return None
    return (
        f"{label} was trained on {count:,} of the {len(test.names):,} test images of `{dataset}`: then the images "
        f"were divided with `{trained.flags}`, now with `{now.flags}`"
    )


def _trained_on(trained: SplitRecord, now: SplitRecord, parts: Sequence[PartFiles]) -> set[str] | None:
    """The hashes of the files that a model was trained on; None where the folder no longer has them as they were."""
    by_use = {part.use: part for part in parts}
    if trained.parts["train"] == now.parts["train"]:
        return set(by_use["training"].hashes)
    pooled = [by_use["training"]]
    if now.test_split is not None:
        pooled.append(by_use["testing"])
    if now.val_split and "validation" in by_use:
        pooled.append(by_use["validation"])
    names = [name for part in pooled for name in part.names]
    classes = [name for part in pooled for name in part.classes]
    hashes = [sha256 for part in pooled for sha256 in part.hashes]
    numbers = {name: number for number, name in enumerate(sorted(set(classes)))}
    rows = torch.arange(len(names))
    for share in (trained.test_split, trained.val_split):
        if share:
            labels = torch.tensor([numbers[classes[row]] for row in rows.tolist()])
            kept, _ = stratified(labels, share, seed=trained.split_seed, names=[names[row] for row in rows.tolist()])
            rows = rows[kept]
    chosen = rows.tolist()
    found = _record([classes[row] for row in chosen], [hashes[row] for row in chosen])
    return {hashes[row] for row in chosen} if found == trained.parts["train"] else None
