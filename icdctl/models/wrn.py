"""Wide ResNet, Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146

Layer names and widths follow RepDistiller (CRD, ICLR 2020, https://github.com/HobbitLong/RepDistiller), whose teacher
weights load as they are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.models.layers import conv1x1, conv3x3, initialise_convolutions, large_image_stem
from icdctl.models.outputs import Classifier, Features


class PreactivationBlock(nn.Module):
    """Norm, ReLU, 3 x 3, norm, ReLU, 3 x 3 and a residual.

    Where the channels change, the residual is a 1 x 1 convolution of the activated input; elsewhere it is the raw
    input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride=stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.convShortcut: nn.Conv2d | None = None  # its name in the weights
        if in_channels != channels:
            self.convShortcut = conv1x1(in_channels, channels, stride=stride)

    def forward(self, features: Tensor, normalised: Tensor) -> Tensor:
        """[B, C_in, H, W] and `bn1` of it -> [B, C, H / stride, W / stride], without activation."""
        activated = F.relu(normalised)
        out = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        residual: Tensor = features if self.convShortcut is None else self.convShortcut(activated)
        convolved: Tensor = self.conv2(out)
        return convolved.add_(residual)


class BlockGroup(nn.Module):
    """The blocks of one stage, called `layer` in the weights."""

    def __init__(self, num_blocks: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        blocks = [PreactivationBlock(in_channels, channels, stride)]
        blocks += [PreactivationBlock(channels, channels, 1) for _ in range(num_blocks - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C_in, H, W] -> the output of the first block's norm, and the raw output of the last block."""
        first_normalised = features
        for index, block in enumerate(self.layer):
            assert isinstance(block, PreactivationBlock)
            normalised = block.bn1(features)
            if index == 0:
                first_normalised = normalised
            features = block(features, normalised)
        return first_normalised, features


class WideResNet(Classifier):
    """A stem and three groups; depth = 6 * blocks_per_group + 4.

    Stages: the stem's convolution and the raw output of each group (negative values occur). A pre-activation is the
    output of the norm that follows its stage, and `feature_map` is relu(bn1(last stage)).

    Every norm runs once per forward pass. The reference runs three of them a second time to get the pre-activations,
    which in training updates their running statistics twice per step (and sets `num_batches_tracked` to 2). Losses and
    gradients are the same, evaluation after training is not. This is an accident of its code, not repeated here.

    Args:
        depth: 16 or 40.
        widen_factor: the stages have 16, 32 and 64 times this many channels.
        num_classes: K.
        large_images: build the variant for 224 x 224, by the rule of the other families (the reference has none): a
            7 x 7 stem of stride 2; stem and head have torch's default initialisation.
    """

    smallest_image = 4

    def __init__(self, depth: int, widen_factor: int, num_classes: int, *, large_images: bool = False) -> None:
        super().__init__()
        num_blocks = (depth - 4) // 6
        first, second, third = (width * widen_factor for width in (16, 32, 64))
        self.conv1 = conv3x3(3, 16)
        self.block1 = BlockGroup(num_blocks, 16, first, stride=1)
        self.block2 = BlockGroup(num_blocks, first, second, stride=2)
        self.block3 = BlockGroup(num_blocks, second, third, stride=2)
        self.bn1 = nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, num_classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.fc.bias)
        if large_images:
            self.conv1 = large_image_stem(16)
            self.fc = nn.Linear(third, num_classes)
            self.smallest_image = 8

    @property
    def head(self) -> nn.Linear:
        """`fc`."""
        return self.fc

    def features(self, images: Tensor) -> Features:
        """[B, 3, H, W] -> four raw stages; the feature map is the last one, normalised and activated."""
        stem = self.conv1(images)
        _, stage1 = self.block1(stem)
        before1, stage2 = self.block2(stage1)
        before2, stage3 = self.block3(stage2)
        before3 = self.bn1(stage3)
        return Features((stem, stage1, stage2, stage3), (stem, before1, before2, before3), F.relu(before3))

    def preactivation_norms(self) -> list[str]:
        """The norm after each group."""
        return ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]

    def conv_bn_pairs(self) -> list[tuple[str, str]]:
        """The pairs conv1 and bn2 of each block; every other norm reads a sum that the residual path reads too."""
        return [
            (f"{name}.conv1", f"{name}.bn2")
            for name, module in self.named_modules()
            if isinstance(module, PreactivationBlock)
        ]
