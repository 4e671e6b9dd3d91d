"""Verified downloads: a file is either absent or complete and checked.

`fetch` tries the mirrors in order. A download keeps a temporary name until its size and hashes are right, then it is
renamed. Wrong bytes are deleted, and the next mirror is tried.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icdctl import files
from icdctl.data import archive
from icdctl.data.transport import (
    USUAL_PATIENCE,
    OnBytes,
    Partial,
    Patience,
    SourceError,
    check_room,
    retrieve,
    shown,
)
from icdctl.errors import ArtifactError, UsageError

__all__ = ["USUAL_PATIENCE", "OnBytes", "Origin", "Patience", "RemoteFile", "fetch", "mirrors_in_order", "verify"]

MIRROR_VARIABLE = "ICDCTL_MIRROR"
_LONGEST_ARCHIVE = 8 * 1024**3
"""Most bytes of an archive of which one member is wanted; only the sizes of members are known in advance."""

Check = Callable[[Path], None]


@dataclass(frozen=True)
class RemoteFile:
    """A published file: where it is, and the size and hashes that its bytes must have; None where not known."""

    name: str
    """Its path on a mirror: `<mirror>/<name>`."""
    urls: tuple[str, ...]
    """Addresses of the publisher, in the order to try; `ARCHIVE_URL#MEMBER` is a member of a tar archive."""
    num_bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None
    pinned_by: str = "the published one"
    """What the hashes belong to, for the message where the bytes have others."""

    @property
    def carry_over(self) -> str:
        """The hint where the file can't be downloaded."""
        return f"copy it from a machine that has it: {self.facts}; then name it with `--from FILE`"

    @property
    def facts(self) -> str:
        """Name, size and hashes, as one phrase for messages."""
        size = "" if self.num_bytes is None else f", {self.num_bytes:,} bytes"
        hashes = [f"{kind} {value}" for kind, value in (("md5", self.md5), ("sha256", self.sha256)) if value]
        return f"`{self.name}`{size}, {', '.join(hashes) if hashes else 'no hash is published'}"


@dataclass(frozen=True)
class Origin:
    """A file on this machine, and where it came from."""

    path: Path
    url: str | None
    """The URL that it was downloaded from; None where the file existed already."""


def mirrors_in_order(given: str | None) -> tuple[str, ...]:
    """The mirrors to try before the publisher: the given one, then the one in `ICDCTL_MIRROR`.

    Raises:
        UsageError: a mirror is not an http, https or file URL.
    """
    named = [mirror for mirror in (given, os.environ.get(MIRROR_VARIABLE)) if mirror]
    for mirror in named:
        if not _is_mirror(mirror):
            raise UsageError(
                f"`{mirror}` is not a mirror: expected an http, https or file URL",
                hint="e.g. `--mirror https://files.example.org/icdctl` or `--mirror file:///mnt/share/icdctl`",
            )
    return tuple(dict.fromkeys(named))


def _is_mirror(text: str) -> bool:
    """Whether a text is the URL of a server or of a folder."""
    try:
        parts = urllib.parse.urlsplit(text)
        host = parts.hostname if parts.port is None or parts.port > 0 else None
    except ValueError:  # an address or a port that is not valid
        return False
    if parts.scheme == "file":
        return parts.path.startswith("/") and parts.netloc in ("", "localhost")
    return parts.scheme in ("http", "https") and bool(host) and text.isprintable() and " " not in text


def verify(file: RemoteFile, path: Path) -> None:
    """Compare size and hashes of the file at `path` with the published ones.

    Raises:
        ArtifactError: one differs (the message says expected and got), or the file can't be read.
    """
    if path.exists() and not path.is_file():  # reading a device or a pipe might never end
        raise ArtifactError(f"`{path}` is not a regular file", hint=f"name the file itself: {file.facts}")
    checks: tuple[tuple[str, object, Callable[[Path], object]], ...] = (
        ("size", file.num_bytes, lambda path: path.stat().st_size),
        ("md5", file.md5, files.md5_file),
        ("sha256", file.sha256, files.sha256_file),
    )
    for what, expected, measure in checks:
        try:
            got = measure(path) if expected is not None else None
        except OSError as error:
            raise ArtifactError(
                f"`{path}` can't be read: {error.strerror or error}", hint="check the path and its permissions"
            ) from error
        if got != expected:
            raise ArtifactError(
                f"`{path}` is not {file.pinned_by} `{file.name}`: {what} {got}, expected {expected}",
                hint="it is broken, cut short or another version; download it again",
            )


def fetch(
    file: RemoteFile,
    destination: Path,
    *,
    mirrors: Sequence[str] = (),
    offline: bool = False,
    on_bytes: OnBytes = lambda here, total: None,
    check: Check = lambda path: None,
    patience: Patience = USUAL_PATIENCE,
) -> Origin:
    """Download `file` to `destination`, unless it is there already; two processes at once download it only once.

    Args:
        file: the published file.
        destination: the final path; a file has this name only once it is complete and verified.
        mirrors: URLs to try before the publisher.
        offline: download nothing; mirrors that are folders are still read.
        on_bytes: called with the progress.
        check: a further check of a file whose hashes are right; it raises ArtifactError where the content is wrong.
        patience: how long to wait for each source.

    Raises:
        ArtifactError: no source gives the file, or it can't be written. Nothing is left under the final name.
    """
    files.make_folder(destination.parent)
    with files.waited_lock(destination.with_name(f".{destination.name}.lock")):
        if destination.is_file():
            verify(file, destination)
            check(destination)
            return Origin(destination, None)
        urls = [f"{mirror.rstrip('/')}/{file.name}" for mirror in mirrors] + list(file.urls)
        allowed = [url for url in urls if not offline or url.startswith("file:")]
        attempt = _Attempt(file, destination, on_bytes, check, patience)
        failures: list[str] = []
        for url in allowed:
            try:
                attempt.take(url)
                return Origin(destination, shown(url))
            except (SourceError, ArtifactError) as error:
                failures.append(f"{shown(url)}: {error}")
            except OSError as error:
                attempt.partial.delete()  # otherwise a full disk would stay full
                raise files.not_writable(destination, error) from error
        raise _fetch_failed(file, destination, failures, offline=offline)


class _Attempt:
    """The download of one file, tried from one source after another."""

    def __init__(
        self, file: RemoteFile, destination: Path, on_bytes: OnBytes, check: Check, patience: Patience
    ) -> None:
        self.file = file
        self.destination = destination
        self.partial = Partial(destination.with_name(f".{destination.name}.part"))
        self._on_bytes = on_bytes
        self._check = check
        self._patience = patience

    def take(self, url: str) -> None:
        """Download from this source, check the bytes, and rename the file to its final name.

        Raises:
            SourceError, ArtifactError: the source does not give the file, or gives wrong bytes, which are deleted.
            OSError: the file can't be written.
        """
        if self.file.num_bytes is None or self.partial.size != self.file.num_bytes:
            self._download(url)
        try:
            verify(self.file, self.partial.path)
            self._check(self.partial.path)
        except ArtifactError as error:
            self.partial.delete()
            message = error.message.replace(f"`{self.partial.path}`", "what it sends")
            raise ArtifactError(f"{message}; deleted", hint=error.hint) from error
        with self.partial.path.open("rb") as content:
            os.fsync(content.fileno())
        self.partial.path.replace(self.destination)
        self.partial.delete()

    def _download(self, url: str) -> None:
        most_bytes = self.file.num_bytes or files.LARGEST_FOREIGN_BYTES
        if self.file.num_bytes is not None:
            check_room(self.file.num_bytes - self.partial.size, self.destination.parent)
        source, _, member = url.partition("#")
        if member:
            self._download_member(source, member, most_bytes)
        else:
            retrieve(url, self.partial, most_bytes=most_bytes, patience=self._patience, on_bytes=self._on_bytes)

    def _download_member(self, url: str, member: str, most_bytes: int) -> None:
        """Extract the member from its archive, which is kept beside the file because other members may be wanted."""
        name = Path(urllib.parse.urlsplit(url).path).name
        whole = self.destination.with_name(name)
        with files.waited_lock(whole.with_name(f".{name}.lock")):
            if not whole.is_file():
                under_way = Partial(whole.with_name(f".{name}.part"))
                try:
                    retrieve(
                        url, under_way, most_bytes=_LONGEST_ARCHIVE, patience=self._patience, on_bytes=self._on_bytes
                    )
                except OSError:
                    under_way.delete()
                    raise
                under_way.path.replace(whole)
                under_way.delete()
            self.partial.delete()
            try:
                archive.take_member(whole, member, self.partial.path, most_bytes=most_bytes)
            except ArtifactError:
                whole.unlink()
                raise


def _fetch_failed(file: RemoteFile, destination: Path, failures: list[str], *, offline: bool) -> ArtifactError:
    hint = file.carry_over
    if offline and not failures:
        return ArtifactError(f"`{destination}` does not exist, and `--offline` forbids downloading it", hint=hint)
    if not failures:
        return ArtifactError(f"there is no address to download `{file.name}` from", hint=hint)
    return ArtifactError(
        f"`{file.name}` could not be fetched: {'; '.join(failures)}",
        hint=f"try again later (the part that has arrived is kept), name another source with `--mirror URL`, or {hint}",
    )
