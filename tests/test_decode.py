"""Image files to one array: pixels against torchvision and Pillow, broken files, and a cache that can't go wrong."""

from __future__ import annotations

import io
import os
import resource
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torchvision import transforms

from icdctl import files
from icdctl.data import decode
from icdctl.data.decode import BrokenImageError, DecodedImage, decode_image
from icdctl.data.image_cache import Decoded, decode_files
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


# Many files


@pytest.fixture(autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder that no other test has filled."""
    home = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("ICDCTL_HOME", str(home))
    return home


def write_photos(folder: Path, count: int) -> list[str]:
    names = [f"{index % 3}/{index:03d}.jpg" for index in range(count)]
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo(60, 50, seed=index).save(folder / name)
    return names


def decoded_of(folder: Path, names: list[str], **changes: Any) -> tuple[Decoded, int]:
    """The images, and how many files were decoded for them."""
    told: list[int] = []
    settings: dict[str, Any] = {
        "resize": (32, 40),
        "crop": (30, 30),
        "content_key": None,
        "label": "photos",
        "skip_broken": False,
        "on_images": lambda done, total: told.append(done),
    }
    decoded = decode_files(folder, names, **{**settings, **changes})
    assert told in ([], list(range(1, len(names) + 1)))
    return decoded, len(told)


def cache_files() -> list[str]:
    """What lies in the cache, locks apart."""
    home = files.state_folder() / "cache" / "images"
    return sorted(path.name for path in home.glob("*") if path.suffix != ".lock") if home.is_dir() else []


def test_many_files_are_one_array_in_order(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 70)
    decoded, count = decoded_of(tmp_path, names)
    assert count == 70
    assert (decoded.images.shape, decoded.images.dtype) == ((70, 30, 30, 3), torch.uint8)
    for row, name in enumerate(names):
        expected = decode_image(tmp_path / name, resize=(32, 40), crop=(30, 30))
        assert np.array_equal(decoded.images[row].numpy(), expected)
    assert torch.equal(decoded.rows, torch.arange(70))
    assert decoded.broken == ()
    assert decoded.sha256 == files.sha256_bytes(decoded.images.numpy().tobytes())
    array, facts = cache_files()[::-1]
    assert (Path(array).suffix, Path(facts).suffix) == (".npy", ".json")
    assert array.startswith("photos-")
    assert np.array_equal(np.load(files.state_folder() / "cache" / "images" / array), decoded.images.numpy())


def test_writing_to_the_images_does_not_reach_the_cache(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 3)
    first, _ = decoded_of(tmp_path, names)
    before = first.images.clone()
    first.images.zero_()
    again, count = decoded_of(tmp_path, names)
    assert count == 0
    assert torch.equal(again.images, before)


def test_with_a_content_key_the_cache_needs_no_files(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 5)
    first, _ = decoded_of(tmp_path, names, content_key="hash of the archive")
    for name in names:
        (tmp_path / name).unlink()
    again, count = decoded_of(tmp_path, names, content_key="hash of the archive")
    assert count == 0
    assert again.sha256 == first.sha256
    assert torch.equal(again.images, first.images)
    with pytest.raises(ArtifactError, match=r"0/000\.jpg` does not exist"):
        decoded_of(tmp_path, names, content_key="hash of another archive")


def test_without_one_the_cache_reads_no_file_and_a_touched_file_is_decoded_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_photos(tmp_path, 5)
    decoded_of(tmp_path, names)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
        assert decoded_of(tmp_path, names)[1] == 0
    os.utime(tmp_path / names[2], ns=(0, 1))
    assert decoded_of(tmp_path, names)[1] == 5
    (tmp_path / names[2]).unlink()
    with pytest.raises(ArtifactError, match=r"2/002\.jpg` does not exist"):
        decoded_of(tmp_path, names)


@pytest.mark.parametrize(
    "change",
    [
        {"resize": (33, 40)},
        {"crop": None},
        {"content_key": "another"},
        {"label": "others"},
        {"names": ["0/003.jpg", "0/000.jpg"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_images_changes_the_cache(tmp_path: Path, change: dict[str, Any]) -> None:
    names = write_photos(tmp_path, 5)
    decoded_of(tmp_path, names, content_key="one")
    settings = {"content_key": "one", **change}
    chosen = settings.pop("names", names)
    assert decoded_of(tmp_path, chosen, **settings)[1] == len(chosen)


def test_equal_names_sizes_and_times_in_two_folders_are_not_taken_for_one(tmp_path: Path) -> None:
    for folder, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 9), colour).save(tmp_path / folder / "a.bmp")
        os.utime(tmp_path / folder / "a.bmp", ns=(0, 0))
    one, _ = decoded_of(tmp_path / "one", ["a.bmp"])
    two, _ = decoded_of(tmp_path / "two", ["a.bmp"])
    assert one.images[0, 0, 0].tolist() == [255, 0, 0]
    assert two.images[0, 0, 0].tolist() == [0, 0, 255]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: flipped(content, len(content) // 2),
        lambda content: flipped(content, 20),
        lambda content: content[: len(content) // 2],
        lambda content: content + b"x",
        lambda content: b"",
        lambda content: b'{"sha256": 5, "broken": [5]}',
        lambda content: content.replace(b"      1,\n", b"      0,\n"),
        lambda content: content.replace(b"      1,\n", b"      9,\n"),
        None,
    ],
    ids=["middle bit", "early bit", "half", "longer", "empty", "something else", "other row", "no row", "deleted"],
)
def test_a_damaged_cache_is_decoded_anew(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes] | None) -> None:
    names = write_photos(tmp_path, 5)
    (tmp_path / names[1]).write_bytes(b"")
    first, _ = decoded_of(tmp_path, names, skip_broken=True)
    (path,) = (files.state_folder() / "cache" / "images").glob(f"*{suffix}")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    again, _ = decoded_of(tmp_path, names, skip_broken=True)
    assert again.sha256 == first.sha256
    assert again.rows.tolist() == [0, 2, 3, 4]
    assert [image.reason for image in again.broken] == ["the file is empty"]
    assert decoded_of(tmp_path, names, skip_broken=True)[1] == 0


def test_broken_files_are_all_counted_and_the_first_named(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 30)
    for row in (4, 7, 11, 29):
        (tmp_path / names[row]).write_bytes(b"no image")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ArtifactError) as caught:
            decoded_of(tmp_path, names)
        assert caught.value.message.startswith("4 of 30 images can't be decoded: `1/004.jpg`: not a JPEG, PNG")
        assert caught.value.message.endswith("; ...")
        assert "011.jpg" in caught.value.message
        assert "029.jpg" not in caught.value.message
        assert "--skip-broken" in caught.value.hint
    decoded, count = decoded_of(tmp_path, names, skip_broken=True)
    assert count == 0
    kept = [row for row in range(30) if row not in (4, 7, 11, 29)]
    assert decoded.rows.tolist() == kept
    assert decoded.images.shape == (26, 30, 30, 3)
    for place, row in enumerate(kept):
        expected = decode_image(tmp_path / names[row], resize=(32, 40), crop=(30, 30))
        assert np.array_equal(decoded.images[place].numpy(), expected)
    assert [image.path for image in decoded.broken] == [tmp_path / names[row] for row in (4, 7, 11, 29)]
    assert decoded.sha256 == files.sha256_bytes(decoded.images.numpy().tobytes())


def test_where_every_image_is_broken_or_there_is_none_nothing_can_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"1 of 1 images can't be decoded: `a.jpg`: the file is empty") as caught:
        decoded_of(tmp_path, ["a.jpg"], skip_broken=True)
    assert "--skip-broken" not in caught.value.hint
    with pytest.raises(ArtifactError, match="no image"):
        decoded_of(tmp_path, [])
    assert cache_files() == []


def test_a_file_that_may_not_be_read_is_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_photos(tmp_path, 3)

    def refuse(path: Path, **limits: int) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "read_regular", refuse)
    with pytest.raises(ArtifactError, match=r"0/000.jpg` can't be read: Permission denied"):
        decoded_of(tmp_path, names, skip_broken=True)
    assert cache_files() == []


def test_an_interrupt_stops_at_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_photos(tmp_path, 300)
    begun: list[Path] = []
    real = decode._decode

    def counted(path: Path, resize: tuple[int, int], crop: tuple[int, int] | None) -> DecodedImage:
        begun.append(path)
        return real(path, resize, crop)

    def interrupt(done: int, total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(decode, "_decode", counted)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        decoded_of(tmp_path, names, on_images=interrupt)
    assert len(begun) < 100
    assert cache_files() == []
    assert decoded_of(tmp_path, names)[1] == 300


DECODE = """
import sys, time
from pathlib import Path
from icdctl.data.image_cache import decode_files
folder = Path(sys.argv[1])
names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))

def told(done, total):
    print(done, flush=True)
    time.sleep(float(sys.argv[2]))

print("ready", flush=True)
sys.stdin.readline()
decoded = decode_files(folder, names, resize=(32, 40), crop=(30, 30), content_key=None, label="photos",
                              skip_broken=False, on_images=told)
print("sha256", decoded.sha256, flush=True)
"""


def start(folder: Path, *, seconds_each: float) -> subprocess.Popen[str]:
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", DECODE, str(folder), str(seconds_each)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings
    )


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_decode_once(tmp_path: Path) -> None:
    write_photos(tmp_path, 20)
    processes = [start(tmp_path, seconds_each=0.02) for _ in range(2)]
    for process in processes:
        go(process)
    ended = [process.communicate(timeout=60) for process in processes]
    assert [(process.returncode, err) for process, (_, err) in zip(processes, ended, strict=True)] == [(0, "")] * 2
    assert sorted(len(out.splitlines()) for out, _ in ended) == [1, 21]
    assert len({out.splitlines()[-1] for out, _ in ended}) == 1


def test_what_a_killed_run_left_is_cleared_by_the_next_of_any_images(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 20)
    process = start(tmp_path, seconds_each=0.2)
    go(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    home = files.state_folder() / "cache" / "images"
    (partial,) = home.glob(".*.part")
    decoded_of(tmp_path, names, content_key="others")  # a living run's file is left alone
    assert partial.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert partial.exists()
    (home / f"{partial.name.removesuffix('.part')}.json.abcd").write_text("{")
    (home / ".keep").write_text("somebody's")
    decoded_of(tmp_path, names, content_key="yet others")
    assert [name for name in cache_files() if name.startswith(".")] == [".keep"]
    assert decoded_of(tmp_path, names)[1] == 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no tmpfs may be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("reserving", [True, False], ids=["reserved", "found while writing"])
def test_a_full_disk_is_said_and_given_back(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, reserving: bool
) -> None:
    names = write_photos(tmp_path / "photos", 30)
    monkeypatch.setenv("ICDCTL_HOME", str(small_disk))
    told: list[int] = []
    if not reserving:
        monkeypatch.delattr(os, "posix_fallocate")
    with pytest.raises(ArtifactError, match=r"can't be written: No space left") as caught:
        decoded_of(
            tmp_path / "photos", names, resize=(200, 200), crop=None, on_images=lambda done, total: told.append(done)
        )
    assert bool(told) is not reserving
    assert "ICDCTL_HOME" in caught.value.hint
    assert cache_files() == []
    assert decoded_of(tmp_path / "photos", names, resize=(50, 50), crop=None)[1] == 30


def test_a_limit_on_file_sizes_is_as_a_full_disk(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ArtifactError, match="File too large"):
            decoded_of(tmp_path, names)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache_files() == []


def test_a_state_folder_that_can_not_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_photos(tmp_path, 2)
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / names[0]))
    with pytest.raises(ArtifactError, match="can't be written"):
        decoded_of(tmp_path, names)
