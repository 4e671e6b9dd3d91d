"""What every model gives: `Outputs`, and the base class `Classifier` that all architectures share.

Shapes: B images, K classes, C channels, H rows, W columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Features(NamedTuple):
    """What an architecture computes before pooling and head."""

    stages: tuple[Tensor, ...]
    preactivations: tuple[Tensor, ...]
    feature_map: Tensor


class Outputs(NamedTuple):
    """One pass through a model, with what the distillation losses read."""

    logits: Tensor
    """[B, K], before softmax."""
    stages: tuple[Tensor, ...]
    """Feature maps [B, C, H, W], shallow to deep; `stages[0]` is the stem."""
    feature_map: Tensor
    """[B, C, H, W]: the map whose global average the head reads; patch logits come from it."""
    pooled: Tensor
    """[B, C]: the global average of `feature_map`; `head(pooled)` is `logits`."""
    preactivations: tuple[Tensor, ...] = ()
    """One map per entry of `stages`, of the same shape, as it was before the last ReLU of that stage
    (the stem has no separate one: there it is the stage itself). Empty for a model that has none to give."""


class Classifier(nn.Module, ABC):
    """An image classifier: `features`, then the global average, then a linear head.

    The average is taken over the whole map whatever its size, so any image works that the strides leave something of.
    """

    name: str = ""
    """The name in `MODELS`, set by `create`; messages use it."""
    smallest_image: int = 1
    """The total stride: a smaller image has no whole cell left in `feature_map`."""

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The layer from `pooled` to `logits`. A property, so that state_dict keys stay the reference's."""

    @abstractmethod
    def features(self, images: Tensor) -> Features:
        """The part of the pass that differs between architectures; `images` have been checked."""

    def outputs(self, images: Tensor) -> Outputs:
        """[B, 3, H, W] -> logits and all that the losses read.

        Raises:
            ValueError: the images are not [B, 3, H, W], or smaller than the model's total stride.
        """
        self._check(images)
        features = self.features(images)
        pooled = features.feature_map.mean(dim=(2, 3))
        logits: Tensor = self.head(pooled)
        return Outputs(logits, features.stages, features.feature_map, pooled, features.preactivations)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]. What evaluation and export run."""
        return self.outputs(images).logits

    def conv_bn_pairs(self) -> list[tuple[str, str]]:
        """Names of the (convolution, batch norm) pairs that may be fused once the model is in eval mode.

        In all families but one a batch norm is registered right after the convolution it reads, and nothing else reads
        that convolution, so the order of registration is the answer. WRN normalises before its convolutions and says
        otherwise.
        """
        pairs: list[tuple[str, str]] = []
        previous: tuple[str, nn.Module] = ("", self)
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d) and isinstance(previous[1], nn.Conv2d):
                pairs.append((previous[0], name))
            previous = (name, module)
        return pairs

    def preactivation_norms(self) -> list[str]:
        """Names of the batch norms that end in `preactivations[1:]`, whose weights tell how these are distributed.

        Empty for the ShuffleNets: half of the channels of their pre-activations don't come from one norm.
        """
        return []

    def _check(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
        if min(images.shape[2], images.shape[3]) < self.smallest_image:
            size, smallest = f"{images.shape[2]} x {images.shape[3]}", self.smallest_image
            label = self.name or type(self).__name__
            raise ValueError(f"images of {size} are too small for {label}: its strides need {smallest} x {smallest}")
