"""Image files of any size and mode, decoded once: one uint8 array on disk, memory-mapped from then on.

The array lies in the state folder under a name that states what it was made of, so that other images, another size
or another Pillow make another array. Beside it lies what can't be seen from the pixels: their hash, and the files that
could not be decoded.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import stat
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from icdctl import files
from icdctl.data.dataset import OnImages
from icdctl.errors import ArtifactError, UsageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
"""Lower-case suffixes of the files that count as images."""

Size = tuple[int, int]
"""Height and width in pixels."""
Pixels = npt.NDArray[np.uint8]

_SCHEME = 1
"""Part of the cache's key: raise it whenever the pixels or the files change."""
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""No other is tried, whatever Pillow could read: EPS, for one, runs a program."""
_NO_IMAGE = "no JPEG, PNG, BMP, GIF, WebP, TIFF or PPM image"
_MOST_PIXELS = 178_956_970
"""Where Pillow sees a decompression bomb; held here too, since another library may have lifted Pillow's limit."""
_MANY_PIXELS = 1 << 25
_LONGEST_REASON = 120
_NAMED_FILES = 3
_MOST_THREADS = 16
_ONE_LARGE_IMAGE = threading.Lock()
"""Held while an image of more than `_MANY_PIXELS` is decoded: one may need a GB, and each thread could have one."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what undoes it."""


class BrokenImageError(ArtifactError):
    """A file whose content is no image that can be decoded."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"`{path}` can't be decoded: {reason}", hint="mend or delete it")
        self.reason = reason


@dataclass(frozen=True)
class BrokenImage:
    """A file that was left out."""

    path: Path
    reason: str
    """A few words, in one line."""


@dataclass(frozen=True)
class Decoded:
    """The images of those files that could be decoded."""

    images: Tensor
    """[M, H, W, 3] uint8, mapped from disk copy-on-write: what is written to it never reaches the file."""
    rows: Tensor
    """[M] int64, ascending: which of the names each image belongs to."""
    broken: tuple[BrokenImage, ...]
    """The others, in the order of the names."""
    sha256: str
    """Of the pixels in `images`."""


def decode_image(path: Path, *, resize: Size, crop: Size | None) -> Pixels:
    """One image file as 8-bit RGB: turned upright, resized (bilinear, antialiased, aspect not kept), centre-cropped.

    Bit for bit what torchvision's Resize and CenterCrop give for Pillow's `convert("RGB")`. Alpha is dropped; of an
    animation, the first frame is taken; of 16-bit grey, the higher byte, as Pillow does for 16-bit colour.

    Args:
        path: the file; its suffix does not matter.
        resize: height and width to resize to.
        crop: height and width to cut out of that; None for all of it.

    Returns:
        [h, w, 3] uint8.

    Raises:
        BrokenImageError: the content can't be decoded: empty, cut short, no image, too large, floating-point.
        ArtifactError: it is missing, can't be read or is no file.
        UsageError: the sizes can't be.
    """
    check_sizes(resize, crop)
    with _quiet_pillow():
        return _decode(path, resize, crop)


def decode_files(
    folder: Path,
    names: Sequence[str],
    *,
    resize: Size,
    crop: Size | None,
    content_key: str | None,
    label: str,
    skip_broken: bool,
    remedy: str | None = None,
    on_images: OnImages = lambda done, total: None,
) -> Decoded:
    """Many image files as one array, from the cache or decoded into it; two processes decode them once.

    Args:
        folder: what the names start from.
        names: POSIX paths relative to `folder`, in the order that the images shall have.
        resize: as for `decode_image`.
        crop: as for `decode_image`.
        content_key: what stands for the content of all files, e.g. the hash of the archive that they come from. None:
            the folder, and size and time of change of each file.
        label: starts the name of the cache's files, for a person who looks at them.
        skip_broken: leave out what can't be decoded.
        remedy: what a person does about files that are missing or broken, where these are not their own.
        on_images: told of the progress, by the calling thread; not called where the cache has them.

    Raises:
        ArtifactError: a file is missing or can't be read; one can't be decoded and `skip_broken` is not set; none can;
            or the cache can't be written.
        UsageError: the sizes can't be.
    """
    check_sizes(resize, crop)
    if not names:
        raise ArtifactError(f"there is no image to decode in `{folder}`", hint="name a folder of images")
    height, width = crop or resize
    content = content_key if content_key is not None else _states(folder, names, remedy)
    cache = _Cache(_stem(label, names, resize, crop, content), folder, names, (height, width))
    decoded = cache.read()
    if decoded is None:
        with files.waited_lock(cache.lock):
            decoded = cache.read()  # another process may have decoded them meanwhile
            if decoded is None:
                _clear_remains(cache.home, cache.stem)
                cache.delete()
                _states(folder, names, remedy)  # a missing file is told now, not when its turn comes
                with closing(_decode_in_order(folder, names, resize, crop)) as results:
                    decoded = cache.fill(results, on_images)
                if decoded.broken and content_key is not None:
                    cache.delete()  # a mended file would not make another key
    if decoded.broken and not skip_broken:
        raise _broken_files(decoded.broken, folder, len(names), remedy)
    return decoded


def check_sizes(resize: Size, crop: Size | None) -> None:
    """Whether images can be resized and cropped so.

    Raises:
        UsageError: a side is less than 1, or the crop is larger than what it is cut from.
    """
    for size in (resize, crop or resize):
        if min(size) < 1:
            raise UsageError(f"images of {_shown(size)}", hint="a side is at least 1 pixel")
    if crop is not None and (crop[0] > resize[0] or crop[1] > resize[1]):
        raise UsageError(
            f"a crop of {_shown(crop)} can't be cut out of {_shown(resize)}",
            hint="make the crop smaller, or resize to more",
        )


def _shown(size: Size) -> str:
    return f"{size[0]} x {size[1]} pixels"


def _decode(path: Path, resize: Size, crop: Size | None) -> Pixels:
    """`decode_image` without its care for warnings, whose filters all threads share."""
    content = _read(path)
    if not content:
        raise BrokenImageError(path, "the file is empty")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            num_pixels = image.width * image.height
            if num_pixels > _MOST_PIXELS:
                raise Image.DecompressionBombError
            with _ONE_LARGE_IMAGE if num_pixels > _MANY_PIXELS else nullcontext():
                small = _upright_rgb(image).resize((resize[1], resize[0]), Image.Resampling.BILINEAR)
        return np.array(small if crop is None else _centre(small, crop))
    except Exception as error:  # Pillow's readers raise nearly anything on content that they did not foresee
        raise BrokenImageError(path, _reason(error)) from error


def _read(path: Path) -> bytes:
    """The whole file. Apart from decoding, so that a disk's or a permission's error is not taken for a broken image."""
    try:
        _check_state(path, path.stat())
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _check_state(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):  # a device or a pipe never ends
        raise ArtifactError(f"image `{path}` is no file", hint="leave it out")
    if state.st_size > files.LARGEST_FOREIGN_BYTES:
        raise ArtifactError(f"image `{path}` is refused: it is larger than 2 GiB", hint="leave it out")


def _unreadable(path: Path, error: OSError, remedy: str | None = None) -> ArtifactError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        hint = remedy or "put it back, or get the data set again"
        return ArtifactError(f"image `{path}` does not exist", hint=hint)
    return ArtifactError(
        f"image `{path}` can't be read: {error.strerror or error}", hint="check its permissions and the disk"
    )


def _reason(error: Exception) -> str:
    """A few words on why an image can't be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return _NO_IMAGE
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels, more than {_MOST_PIXELS:,}"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    told = " ".join(str(error).split()).encode("ascii", "replace").decode("ascii")
    return told[:_LONGEST_REASON] or type(error).__name__


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()  # also what may follow the pixels, EXIF in a PNG; a TIFF turns itself upright
    # `convert` warns of transparency or fails over it, and would not make use of it.
    image.info.pop("transparency", None)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    upright = _orientation(image)
    eight_bits = _higher_byte(image) if image.mode.startswith("I") else image
    rgb = eight_bits if eight_bits.mode == "RGB" else eight_bits.convert("RGB")
    return rgb if upright is None else rgb.transpose(upright)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What turns it as EXIF asks for; None where it is upright. `ImageOps.exif_transpose` does the same, but fails
    where other entries are damaged."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF, of any kind; the pixels are well
        return None


def _higher_byte(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8; `convert` would clip it."""
    values: npt.NDArray[Any] = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"grey values {values.min()} to {values.max()}, not of 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _centre(image: Image.Image, size: Size) -> Image.Image:
    """The middle of an image, rounded as torchvision's CenterCrop does: half a pixel goes to the even side."""
    height, width = size
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow warns of images that it reads all the same, and its log goes to stderr where nobody takes it.

    What libtiff itself prints of a damaged TIFF stays: to stop it would take stderr from all threads.
    """
    log, silence = logging.getLogger("PIL"), logging.NullHandler()
    log.addHandler(silence)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(silence)


def _decode_in_order(
    folder: Path, names: Sequence[str], resize: Size, crop: Size | None
) -> Generator[Pixels | BrokenImage, None, None]:
    """What each file gives, decoded by as many threads as there are cores: Pillow holds no lock meanwhile."""

    def decode_one(path: Path) -> Pixels | BrokenImage:
        try:
            return _decode(path, resize, crop)
        except BrokenImageError as error:
            return BrokenImage(path, error.reason)

    num_threads = min(os.cpu_count() or 1, _MOST_THREADS)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    pending: deque[Future[Pixels | BrokenImage]] = deque()
    with _quiet_pillow():
        try:
            for name in names:
                pending.append(pool.submit(decode_one, folder / name))
                if len(pending) > 8 * num_threads:  # bounds the memory where a slow image is waited for
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also after Ctrl-C: what has begun takes milliseconds, the rest is dropped
            pool.shutdown(wait=True, cancel_futures=True)


def _states(folder: Path, names: Sequence[str], remedy: str | None) -> list[Any]:
    """What stands for the content of files without reading them: the folder, and size and time of change of each.

    Raises:
        ArtifactError: one is missing or no file.
    """
    facts: list[Any] = [str(folder.resolve())]
    for name in names:
        path = folder / name
        try:
            state = path.stat()
        except OSError as error:
            raise _unreadable(path, error, remedy) from error
        _check_state(path, state)
        facts.append([state.st_size, state.st_mtime_ns])
    return facts


def _stem(label: str, names: Sequence[str], resize: Size, crop: Size | None, content: object) -> str:
    """The name of the cache's files, without a suffix; it holds no dot. Another Pillow may make other pixels."""
    facts = [_SCHEME, PIL.__version__, list(names), list(resize), None if crop is None else list(crop), content]
    key = files.sha256_bytes(json.dumps(facts).encode("ascii"))
    return f"{re.sub('[^A-Za-z0-9_-]', '_', label)[:60]}-{key[:32]}"


class _Cache:
    """The array of some images on disk, `<stem>.npy`, and what is to be known of it, `<stem>.json`."""

    def __init__(self, stem: str, folder: Path, names: Sequence[str], size: Size) -> None:
        self.home = files.cache_folder() / "images"
        self.stem = stem
        self.lock = self.home / f".{stem}.lock"
        self._array = self.home / f"{stem}.npy"
        self._facts = self.home / f"{stem}.json"
        self._partial = self.home / f".{stem}.part"
        self._folder = folder
        self._names = names
        self._size = size

    def read(self) -> Decoded | None:
        """What it holds; None where it is absent, damaged or cut short."""
        try:
            facts = files.read_json(self._facts, what="cache", hint="")
            reasons = {int(row): str(reason) for row, reason in facts["broken"]}
            if facts["check"] != _check(reasons, facts["sha256"]):
                return None
            decoded = self._map(reasons, facts["sha256"])
        except (ArtifactError, OSError, ValueError, TypeError, LookupError, OverflowError):
            return None
        whole = hashlib.sha256(decoded.images.numpy().data).hexdigest() == decoded.sha256
        if whole:
            files.mark_used(self._facts)
        return decoded if whole else None

    def delete(self) -> None:
        """Give the room of a damaged one back."""
        try:
            self._array.unlink(missing_ok=True)
            self._facts.unlink(missing_ok=True)
        except OSError as error:
            raise files.not_writable(self._array, error) from error

    def fill(self, results: Iterator[Pixels | BrokenImage], on_images: OnImages) -> Decoded:
        """Write what the files give, in their order, and map it.

        Raises:
            ArtifactError: it can't be written, or no image could be decoded. Nothing is left then.
        """
        broken: dict[int, BrokenImage] = {}
        digest = hashlib.sha256()
        total = len(self._names)
        try:
            with self._opened() as file:
                for row, result in enumerate(results):
                    if isinstance(result, BrokenImage):
                        broken[row] = result
                    else:
                        digest.update(result.data)
                        self._write(file, result)
                    on_images(row + 1, total)
                if len(broken) == total:
                    raise _broken_files(tuple(broken.values()), self._folder, total)
                self._finish(file, total - len(broken))
            reasons = {row: image.reason for row, image in broken.items()}
            return self._publish(reasons, digest.hexdigest())
        finally:
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        """The file under its temporary name, at the place of the first pixel, with room for all images."""
        header = _npy_header((len(self._names), *self._size, 3))
        num_bytes = len(header) + len(self._names) * self._size[0] * self._size[1] * 3
        with self._told(), self._partial.open("wb", buffering=0):
            pass  # a place that can't be written to is told before the first image is decoded
        with self._partial.open("r+b", buffering=0) as file:
            with self._told():
                _reserve(file.fileno(), num_bytes)
                file.seek(len(header))
            yield file

    def _write(self, file: io.FileIO, pixels: Pixels) -> None:
        rest = pixels.data.cast("B")
        with self._told():
            while rest:  # an unbuffered file may take a part
                rest = rest[file.write(rest) :]

    def _finish(self, file: io.FileIO, num_images: int) -> None:
        """Cut off the room that broken images left, and state the shape; numpy's header is as long for any count."""
        with self._told():
            file.truncate()
            file.seek(0)
            file.write(_npy_header((num_images, *self._size, 3)))
            os.fsync(file.fileno())

    def _publish(self, reasons: dict[int, str], sha256: str) -> Decoded:
        """Give the file its name. The facts come last: pixels without them are decoded anew."""
        with self._told():
            self._partial.replace(self._array)
        try:
            facts = {
                "of": str(self._folder),
                "sha256": sha256,
                "broken": sorted(reasons.items()),
                "check": _check(reasons, sha256),
            }
            files.write_json(self._facts, facts)
            with self._told():
                return self._map(reasons, sha256)
        except BaseException:
            self._array.unlink(missing_ok=True)
            raise

    def _map(self, reasons: dict[int, str], sha256: str) -> Decoded:
        """The array as it lies on disk.

        Raises:
            OSError, ValueError: it is missing, or has not the header and the length that these facts ask for.
        """
        rows = [row for row in range(len(self._names)) if row not in reasons]
        shape = (len(rows), *self._size, 3)
        header = _npy_header(shape)
        with self._array.open("rb") as file:
            files.hold_mapped(file)
            length = os.fstat(file.fileno()).st_size
            if file.read(len(header)) != header or length != len(header) + shape[0] * shape[1] * shape[2] * 3:
                raise ValueError("another array")
            images = np.memmap(file, dtype=np.uint8, mode="c", offset=len(header), shape=shape)
        return Decoded(
            images=torch.from_numpy(images),
            rows=torch.tensor(rows, dtype=torch.int64),
            broken=tuple(BrokenImage(self._folder / self._names[row], reasons[row]) for row in sorted(reasons)),
            sha256=sha256,
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the disk refuses, as the error that a person sees."""
        try:
            yield
        except OSError as error:
            raise files.not_writable(self._array, error) from error


def _check(reasons: dict[int, str], sha256: str) -> str:
    """A hash of the facts themselves: a row number that changed on disk would give images the labels of others."""
    return files.sha256_bytes(json.dumps([sha256, sorted(reasons.items())]).encode("ascii"))


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """How a `.npy` file of uint8 starts."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Have the room before the work. A file system that can't promise it fails at the write instead.

    Raises:
        OSError: there is not so much.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def _clear_remains(home: Path, own: str) -> None:
    """Delete the temporary files of killed runs, of these images or others: one whose lock is free has no owner.

    Args:
        home: the folder of the caches.
        own: the stem whose lock this process holds.
    """
    for remains in (*home.glob(".*.part"), *home.glob(".*.json.*")):
        stem = remains.name.split(".")[1]
        is_own = stem == own
        try:
            with nullcontext() if is_own else filelock.FileLock(home / f".{stem}.lock").acquire(blocking=False):
                remains.unlink(missing_ok=True)
        except (filelock.Timeout, OSError):
            continue  # in use, or another user's


def _broken_files(broken: Sequence[BrokenImage], folder: Path, total: int, remedy: str | None = None) -> ArtifactError:
    named = [f"`{image.path.relative_to(folder).as_posix()}`: {image.reason}" for image in broken[:_NAMED_FILES]]
    more = ["..."] if len(broken) > _NAMED_FILES else []
    own = "mend or delete them, or leave them out with `--skip-broken`"
    return ArtifactError(
        f"{len(broken)} of {total} images can't be decoded: {'; '.join(named + more)}",
        hint=remedy or (own if len(broken) < total else "name a folder of images that can be decoded"),
    )
