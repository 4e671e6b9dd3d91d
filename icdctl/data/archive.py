"""Unpacking of tar archives from untrusted sources.

Only regular files and folders inside one top folder are extracted. The number of members and of unpacked bytes is
limited while unpacking, before anything larger reaches the memory or the disk.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from icdctl import files
from icdctl.errors import ArtifactError

_AGAIN = "download it again from where it is published, and compare its hash"
_CHUNK_BYTES = 1 << 20
_MOST_MEMBERS = 10_000


@dataclass(frozen=True)
class Limits:
    """The most that an archive may hold."""

    members: int
    unpacked_bytes: int


class _Refused(Exception):
    """The archive is unsafe or holds more than its limits; the message says which."""


class _Bounded:
    """A stream that fails after a number of bytes; headers count as well as files."""

    def __init__(self, stream: IO[bytes], most_bytes: int) -> None:
        self._stream = stream
        self._left = most_bytes
        self._most = most_bytes

    def read(self, size: int = -1) -> bytes:
        wanted = self._left + 1 if size < 0 else min(size, self._left + 1)
        content = self._stream.read(wanted)
        self._left -= len(content)
        if self._left < 0:
            raise _Refused(f"it unpacks to more than {self._most:,} bytes")
        return content


@contextmanager
def unpacked(archive: Path, folder: Path, *, limits: Limits, beside: Collection[str] = ()) -> Iterator[Path]:
    """Unpack `archive` into a temporary folder beside `folder`, which is deleted when the block ends.

    Args:
        archive: a .tar or .tar.gz whose members all lie in a folder with the name of `folder`.
        folder: the final place, to which the block moves what it needs. Temporary folders that a killed process left
            there are deleted.
        limits: the most that the archive may hold.
        beside: files that may lie beside the top folder in the archive; they are skipped.

    Yields:
        The unpacked top folder.

    Raises:
        ArtifactError: the archive is broken or unsafe, or the disk is full.
    """
    prefix = f".{folder.name}.new-"
    files.make_folder(folder.parent)
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    except OSError as error:
        raise files.not_writable(folder, error) from error
    try:
        _extract(archive, temporary, top=folder.name, limits=limits, beside=beside)
        if not (temporary / folder.name).is_dir():
            raise ArtifactError(f"`{archive}` is refused: it holds no folder `{folder.name}`", hint=_AGAIN)
        yield temporary / folder.name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_member(archive: Path, name: str, destination: Path, *, most_bytes: int) -> None:
    """Write one file of an archive to `destination`.

    Raises:
        ArtifactError: the archive is broken or unsafe, has no such member, or the member is larger than `most_bytes`.
        OSError: the file can't be written.
    """
    with _opened(archive, most_bytes=16 * files.LARGEST_FOREIGN_BYTES) as tar:
        for count, member in enumerate(tar, start=1):
            if count > _MOST_MEMBERS:
                raise _Refused(f"it holds more than {_MOST_MEMBERS:,} members")
            if member.name.removeprefix("./") != name or not member.isreg():
                continue
            if member.size > most_bytes:
                raise _Refused(f"`{name}` in it has {member.size:,} bytes, expected {most_bytes:,} at most")
            source = cast(IO[bytes], tar.extractfile(member))
            with destination.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK_BYTES)
            return
    raise ArtifactError(f"`{archive}` holds no `{name}`", hint=_AGAIN)


def _extract(archive: Path, folder: Path, *, top: str, limits: Limits, beside: Collection[str]) -> None:
    # Every member adds a header block and pads its last data block.
    most_bytes = limits.unpacked_bytes + (limits.members + 20) * 4 * tarfile.BLOCKSIZE
    try:
        with _opened(archive, most_bytes=most_bytes) as tar:
            for count, member in enumerate(tar, start=1):
                if count > limits.members:
                    raise _Refused(f"it holds more than {limits.members:,} members")
                if _is_passed_over(member, beside):
                    continue
                _check_member(member, top)
                # Without the archive's mode, the umask decides who may read and write the file.
                member = member.replace(mode=None, deep=False)  # type: ignore[arg-type]  # None is in tarfile's docs
                tar.extract(member, folder, filter="data")
    except OSError as error:
        raise files.not_writable(folder.parent / top, error) from error


def _is_passed_over(member: tarfile.TarInfo, beside: Collection[str]) -> bool:
    """Whether a member may lie outside the top folder: a file in `beside`, a `._` file of macOS, the root `.`."""
    name = str(PurePosixPath(member.name))
    if member.isdir():
        return name == "."
    return member.isreg() and (name in beside or ("/" not in name and name.startswith("._")))


def _check_member(member: tarfile.TarInfo, top: str) -> None:
    path = PurePosixPath(member.name)
    shown = member.name[:80].encode("unicode_escape").decode("ascii")
    if path.is_absolute() or ".." in path.parts or path.parts[:1] != (top,):
        raise _Refused(f"`{shown}` in it lies outside `{top}`")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _Refused(f"`{shown}` in it is a link or a device, not a file or a folder")


@contextmanager
def _opened(archive: Path, *, most_bytes: int) -> Iterator[tarfile.TarFile]:
    """Open the archive as a stream. Errors in the archive become ArtifactError; OSErrors of writing pass through."""
    try:
        raw = files.open_regular(archive)
    except OSError as error:
        raise ArtifactError(
            f"`{archive}` can't be read: {error.strerror or error}", hint="check the path and its permissions"
        ) from error
    with raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
        bounded = cast(IO[bytes], _Bounded(stream, most_bytes))  # a stream is only read from
        try:
            with tarfile.open(fileobj=bounded, mode="r|") as tar:
                yield tar
        except (_Refused, tarfile.FilterError) as error:
            raise ArtifactError(f"`{archive}` is refused: {error}", hint=_AGAIN) from error
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            cause = str(error) or type(error).__name__
            raise ArtifactError(f"`{archive}` is not a complete tar archive: {cause}", hint=_AGAIN) from error
