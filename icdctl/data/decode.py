"""Decoding of image files of any size and mode to 8-bit RGB of one size."""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from icdctl import files
from icdctl.data.image_formats import pointer, readable_formats, unknown_format
from icdctl.errors import ArtifactError, UsageError

Size = tuple[int, int]
"""Height and width in pixels."""
Pixels = npt.NDArray[np.uint8]

_MOST_PIXELS = 178_956_970
"""Pillow's own limit for decompression bombs; checked here too, since another library may have lifted Pillow's."""
_MANY_PIXELS = 1 << 25
_LONGEST_REASON = 120
_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 258, 281
"""Tags of a TIFF."""
_NAMED_FILES = 3
_MOST_THREADS = 16
_ONE_LARGE_IMAGE = threading.Lock()
"""Held while an image of more than `_MANY_PIXELS` is decoded: each may need 1 GB, so only one is decoded at a time."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transpose that undoes it."""


class UnusableImageError(ArtifactError):
    """An image that can't be used, whatever is done with its content; other images are not affected."""

    def __init__(self, message: str, *, hint: str, reason: str) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        """Why, in a few words on one line."""


class BrokenImageError(UnusableImageError):
    """The content of a file can't be decoded as an image."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"`{path}` can't be decoded: {reason}", hint="fix or delete it", reason=reason)


class DecodedImage(NamedTuple):
    """An image file that was decoded."""

    pixels: Pixels
    """[h, w, 3] uint8."""
    sha256: str
    """Hash of the file."""


@dataclass(frozen=True)
class BrokenImage:
    """A file that was left out."""

    path: Path
    reason: str
    """Why, in a few words on one line."""


def decode_image(path: Path, *, resize: Size, crop: Size | None) -> Pixels:
    """Decode an image file to 8-bit RGB: turned upright, resized (bilinear, antialiased, aspect not kept) and cropped.

    The result equals, bit for bit, torchvision's Resize and CenterCrop of Pillow's `convert("RGB")`. Alpha is dropped.
    An animation gives its first frame. 16-bit grey gives its higher byte, as Pillow does for 16-bit colour; of fewer
    bits, as a TIFF states them, the highest eight.

    Args:
        path: the file; its suffix does not matter.
        resize: height and width to resize to.
        crop: height and width to crop from the centre of that; None keeps all of it.

    Returns:
        [h, w, 3] uint8.

    Raises:
        BrokenImageError: the content can't be decoded: empty, cut short, not an image, too large, floating-point.
        ArtifactError: the file is missing, can't be read or is not a regular file.
        UsageError: the sizes are impossible.
    """
    check_sizes(resize, crop)
    with _quiet_pillow():
        return _decode(path, resize, crop).pixels


def check_sizes(resize: Size, crop: Size | None) -> None:
    """Check that images can be resized and cropped to these sizes.

    Raises:
        UsageError: a side is less than 1, or the crop is larger than the resized image.
    """
    for size in (resize, crop or resize):
        if min(size) < 1:
            raise UsageError(f"images of {_shown(size)} are impossible", hint="pass sides of at least 1 pixel")
    if crop is not None and (crop[0] > resize[0] or crop[1] > resize[1]):
        raise UsageError(
            f"a crop of {_shown(crop)} can't be cut out of {_shown(resize)}",
            hint="make the crop smaller, or resize to a larger size",
        )


def _shown(size: Size) -> str:
    return f"{size[0]} x {size[1]} pixels"


def _decode(path: Path, resize: Size, crop: Size | None) -> DecodedImage:
    """`decode_image` without silencing warnings: all threads share the warning filters, so the caller does it once."""
    content = _read(path)
    stand_in = "the file is empty" if not content else pointer(content)
    if stand_in is not None:
        raise BrokenImageError(path, stand_in)
    try:
        with Image.open(io.BytesIO(content), formats=readable_formats()) as image:
            num_pixels = image.width * image.height
            if num_pixels > _MOST_PIXELS:
                raise Image.DecompressionBombError
            with _ONE_LARGE_IMAGE if num_pixels > _MANY_PIXELS else nullcontext():
                small = _upright_rgb(image).resize((resize[1], resize[0]), Image.Resampling.BILINEAR)
        pixels = np.array(small if crop is None else _centre(small, crop))
    except UnidentifiedImageError as error:
        raise BrokenImageError(path, unknown_format(content)) from error
    except Exception as error:  # Pillow's readers can raise almost any exception on broken content
        raise BrokenImageError(path, _reason(error)) from error
    return DecodedImage(pixels, files.sha256_bytes(content))


def _read(path: Path) -> bytes:
    """The whole file. Reading is separate from decoding so that a disk error is not reported as a broken image."""
    state_of(path)
    try:
        return files.read_regular(path, most_bytes=files.LARGEST_FOREIGN_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error


def state_of(path: Path, remedy: str | None = None) -> os.stat_result:
    """The file system's facts about an image file.

    Args:
        path: the file.
        remedy: the hint where the file is missing; None gives a general one.

    Raises:
        UnusableImageError: it is a link whose target is missing, not a regular file, or larger than 2 GiB.
        ArtifactError: the file is missing or not accessible.
    """
    try:
        state = path.stat()
    except OSError as error:
        if os.path.islink(path) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            reason = "a link whose target does not exist"
            hint = remedy or "restore the target (an unmounted disk, `git annex get`), or delete the link"
            raise UnusableImageError(f"image `{path}` is {reason}", hint=hint, reason=reason) from error
        raise _unreadable(path, error, remedy) from error
    if not stat.S_ISREG(state.st_mode):  # a device or a pipe never ends
        reason = "not a regular file"
        raise UnusableImageError(f"image `{path}` is {reason}", hint="leave it out", reason=reason)
    if state.st_size > files.LARGEST_FOREIGN_BYTES:
        reason = "larger than 2 GiB"
        raise UnusableImageError(f"image `{path}` is refused: it is {reason}", hint="leave it out", reason=reason)
    return state


def broken_images_message(broken: Sequence[BrokenImage], total: int, *, folder: Path | None = None) -> str:
    """How many of `total` files can't be decoded, and why for the first few; paths relative to `folder` if given."""
    paths = [image.path if folder is None else image.path.relative_to(folder) for image in broken[:_NAMED_FILES]]
    named = [f"`{path.as_posix()}`: {image.reason}" for path, image in zip(paths, broken, strict=False)]
    more = ["..."] if len(broken) > _NAMED_FILES else []
    return f"{len(broken)} of {total} images can't be decoded: {'; '.join(named + more)}"


def _unreadable(path: Path, error: OSError, remedy: str | None = None) -> ArtifactError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        hint = remedy or "restore it, or get the data set again"
        return ArtifactError(f"image `{path}` does not exist", hint=hint)
    return ArtifactError(
        f"image `{path}` can't be read: {error.strerror or error}", hint="check its permissions and the disk"
    )


def _reason(error: Exception) -> str:
    """Why an image can't be decoded, in a few words on one line."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels, more than {_MOST_PIXELS:,}"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    reason = " ".join(str(error).split()).encode("ascii", "replace").decode("ascii")
    return reason[:_LONGEST_REASON] or type(error).__name__


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()  # also reads what may follow the pixels, such as EXIF in a PNG; a TIFF turns itself upright
    # `convert` warns about transparency or fails because of it, and does not use it.
    image.info.pop("transparency", None)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    upright = _orientation(image)
    eight_bits = _highest_byte(image) if image.mode.startswith("I") else image
    rgb = eight_bits if eight_bits.mode == "RGB" else eight_bits.convert("RGB")
    return rgb if upright is None else rgb.transpose(upright)


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """The transpose that makes an image upright, from its EXIF data; None where it is upright already.

    `ImageOps.exif_transpose` does the same, but fails where other EXIF entries are damaged.
    """
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF can raise almost any exception; the pixels are intact
        return None


def _highest_byte(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits as 8-bit grey: the highest eight bits. `convert` would clip the values instead."""
    values: npt.NDArray[np.integer] = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"grey values {values.min()} to {values.max()}, expected 0 to 65535")
    return Image.fromarray((values >> (_significant_bits(image, int(values.max())) - 8)).astype(np.uint8))


def _significant_bits(image: Image.Image, largest: int) -> int:
    """Number of bits that grey values use, 9 to 16: a TIFF may state that it is less than 16, e.g. 12 of a camera.

    Args:
        image: the image.
        largest: its largest value; a statement that it contradicts does not count.
    """
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    packed, top = tags.get(_BITS_PER_SAMPLE), tags.get(_MAX_SAMPLE_VALUE)
    stated = [
        int(bits)
        for bits in (
            packed[0] if isinstance(packed, tuple) and packed else 16,
            int(top[0]).bit_length() if isinstance(top, tuple) and top else 16,
        )
        if 8 < bits < 16 and largest < 1 << int(bits)
    ]
    return min(stated, default=16)


def _centre(image: Image.Image, size: Size) -> Image.Image:
    """The centre of an image, rounded as torchvision's CenterCrop does: half a pixel goes to the even side."""
    height, width = size
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings about images that it reads all the same, and its log, which would go to stderr.

    What libtiff itself prints about a damaged TIFF still appears: stopping it would take stderr from all threads.
    """
    log, silence = logging.getLogger("PIL"), logging.NullHandler()
    log.addHandler(silence)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(silence)


def decode_in_order(
    paths: Iterable[Path], *, resize: Size, crop: Size | None
) -> Generator[DecodedImage | BrokenImage, None, None]:
    """Decode files and give the results in the order of `paths`, with a thread per core, 16 at most.

    Args:
        paths: the files.
        resize: as for `decode_image`; the caller has checked both sizes with `check_sizes`.
        crop: as for `decode_image`.

    Raises:
        ArtifactError: a file is missing or can't be read.
    """

    def decode_one(path: Path) -> DecodedImage | BrokenImage:
        try:
            return _decode(path, resize, crop)
        except UnusableImageError as error:
            return BrokenImage(path, error.reason)

    num_threads = min(os.cpu_count() or 1, _MOST_THREADS)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    pending: deque[Future[DecodedImage | BrokenImage]] = deque()
    with _quiet_pillow():
        try:
            for path in paths:
                pending.append(pool.submit(decode_one, path))
                if len(pending) > 8 * num_threads:  # bounds the memory while a slow image holds up the others
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also after Ctrl-C: images under way take milliseconds, the rest are dropped
            pool.shutdown(wait=True, cancel_futures=True)
