"""ResNet-18 and ResNet-50 with a stem for 32 x 32 images, He et al. 2016, https://arxiv.org/abs/1512.03385

The reference calls the file resnetv2; the blocks are those of the first paper (not pre-activation). Layer names and
widths follow RepDistiller (CRD, ICLR 2020, https://github.com/HobbitLong/RepDistiller), whose weights load as they are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.models.layers import conv1x1, conv3x3, initialise_convolutions, large_image_stem, run_blocks
from icdctl.models.outputs import Classifier, Features

_STAGE_WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a residual; returns the sum before its ReLU."""

    expansion = 1
    last_norm = "bn2"

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(features)), inplace=True)
        normalised: Tensor = self.bn2(self.conv2(out))
        residual: Tensor = self.shortcut(features)
        return normalised.add_(residual)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride), 1 x 1 to four times the channels; returns the sum before its ReLU."""

    expansion = 4
    last_norm = "bn3"

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, 4 * C, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(features)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        normalised: Tensor = self.bn3(self.conv3(out))
        residual: Tensor = self.shortcut(features)
        return normalised.add_(residual)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(conv1x1(in_channels, out_channels, stride=stride), nn.BatchNorm2d(out_channels))


class ResNetV2(Classifier):
    """A 3 x 3 stem without pooling and four stages.

    Stages: the stem's ReLU and the last ReLU of each stage, 32 x 32, 32 x 32, 16 x 16, 8 x 8, 4 x 4 for a 32 x 32
    image.

    Args:
        block: the class of the blocks.
        num_blocks: number of blocks in each of the four stages.
        num_classes: K.
        large_images: build the variant for 224 x 224: a 7 x 7 stem of stride 2; stem and head have torch's default
            initialisation. The reference has it for res50.
    """

    smallest_image = 8

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: tuple[int, int, int, int],
        num_classes: int,
        *,
        large_images: bool = False,
    ) -> None:
        super().__init__()
        stem = _STAGE_WIDTHS[0]
        self.conv1 = conv3x3(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        stages = []
        in_channels = stem
        for index, (channels, count) in enumerate(zip(_STAGE_WIDTHS, num_blocks, strict=True)):
            strides = [1 if index == 0 else 2] + [1] * (count - 1)
            blocks = []
            for stride in strides:
                blocks.append(block(in_channels, channels, stride))
                in_channels = channels * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(in_channels, num_classes)
        self.last_norm = block.last_norm
        initialise_convolutions(self)
        if large_images:
            self.conv1 = large_image_stem(stem)
            self.smallest_image = 16

    @property
    def head(self) -> nn.Linear:
        """`linear`."""
        return self.linear

    def features(self, images: Tensor) -> Features:
        """[B, 3, H, W] -> five stages; the last one is the feature map."""
        stages = [F.relu(self.bn1(self.conv1(images)), inplace=True)]
        preactivations = [stages[0]]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            before, after = run_blocks(layer, stages[-1])
            preactivations.append(before)
            stages.append(after)
        return Features(tuple(stages), tuple(preactivations), stages[-1])

    def preactivation_norms(self) -> list[str]:
        """The last norm of each stage."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return [f"layer{number}.{len(stage) - 1}.{self.last_norm}" for number, stage in enumerate(stages, 1)]


def res18(num_classes: int, *, large_images: bool = False) -> ResNetV2:
    """Two basic blocks per stage, 512 channels at the end."""
    return ResNetV2(BasicBlock, (2, 2, 2, 2), num_classes, large_images=large_images)


def res50(num_classes: int, *, large_images: bool = False) -> ResNetV2:
    """Bottlenecks, 2048 channels at the end."""
    return ResNetV2(Bottleneck, (3, 4, 6, 3), num_classes, large_images=large_images)
