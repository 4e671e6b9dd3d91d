"""Which image, crop and flip stand at each position of an epoch, and the pixels of such views.

Order, crops and flips are functions of (seed, epoch) alone, drawn by a generator on the CPU: a CPU, any GPU and any
number of students see the same stream, and a resumed run continues it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from icdctl.data.dataset import Preprocessing


@dataclass(frozen=True)
class Views:
    """Views of images: entry i is image `index[i]`, cropped at (`top[i]`, `left[i]`) once padded, then flipped."""

    index: Tensor
    """[N] int64."""
    top: Tensor
    """[N] int64, 0 to 2 * crop_padding."""
    left: Tensor
    """[N] int64, 0 to 2 * crop_padding."""
    flip: Tensor
    """[N] bool."""

    def __len__(self) -> int:
        return self.index.shape[0]

    def __getitem__(self, part: slice) -> Views:
        return Views(self.index[part], self.top[part], self.left[part], self.flip[part])

    def to(self, device: torch.device) -> Views:
        """The same views on a device."""
        return Views(*(field.to(device) for field in (self.index, self.top, self.left, self.flip)))


def epoch_views(num_images: int, *, seed: int, epoch: int, crop_padding: int, flip: bool) -> Views:
    """One epoch: every image once, in random order, each with its own crop and flip.

    Args:
        num_images: N.
        seed: of the run.
        epoch: counted from 1.
        crop_padding: zeros on each side before cropping back to size; 0 for no crop.
        flip: mirror half of the views.
    """
    digest = hashlib.sha256(f"icdctl views {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    index = torch.randperm(num_images, generator=generator)
    # Drawn even where the recipe has no crop or flip, so that switching one off leaves the order as it is.
    unit = torch.rand((3, num_images), generator=generator, dtype=torch.float64)
    offsets = (unit[:2] * (2 * crop_padding + 1)).long()
    return Views(index, offsets[0], offsets[1], (unit[2] < 0.5) & flip)


def plain_views(num_images: int, *, crop_padding: int) -> Views:
    """Every image once, in order, as it is: the centre of its padded self."""
    centre = torch.full((num_images,), crop_padding)
    return Views(torch.arange(num_images), centre, centre, torch.zeros(num_images, dtype=torch.bool))


class ImageStore:
    """Training images resident on a device as uint8, and the normalised pixels of any views of them."""

    def __init__(
        self, images: Tensor, preprocessing: Preprocessing, *, crop_padding: int, device: torch.device
    ) -> None:
        """
        Args:
            images: [N, H, W, 3] uint8.
            preprocessing: of the data set.
            crop_padding: zeros added on each side, once.
            device: where the pixels stay.
        """
        self.height, self.width = images.shape[1:3]
        sides = (0, 0, crop_padding, crop_padding, crop_padding, crop_padding)
        self._padded = F.pad(images.to(device), sides)  # [N, H + 2p, W + 2p, 3]
        self._preprocessing = preprocessing
        self._rows = torch.arange(self.height, device=device)
        self._columns = torch.arange(self.width, device=device)
        self.device = device

    def pixels(self, views: Views) -> Tensor:
        """The raw pixels of views on the store's device: [B, H, W, 3] uint8."""
        columns = torch.where(views.flip[:, None], self.width - 1 - self._columns, self._columns)  # [B, W]
        rows = views.top[:, None] + self._rows  # [B, H]
        columns = views.left[:, None] + columns
        return self._padded[views.index[:, None, None], rows[:, :, None], columns[:, None, :]]

    def inputs(self, views: Views) -> Tensor:
        """What a model reads: [B, 3, H, W] float32, channels last in memory."""
        return self._preprocessing.normalise(self.pixels(views))
