"""Image files to pixels, against torchvision and Pillow; broken files."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from torchvision import transforms

from icdctl.data.decode import BrokenImageError, decode_image
from icdctl.errors import ArtifactError, UsageError

RESIZE, CROP = (256, 256), (224, 224)
Pixels = npt.NDArray[np.uint8]


def photo(width: int = 301, height: int = 199, *, seed: int = 0) -> Image.Image:
    """Smooth colours with noise on them."""
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (5, 7, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    noisy = smooth + random.randint(-20, 21, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def by_torchvision(image: Image.Image, resize: tuple[int, int], crop: tuple[int, int]) -> Pixels:
    steps = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop)])
    return np.array(steps(image))


def unresized(path: Path) -> Pixels:
    with Image.open(path) as image:
        width, height = image.size
    return decode_image(path, resize=(height, width), crop=None)


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def see_through(image: Image.Image) -> Image.Image:
    palette = image.quantize(200)
    palette.info["transparency"] = bytes(range(200))
    return palette


KINDS: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "RGB": (".jpg", lambda image: image),
    "L": (".jpg", lambda image: image.convert("L")),
    "CMYK": (".jpg", lambda image: image.convert("CMYK")),
    "P": (".png", lambda image: image.quantize(256)),
    "P, transparent": (".png", see_through),
    "P of a GIF": (".gif", lambda image: image.quantize(128)),
    "RGBA": (".png", with_alpha),
    "RGBA of a WebP": (".webp", with_alpha),
    "LA": (".png", lambda image: with_alpha(image.convert("L"))),
    "1": (".png", lambda image: image.convert("1")),
    "1 of a TIFF": (".tif", lambda image: image.convert("1")),
    "RGB of a BMP": (".bmp", lambda image: image),
    "RGB of a PPM": (".ppm", lambda image: image),
    "L of a PGM": (".pgm", lambda image: image.convert("L")),
    "YCbCr": (".tiff", lambda image: image.convert("YCbCr")),
    "LAB": (".tiff", lambda image: image.convert("LAB")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("resize", "crop"), [(RESIZE, CROP), ((97, 150), (60, 81))], ids=["square", "odd"])
def test_pixels_are_those_of_pillow_and_torchvision(
    tmp_path: Path, kind: str, resize: tuple[int, int], crop: tuple[int, int]
) -> None:
    suffix, change = KINDS[kind]
    path = tmp_path / f"image{suffix}"
    change(photo()).save(path)
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")  # Pillow's, of transparency
        expected = by_torchvision(image.convert("RGB"), resize, crop)
    found = decode_image(path, resize=resize, crop=crop)
    assert found.dtype == np.uint8
    assert found.shape == (*crop, 3)
    assert np.array_equal(found, expected)


def test_without_a_crop_all_of_the_resized_image_is_there(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    found = decode_image(tmp_path / "a.png", resize=(40, 70), crop=None)
    assert np.array_equal(found, np.asarray(photo().resize((70, 40), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The stored rows and columns of EXIF 2.3: where the first row and the first column of the file belong."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored: dict[int, Pixels] = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    options = {"quality": 95, "subsampling": 0} if suffix == ".jpg" else {"lossless": True} if suffix == ".webp" else {}
    image.save(tmp_path / f"a{suffix}", exif=exif, **options)
    found = decode_image(tmp_path / f"a{suffix}", resize=(32, 48), crop=None)
    assert np.abs(found.astype(int) - upright).max() <= (2 if suffix == ".jpg" else 0)


def test_damaged_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40)
    photo().save(tmp_path / "b.jpg")
    found = decode_image(tmp_path / "a.jpg", resize=(199, 301), crop=None)
    assert np.array_equal(found, unresized(tmp_path / "b.jpg"))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / f"a{suffix}")
    found = unresized(tmp_path / f"a{suffix}")
    assert np.array_equal(found, np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_32_bit_grey_counts_as_16_where_it_fits(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64).astype(np.int32).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert np.array_equal(unresized(tmp_path / "a.tif")[:, :, 1], grey >> 8)
    Image.fromarray(grey * 2).save(tmp_path / "b.tif")
    with pytest.raises(BrokenImageError, match="grey values 0 to 131070"):
        unresized(tmp_path / "b.tif")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(unresized(tmp_path / f"a{suffix}").astype(int) - [255, 0, 0]).max() <= 3


def png_of_zeros(width: int, height: int) -> bytes:
    """A grey PNG's header and little else: what it claims, it does not hold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "text": (b"404 not found\n" * 50, "not a JPEG, PNG"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not a JPEG, PNG"),
    "half a JPEG": (saved(photo(), "JPEG")[:9000], "truncated"),
    "a JPEG's first bytes": (saved(photo(), "JPEG")[:30], "not a JPEG, PNG|[Tt]runcated"),
    "half a PNG": (saved(photo(), "PNG")[:60_000], "truncated|broken"),
    "half a GIF": (saved(photo(), "GIF")[:9000], "truncated"),
    "half a WebP": (saved(photo(), "WEBP")[:3000], "."),
    "half a BMP": (saved(photo(), "BMP")[:9000], "truncated"),
    "half a PPM": (saved(photo(), "PPM")[:9000], "truncated"),
    "half a TIFF": (saved(photo(), "TIFF", compression="tiff_lzw")[:9000], "."),
    "half a fax": (saved(photo().convert("1"), "TIFF", compression="group4")[:4000], "."),
    "a bomb": (png_of_zeros(30_000, 30_000), "too many pixels, more than 178,956,970"),
    "nearly a bomb": (png_of_zeros(10_000, 10_000), "truncated|broken"),
    "floating-point": (saved(Image.new("F", (9, 9), 0.5), "TIFF"), "floating-point"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_told_with_a_short_reason(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    content, reason = BROKEN[kind]
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BrokenImageError, match=reason) as caught:
        decode_image(tmp_path / "a.jpg", resize=(32, 32), crop=None)
    assert 0 < len(caught.value.reason) <= 120
    assert "\n" not in caught.value.reason
    assert capfd.readouterr() == ("", "")


def test_a_bomb_is_one_even_where_another_library_lifted_pillows_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(png_of_zeros(30_000, 30_000))
    with pytest.raises(BrokenImageError, match="too many pixels"):
        decode_image(tmp_path / "a.png", resize=(32, 32), crop=None)


def test_damage_anywhere_ends_as_an_image_or_as_a_broken_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing but BrokenImageError leaves, and nothing is printed, whichever bytes are hit."""
    random = np.random.RandomState(0)
    image = photo(40, 30)
    kinds = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
    contents = [saved(image, kind) for kind in kinds]
    contents.append(saved(image, "JPEG", exif=bytes.fromhex("45786966000049492a0008000000010012010300010000000600")))
    contents.append(saved(image.quantize(16), "PNG"))
    broken = 0
    for content in contents:
        for _ in range(30):
            damaged = np.frombuffer(content, np.uint8).copy()
            places = random.randint(0, min(len(damaged), 300), 4)
            damaged[places] = random.randint(0, 256, 4)
            (tmp_path / "a").write_bytes(damaged.tobytes())
            try:
                assert decode_image(tmp_path / "a", resize=(8, 8), crop=None).shape == (8, 8, 3)
            except BrokenImageError:
                broken += 1
    assert 30 < broken < 300
    assert capfd.readouterr() == ("", "")


def test_what_is_no_file_or_not_there_is_not_called_broken(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in [
        ("folder.jpg", "is not a regular file"),
        ("pipe.jpg", "is not a regular file"),
        ("none.jpg", "does not exist"),
    ]:
        with pytest.raises(ArtifactError, match=f"{name}` {reason}") as caught:
            decode_image(tmp_path / name, resize=(8, 8), crop=None)
        assert not isinstance(caught.value, BrokenImageError)


@pytest.mark.parametrize(
    ("resize", "crop", "message"),
    [((0, 9), None, "0 x 9"), ((9, 9), (9, 0), "9 x 0"), ((9, 9), (10, 9), "10 x 9 pixels can't be cut out")],
)
def test_sizes_that_can_not_be_are_refused(resize: tuple[int, int], crop: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode_image(Path("a.jpg"), resize=resize, crop=crop)
