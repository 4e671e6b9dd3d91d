"""MobileNetV2 at half width for 32 x 32 images, Sandler et al. 2018, https://arxiv.org/abs/1801.04381

Layer names and widths follow RepDistiller (CRD, ICLR 2020, https://github.com/HobbitLong/RepDistiller), whose weights
load as they are. It differs from the paper: ReLU instead of ReLU6, an expansion layer in the first block too, and
strides for small images.
"""

from __future__ import annotations

from torch import Tensor, nn

from icdctl.models.layers import conv1x1, conv3x3, initialise_convolutions, large_image_stem
from icdctl.models.outputs import Classifier, Features

_STEM_WIDTH = 16
_HEAD_WIDTH = 1280
# Expansion, channels, number of blocks, stride of the first block.
_GROUPS = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
_STAGE_ENDS = (1, 2, 4, 6)
"""The groups whose outputs are the stages after the stem."""


class InvertedResidual(nn.Module):
    """1 x 1 up, 3 x 3 depthwise, 1 x 1 down without activation, and a residual where the shape stays the same."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            conv1x1(in_channels, hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            conv3x3(hidden, hidden, stride=stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            conv1x1(hidden, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C, H / stride, W / stride], without activation."""
        out: Tensor = self.conv(features)
        return out.add_(features) if self.has_residual else out


class MobileNetV2(Classifier):
    """A stem of stride 2, seven groups of inverted residuals, a 1 x 1 convolution to 1280 channels.

    Stages: the stem and the outputs of groups 1, 2, 4 and 6, which are linear (no ReLU, so their pre-activations are
    themselves): 16 x 16, 16 x 16, 8 x 8, 4 x 4, 2 x 2 for a 32 x 32 image. `feature_map` is the 1280-channel map after
    the last stage; where it is 2 x 2, the 16 patches of scale 4 are only 4 distinct ones, each four times.

    Args:
        num_classes: K.
        large_images: build the variant for 224 x 224, as in the reference: the stem is a 7 x 7 convolution of stride 2
            (with torch's default initialisation), norm, ReLU and a max pooling by 2.
    """

    smallest_image = 16

    def __init__(self, num_classes: int, *, large_images: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            conv3x3(3, _STEM_WIDTH, stride=2), nn.BatchNorm2d(_STEM_WIDTH), nn.ReLU(inplace=True)
        )
        groups = []
        in_channels = _STEM_WIDTH
        for expansion, channels, count, first_stride in _GROUPS:
            blocks = []
            for stride in [first_stride] + [1] * (count - 1):
                blocks.append(InvertedResidual(in_channels, channels, stride, expansion))
                in_channels = channels
            groups.append(nn.Sequential(*blocks))
        self.blocks = nn.ModuleList(groups)
        self.conv2 = nn.Sequential(
            conv1x1(in_channels, _HEAD_WIDTH), nn.BatchNorm2d(_HEAD_WIDTH), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Sequential(nn.Linear(_HEAD_WIDTH, num_classes))
        initialise_convolutions(self)
        nn.init.normal_(self.head.weight, 0.0, 0.01)
        nn.init.zeros_(self.head.bias)
        if large_images:
            self.conv1 = nn.Sequential(
                large_image_stem(_STEM_WIDTH), nn.BatchNorm2d(_STEM_WIDTH), nn.ReLU(inplace=True), nn.MaxPool2d(2)
            )
            self.smallest_image = 32

    @property
    def head(self) -> nn.Linear:
        """`classifier.0`."""
        linear = self.classifier[0]
        assert isinstance(linear, nn.Linear)
        return linear

    def features(self, images: Tensor) -> Features:
        """[B, 3, H, W] -> five stages and the 1280-channel map."""
        features: Tensor = self.conv1(images)
        stages = [features]
        for index, group in enumerate(self.blocks):
            features = group(features)
            if index in _STAGE_ENDS:
                stages.append(features)
        return Features(tuple(stages), tuple(stages), self.conv2(features))

    def preactivation_norms(self) -> list[str]:
        """The last norm of the groups whose outputs are stages."""
        return [f"blocks.{index}.{_GROUPS[index][2] - 1}.conv.7" for index in _STAGE_ENDS]
