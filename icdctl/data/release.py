"""A data set that is published as one archive: is it here, is it right, and getting it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icdctl import files
from icdctl.data import archive, download
from icdctl.data.archive import Limits
from icdctl.data.download import USUAL_PATIENCE, OnBytes, Patience, RemoteFile
from icdctl.data.pin import Pin
from icdctl.errors import ArtifactError

State = Literal["right", "absent", "other"]


@dataclass(frozen=True)
class Release:
    """What was published, down to the hashes."""

    archive: RemoteFile
    folder: str
    """The one folder that the archive holds, and the name that it gets in the folder of data sets."""
    member_md5: Mapping[str, str]
    """File in the folder -> md5, for every file whose md5 is known."""
    limits: Limits
    also_needed: tuple[str, ...] = ()
    """Files that must be there too; nothing is published of their content but the archive's own hash."""
    beside: tuple[str, ...] = ()
    """Files beside the folder in the archive, which are not taken."""

    @property
    def needed(self) -> tuple[str, ...]:
        """The files by which one sees that it is there."""
        return (*self.member_md5, *self.also_needed)


@dataclass(frozen=True)
class Installed:
    """A data set in its place."""

    path: Path
    source: str | None
    """The URL or the file that it came from; None where it was there already."""


def look(release: Release, data_folder: Path) -> tuple[State, str]:
    """Whether the published files are there, by their hashes, and the file that is not or is another."""
    missing = ""
    for name in release.needed:
        path = data_folder / release.folder / name
        try:
            if _differs(path, release.member_md5.get(name)):
                return "other", name
        except (FileNotFoundError, NotADirectoryError):
            missing = missing or name
        except OSError as error:
            raise ArtifactError(f"`{path}` can't be read: {error.strerror}", hint="check its permissions") from error
    return ("absent", missing) if missing else ("right", "")


def install(
    release: Release,
    data_folder: Path,
    *,
    from_file: Path | None = None,
    mirrors: Sequence[str] = (),
    offline: bool = False,
    pin: Pin | None = None,
    on_bytes: OnBytes = lambda here, total: None,
    patience: Patience = USUAL_PATIENCE,
) -> Installed:
    """Have the data set in `data_folder`: nothing to do, or the archive brought, verified, unpacked and verified again.

    Args:
        release: what it must be.
        data_folder: what holds the data sets' folders.
        from_file: a copy of the archive; nothing is downloaded then, and the copy stays.
        mirrors: as `download.fetch`.
        offline: as `download.fetch`.
        pin: of the archive, which then has its place there and stays; without one it is deleted when it is unpacked.
        on_bytes: told of the progress.
        patience: how long each source is waited for.

    Raises:
        ArtifactError: it can't be had, is not what was published, or other files are in its place. What is there then
            is as it was before.
    """
    target = data_folder / release.folder
    if from_file is not None:
        download.verify(release.archive, from_file)
    if _is_there(release, data_folder):
        return Installed(target, None)
    files.make_folder(data_folder)
    with files.waited_lock(data_folder / f".{release.folder}.lock"):
        if _is_there(release, data_folder):  # another process was faster
            return Installed(target, None)
        own = data_folder / release.archive.name if pin is None else pin.place
        if from_file is not None:
            source, said = from_file, from_file.name
        else:
            if pin is not None:
                pin.restore()
            origin = _fetched(release, own, mirrors=mirrors, offline=offline, on_bytes=on_bytes, patience=patience)
            source, said = own, origin.url or own.name
        if pin is not None:
            pin.keep(source)  # before it is unpacked, so that a kill can't leave the data set without its archive
        _unpack(release, source, target)
        if pin is None and from_file is None:
            own.unlink()
        return Installed(target, said)


def _fetched(
    release: Release, own: Path, *, mirrors: Sequence[str], offline: bool, on_bytes: OnBytes, patience: Patience
) -> download.Origin:
    return download.fetch(release.archive, own, mirrors=mirrors, offline=offline, on_bytes=on_bytes, patience=patience)


def _is_there(release: Release, data_folder: Path) -> bool:
    state, name = look(release, data_folder)
    if state == "other":
        raise ArtifactError(
            f"`{data_folder / release.folder / name}` is not the published file: its md5 is not "
            f"{release.member_md5[name]}",
            hint=f"move `{data_folder / release.folder}` away, or choose another folder with `--data-dir`",
        )
    return state == "right"


def _unpack(release: Release, source: Path, target: Path) -> None:
    with archive.unpacked(source, target, limits=release.limits, beside=release.beside) as unpacked:
        for name in release.needed:
            member, md5 = unpacked / name, release.member_md5.get(name)
            if not member.is_file() or _differs(member, md5):
                raise ArtifactError(
                    f"`{source}` is refused: `{name}` in it is missing or is not the published file"
                    + (f" (md5 {md5})" if md5 else ""),
                    hint="get the archive again from where it is published",
                )
        try:
            if not target.exists():
                unpacked.rename(target)
                return
            # Some of them are there, and right. By the needed ones one sees that all are, so they come last.
            last = {unpacked / name for name in release.needed}
            for path in sorted(unpacked.rglob("*"), key=last.__contains__):
                place = target / path.relative_to(unpacked)
                if path.is_file() and not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(place)
        except OSError as error:
            raise files.not_writable(target, error) from error


def _differs(path: Path, md5: str | None) -> bool:
    """Whether a file has another md5; where none is known, that it can be read is all that counts.

    Raises:
        OSError: it is not there or can't be read.
    """
    found = files.md5_file(path)
    return md5 is not None and found != md5
