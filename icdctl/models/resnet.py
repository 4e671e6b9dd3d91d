"""CIFAR ResNet, He et al. 2016, section 4.2, https://arxiv.org/abs/1512.03385

Layer names and widths follow RepDistiller (CRD, ICLR 2020, https://github.com/HobbitLong/RepDistiller), whose teacher
weights load as they are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.models.layers import conv1x1, conv3x3, initialise_convolutions, large_image_stem, run_blocks
from icdctl.models.outputs import Classifier, Features


class CifarBlock(nn.Module):
    """Two 3 x 3 convolutions and a residual; returns the sum before its ReLU. Unlike `resnetv2.BasicBlock`, its
    residual is called `downsample` in the weights."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(conv1x1(in_channels, channels, stride=stride), nn.BatchNorm2d(channels))

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H / stride, W / stride]."""
        residual: Tensor = features if self.downsample is None else self.downsample(features)
        out = F.relu(self.bn1(self.conv1(features)), inplace=True)
        normalised: Tensor = self.bn2(self.conv2(out))
        return normalised.add_(residual)


class ResNet(Classifier):
    """A stem and three stages of blocks; depth = 6 * blocks_per_stage + 2.

    Stages: the stem's ReLU and the last ReLU of each stage, 32 x 32, 32 x 32, 16 x 16, 8 x 8 for a 32 x 32 image.

    Args:
        blocks_per_stage: 1 for res8, 18 for res110.
        widths: channels of the stem and of the three stages.
        num_classes: K.
        large_images: build the variant for 224 x 224: a 7 x 7 stem of stride 2; stem and head have torch's default
            initialisation. The reference has it for res32x4 and res8x4.
    """

    smallest_image = 4

    def __init__(
        self, blocks_per_stage: int, widths: tuple[int, int, int, int], num_classes: int, *, large_images: bool = False
    ) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.conv1 = conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(blocks_per_stage, stem, first, stride=1)
        self.layer2 = _stage(blocks_per_stage, first, second, stride=2)
        self.layer3 = _stage(blocks_per_stage, second, third, stride=2)
        self.fc = nn.Linear(third, num_classes)
        initialise_convolutions(self)
        if large_images:
            self.conv1 = large_image_stem(stem)
            self.smallest_image = 8

    @property
    def head(self) -> nn.Linear:
        """`fc`."""
        return self.fc

    def features(self, images: Tensor) -> Features:
        """[B, 3, H, W] -> four stages; the last one is the feature map."""
        stem = F.relu(self.bn1(self.conv1(images)), inplace=True)
        before1, stage1 = run_blocks(self.layer1, stem)
        before2, stage2 = run_blocks(self.layer2, stage1)
        before3, stage3 = run_blocks(self.layer3, stage2)
        return Features((stem, stage1, stage2, stage3), (stem, before1, before2, before3), stage3)

    def preactivation_norms(self) -> list[str]:
        """The last norm of each stage."""
        stages = (self.layer1, self.layer2, self.layer3)
        return [f"layer{number}.{len(stage) - 1}.bn2" for number, stage in enumerate(stages, 1)]


def _stage(num_blocks: int, in_channels: int, channels: int, *, stride: int) -> nn.Sequential:
    blocks = [CifarBlock(in_channels, channels, stride)]
    blocks += [CifarBlock(channels, channels, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


def narrow_resnet(depth: int, num_classes: int, *, large_images: bool = False) -> ResNet:
    """res8 to res110: 16, 16, 32, 64 channels."""
    return ResNet((depth - 2) // 6, (16, 16, 32, 64), num_classes, large_images=large_images)


def wide_resnet(depth: int, num_classes: int, *, large_images: bool = False) -> ResNet:
    """res8x4 and res32x4: 32, 64, 128, 256 channels (four times as wide, except the stem, which is twice)."""
    return ResNet((depth - 2) // 6, (32, 64, 128, 256), num_classes, large_images=large_images)
