"""`Outputs`, which every model returns, and `Classifier`, the base class of all architectures.

Shapes: B images, K classes, C channels, H rows, W columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn


class Features(NamedTuple):
    """The part of a forward pass before global average and head; the fields are those of `Outputs`."""

    stages: tuple[Tensor, ...]
    preactivations: tuple[Tensor, ...]
    feature_map: Tensor


class Outputs(NamedTuple):
    """The results of one forward pass: logits, and the tensors that distillation losses read."""

    logits: Tensor
    """[B, K], before softmax."""
    stages: tuple[Tensor, ...]
    """Feature maps [B, C, H, W], shallow to deep; `stages[0]` is the stem."""
    feature_map: Tensor
    """[B, C, H, W]: the map whose global average the head reads; patch logits come from it."""
    pooled: Tensor
    """[B, C]: the global average of `feature_map`; `head(pooled)` is `logits`."""
    preactivations: tuple[Tensor, ...] = ()
    """One map per entry of `stages`, of the same shape: the stage before its last ReLU; for the stem, the stage itself.
    Empty for custom modules."""


class Classifier(nn.Module, ABC):
    """An image classifier: `features`, then the global average, then a linear head.

    The average is taken over the whole map, whatever its size, so images of any size work from `smallest_image` on.
    """

    name: str = ""
    """The name in `MODELS`, set by `create`, for messages."""
    smallest_image: int = 1
    """Smallest height and width of an image, which is the total stride; `feature_map` is then 1 x 1."""

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The layer from `pooled` to `logits`. A property, so that state_dict keys stay the reference's."""

    @abstractmethod
    def features(self, images: Tensor) -> Features:
        """The part of the forward pass that differs between architectures: images [B, 3, H, W], already checked."""

    def outputs(self, images: Tensor) -> Outputs:
        """[B, 3, H, W] -> logits, and the tensors that distillation losses read.

        Raises:
            ValueError: the images are not [B, 3, H, W], or smaller than the model's total stride.
        """
        self._check(images)
        features = self.features(images)
        pooled = features.feature_map.mean(dim=(2, 3))
        logits: Tensor = self.head(pooled)
        return Outputs(logits, features.stages, features.feature_map, pooled, features.preactivations)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]; evaluation and export use it."""
        return self.outputs(images).logits

    def conv_bn_pairs(self) -> list[tuple[str, str]]:
        """Names of the (convolution, batch norm) pairs that can be fused in eval mode.

        In all families except WRN, a batch norm is registered right after the convolution that it reads, and nothing
        else reads that convolution, so the order of registration gives the pairs. WRN overrides this.
        """
        pairs: list[tuple[str, str]] = []
        previous: tuple[str, nn.Module] = ("", self)
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d) and isinstance(previous[1], nn.Conv2d):
                pairs.append((previous[0], name))
            previous = (name, module)
        return pairs

    def preactivation_norms(self) -> list[str]:
        """Names of the batch norms whose outputs are `preactivations[1:]`; their weights show its distribution.

        Empty for the ShuffleNets, where half of the pre-activation's channels do not come from one norm.
        """
        return []

    def _check(self, images: Tensor) -> None:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
        if min(images.shape[2], images.shape[3]) < self.smallest_image:
            size, smallest = f"{images.shape[2]} x {images.shape[3]}", self.smallest_image
            label = self.name or type(self).__name__
            raise ValueError(f"images of {size} are too small for {label}: its strides need {smallest} x {smallest}")
