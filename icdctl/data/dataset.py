"""What a data set is to the rest of icdctl: what is asked for, what is known of it, and its images and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LARGEST_SIDE = 4096

UNLABELED = -1
"""The label of an image that has none."""

OnImages = Callable[[int, int | None], None]
"""(images that are decoded, images in all)."""


@dataclass(frozen=True)
class Request:
    """Which images are wanted, and how they are divided. `icdctl.data.request` makes it, with everything checked."""

    name: str
    """A name in `DATASETS`, or `imagefolder:` and an absolute path."""
    folder: Path
    """What holds the folders of published data sets."""
    train_images: int | None = None
    """How many to make; `digits100` alone."""
    test_images: int | None = None
    """Likewise, for testing."""
    image_size: int | None = None
    """Side of the square that images are resized to; `imagefolder` alone."""
    test_split: float | None = None
    """Share of each class for testing, where the folder brings no test images; `imagefolder` alone."""
    skip_broken: bool | None = None
    """Leave out images that can't be decoded; `imagefolder` alone."""
    val_split: float = 0.0
    """Share of each class's training images that is held out for validation."""
    split_seed: int = 0
    """Which images are held out, for validation and for testing."""
    room_to_crop: bool = False
    """Keep training images an eighth larger than what a model reads, for crops of changing size."""
    unlabeled: bool = False
    """Bring the images without labels too."""


@dataclass(frozen=True)
class Preprocessing:
    """How an 8-bit RGB image becomes a model's input: resize, divide by 255, subtract the mean, divide by the std."""

    size: tuple[int, int]
    """Height and width of what the model reads."""
    mean: tuple[float, float, float]
    """Of the training set, red, green, blue, in [0, 1]."""
    std: tuple[float, float, float]
    """Of the training set, red, green, blue, in [0, 1]."""
    resize: tuple[int, int] | None = None
    """Height and width that an image is resized to, where `size` is then cut out of its centre."""

    def normalise(self, images: Tensor) -> Tensor:
        """Bit for bit what torchvision's ToTensor and Normalize give.

        Args:
            images: [B, H, W, 3] uint8.

        Returns:
            [B, 3, H, W] float32, channels last in memory.
        """
        return self.normaliser(images.device)(images)

    def normaliser(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """`normalise` for images on one device, with its numbers there already: a call copies nothing to it."""
        mean, std = torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)
        return lambda images: ((images.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2)

    def as_json(self) -> dict[str, Any]:
        """A plain value for metadata."""
        stated = {"colour": "RGB", "size": list(self.size), "mean": list(self.mean), "std": list(self.std)}
        return stated if self.resize is None else {**stated, "resize": list(self.resize)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `as_json`.

        Raises:
            KeyError, TypeError, ValueError: it is not what `as_json` made.
        """
        height, width = (int(side) for side in value["size"])
        resize = None
        if "resize" in value:
            resized_height, resized_width = (int(side) for side in value["resize"])
            resize = (resized_height, resized_width)
            if not (height <= resized_height <= _LARGEST_SIDE and width <= resized_width <= _LARGEST_SIDE):
                raise ValueError(f"{height} x {width} can't be cut out of {resized_height} x {resized_width}")
        red_mean, green_mean, blue_mean = (float(number) for number in value["mean"])
        red_std, green_std, blue_std = (float(number) for number in value["std"])
        mean, std = (red_mean, green_mean, blue_mean), (red_std, green_std, blue_std)
        if not (0 < height <= _LARGEST_SIDE and 0 < width <= _LARGEST_SIDE):
            raise ValueError(f"image size {height} x {width}")
        if not all(0 <= number <= 1 for number in mean) or not all(0 < number <= 1 for number in std):
            raise ValueError(f"mean {list(mean)} and std {list(std)} are not those of pixels in [0, 1]")
        return Preprocessing((height, width), mean, std, resize)


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set without its images."""

    name: str
    """As weights and reports say it: a name in `DATASETS`, or `imagefolder:` and the folder's own name."""
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    source: str
    """Where the pixels come from."""
    licence: str
    """What their publisher says on their use."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def weights_metadata(self, model: str) -> dict[str, Any]:
        """The metadata of the weights of a model trained on this data: enough to use them with nothing beside them."""
        return {
            "class_names": list(self.class_names),
            "dataset": self.name,
            "model": model,
            "num_classes": self.num_classes,
            "preprocessing": self.preprocessing.as_json(),
        }


@dataclass(frozen=True)
class Dataset(DatasetInfo):
    """Images and labels, whole, on the CPU, in memory or in memory-mapped files."""

    train_images: Tensor
    """[N, H, W, 3] uint8, of the size that the model reads or larger, for crops."""
    train_labels: Tensor
    """[N] int64; `UNLABELED` for images without one."""
    test_images: Tensor
    """[M, H, W, 3] uint8, of the size that the model reads."""
    test_labels: Tensor
    """[M] int64."""
    sha256: str
    """Of all pixels and labels."""
    val_images: Tensor | None = None
    """[V, H, W, 3] uint8, of the size that the model reads; None where nothing is held out for validation."""
    val_labels: Tensor | None = None
    """[V] int64."""
    caveat: str | None = None
    """What a reader of the results must know of these files."""
    notes: tuple[str, ...] = ()
    """What a person who starts a run should know of how the images are used."""
    skipped_images: int = 0
    """Left out because they can't be decoded."""

    @property
    def has_unlabeled(self) -> bool:
        """Whether training images without a label are among them."""
        return bool((self.train_labels == UNLABELED).any())
