"""Data sets and views: real crops and flips, the embedded digits, and a CIFAR-100 archive of generated images."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from icdctl import data, files
from icdctl.config.dataset_request import dataset_request
from icdctl.data import Augmentation, ImageStore, Preprocessing, Views, cifar100, digits100
from icdctl.errors import ArtifactError, UsageError

PREPROCESSING = Preprocessing((32, 32), cifar100.MEAN, cifar100.STD)
CPU = torch.device("cpu")
PADDED = Augmentation(crop_padding=4, flip=True)


def images(count: int, *, height: int = 32, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def store_of(count: int, augmentation: Augmentation, *, side: int = 4) -> ImageStore:
    """Of small images, where only the views are of interest."""
    preprocessing = Preprocessing((side, side), cifar100.MEAN, cifar100.STD)
    return ImageStore(images(count, height=side, width=side), preprocessing, augmentation, device=CPU)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_views_are_bit_identical_to_torchvisions_crop_flip_and_normalise(size: tuple[int, int]) -> None:
    pixels = images(60, height=size[0], width=size[1])
    store = ImageStore(pixels, Preprocessing(size, cifar100.MEAN, cifar100.STD), PADDED, device=CPU)
    views = store.epoch(seed=3, epoch=2)
    found = store.inputs(views)
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize(cifar100.MEAN, cifar100.STD)])
    assert found.is_contiguous(memory_format=torch.channels_last)
    for place in range(60):
        picture = Image.fromarray(pixels[views.index[place]].numpy())
        padded = functional.pad(picture, [4])
        cropped = functional.crop(padded, int(views.top[place]), int(views.left[place]), *size)
        flipped = functional.hflip(cropped) if views.flip[place] else cropped
        assert torch.equal(found[place], convert(flipped))


def test_an_epoch_shows_every_image_once_with_fair_crops_and_flips() -> None:
    views = store_of(20_000, PADDED).epoch(seed=0, epoch=1)
    assert torch.equal(views.index.sort().values, torch.arange(20_000))
    assert not torch.equal(views.index, torch.arange(20_000))
    for offsets in (views.top, views.left):
        counts = torch.bincount(offsets, minlength=9).double()
        expected = 20_000 / 9
        assert counts.shape == (9,)
        assert ((counts - expected) ** 2 / expected).sum() < 26.1  # chi-square, 8 degrees of freedom, p = 0.001
    assert abs(views.flip.double().mean().item() - 0.5) < 0.015


def test_order_crops_and_flips_are_functions_of_seed_and_epoch_alone() -> None:
    def drawn(seed: int, epoch: int, *, padding: int = 4, flip: bool = True) -> Views:
        torch.manual_seed(torch.seed() % 1000)  # whatever the global state is
        return store_of(500, Augmentation(crop_padding=padding, flip=flip)).epoch(seed=seed, epoch=epoch)

    first, again = drawn(1, 1), drawn(1, 1)
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("index", "top", "left", "flip"))
    assert not torch.equal(first.index, drawn(2, 1).index)
    assert not torch.equal(first.index, drawn(1, 2).index)
    assert torch.equal(first.index, drawn(1, 1, padding=0, flip=False).index)
    assert not drawn(1, 1, flip=False).flip.any()
    assert not drawn(1, 1, padding=0).top.any()


def test_plain_views_are_the_images_as_they_are() -> None:
    pixels = images(5)
    store = ImageStore(pixels, PREPROCESSING, PADDED, device=CPU)
    assert torch.equal(store.pixels(store.numbered(torch.arange(5) * 162 + (4 * 9 + 4) * 2)), pixels)


def test_digits100_is_balanced_deterministic_and_disjoint() -> None:
    train = digits100.make_images(300, seed=1, test=False)
    assert np.bincount(train.labels).tolist() == [3] * 100
    longer = digits100.make_images(400, seed=1, test=False)
    assert np.array_equal(longer.images[:300], train.images)
    digest = hashlib.sha256(train.images.tobytes()).hexdigest()
    assert digest.startswith("9d52a6cbfa4d686e")
    train_pool, test_pool = digits100._digit_pool(False), digits100._digit_pool(True)
    assert sum(map(len, train_pool)) + sum(map(len, test_pool)) == 1797
    held = {digit.tobytes() for digits in train_pool for digit in digits}
    shared = sum(digit.tobytes() in held for digits in test_pool for digit in digits)
    assert shared == 0


def test_digits100_is_cached_and_a_damaged_cache_is_made_anew() -> None:
    first = data.load(dataset_request("digits100", train_images=100, test_images=100))
    cache = files.state_folder() / "cache" / "digits100-v1-100-100.safetensors"
    content = bytearray(cache.read_bytes())
    content[-5] ^= 255  # a flipped byte among the pixels, which the format itself does not notice
    cache.write_bytes(bytes(content))
    again = data.load(dataset_request("digits100", train_images=100, test_images=100))
    assert again.sha256 == first.sha256
    assert torch.equal(again.train_images, first.train_images)
    assert torch.equal(again.test_labels, first.test_labels)
    cache.write_bytes(b"nothing of use")
    assert data.load(dataset_request("digits100", train_images=100, test_images=100)).sha256 == first.sha256


def test_sizes_are_settings_of_digits100_alone() -> None:
    assert data.load(dataset_request("digits100", train_images=7, test_images=3)).train_images.shape == (7, 32, 32, 3)
    with pytest.raises(UsageError, match="`train_images` is `0`"):
        data.load(dataset_request("digits100", train_images=0))
    with pytest.raises(UsageError, match="no such setting"):
        data.load(dataset_request("cifar100", train_images=10))
    with pytest.raises(UsageError, match="unknown data set `cifar10`"):
        data.load(dataset_request("cifar10"))


def write_cifar(folder: Path, *, train: int = 200, test: int = 100) -> None:
    """A folder in the format of CIFAR-100's python version, of generated images."""
    (folder / cifar100.FOLDER).mkdir(parents=True)
    for seed, (split, count) in enumerate((("train", train), ("test", test))):
        random = np.random.RandomState(seed)
        content: dict[bytes, Any] = {
            b"data": random.randint(0, 256, (count, 3072)).astype(np.uint8),
            b"fine_labels": [index % 100 for index in range(count)],
            b"coarse_labels": [0] * count,
            b"filenames": [b"image.png"] * count,
        }
        (folder / cifar100.FOLDER / split).write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        *(("a", "label 1 is of type str"), (b"1", "label 1 is of type bytes"), (None, "label 1 is of type NoneType")),
        *((1.5, "label 1 is of type float"), (1.0, "label 1 is of type float"), (float("nan"), "of type float")),
        *(([1], "label 1 is of type list"), (True, "label 1 is of type bool"), ({}, "label 1 is of type dict")),
        *((2**70, "a label is not in 0 to 99"), (-1, "a label is not in 0 to 99"), (100, "a label is not in 0 to 99")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_label_that_is_no_class_number_is_refused(tmp_path: Path, split: str, label: object, reason: str) -> None:
    write_cifar(tmp_path)
    content = {b"data": np.zeros((3, 3072), np.uint8), b"fine_labels": [0, label, 2]}
    (tmp_path / cifar100.FOLDER / split).write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ArtifactError, match=f"{split}` is not a file of CIFAR-100's python version: .*{reason}"):
        data.load(dataset_request("cifar100", folder=tmp_path))


def test_cifar100_is_read_from_its_own_format(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    found = data.load(dataset_request("cifar100", folder=tmp_path))
    raw = pickle.loads((tmp_path / cifar100.FOLDER / "train").read_bytes())[b"data"]
    assert found.train_images.shape == (200, 32, 32, 3)
    assert found.train_images[3, 5, 7].tolist() == [int(raw[3, channel * 1024 + 5 * 32 + 7]) for channel in range(3)]
    assert found.class_names[:2] == ("apple", "aquarium_fish")
    assert found.caveat is not None


class Hostile:
    """Its pickle runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_a_forged_cifar100_file_can_not_run_code(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / cifar100.FOLDER / "test").write_bytes(pickle.dumps({b"data": Hostile(marker)}))
    with pytest.raises(ArtifactError, match="system") as caught:
        data.load(dataset_request("cifar100", folder=tmp_path))
    assert not marker.exists()
    assert cifar100.URL in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": 1}),
        pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"fine_labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [100]}, protocol=2),
    ],
)
def test_a_broken_cifar100_file_is_named(tmp_path: Path, content: bytes) -> None:
    write_cifar(tmp_path)
    (tmp_path / cifar100.FOLDER / "train").write_bytes(content)
    with pytest.raises(ArtifactError, match="train"):
        data.load(dataset_request("cifar100", folder=tmp_path))


def test_missing_data_are_named_with_the_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist") as caught:
        data.load(dataset_request("cifar100", folder=tmp_path))
    assert cifar100.URL in caught.value.hint
    assert cifar100.ARCHIVE_MD5 in caught.value.hint


@pytest.mark.parametrize(
    ("text", "kind", "folder", "public"),
    [
        ("cifar100", "cifar100", None, "cifar100"),
        ("imagefolder", "imagefolder", None, "imagefolder"),
        ("imagefolder:/data/pets", "imagefolder", "/data/pets", "imagefolder:pets"),
        ("imagefolder:/data/a:b", "imagefolder", "/data/a:b", "imagefolder:a:b"),
        ("imagefolder:pets", "imagefolder", "pets", "imagefolder:pets"),
        ("imagenet", "imagenet", None, "imagenet"),
    ],
)
def test_a_data_set_name_has_two_parts(text: str, kind: str, folder: str | None, public: str) -> None:
    name = data.DatasetName.parse(text)
    assert (name.kind, name.folder, str(name)) == (kind, folder, text)
    assert name.is_image_folder == (folder is not None)
    assert str(name.public) == data.public_name(text) == public
