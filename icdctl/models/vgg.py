"""VGG with batch norm for 32 x 32 images, Simonyan and Zisserman 2015, https://arxiv.org/abs/1409.1556

Layer names and widths follow RepDistiller (CRD, ICLR 2020, https://github.com/HobbitLong/RepDistiller), whose teacher
weights load as they are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.models.layers import initialise_convolutions
from icdctl.models.outputs import Classifier, Features

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(Classifier):
    """Five blocks of 3 x 3 convolutions, with max pooling by 2 after the first three, and one linear layer.

    Stages: the last ReLU of each block (block0 is the stem), 32 x 32, 16 x 16, 8 x 8, 4 x 4, 4 x 4 for a 32 x 32 image.
    A fourth pooling happens only where the image is exactly 64 pixels high. The reference has this rule for Tiny
    ImageNet, and the numbers of both image sizes depend on it; 224 x 224 images keep a 28 x 28 map.

    Args:
        depth: a key of the table of convolutions: 8, 11, 13, 16 or 19.
        num_classes: K.
        large_images: build the variant for 224 x 224: only the head differs, which has torch's default initialisation.
            The reference has it for vgg13 and vgg8.
    """

    smallest_image = 8

    def __init__(self, depth: int, num_classes: int, *, large_images: bool = False) -> None:
        super().__init__()
        blocks = []
        in_channels = 3
        for channels, count in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True):
            blocks.append(_block(in_channels, channels, count))
            in_channels = channels
        self.block0, self.block1, self.block2, self.block3, self.block4 = blocks
        self.classifier = nn.Linear(in_channels, num_classes)
        initialise_convolutions(self)
        if not large_images:
            nn.init.normal_(self.classifier.weight, 0.0, 0.01)
            nn.init.zeros_(self.classifier.bias)

    @property
    def head(self) -> nn.Linear:
        """`classifier`."""
        return self.classifier

    def features(self, images: Tensor) -> Features:
        """[B, 3, H, W] -> five stages; the last one is the feature map."""
        pooled = [True, True, True, images.shape[2] == 64, False]
        features = images
        stages, preactivations = [], []
        blocks = (self.block0, self.block1, self.block2, self.block3, self.block4)
        for block, pool in zip(blocks, pooled, strict=True):
            before: Tensor = block(features)
            stage = F.relu(before)
            preactivations.append(before)
            stages.append(stage)
            features = F.max_pool2d(stage, 2) if pool else stage
        preactivations[0] = stages[0]  # the stem has no separate pre-activation, in any family
        return Features(tuple(stages), tuple(preactivations), stages[-1])

    def preactivation_norms(self) -> list[str]:
        """The last norm of each block except the stem."""
        blocks = (self.block1, self.block2, self.block3, self.block4)
        return [f"block{number}.{len(block) - 1}" for number, block in enumerate(blocks, 1)]


def _block(in_channels: int, channels: int, num_convolutions: int) -> nn.Sequential:
    """Convolution, norm, ReLU, repeated; `features` applies the last ReLU, so that the keys fit the weights."""
    layers: list[nn.Module] = []
    for _ in range(num_convolutions):
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        in_channels = channels
    return nn.Sequential(*layers[:-1])
