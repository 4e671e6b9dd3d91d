"""digits100: an embedded data set, shaped like CIFAR-100, that needs no download.

Each image shows two real handwritten digits side by side on a coloured, cluttered background; the class is the
two-digit number that they spell. The digits are the 8x8 images of "Optical Recognition of Handwritten Digits" from
scikit-learn; only their composition is synthetic. Training and test images use different source digits (but maybe of
the same writers, whom the source does not name).

Only uniform draws and elementwise arithmetic are used, so that every machine makes the same bytes, and image n is the
same however many images are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from icdctl import files
from icdctl.data.assemble import fingerprint, of_halves
from icdctl.data.dataset import Dataset, DatasetInfo, OnImages, Preprocessing, Request

SIDE = 32
NUM_CLASSES = 100
CLASS_NAMES = tuple(f"{number:02d}" for number in range(NUM_CLASSES))
MEAN = (0.310, 0.310, 0.310)
STD = (0.187, 0.187, 0.187)
SOURCE = "composed of the handwritten digits of UCI Optical Recognition of Handwritten Digits, from scikit-learn"
LICENCE = "CC BY 4.0 (Alpaydin and Kaynak, 1998, https://doi.org/10.24432/C50P49)"
RECIPE_VERSION = 1
"""Version of the pixels, part of the cache file's name: raise it whenever they change."""
DESCRIPTION = DatasetInfo("digits100", CLASS_NAMES, Preprocessing((SIDE, SIDE), MEAN, STD), SOURCE, LICENCE)

_CLUTTER_OPACITY = 0.3
_NOISE_STD = 0.04

_Pixels = npt.NDArray[np.uint8]
_Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DigitImages:
    """Images [N, 32, 32, 3] uint8 and labels [N] int64, for training or for testing."""

    images: _Pixels
    labels: _Labels


def load(wanted: Request, on_images: OnImages) -> Dataset:
    """Read the images from the cache, or make them (in about two seconds) and cache them."""
    train_images, test_images = int(wanted.train_images or 0), int(wanted.test_images or 0)
    name = f"digits100-v{RECIPE_VERSION}-{train_images}-{test_images}.safetensors"
    path = files.cache_folder() / name
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    tensors, sha256 = _read_cache(path, keys)
    if not tensors or fingerprint(*tensors) != sha256:  # absent or damaged
        train = make_images(train_images, seed=1, test=False)
        test = make_images(test_images, seed=2, test=True)
        arrays = (train.images, train.labels, test.images, test.labels)
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        sha256 = fingerprint(*tensors)
        files.write_bytes(path, save(dict(zip(keys, tensors, strict=True)), metadata={"sha256": sha256}))
    return of_halves(DESCRIPTION, tensors, wanted, sha256=sha256)


def _read_cache(path: Path, keys: Sequence[str]) -> tuple[tuple[Tensor, ...], str]:
    """The tensors of a cache file and the hash in its metadata; `((), "")` where it can't be read."""
    try:
        tensors, texts = files.read_tensors(path, most_bytes=files.LARGEST_FOREIGN_BYTES)
        found = tuple(tensors[key] for key in keys), texts["sha256"]
    except (OSError, KeyError, ValueError):
        return (), ""
    files.mark_used(path)
    return found


def make_images(num_images: int, *, seed: int, test: bool) -> DigitImages:
    """Compose images for training or testing; each run of 100 images holds every class once.

    Args:
        num_images: N.
        seed: seed of the composition.
        test: use the source digits that are reserved for testing, one in five.
    """
    pool = _digit_pool(test)
    random = np.random.RandomState(seed)
    images = np.empty((num_images, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.empty(num_images, dtype=np.int64)
    order = np.empty(0, dtype=np.int64)
    for position in range(num_images):
        if position % NUM_CLASSES == 0:
            order = random.permutation(NUM_CLASSES)
        label = int(order[position % NUM_CLASSES])
        images[position] = _compose(label, pool, random)
        labels[position] = label
    return DigitImages(images, labels)


def _digit_pool(test: bool) -> list[list[Image.Image]]:
    """The source digits by class, 0 to 9, as 8x8 grey images."""
    from sklearn.datasets import load_digits

    flat_images, digit_of = load_digits(return_X_y=True)
    pixels = (flat_images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    pool: list[list[Image.Image]] = [[] for _ in range(10)]
    for index, (image, digit) in enumerate(zip(pixels, digit_of, strict=True)):
        if (index % 5 == 4) == test:
            pool[int(digit)].append(Image.fromarray(image))
    return pool


def _compose(label: int, pool: list[list[Image.Image]], random: np.random.RandomState) -> _Pixels:
    """One image: background, clutter, the left and the right digit, noise."""
    canvas = _background(random)
    for _ in range(random.randint(2, 5)):
        _paste_clutter(canvas, pool, random)
    half = SIDE // 2
    for digit, left_edge in ((label // 10, 0), (label % 10, half)):
        source = pool[digit][random.randint(len(pool[digit]))]
        width, height = random.randint(11, 17), random.randint(13, 21)
        top = random.randint(0, SIDE - height + 1)
        left = left_edge + random.randint(0, half - width + 1)
        _blend(canvas, _resized(source, width, height), top, left, random.uniform(0.6, 1.0, 3))
    # The sum of four uniform draws is nearly normal, and the same on every machine.
    noise = random.randint(0, 256, (4, SIDE, SIDE, 3)).sum(axis=0) / 255.0 - 2.0
    noisy = canvas + noise * (_NOISE_STD * 3.0**0.5)
    pixels: _Pixels = (noisy.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return pixels


def _background(random: np.random.RandomState) -> npt.NDArray[np.float64]:
    """A dark gradient between two colours, across or down: [32, 32, 3]."""
    first, last = random.uniform(0.0, 0.45, (2, 3))
    ramp = np.arange(SIDE)[:, None, None] / (SIDE - 1)
    gradient = np.broadcast_to(first + ramp * (last - first), (SIDE, SIDE, 3))
    return np.array(gradient if random.randint(2) else gradient.transpose(1, 0, 2))


def _paste_clutter(
    canvas: npt.NDArray[np.float64], pool: list[list[Image.Image]], random: np.random.RandomState
) -> None:
    """Paint a faint part of a random digit at a random place, in place."""
    digits = pool[random.randint(10)]
    digit = _resized(digits[random.randint(len(digits))], 16, 16)
    height, width = random.randint(5, 11, 2)
    part = digit[(16 - height) // 2 :, (16 - width) // 2 :][:height, :width]
    top, left = random.randint(0, SIDE - height + 1), random.randint(0, SIDE - width + 1)
    _blend(canvas, part * _CLUTTER_OPACITY, top, left, random.uniform(0.3, 1.0, 3))


def _resized(digit: Image.Image, width: int, height: int) -> npt.NDArray[np.float64]:
    """A digit as opacity in [0, 1]: [height, width]."""
    return np.asarray(digit.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64) / 255.0


def _blend(
    canvas: npt.NDArray[np.float64],
    opacity: npt.NDArray[np.float64],
    top: int,
    left: int,
    colour: npt.NDArray[np.float64],
) -> None:
    """Paint `colour` through `opacity` [h, w] at (top, left), in place."""
    height, width = opacity.shape
    area = canvas[top : top + height, left : left + width]
    area += opacity[:, :, None] * (colour - area)
