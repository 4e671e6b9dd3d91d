"""Verified downloads: a file is either absent or whole and checked.

`fetch` tries the mirrors in order; what one of them sends is kept under a temporary name until its size and hashes are
right, then renamed. Wrong bytes are deleted, and the next mirror is asked.
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
"""Of an archive that one member is wanted from; only its members' sizes are known."""

Check = Callable[[Path], None]


@dataclass(frozen=True)
class RemoteFile:
    """A published file, and what its bytes must be."""

    name: str
    """Where it lies on a mirror: `<mirror>/<name>`."""
    urls: tuple[str, ...]
    """Where it is published, in the order to be tried; `ARCHIVE_URL#MEMBER` is a member of a tar archive."""
    num_bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None
    pinned_by: str = "the published one"
    """Whose hash it is, for the message where the bytes have another."""

    @property
    def carry_over(self) -> str:
        """The hint where it can't be downloaded."""
        return f"carry it over from a machine that has it: {self.facts}; then name it with `--from FILE`"

    @property
    def facts(self) -> str:
        """Name, size and hash, for a person who carries the file over."""
        size = "" if self.num_bytes is None else f", {self.num_bytes:,} bytes"
        hashes = [f"{kind} {value}" for kind, value in (("md5", self.md5), ("sha256", self.sha256)) if value]
        return f"`{self.name}`{size}, {', '.join(hashes) if hashes else 'no hash is published'}"


@dataclass(frozen=True)
class Origin:
    """A file that is here, and where it came from."""

    path: Path
    url: str | None
    """None where it was here already."""


def mirrors_in_order(given: str | None) -> tuple[str, ...]:
    """The mirrors to ask before the publisher: the one that was given, then the one that `ICDCTL_MIRROR` names.

    Raises:
        UsageError: one is no http, https or file URL.
    """
    named = [mirror for mirror in (given, os.environ.get(MIRROR_VARIABLE)) if mirror]
    for mirror in named:
        parts = urllib.parse.urlsplit(mirror)
        is_folder = parts.scheme == "file" and parts.path.startswith("/") and parts.netloc in ("", "localhost")
        if not is_folder and not (parts.scheme in ("http", "https") and parts.netloc):
            raise UsageError(
                f"`{mirror}` is no mirror: expected an http, https or file URL",
                hint="e.g. `--mirror https://files.example.org/icdctl` or `--mirror file:///mnt/share/icdctl`",
            )
    return tuple(dict.fromkeys(named))


def verify(file: RemoteFile, path: Path) -> None:
    """Compare size and hashes.

    Raises:
        ArtifactError: one differs; expected and got are said.
    """
    if path.exists() and not path.is_file():  # reading a device or a pipe might never end
        raise ArtifactError(f"`{path}` is no file", hint=f"name the file itself: {file.facts}")
    questions: tuple[tuple[str, object, Callable[[Path], object]], ...] = (
        ("size", file.num_bytes, lambda path: path.stat().st_size),
        ("md5", file.md5, files.md5_file),
        ("sha256", file.sha256, files.sha256_file),
    )
    for what, expected, ask in questions:
        try:
            got = ask(path) if expected is not None else None
        except OSError as error:
            raise ArtifactError(
                f"`{path}` can't be read: {error.strerror or error}", hint="check the path and its permissions"
            ) from error
        if got != expected:
            raise ArtifactError(
                f"`{path}` is not {file.pinned_by} `{file.name}`: {what} {got}, expected {expected}",
                hint="it is broken, cut short or another version; get it again",
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
    """Have `file` at `destination`, downloaded where it is not there yet; two processes that want it fetch it once.

    Args:
        file: what it must be.
        destination: where it goes, under this name only when it is whole and right.
        mirrors: asked before the publisher.
        offline: nothing is downloaded; mirrors that are folders are still read.
        on_bytes: told of the progress.
        check: a further look at a file whose hashes are right; it raises ArtifactError where the content is wrong.
        patience: how long each source is waited for.

    Raises:
        ArtifactError: no source gives it, or it can't be written. Nothing is left under the final name.
    """
    files.make_folder(destination.parent)
    with files.waited_lock(destination.with_name(f".{destination.name}.lock")):
        if destination.is_file():
            verify(file, destination)
            check(destination)
            return Origin(destination, None)
        urls = [f"{mirror.rstrip('/')}/{file.name}" for mirror in mirrors] + list(file.urls)
        asked = [url for url in urls if not offline or url.startswith("file:")]
        attempt = _Attempt(file, destination, on_bytes, check, patience)
        failures: list[str] = []
        for url in asked:
            try:
                attempt.take(url)
                return Origin(destination, shown(url))
            except (SourceError, ArtifactError) as error:
                failures.append(f"{shown(url)}: {error}")
            except OSError as error:
                attempt.partial.delete()  # or the disk would stay full
                raise files.not_writable(destination, error) from error
        raise _not_to_be_had(file, destination, failures, offline=offline)


class _Attempt:
    """One file on its way from one source after another."""

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
        """From this source, through all checks, to its final name.

        Raises:
            SourceError, ArtifactError: it does not give it, or gives something else, which is deleted.
            OSError: it can't be written.
        """
        if self.file.num_bytes is None or self.partial.size != self.file.num_bytes:
            self._bring(url)
        try:
            verify(self.file, self.partial.path)
            self._check(self.partial.path)
        except ArtifactError as error:
            self.partial.delete()
            told = error.message.replace(f"`{self.partial.path}`", "what it sends")
            raise ArtifactError(f"{told}; deleted", hint=error.hint) from error
        with self.partial.path.open("rb") as content:
            os.fsync(content.fileno())
        self.partial.path.replace(self.destination)
        self.partial.delete()

    def _bring(self, url: str) -> None:
        most_bytes = self.file.num_bytes or files.LARGEST_FOREIGN_BYTES
        if self.file.num_bytes is not None:
            check_room(self.file.num_bytes - self.partial.size, self.destination.parent)
        source, _, member = url.partition("#")
        if member:
            self._bring_member(source, member, most_bytes)
        else:
            retrieve(url, self.partial, most_bytes=most_bytes, patience=self._patience, on_bytes=self._on_bytes)

    def _bring_member(self, url: str, member: str, most_bytes: int) -> None:
        """The archive is kept beside the file, for the next member that is wanted from it."""
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


def _not_to_be_had(file: RemoteFile, destination: Path, failures: list[str], *, offline: bool) -> ArtifactError:
    hint = file.carry_over
    if offline and not failures:
        return ArtifactError(f"`{destination}` is not there, and `--offline` forbids to download it", hint=hint)
    if not failures:
        return ArtifactError(f"there is no address to download `{file.name}` from", hint=hint)
    return ArtifactError(
        f"`{file.name}` can't be had: {'; '.join(failures)}",
        hint=f"try again later (what has arrived is kept), name another source with `--mirror URL`, or {hint}",
    )
