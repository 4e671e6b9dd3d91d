"""A data set published as one archive: check whether it is installed and correct, and install it."""

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
    """A published archive: where it is, its hashes, and the files in it."""

    archive: RemoteFile
    folder: str
    """The one folder that the archive holds; it keeps this name in the folder of data sets."""
    member_md5: Mapping[str, str]
    """File in the folder -> its md5, for every file whose md5 is known."""
    limits: Limits
    also_needed: tuple[str, ...] = ()
    """More files that must exist; no hash of them is published, only that of the whole archive."""
    beside: tuple[str, ...] = ()
    """Files beside the folder in the archive; they are not unpacked."""

    @property
    def needed(self) -> tuple[str, ...]:
        """The files whose presence shows that the data set is installed."""
        return (*self.member_md5, *self.also_needed)


@dataclass(frozen=True)
class Installed:
    """An installed data set."""

    path: Path
    source: str | None
    """The URL or the file that it came from; None where it was installed already."""


def look(release: Release, data_folder: Path) -> tuple[State, str]:
    """Whether the published files exist with the right hashes, and the first one that is missing or wrong, or "".

    Raises:
        ArtifactError: a file can't be read.
    """
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
    """Install the data set in `data_folder`, unless it is there: fetch the archive, verify, unpack and verify again.

    Args:
        release: the published archive.
        data_folder: the folder that holds the data sets' folders.
        from_file: a copy of the archive; then nothing is downloaded, and the copy is not deleted.
        mirrors: as for `download.fetch`.
        offline: as for `download.fetch`.
        pin: the project's pin of the archive, which is then kept there; without a pin the archive is deleted after it
            is unpacked.
        on_bytes: called with the progress.
        patience: how long to wait for each source.

    Raises:
        ArtifactError: the archive could not be fetched, is not the published one, or other files are in its place.
            Nothing has changed in the folder then.
    """
    target = data_folder / release.folder
    if from_file is not None:
        download.verify(release.archive, from_file)
    if _is_there(release, data_folder):
        return Installed(target, None)
    files.make_folder(data_folder)
    with files.waited_lock(data_folder / f".{release.folder}.lock"):
        if _is_there(release, data_folder):  # another process has installed it meanwhile
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
            pin.keep(source)  # before unpacking, so that a killed process can't leave the data set without its archive
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
                    hint="download the archive again from its publisher",
                )
        try:
            if not target.exists():
                unpacked.rename(target)
                return
            # Some files exist already, and are right. The needed files show that all others exist, so they come last.
            last = {unpacked / name for name in release.needed}
            for path in sorted(unpacked.rglob("*"), key=last.__contains__):
                place = target / path.relative_to(unpacked)
                if path.is_file() and not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(place)
        except OSError as error:
            raise files.not_writable(target, error) from error


def _differs(path: Path, md5: str | None) -> bool:
    """Whether a file has another md5; False for any readable file where `md5` is None.

    Raises:
        OSError: the file is missing or can't be read.
    """
    found = files.md5_file(path)
    return md5 is not None and found != md5
