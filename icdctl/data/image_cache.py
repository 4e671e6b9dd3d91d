"""Cache of decoded images: many image files as one uint8 array on disk, decoded once and memory-mapped from then on.

The array is in the state folder. Its name includes a hash of everything it was made from, so other images, another
size or another version of Pillow make another array. A JSON file beside it holds what the pixels do not show: their
hash, and the files that could not be decoded.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import numpy as np
import PIL
import torch
from torch import Tensor

from icdctl import files
from icdctl.data.dataset import OnImages
from icdctl.data.decode import (
    BrokenImage,
    DecodedImage,
    Pixels,
    Size,
    UnusableImageError,
    broken_images_message,
    check_sizes,
    decode_in_order,
    state_of,
)
from icdctl.errors import ArtifactError

_SCHEME = 1
"""Version of the pixels and of the file format, part of the name: raise it whenever either changes."""
_HASH_DIGITS = 32
"""Digits that are kept of the hash of each file."""


@dataclass(frozen=True)
class Decoded:
    """Decoded images, and the files that could not be decoded."""

    images: Tensor
    """[M, H, W, 3] uint8, mapped from disk copy-on-write: changes to it never reach the file."""
    rows: Tensor
    """[M] int64, ascending: the position in `names` of each image."""
    broken: tuple[BrokenImage, ...]
    """Files that could not be decoded, in the order of `names`."""
    sha256: str
    """Hash of the pixels in `images`."""
    file_hashes: tuple[str, ...] | None
    """M hashes of the files, hex, cut to 128 bits; None where an earlier version of icdctl filled the cache."""


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
    """Many image files as one array, from the cache or decoded into it; two processes at once decode them only once.

    Args:
        folder: the folder that the names are relative to.
        names: POSIX paths relative to `folder`, in the order of the images.
        resize: as for `decode_image`.
        crop: as for `decode_image`.
        content_key: identifies the content of all files, e.g. the hash of the archive that they come from. None uses
            the folder's path, and the size and modification time of each file.
        label: start of the name of the cache's files, for users who look into the cache.
        skip_broken: leave out images that can't be decoded.
        remedy: the hint where files of a published data set are missing or broken; None for the user's own files.
        on_images: called with the progress, in the calling thread; not called where the cache has the images.

    Raises:
        ArtifactError: a file is missing or can't be read; an image can't be decoded and `skip_broken` is not set; no
            image can be decoded; or the cache can't be written.
        UsageError: the sizes are impossible.
    """
    check_sizes(resize, crop)
    if not names:
        raise ArtifactError(f"there is no image to decode in `{folder}`", hint="name a folder of images")
    height, width = crop or resize
    content = content_key if content_key is not None else _states(folder, names, remedy, skip_broken=skip_broken)
    cache = _Cache(_stem(label, names, resize, crop, content), folder, names, (height, width))
    decoded = cache.read()
    if decoded is None:
        with files.waited_lock(cache.lock):
            decoded = cache.read()  # another process may have decoded them meanwhile
            if decoded is None:
                _clear_remains(cache.home, cache.stem)
                cache.delete()
                # Reports a missing file now, not after minutes of decoding.
                _states(folder, names, remedy, skip_broken=skip_broken)
                with closing(decode_in_order((folder / name for name in names), resize=resize, crop=crop)) as results:
                    decoded = cache.fill(results, on_images)
                if decoded.broken and content_key is not None:
                    cache.delete()  # the key would not change when the file is fixed
    if decoded.broken and not skip_broken:
        raise _broken_files(decoded.broken, folder, len(names), remedy)
    return cache.with_file_hashes(decoded) if decoded.file_hashes is None and content_key is None else decoded


def _states(folder: Path, names: Sequence[str], remedy: str | None, *, skip_broken: bool) -> list[object]:
    """Identifies the content of files without reading them: the folder, and each file's size and modification time.

    Raises:
        ArtifactError: a file is missing or not a regular file; with `skip_broken`, only if it can't be left out.
    """
    facts: list[object] = [str(folder.resolve())]
    unusable: list[BrokenImage] = []
    for name in names:
        try:
            state = state_of(folder / name, remedy)
        except UnusableImageError as error:
            unusable.append(BrokenImage(folder / name, error.reason))
            facts.append(None)
        else:
            facts.append([state.st_size, state.st_mtime_ns])
    if unusable and not skip_broken:
        raise _broken_files(unusable, folder, len(names), remedy)
    return facts


def _stem(label: str, names: Sequence[str], resize: Size, crop: Size | None, content: object) -> str:
    """The name of the cache's files, without a suffix or a dot. It depends on Pillow's version, as the pixels may."""
    facts = [_SCHEME, PIL.__version__, list(names), list(resize), None if crop is None else list(crop), content]
    key = files.sha256_bytes(json.dumps(facts).encode("ascii"))
    return f"{re.sub('[^A-Za-z0-9_-]', '_', label)[:60]}-{key[:32]}"


class _Cache:
    """Two files on disk: the array of the images, `<stem>.npy`, and the facts about it, `<stem>.json`."""

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
        """The cached images; None where the cache is absent, damaged or cut short."""
        try:
            facts = files.read_json(self._facts, what="cache", hint="")
            reasons = {int(row): str(reason) for row, reason in facts["broken"]}
            hashes = facts.get("files")  # absent where an earlier version filled the cache
            if facts["check"] != _check(reasons, facts["sha256"], hashes):
                return None
            decoded = self._map(reasons, facts["sha256"], hashes)
        except (ArtifactError, OSError, ValueError, TypeError, LookupError, OverflowError):
            return None
        whole = hashlib.sha256(decoded.images.numpy().data).hexdigest() == decoded.sha256
        if whole:
            files.mark_used(self._facts)
        return decoded if whole else None

    def delete(self) -> None:
        """Delete both files, to free the disk space of a damaged cache."""
        try:
            self._array.unlink(missing_ok=True)
            self._facts.unlink(missing_ok=True)
        except OSError as error:
            raise files.not_writable(self._array, error) from error

    def fill(self, results: Iterator[DecodedImage | BrokenImage], on_images: OnImages) -> Decoded:
        """Write the decoded images, in their order, and map the array.

        Raises:
            ArtifactError: the cache can't be written, or no image could be decoded. No file is left then.
        """
        broken: dict[int, BrokenImage] = {}
        digest = hashlib.sha256()
        hashes: list[str] = []
        total = len(self._names)
        try:
            with self._opened() as file:
                for row, result in enumerate(results):
                    if isinstance(result, BrokenImage):
                        broken[row] = result
                    else:
                        digest.update(result.pixels.data)
                        hashes.append(result.sha256[:_HASH_DIGITS])
                        self._write(file, result.pixels)
                    on_images(row + 1, total)
                if len(broken) == total:
                    raise _broken_files(tuple(broken.values()), self._folder, total)
                self._finish(file, total - len(broken))
            reasons = {row: image.reason for row, image in broken.items()}
            return self._publish(reasons, digest.hexdigest(), hashes)
        finally:
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        """The file under its temporary name, with space reserved for all images, positioned at the first pixel."""
        header = _npy_header((len(self._names), *self._size, 3))
        num_bytes = len(header) + len(self._names) * self._size[0] * self._size[1] * 3
        with self._reporting(), self._partial.open("wb", buffering=0):
            pass  # an unwritable place is reported before the first image is decoded
        with self._partial.open("r+b", buffering=0) as file:
            with self._reporting():
                _reserve(file.fileno(), num_bytes)
                file.seek(len(header))
            yield file

    def _write(self, file: io.FileIO, pixels: Pixels) -> None:
        rest = pixels.data.cast("B")
        with self._reporting():
            while rest:  # an unbuffered file may write only a part
                rest = rest[file.write(rest) :]

    def _finish(self, file: io.FileIO, num_images: int) -> None:
        """Cut off the space that broken images did not use, and write the shape; numpy's header has a fixed length."""
        with self._reporting():
            file.truncate()
            file.seek(0)
            file.write(_npy_header((num_images, *self._size, 3)))
            os.fsync(file.fileno())

    def _publish(self, reasons: dict[int, str], sha256: str, hashes: list[str]) -> Decoded:
        """Give the file its final name. The facts are written last: pixels without facts are decoded again."""
        with self._reporting():
            self._partial.replace(self._array)
        try:
            self._write_facts(reasons, sha256, hashes)
            with self._reporting():
                return self._map(reasons, sha256, hashes)
        except BaseException:
            self._array.unlink(missing_ok=True)
            raise

    def _write_facts(self, reasons: dict[int, str], sha256: str, hashes: list[str]) -> None:
        facts = {
            "of": str(self._folder),
            "sha256": sha256,
            "broken": sorted(reasons.items()),
            "files": hashes,
            "check": _check(reasons, sha256, hashes),
        }
        files.write_json(self._facts, facts)

    def with_file_hashes(self, decoded: Decoded) -> Decoded:
        """The same images with the hashes of their files, which an earlier version did not record.

        Raises:
            ArtifactError: a file can't be read, or the cache can't be written.
        """
        hashes = [_hash_of(self._folder / self._names[row]) for row in decoded.rows.tolist()]
        reasons = dict(zip(self._broken_rows(decoded), (image.reason for image in decoded.broken), strict=True))
        self._write_facts(reasons, decoded.sha256, hashes)
        return replace(decoded, file_hashes=tuple(hashes))

    def _broken_rows(self, decoded: Decoded) -> list[int]:
        return sorted(set(range(len(self._names))) - set(decoded.rows.tolist()))

    def _map(self, reasons: dict[int, str], sha256: str, hashes: list[str] | None) -> Decoded:
        """Map the array on disk.

        Raises:
            OSError, ValueError: the file is missing, or its header or length does not match the facts.
        """
        rows = [row for row in range(len(self._names)) if row not in reasons]
        shape = (len(rows), *self._size, 3)
        header = _npy_header(shape)
        with files.open_regular(self._array) as file:
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
            file_hashes=None if hashes is None else tuple(hashes),
        )

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn errors of the disk into the error that users see."""
        try:
            yield
        except OSError as error:
            raise files.not_writable(self._array, error) from error


def _check(reasons: dict[int, str], sha256: str, hashes: Sequence[str] | None) -> str:
    """A hash of the facts themselves: a row number that changed on disk would give images wrong labels."""
    facts = [sha256, sorted(reasons.items()), *([] if hashes is None else [list(hashes)])]
    return files.sha256_bytes(json.dumps(facts).encode("ascii"))


def _hash_of(path: Path) -> str:
    """The hash of an image file, as `Decoded.file_hashes` holds it."""
    try:
        return files.sha256_file(path)[:_HASH_DIGITS]
    except OSError as error:
        raise ArtifactError(
            f"image `{path}` can't be read: {error.strerror or error}", hint="check its permissions and the disk"
        ) from error


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """The header of a `.npy` file of uint8 with this shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Reserve disk space before the work. On a file system that can't reserve it, the write may fail instead.

    Raises:
        OSError: there is not enough space.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def _clear_remains(home: Path, own: str) -> None:
    """Delete the temporary files of killed processes, for these images or others: those whose lock is free.

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
    own = "fix or delete them, or leave them out with `--skip-broken`"
    return ArtifactError(
        broken_images_message(broken, total, folder=folder),
        hint=remedy or (own if len(broken) < total else "name a folder of images that can be decoded"),
    )
