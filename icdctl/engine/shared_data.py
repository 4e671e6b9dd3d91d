"""The images of a run on its device, which all students of a process share, and how steps are cut out of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from icdctl.config.run_config import RunConfig
from icdctl.data import UNLABELED, Dataset, ImageStore
from icdctl.engine.device import is_device_driven
from icdctl.engine.environment import describe_environment
from icdctl.errors import UsageError


@dataclass(frozen=True)
class SharedData:
    """What all students of a run share: the images on the device, and how a step is cut out of them."""

    dataset: Dataset
    device: torch.device
    precision: str
    store: ImageStore
    labels: Tensor
    """[N] int64 on the device."""
    watched: str
    """"val" where images are held out for validation, else "test"."""
    watched_images: Tensor
    """[V, H, W, 3] uint8 on the device."""
    watched_labels: Tensor
    """[V] int64 on the CPU."""
    batch_size: int
    num_steps: int
    """Number of steps of an epoch."""
    device_driven: bool
    """Whether steps read what they need, the learning rate too, from tensors that stay where they are."""

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, machine and commit, for environment.json; they are the same for all students of a process."""
        return describe_environment(self.device, self.precision)

    @property
    def num_images(self) -> int:
        """N."""
        return self.store.num_images

    def images_of(self, steps: int) -> int:
        """Number of images that so many steps see, in epochs whose last batch may be smaller."""
        epochs, rest = divmod(steps, self.num_steps)
        per_epoch = min(self.num_images, self.num_steps * self.batch_size)
        return epochs * per_epoch + rest * self.batch_size


def make_shared_data(config: RunConfig, dataset: Dataset, device: torch.device, precision: str) -> SharedData:
    """The images of a run on its device.

    Raises:
        UsageError: there are too few of them.
    """
    num_images = dataset.train_images.shape[0]
    if config.drop_last and num_images < config.batch_size:
        raise UsageError(
            f"{num_images} training images do not fill one batch of {config.batch_size}, and the recipe drops "
            "batches that are not full",
            hint=f"use `--batch-size {num_images}` or less",
        )
    whole, rest = divmod(num_images, config.batch_size)
    # Batch norm can't learn from a single image, so a last batch of one is left out.
    num_steps = whole + (1 if rest > 1 and not config.drop_last else 0)
    if num_steps == 0:
        raise UsageError("one training image is too few", hint="train on 2 images or more")
    has_val = dataset.val_images is not None
    watched_images = dataset.test_images if dataset.val_images is None else dataset.val_images
    return SharedData(
        dataset=dataset,
        device=device,
        precision=precision,
        store=ImageStore(dataset.train_images, dataset.preprocessing, config.augmentation, device=device),
        labels=dataset.train_labels.to(device),
        watched="val" if has_val else "test",
        watched_images=watched_images.to(device),
        watched_labels=dataset.test_labels if dataset.val_labels is None else dataset.val_labels,
        batch_size=config.batch_size,
        num_steps=num_steps,
        device_driven=is_device_driven(device),
    )


def balanced_class_weights(dataset: Dataset) -> Tensor:
    """Weights inverse to each class's share of the labelled training images, 1 on average over them: [K]."""
    labels = dataset.train_labels[dataset.train_labels != UNLABELED]
    counts = torch.bincount(labels, minlength=dataset.num_classes)
    return labels.shape[0] / (dataset.num_classes * counts.clamp(min=1).float())
