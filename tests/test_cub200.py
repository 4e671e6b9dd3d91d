"""CUB-200-2011: what is known of it, its own lists, and its images."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cub200_support import (
    CPU,
    KNOWN,
    MEMBERS,
    NAME,
    NUM_REAL,
    REAL,
    RELEASE,
    cached,
    fetched,
    own_state,
    put_data,
    shared_state,
    swap_release,
)
from fetch_support import CUB_TEST, CUB_TRAIN, jpeg
from PIL import Image
from torchvision import transforms

from icdctl import data
from icdctl.config.dataset_request import dataset_request
from icdctl.data import Augmentation, ImageStore, cub200
from icdctl.errors import ArtifactError

__all__ = ["fetched", "own_state", "shared_state"]


# The description


def test_the_pins_are_the_published_ones() -> None:
    archive = REAL.archive
    assert (archive.name, archive.num_bytes) == (NAME, 1_150_585_339)
    assert archive.md5 == "97eceeb196236b17998738112f37df78"
    assert archive.sha256 == "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"
    assert [url.partition("/files")[0] for url in archive.urls] == [
        "https://data.caltech.edu/records/65de6-vp158",
        "https://data.caltech.edu/api/records/65de6-vp158",
    ]
    assert len(REAL.member_md5) == 4
    assert NUM_REAL == (5994, 5794)
    assert len(set(cub200.CLASS_NAMES)) == len(cub200.CLASS_NAMES) == 200
    assert [cub200.CLASS_NAMES[index] for index in (0, 1, 197, 199)] == [
        Path(name).parts[1].partition(".")[2] for name in KNOWN
    ]


# Its own lists


def write_lists(folder: Path, **changes: Callable[[list[str]], list[str]]) -> None:
    """The four lists without the images; `changes` are what becomes of the lines of `<key>.txt`."""
    (folder / cub200.FOLDER).mkdir(parents=True)
    for name in ("images", "image_class_labels", "train_test_split", "classes"):
        lines = MEMBERS[f"{cub200.FOLDER}/{name}.txt"].decode().splitlines()
        lines = changes[name](lines) if name in changes else lines
        (folder / cub200.FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")


def test_the_lists_divide_the_images(tmp_path: Path) -> None:
    write_lists(tmp_path)
    train, test = cub200.read_lists(tmp_path)
    assert (len(train.names), len(test.names)) == (CUB_TRAIN, CUB_TEST)
    assert train.names[:2] == (
        f"{KNOWN[0].removeprefix('images/')}",
        "001.Black_footed_Albatross/Black_footed_Albatross_0002_1.jpg",
    )
    assert train.labels.bincount().tolist() == [2] * 40 + [1] * 160
    assert test.labels.tolist() == list(range(4, 200, 5))


@pytest.mark.parametrize("name", ["images", "image_class_labels", "train_test_split", "classes"])
@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "words", "twice"])
def test_a_list_that_is_missing_or_malformed_is_named(tmp_path: Path, name: str, kind: str) -> None:
    write_lists(tmp_path)
    path = tmp_path / cub200.FOLDER / f"{name}.txt"
    lines = path.read_text()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"binary": b"\xff\xfe", "words": b"one two\n", "twice": (lines * 2).encode()}[kind])
    expected = "does not exist" if kind == "missing" else "is not a file of CUB-200-2011"
    with pytest.raises(ArtifactError, match=f"{name}.txt` {expected}") as caught:
        data.load(dataset_request("cub200", folder=tmp_path))
    assert "`icdctl fetch-data cub200`" in caught.value.hint


def without(number: int) -> Callable[[list[str]], list[str]]:
    return lambda lines: lines[:number] + lines[number + 1 :]


def with_line(number: int, line: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[:number], line, *lines[number + 1 :]]


CONTRADICTIONS: dict[str, tuple[str, Callable[[list[str]], list[str]], str, str]] = {
    "image without a label": ("image_class_labels", without(3), "image_class_labels", "image `4` .* not in both"),
    "image without a side": ("train_test_split", without(3), "train_test_split", "image `4` .* not in both"),
    "label without an image": ("image_class_labels", lambda lines: [*lines, "999 1"], "image_class_labels", "`999`"),
    "label out of range": ("image_class_labels", with_line(0, "1 201"), "image_class_labels", "the label `201`"),
    "label zero": ("image_class_labels", with_line(0, "1 0"), "image_class_labels", "the label `0`"),
    "label of another class": ("image_class_labels", with_line(0, "1 2"), "image_class_labels", "the label `2`"),
    "side out of range": ("train_test_split", with_line(4, "5 2"), "train_test_split", "side `2`"),
    "no test image": (
        "train_test_split",
        lambda lines: [f"{line[:-1]}1" for line in lines],
        "train_test_split",
        "there are no training images or no test images",
    ),
    "classes in another order": ("classes", lambda lines: [*lines[1:], "1 001.Wren"], "classes", "200 species"),
    "a class too few": ("classes", without(199), "classes", "200 species"),
    "image outside": ("images", with_line(0, "1 ../../x.jpg"), "images", "not a path below `images`"),
    "image elsewhere": ("images", with_line(0, "1 /etc/x.jpg"), "images", "not a path below `images`"),
    "image with a zero byte": (
        "images",
        with_line(0, "1 001.Black_footed_Albatross/\0.jpg"),
        "images",
        "not a path below `images`",
    ),
    "image twice": ("images", with_line(1, f"2 {KNOWN[0].removeprefix('images/')}"), "images", "names an image twice"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_lists_that_contradict_each_other_are_refused(tmp_path: Path, kind: str) -> None:
    changed, change, named, message = CONTRADICTIONS[kind]
    write_lists(tmp_path, **{changed: change})
    with pytest.raises(ArtifactError, match=rf"{named}\.txt` is not a file of CUB-200-2011: .*{message}") as caught:
        cub200.read_lists(tmp_path)
    assert f"move `{tmp_path / cub200.FOLDER}` away" in caught.value.hint


# Its images


def mode_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def pil_of(name: str) -> Image.Image:
    return Image.open(io.BytesIO(MEMBERS[f"{cub200.FOLDER}/images/{name}"])).convert("RGB")


def test_pixels_are_those_of_torchvision_and_stay_on_disk(fetched: Path) -> None:
    found = data.load(dataset_request("cub200"))
    assert (found.caveat, found.val_images, found.num_classes) == (None, None, 200)
    assert (found.train_images.shape, found.train_images.dtype) == ((CUB_TRAIN, 256, 256, 3), torch.uint8)
    assert (found.test_images.shape, found.test_images.dtype) == ((CUB_TEST, 224, 224, 3), torch.uint8)
    train, test = cub200.read_lists(fetched.parent)
    assert torch.equal(found.train_labels, train.labels)
    assert torch.equal(found.test_labels, test.labels)
    resize, crop = transforms.Resize((256, 256)), transforms.CenterCrop(224)
    modes = set()
    for row in range(0, CUB_TRAIN, 7):
        modes.add(mode_of(fetched / "images" / train.names[row]))
        assert np.array_equal(found.train_images[row].numpy(), np.asarray(resize(pil_of(train.names[row]))))
    for row, name in enumerate(test.names):
        modes.add(mode_of(fetched / "images" / name))
        assert np.array_equal(found.test_images[row].numpy(), np.asarray(crop(resize(pil_of(name)))))
    assert modes == {"RGB", "L"}
    mapped = Path("/proc/self/maps").read_text()
    assert all(name in mapped for name in cached())
    assert [name.rpartition("-")[0] for name in cached()] == ["cub200-test", "cub200-train"]


def test_training_views_are_crops_of_224_and_tests_see_the_centre(fetched: Path) -> None:
    found = data.load(dataset_request("cub200"))
    store = ImageStore(found.train_images, found.preprocessing, Augmentation(flip=True), device=CPU)
    assert store.num_views == 33 * 33 * 2
    views = store.epoch(seed=0, epoch=1)
    assert (int(views.top.min()), int(views.top.max()), int(views.left.max())) == (0, 32, 32)
    part = views[:6]
    pixels = store.pixels(part)
    assert pixels.shape == (6, 224, 224, 3)
    for place in range(6):
        top, left = int(part.top[place]), int(part.left[place])
        expected = found.train_images[part.index[place], top : top + 224, left : left + 224]
        assert torch.equal(pixels[place], expected.flip(1) if part.flip[place] else expected)


def test_images_are_held_out_of_the_training_images_and_cut_to_their_centre(fetched: Path) -> None:
    whole = data.load(dataset_request("cub200"))
    found = data.load(dataset_request("cub200", val_split=0.5))
    assert found.val_images is not None
    assert found.val_labels is not None
    assert torch.equal(found.test_images, whole.test_images)
    assert found.train_images.shape == (CUB_TRAIN - 40, 256, 256, 3)
    assert found.val_images.shape == (40, 224, 224, 3)
    assert found.val_labels.tolist() == list(range(40)), "classes with a single image keep it"
    names = cub200.read_lists(fetched.parent)[0].names
    crop = transforms.Compose([transforms.Resize((256, 256)), transforms.CenterCrop(224)])
    for row in range(0, 40, 9):
        choices = [np.asarray(crop(pil_of(name))) for name in names if name.startswith(f"{row + 1:03d}.")]
        assert any(np.array_equal(found.val_images[row].numpy(), choice) for choice in choices)


def test_published_images_are_decoded_once_by_the_hash_of_their_archive(
    own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = put_data(own_state / "data")
    told: list[int] = []
    request = dataset_request("cub200")
    first = data.load(request, on_images=lambda done, total: told.append(done))
    assert told == [*range(1, CUB_TRAIN + 1), *range(1, CUB_TEST + 1)]
    train, _ = cub200.read_lists(place.parent)
    for name in train.names:
        if f"images/{name}" not in KNOWN:
            (place / "images" / name).unlink()
    told.clear()
    again = data.load(request, on_images=lambda done, total: told.append(done))
    assert (told, again.sha256, again.caveat) == ([], first.sha256, None)
    archive = dataclasses.replace(RELEASE.archive, sha256="0" * 64)
    swap_release(monkeypatch, dataclasses.replace(RELEASE, archive=archive))
    with pytest.raises(ArtifactError, match=r"images/001\.Black_footed_Albatross/.*` does not exist") as caught:
        data.load(request)
    assert f"move `{place}` away; `icdctl fetch-data cub200`" in caught.value.hint


def test_other_images_are_used_with_a_caveat_and_told_apart(own_state: Path) -> None:
    place = put_data(own_state / "data")
    (place / KNOWN[0]).write_bytes(jpeg(seed=999))
    first = data.load(dataset_request("cub200"))
    assert first.caveat == f"`{place}` is not the published CUB-200-2011: results can't be compared"
    assert not np.array_equal(first.train_images[0].numpy(), np.asarray(pil_of(KNOWN[0].removeprefix("images/"))))
    (place / KNOWN[0]).write_bytes(jpeg(seed=1000))
    assert data.load(dataset_request("cub200")).sha256 != first.sha256


def test_a_broken_image_is_named_and_a_mended_one_is_read(own_state: Path) -> None:
    place = put_data(own_state / "data")
    broken = place / "images" / "100.Brown_Pelican" / "Brown_Pelican_test.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:300])
    with pytest.raises(ArtifactError, match=r"1 of 40 images .*`100\.Brown_Pelican/Brown_Pelican_test\.jpg`") as caught:
        data.load(dataset_request("cub200"))
    assert "--skip-broken" not in caught.value.hint
    assert f"move `{place}` away; `icdctl fetch-data cub200`" in caught.value.hint
    broken.write_bytes(whole)
    assert data.load(dataset_request("cub200")).test_images.shape[0] == CUB_TEST
