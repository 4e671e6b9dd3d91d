"""The types of a data set: what a caller asks for, what is known without images, and the images with their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icdctl.data.names import DatasetName
from icdctl.data.part_files import PartFiles
from icdctl.data.split_record import METADATA_KEY, SplitRecord, seen_test_images

_LARGEST_SIDE = 4096

UNLABELED = -1
"""The label of an image that has none."""

OnImages = Callable[[int, int | None], None]
"""Called with (images decoded so far, images in all)."""


@dataclass(frozen=True)
class Request:
    """Which images are wanted and how they are divided; `icdctl.config.dataset_request` checks it all and makes one."""

    name: str
    """A name in `DATASETS`, or `imagefolder:` and an absolute path."""
    folder: Path
    """The folder that holds the folders of published data sets."""
    train_images: int | None = None
    """Training images to make; only `digits100` has this setting."""
    test_images: int | None = None
    """Test images to make; only `digits100` has this setting."""
    image_size: int | None = None
    """Side in pixels of the square that images are resized to; only `imagefolder` has this setting."""
    test_split: float | None = None
    """Share of each class for testing where the folder has no test images; only `imagefolder` has this setting."""
    skip_broken: bool | None = None
    """Leave out images that can't be decoded; only `imagefolder` has this setting."""
    val_split: float = 0.0
    """Share of each class's training images that is held out for validation."""
    split_seed: int = 0
    """Seed that decides which images are held out, for validation and for testing."""
    room_to_crop: bool = False
    """Keep training images about an eighth larger than the model's input, for crops of varying size."""
    unlabeled: bool = False
    """Load the images without labels too."""


@dataclass(frozen=True)
class Preprocessing:
    """How an 8-bit RGB image becomes a model's input: resize, divide by 255, subtract the mean, divide by the std."""

    size: tuple[int, int]
    """Height and width of the model's input, in pixels."""
    mean: tuple[float, float, float]
    """Mean of red, green and blue over the training set, for pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of red, green and blue over the training set, for pixels in [0, 1]."""
    resize: tuple[int, int] | None = None
    """Height and width that an image is resized to before `size` is cropped from its centre; None without a crop."""

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images exactly, bit for bit, as torchvision's ToTensor and Normalize do.

        Args:
            images: [B, H, W, 3] uint8.

        Returns:
            [B, 3, H, W] float32, channels last in memory.
        """
        return self.normaliser(images.device)(images)

    def normaliser(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """`normalise` for images on one device; mean and std are there already, so a call copies nothing to it."""
        mean, std = torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)
        return lambda images: ((images.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2)

    def as_json(self) -> dict[str, object]:
        """The JSON object that metadata hold."""
        stated: dict[str, object] = {
            "colour": "RGB",
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
        }
        return stated if self.resize is None else {**stated, "resize": list(self.resize)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Preprocessing:
        """Read back what `as_json` gave.

        Raises:
            KeyError, TypeError, ValueError: `value` is not what `as_json` gives.
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
    """The public name, for weights and reports: a name in `DATASETS`, or `imagefolder:` and the folder's last part."""
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    source: str
    """Where the pixels come from."""
    licence: str
    """What the publisher says about their use."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def weights_metadata(self, model: str) -> dict[str, object]:
        """The metadata for weights of a model trained on this data: enough to use the weights file by itself."""
        return {
            "class_names": list(self.class_names),
            "dataset": self.name,
            "model": model,
            "num_classes": self.num_classes,
            "preprocessing": self.preprocessing.as_json(),
        }


@dataclass(frozen=True)
class Dataset(DatasetInfo):
    """All images and labels, on the CPU, in memory or in memory-mapped files."""

    train_images: Tensor
    """[N, H, W, 3] uint8, of the model's input size, or larger for crops."""
    train_labels: Tensor
    """[N] int64; `UNLABELED` for images without a label."""
    test_images: Tensor
    """[M, H, W, 3] uint8, of the model's input size."""
    test_labels: Tensor
    """[M] int64."""
    sha256: str
    """Hash of all pixels and labels."""
    val_images: Tensor | None = None
    """[V, H, W, 3] uint8, of the model's input size; None where nothing is held out for validation."""
    val_labels: Tensor | None = None
    """[V] int64; None where nothing is held out for validation."""
    caveat: str | None = None
    """What readers of the results must know about these files; None where they are as published."""
    notes: tuple[str, ...] = ()
    """What users should know, at the start of a run, about how the images are used."""
    warnings: tuple[str, ...] = ()
    """What makes results doubtful, such as an image that is for training and for testing."""
    skipped_images: int = 0
    """Number of images left out because they can't be decoded."""
    split: SplitRecord | None = None
    """How the images are divided; None for data sets that were not loaded by `icdctl.data.load`."""
    parts: tuple[PartFiles, ...] = field(default=(), repr=False)
    """The image files of each part; empty for published data sets."""

    def weights_metadata(self, model: str) -> dict[str, object]:
        """See `DatasetInfo.weights_metadata`; with the record of the split, which says what it was trained on."""
        split = {} if self.split is None else {METADATA_KEY: self.split.as_json()}
        return {**super().weights_metadata(model), **split}

    def seen_by(self, label: str, dataset: str | None, trained: SplitRecord | None) -> str | None:
        """What to say about test images that a model was trained on, or may have been; None where there are none.

        Test images of published data sets are nobody's training images.

        Args:
            label: the model in the message, e.g. "teacher `runs/t`".
            dataset: the public name of the data set that it was trained on; None where that is not known.
            trained: how the images were divided when it was trained; None where its weights do not say it.
        """
        same_kind = dataset is None or DatasetName.parse(dataset).kind == DatasetName.parse(self.name).kind
        if not self.parts or self.split is None or not same_kind:
            return None
        return seen_test_images(label, trained, self.split, self.parts, dataset=self.name)

    @property
    def has_unlabeled(self) -> bool:
        """Whether some training images have no label."""
        return bool((self.train_labels == UNLABELED).any())
