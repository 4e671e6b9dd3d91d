"""What the loaders of data sets share: joining training and test images, and hashing what a data set holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from icdctl.data.dataset import Dataset, DatasetInfo, Request
from icdctl.data.split import stratified
from icdctl.data.split_record import SplitRecord
from icdctl.errors import ArtifactError


def of_halves(
    description: DatasetInfo,
    tensors: Sequence[Tensor],
    wanted: Request,
    *,
    sha256: str,
    caveat: str | None = None,
) -> Dataset:
    """Build a data set from its training and test images; hold validation images out of the first where asked for.

    Args:
        description: what is known of the data set.
        tensors: training images, their labels, test images, their labels; shapes as in `Dataset`.
        wanted: says which share is held out for validation.
        sha256: hash of the tensors.
        caveat: what readers of the results must know about the files; None where they are as published.

    Raises:
        ArtifactError: no class has enough images to hold one out.
    """
    train_images, train_labels, test_images, test_labels = tensors
    dataset = Dataset(
        **vars(description),
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        sha256=sha256,
        caveat=caveat,
        split=SplitRecord(wanted.val_split, wanted.split_seed),
    )
    if not wanted.val_split:
        return dataset
    kept, held = stratified(train_labels, wanted.val_split, seed=wanted.split_seed)
    if not len(held):
        raise ArtifactError(
            f"`{wanted.name}` has one training image per class: none is left for validation",
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


def fingerprint(*tensors: Tensor) -> str:
    """The sha256 of the tensors' bytes, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()


def fingerprint_of(hashes: Sequence[str], *labels: Tensor) -> str:
    """The sha256 of hashes of pixels that are known already, and of the labels."""
    return hashlib.sha256(" ".join([*hashes, fingerprint(*labels)]).encode()).hexdigest()
