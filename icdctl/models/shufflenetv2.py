"""ShuffleNetV2 at width 1, Ma et al. 2018, https://arxiv.org/abs/1807.11164

Layer names and widths follow RepDistiller (CRD, ICLR 2020, https://github.com/HobbitLong/RepDistiller), whose weights
load as they are. All layers have torch's default initialisation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.models.layers import conv1x1, conv3x3, large_image_stem, shuffle_channels
from icdctl.models.outputs import Classifier, Features

_STEM_WIDTH = 24
_HEAD_WIDTH = 1024
_STAGES = ((116, 3), (232, 7), (464, 3))
"""Channels of each stage, and number of basic units after the unit that halves the size."""


class BasicUnit(nn.Module):
    """Half of the channels pass unchanged, the others through 1 x 1, 3 x 3 depthwise, 1 x 1; then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv3x3(half, half, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> both [B, C, H, W]: before the last ReLU and the shuffle, and after them."""
        kept, changed = features.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(changed)), inplace=True)
        out = self.bn2(self.conv2(out))
        before = self.bn3(self.conv3(out))
        shuffled = shuffle_channels(torch.cat((kept, F.relu(before)), dim=1), 2)
        return torch.cat((kept, before), dim=1), shuffled


class DownUnit(nn.Module):
    """Two branches of stride 2, each giving half of the new channels, which are joined and shuffled."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv3x3(in_channels, in_channels, stride=2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv1x1(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv3x3(half, half, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H / 2, W / 2]."""
        left = self.bn1(self.conv1(features))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(features)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return shuffle_channels(torch.cat((left, right), dim=1), 2)


class ShuffleNetV2(Classifier):
    """A 1 x 1 stem, three stages and a 1 x 1 convolution to 1024 channels.

    Stages: the stem's ReLU and the shuffled output of each stage, 32 x 32, 16 x 16, 8 x 8, 4 x 4 for a 32 x 32 image.
    The pre-activation of a stage is not shuffled (so its channels are in another order), as in the reference, and half
    of it has been through the ReLU of an earlier unit. `feature_map` is the 1024-channel map after the last stage.

    Args:
        num_classes: K.
        large_images: build the variant for 224 x 224, by the rule of shuv1 (the reference's variant does not run): a
            7 x 7 stem of stride 2.
    """

    smallest_image = 8

    def __init__(self, num_classes: int, *, large_images: bool = False) -> None:
        super().__init__()
        self.conv1 = large_image_stem(_STEM_WIDTH) if large_images else conv1x1(3, _STEM_WIDTH)
        self.bn1 = nn.BatchNorm2d(_STEM_WIDTH)
        stages = []
        in_channels = _STEM_WIDTH
        for channels, count in _STAGES:
            units = [BasicUnit(channels) for _ in range(count)]
            stages.append(nn.Sequential(DownUnit(in_channels, channels), *units))
            in_channels = channels
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = conv1x1(in_channels, _HEAD_WIDTH)
        self.bn2 = nn.BatchNorm2d(_HEAD_WIDTH)
        self.linear = nn.Linear(_HEAD_WIDTH, num_classes)
        if large_images:
            self.smallest_image = 16

    @property
    def head(self) -> nn.Linear:
        """`linear`."""
        return self.linear

    def features(self, images: Tensor) -> Features:
        """[B, 3, H, W] -> four stages and the 1024-channel map."""
        features = F.relu(self.bn1(self.conv1(images)), inplace=True)
        stages, preactivations = [features], [features]
        for layer in (self.layer1, self.layer2, self.layer3):
            down, *units = layer
            features = down(features)
            before = features
            for unit in units:
                before, features = unit(features)
            stages.append(features)
            preactivations.append(before)
        feature_map = F.relu(self.bn2(self.conv2(features)), inplace=True)
        return Features(tuple(stages), tuple(preactivations), feature_map)
