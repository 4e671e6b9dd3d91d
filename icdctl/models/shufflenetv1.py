"""ShuffleNet, three groups, Zhang et al. 2018, https://arxiv.org/abs/1707.01083

Layer names and widths follow RepDistiller (CRD, ICLR 2020, https://github.com/HobbitLong/RepDistiller), whose weights
load as they are. All layers have torch's default initialisation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.models.layers import conv1x1, conv3x3, large_image_stem, run_blocks, shuffle_channels
from icdctl.models.outputs import Classifier, Features

_GROUPS = 3
_STEM_WIDTH = 24
_STAGES = ((240, 4), (480, 8), (960, 4))
"""Channels and number of units of each stage."""


class ShuffleUnit(nn.Module):
    """Grouped 1 x 1, shuffle, 3 x 3 depthwise, grouped 1 x 1; returns the output before the last ReLU.

    At stride 1 the input is added. At stride 2 its 3 x 3 average is appended, so the convolutions give
    `channels - in_channels` channels.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = channels if stride == 1 else channels - in_channels
        hidden = branch // 4
        self.first_groups = 1 if in_channels == _STEM_WIDTH else _GROUPS
        self.conv1 = conv1x1(in_channels, hidden, groups=self.first_groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = conv3x3(hidden, hidden, stride=stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv1x1(hidden, branch, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(features)), inplace=True)
        out = shuffle_channels(out, self.first_groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        branch: Tensor = self.bn3(self.conv3(out))
        if self.stride == 1:
            return branch.add_(features)
        return torch.cat((branch, F.avg_pool2d(features, 3, stride=2, padding=1)), dim=1)


class ShuffleNetV1(Classifier):
    """A 1 x 1 stem and three stages, each of which starts with a unit of stride 2.

    Stages: the stem's ReLU and the last ReLU of each stage, 32 x 32, 16 x 16, 8 x 8, 4 x 4 for a 32 x 32 image.

    Args:
        num_classes: K.
        large_images: build the variant for 224 x 224, as in the reference: a 7 x 7 stem of stride 2.
    """

    smallest_image = 8

    def __init__(self, num_classes: int, *, large_images: bool = False) -> None:
        super().__init__()
        self.conv1 = large_image_stem(_STEM_WIDTH) if large_images else conv1x1(3, _STEM_WIDTH)
        self.bn1 = nn.BatchNorm2d(_STEM_WIDTH)
        stages = []
        in_channels = _STEM_WIDTH
        for channels, count in _STAGES:
            units = [ShuffleUnit(in_channels, channels, 2)]
            units += [ShuffleUnit(channels, channels, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*units))
            in_channels = channels
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(in_channels, num_classes)
        if large_images:
            self.smallest_image = 16

    @property
    def head(self) -> nn.Linear:
        """`linear`."""
        return self.linear

    def features(self, images: Tensor) -> Features:
        """[B, 3, H, W] -> four stages; the last one is the feature map."""
        stem = F.relu(self.bn1(self.conv1(images)), inplace=True)
        before1, stage1 = run_blocks(self.layer1, stem)
        before2, stage2 = run_blocks(self.layer2, stage1)
        before3, stage3 = run_blocks(self.layer3, stage2)
        return Features((stem, stage1, stage2, stage3), (stem, before1, before2, before3), stage3)
