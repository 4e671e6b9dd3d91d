"""Parts that several architectures share: convolutions, the stem for large images, initialisation.

Sums and ReLUs work in place where nothing else reads the tensor that they overwrite: on a CPU, allocating a new map
costs more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 1 x 1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, groups=groups, bias=False)


def large_image_stem(out_channels: int) -> nn.Conv2d:
    """The first convolution of the variants for large images, 224 -> 112, with torch's default initialisation."""
    return nn.Conv2d(3, out_channels, 7, stride=2, padding=3, bias=False)


def run_blocks(blocks: Iterable[nn.Module], features: Tensor) -> tuple[Tensor, Tensor]:
    """Run a stage whose blocks return their output before its ReLU.

    Returns:
        The output of the last block before its ReLU, and after it.
    """
    *inner, last = blocks
    for block in inner:
        features = F.relu(block(features), inplace=True)
    before = last(features)
    return before, F.relu(before)


def shuffle_channels(features: Tensor, groups: int) -> Tensor:
    """[B, groups * n, H, W] -> the same shape, the groups interleaved.

    Source: Zhang et al. 2018, figure 1, https://arxiv.org/abs/1707.01083
    """
    batch, channels, height, width = features.shape
    grouped = features.reshape(batch, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(batch, channels, height, width)


@torch.no_grad()
def initialise_convolutions(model: nn.Module) -> None:
    """Initialise convolutions with normal weights of variance 2 / (k * k * C_out) and zero biases.

    C_out counts all the groups, as in the reference: the depthwise convolutions of MobileNetV2 start at about 0.02
    where an unscaled fan-out would give 0.47. Source: He et al. 2015, https://arxiv.org/abs/1502.01852
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            module.weight.normal_(0.0, math.sqrt(2.0 / (height * width * module.out_channels)))
            if module.bias is not None:
                module.bias.zero_()
