"""The order of images in an epoch, their random crops and flips, and the pixels of such views.

Order, crops and flips are functions of (seed, epoch) alone, drawn by a generator on the CPU. So a CPU, any GPU and any
number of students see the same views, and a resumed run continues with them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from icdctl.data.dataset import Preprocessing

_CROP_ATTEMPTS = 10
"""Boxes drawn for one crop; the first that lies inside the image is used."""


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed each time they are seen."""

    crop_padding: int = 0
    """Zeros added on each side, in pixels, before a crop back to the input's size."""
    flip: bool = False
    """Mirror half of the views."""
    crop_scale: tuple[float, float] | None = None
    """Least and greatest share of the image's area for a crop that is resized to the input; None for crops of one
    size."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width divided by height of such a crop."""
    randaugment_ops: int = 0
    """Random changes of colour and shape per view, one after the other; 0 for none."""
    randaugment_magnitude: int = 9
    """Strength of these changes, 0 to 30."""


@dataclass(frozen=True)
class Views:
    """Views of images: entry i is image `index[i]`, cropped at (`top[i]`, `left[i]`), flipped, then augmented."""

    index: Tensor
    """[N] int64."""
    top: Tensor
    """[N] int64: the crop's first row in the padded image."""
    left: Tensor
    """[N] int64: the crop's first column in the padded image."""
    flip: Tensor
    """[N] bool."""
    box: Tensor | None = None
    """[N, 2] int64: height and width of the crop before it is resized; None where all have the size of the input."""
    key: Tensor | None = None
    """[N] int64: the seed of each view's random augmentation; None where there is none."""

    def __len__(self) -> int:
        return self.index.shape[0]

    def __getitem__(self, part: slice | Tensor) -> Views:
        """Some of the views: a slice, or [M] int64 positions on the views' device; seeds allow a slice only."""
        if self.key is not None and not isinstance(part, slice):
            raise ValueError("views with seeds of random augmentation can only be sliced: the seeds stay on the CPU")
        box = None if self.box is None else self.box[part]
        key = self.key[part] if self.key is not None and isinstance(part, slice) else None
        return Views(self.index[part], self.top[part], self.left[part], self.flip[part], box, key)

    def to(self, device: torch.device) -> Views:
        """The same views on a device; the seeds stay on the CPU, where they are used."""
        box = None if self.box is None else self.box.to(device)
        index, top, left, flip = (field.to(device) for field in (self.index, self.top, self.left, self.flip))
        return Views(index, top, left, flip, box, self.key)

    def copy_(self, other: Views) -> None:
        """Overwrite these views in place by as many others from the CPU; does not wait for a CUDA device."""
        for name in ("index", "top", "left", "flip", "box"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine.copy_(theirs.pin_memory() if mine.is_cuda else theirs, non_blocking=True)


class ImageStore:
    """Training images resident on a device as uint8, and the normalised pixels of any views of them."""

    def __init__(
        self, images: Tensor, preprocessing: Preprocessing, augmentation: Augmentation, *, device: torch.device
    ) -> None:
        """
        Args:
            images: [N, H, W, 3] uint8, as large as the model's input or larger.
            preprocessing: the data set's preprocessing.
            augmentation: the run's augmentation.
            device: where the pixels stay.

        Raises:
            ValueError: the images are smaller than the input.
        """
        self.height, self.width = preprocessing.size
        padding = augmentation.crop_padding
        self.num_images = images.shape[0]
        self._padding = padding
        self._spare = (images.shape[1] - self.height, images.shape[2] - self.width)
        if min(self._spare) < 0:
            raise ValueError(f"images are {list(images.shape[1:3])}, the input is {list(preprocessing.size)}")
        held = images.to(device)
        # Without padding, memory-mapped images are used as they are, not copied into memory.
        self._images = F.pad(held, (0, 0, padding, padding, padding, padding)) if padding else held
        self._normalise = preprocessing.normaliser(device)
        self._augmentation = augmentation
        self._rows = torch.arange(self.height, device=device)
        self._columns = torch.arange(self.width, device=device)
        self.device = device

    @property
    def num_views(self) -> int | None:
        """Number of distinct views of one image; None where they are too many to count."""
        augmentation = self._augmentation
        if augmentation.crop_scale is not None or augmentation.randaugment_ops:
            return None
        down, right = self._margins
        return (down + 1) * (right + 1) * (2 if augmentation.flip else 1)

    @property
    def fingerprint(self) -> str:
        """A text that names everything that decides which views there are, except the pixels."""
        return f"{tuple(self._images.shape[1:3])} {(self.height, self.width)} {self._augmentation}"

    @property
    def _margins(self) -> tuple[int, int]:
        """The largest `top` and `left` of a crop of the input's size."""
        return self._spare[0] + 2 * self._padding, self._spare[1] + 2 * self._padding

    def epoch(self, *, seed: int, epoch: int) -> Views:
        """The views of one epoch, on the CPU: every image once, in random order, randomly cropped and flipped.

        Args:
            seed: the run's seed.
            epoch: number of the epoch, from 1.
        """
        generator = _generator(f"icdctl views {seed} {epoch}")
        return self._drawn(torch.randperm(self.num_images, generator=generator), generator)

    def epoch_of_many(self, *, seed: int, epoch: int, num_views: int, batch_size: int) -> Views:
        """The views of one epoch whose batches have several views of each image, on the CPU.

        Args:
            seed: the run's seed.
            epoch: number of the epoch, from 1.
            num_views: V, views of an image.
            batch_size: B, images in a batch.

        Returns:
            [V * N] views: batch after batch, in each all first views, then all second ones, ... The first views and
            the order of the images are those of `epoch`.
        """
        first = self.epoch(seed=seed, epoch=epoch)
        if num_views == 1:
            return first
        others = (
            self._drawn(first.index, _generator(f"icdctl views {seed} {epoch} {number}"))
            for number in range(1, num_views)
        )
        return _batched([first, *others], batch_size)

    def _drawn(self, index: Tensor, generator: torch.Generator) -> Views:
        """One view, drawn at random, of each of these images: [N] int64."""
        augmentation, count = self._augmentation, self.num_images
        # Drawn even where the recipe has no crop or flip, so that switching one off does not change the other draws.
        unit = torch.rand((3, count), generator=generator, dtype=torch.float64)
        room = torch.tensor([[margin + 1] for margin in self._margins])
        box, key = None, None
        if augmentation.crop_scale is not None:
            box = _boxes(self._images.shape[1:3], count, augmentation.crop_scale, augmentation.crop_ratio, generator)
            room = torch.tensor(self._images.shape[1:3])[:, None] - box.T + 1
        if augmentation.randaugment_ops:
            key = torch.randint(2**62, (count,), generator=generator)
        offsets = (unit[:2] * room).long()
        return Views(index, offsets[0], offsets[1], (unit[2] < 0.5) & augmentation.flip, box, key)

    def numbered(self, numbers: Tensor) -> Views:
        """The views with these numbers; views of one image have consecutive numbers.

        Args:
            numbers: [N] int64, on the CPU, 0 to `num_images * num_views - 1`.

        Raises:
            ValueError: the views are too many to count.
        """
        if self.num_views is None:
            raise ValueError("these views have no numbers")
        sides = 2 if self._augmentation.flip else 1
        across = self._margins[1] + 1
        index, place = numbers // self.num_views, numbers % self.num_views
        top, left, flip = place // (across * sides), place // sides % across, place % sides
        return Views(index, top, left, flip.bool())

    def numbers(self, views: Views) -> Tensor:
        """The inverse of `numbered`: [N] int64, on the views' device."""
        sides = 2 if self._augmentation.flip else 1
        across = self._margins[1] + 1
        place = (views.top * across + views.left) * sides
        return views.index * (self.num_views or 1) + (place + views.flip if sides == 2 else place)

    def pixels(self, views: Views) -> Tensor:
        """The raw pixels of views on the store's device: [B, H, W, 3] uint8."""
        pixels = self._cut(views) if views.box is None else self._cut_and_resized(views, views.box)
        if views.key is not None:
            pixels = self._randomly_augmented(pixels, views.key)
        return pixels

    def inputs(self, views: Views) -> Tensor:
        """The model's input for views: [B, 3, H, W] float32, normalised, channels last in memory."""
        return self._normalise(self.pixels(views))

    def _cut(self, views: Views) -> Tensor:
        columns = torch.where(views.flip[:, None], self.width - 1 - self._columns, self._columns)  # [B, W]
        rows = views.top[:, None] + self._rows  # [B, H]
        columns = views.left[:, None] + columns
        return self._images[views.index[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _cut_and_resized(self, views: Views, box: Tensor) -> Tensor:
        """Bilinear, without an antialiasing filter: the stored images are hardly larger than the input."""
        images = self._images[views.index].permute(0, 3, 1, 2).float()  # [B, 3, H, W]
        rows = _sample_positions(views.top, box[:, 0], self._rows, images.shape[2])  # [B, H]
        columns = _sample_positions(views.left, box[:, 1], self._columns, images.shape[3])  # [B, W]
        columns = torch.where(views.flip[:, None], columns.flip(1), columns)
        shape = (len(views), self.height, self.width)
        grid = torch.stack((columns[:, None, :].expand(shape), rows[:, :, None].expand(shape)), dim=3)
        cut = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return cut.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def _randomly_augmented(self, pixels: Tensor, key: Tensor) -> Tensor:
        """RandAugment with one seed per view, so that a view's pixels do not depend on its batch.

        Source: Cubuk et al. 2020, https://arxiv.org/abs/1909.13719
        """
        from torchvision.transforms.v2 import RandAugment  # here, not above: it takes a second, and few runs need it

        augmentation = self._augmentation
        transform = RandAugment(augmentation.randaugment_ops, augmentation.randaugment_magnitude)
        changed = torch.empty_like(pixels)
        with torch.random.fork_rng(devices=[]):
            for place, seed in enumerate(key.tolist()):
                torch.manual_seed(seed)
                changed[place] = transform(pixels[place].permute(2, 0, 1)).permute(1, 2, 0)
        return changed


def _generator(purpose: str) -> torch.Generator:
    """A generator on the CPU for one purpose."""
    digest = hashlib.sha256(purpose.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _batched(several: list[Views], batch_size: int) -> Views:
    """Views of the same images [N] each, a batch of all of them after the other: [V * N]."""
    count = len(several[0])
    position = torch.arange(count)
    order = torch.cat(
        [
            position[first : first + batch_size] + number * count
            for first in range(0, count, batch_size)
            for number in range(len(several))
        ]
    )

    def joined(fields: list[Tensor | None]) -> Tensor | None:
        held = [field for field in fields if field is not None]
        return torch.cat(held)[order] if held else None

    index, top, left, flip = (
        torch.cat([getattr(views, name) for views in several])[order] for name in ("index", "top", "left", "flip")
    )
    box, key = joined([views.box for views in several]), joined([views.key for views in several])
    return Views(index, top, left, flip, box, key)


def _boxes(
    image: torch.Size,
    count: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Height and width of random crops, uniform in area and in the logarithm of the ratio: [N, 2] int64.

    Source: torchvision's RandomResizedCrop; where no attempt fits, the whole image is used.
    """
    height, width = image
    unit = torch.rand((2, count, _CROP_ATTEMPTS), generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + unit[0] * (scale[1] - scale[0]))
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    by_height = torch.exp(log_low + unit[1] * (log_high - log_low))
    attempts = torch.stack((torch.sqrt(area / by_height), torch.sqrt(area * by_height)), dim=2).round().long()
    fits = ((attempts >= 1) & (attempts <= torch.tensor([height, width]))).all(dim=2)
    first = fits.long().argmax(dim=1)
    chosen = attempts[torch.arange(count), first]
    return torch.where(fits.any(dim=1)[:, None], chosen, torch.tensor([height, width]))


def _sample_positions(start: Tensor, length: Tensor, target: Tensor, whole: int) -> Tensor:
    """Centres of the target's pixels in a crop, in grid_sample's coordinates of -1 to 1: [B], [B], [T] -> [B, T]."""
    centres = start[:, None] + (target + 0.5) * (length / target.shape[0])[:, None]
    return (2 * centres / whole - 1).float()
