"""What a data set is to the rest of icdctl: whole images in memory, labels, and how pixels become input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LARGEST_SIDE = 4096


@dataclass(frozen=True)
class Preprocessing:
    """How an 8-bit RGB image becomes a model's input: resize, divide by 255, subtract the mean, divide by the std."""

    size: tuple[int, int]
    """Height and width."""
    mean: tuple[float, float, float]
    """Of the training set, red, green, blue, in [0, 1]."""
    std: tuple[float, float, float]
    """Of the training set, red, green, blue, in [0, 1]."""

    def normalise(self, images: Tensor) -> Tensor:
        """Bit for bit what torchvision's ToTensor and Normalize give.

        Args:
            images: [B, H, W, 3] uint8.

        Returns:
            [B, 3, H, W] float32, channels last in memory.
        """
        mean = torch.tensor(self.mean, device=images.device)
        std = torch.tensor(self.std, device=images.device)
        return ((images.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2)

    def as_json(self) -> dict[str, Any]:
        """A plain value for metadata."""
        return {"colour": "RGB", "size": list(self.size), "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `as_json`.

        Raises:
            KeyError, TypeError, ValueError: it is not what `as_json` made.
        """
        height, width = (int(side) for side in value["size"])
        red_mean, green_mean, blue_mean = (float(number) for number in value["mean"])
        red_std, green_std, blue_std = (float(number) for number in value["std"])
        mean, std = (red_mean, green_mean, blue_mean), (red_std, green_std, blue_std)
        if not (0 < height <= _LARGEST_SIDE and 0 < width <= _LARGEST_SIDE):
            raise ValueError(f"image size {height} x {width}")
        if not all(0 <= number <= 1 for number in mean) or not all(0 < number <= 1 for number in std):
            raise ValueError(f"mean {list(mean)} and std {list(std)} are not those of pixels in [0, 1]")
        return Preprocessing((height, width), mean, std)


@dataclass(frozen=True)
class Dataset:
    """Images and labels, whole, on the CPU."""

    name: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    train_images: Tensor
    """[N, H, W, 3] uint8."""
    train_labels: Tensor
    """[N] int64."""
    test_images: Tensor
    """[M, H, W, 3] uint8."""
    test_labels: Tensor
    """[M] int64."""
    source: str
    """Where the pixels come from."""
    licence: str
    """What their publisher says on their use."""
    sha256: str
    """Of pixels and labels, train then test."""
    caveat: str | None = None
    """What a reader of the results must know of these files."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)
