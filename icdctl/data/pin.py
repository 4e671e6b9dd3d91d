"""An archive that the project pins with DVC: `data.dvc` holds its hash, DVC's cache holds its bytes.

DVC never compares what a URL sends with the md5 in a .dvc file, and `dvc update` silently overwrites that md5. So this
module fetches and verifies the bytes and puts them into DVC's cache. It never writes `data.dvc`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from pydantic import BaseModel

from icdctl import files
from icdctl.data import download
from icdctl.data.download import RemoteFile
from icdctl.errors import ArtifactError
from icdctl.files import yaml_reading
from icdctl.files.dvc import run_dvc

FILE = "data.dvc"
_OBJECT_MODE = 0o444
"""File mode by which DVC knows that it need not hash an object again."""


class _Out(BaseModel):
    """The fields that are read of an entry of `outs`."""

    path: str
    md5: str | None = None
    size: int | None = None


class _Document(BaseModel):
    """The fields that are read of a .dvc file."""

    outs: tuple[_Out, ...] = ()


@dataclass(frozen=True)
class Pin:
    """An archive that `data.dvc` pins as it was published."""

    file: RemoteFile
    md5: str
    root: Path
    """The project's root folder."""
    place: Path
    """The archive's path in the project, as `data.dvc` says."""

    def restore(self) -> None:
        """Check the archive out from DVC's cache, where the cache has it and the project does not.

        Raises:
            ArtifactError: another file is in its place, or dvc fails.
        """
        if not self._is_in_place() and self._is_kept():
            self._dvc("checkout", FILE)

    def keep(self, archive: Path) -> None:
        """Put the archive into DVC's cache and into its place, so that `dvc status` reports no change.

        Args:
            archive: a copy of the archive; it is not moved.

        Raises:
            ArtifactError: the copy is wrong, another file is in the place, the cache can't be written, or dvc fails.
        """
        is_in_place, is_kept = self._is_in_place(), self._is_kept()
        if not is_kept:
            self._copy_into_cache(archive)
        if not (is_in_place and is_kept):
            self._dvc("checkout", "--relink", FILE)  # after relinking, the two share disk space

    @cached_property
    def _object(self) -> Path:
        cache = self.root / self._dvc("cache", "dir").strip()
        return cache / "files" / "md5" / self.md5[:2] / self.md5[2:]

    def _is_in_place(self) -> bool:
        if not self.place.exists():
            return False
        try:
            download.verify(self.file, self.place)
        except ArtifactError as error:
            raise ArtifactError(
                error.message, hint=f"move it away; `{FILE}` pins {self.file.facts} to that place"
            ) from error
        return True

    def _is_kept(self) -> bool:
        """Whether DVC's cache has the archive, by its bytes; DVC itself only looks at an object's name."""
        try:
            download.verify(self.file, self._object)
        except ArtifactError:
            return False
        return True

    def _copy_into_cache(self, archive: Path) -> None:
        # Not in the object's own folder: there DVC would read the temporary name as the name of an object.
        temporary = self._object.parent.with_name(f".{self.md5}.part")
        with files.waited_lock(temporary.with_suffix(".lock")):
            try:
                temporary.unlink(missing_ok=True)  # a file that a killed process left may be read-only
                shutil.copyfile(archive, temporary)
                download.verify(self.file, temporary)
                with temporary.open("rb") as content:
                    os.fsync(content.fileno())
                temporary.chmod(_OBJECT_MODE)
                files.make_folder(self._object.parent)
                temporary.replace(self._object)
            except OSError as error:
                raise ArtifactError(
                    f"`{archive}` can't be copied to DVC's cache, `{self._object}`: {error.strerror or error}",
                    hint="make room there and check its permissions; `dvc cache dir` shows and moves it",
                ) from error
            finally:
                temporary.unlink(missing_ok=True)

    def _dvc(self, *arguments: str) -> str:
        """Run a dvc command and return what it prints."""
        return run_dvc(
            self.root, *arguments, hint="`dvc doctor` and `dvc status` show more; then run the command again"
        )


def find_pin(file: RemoteFile) -> Pin | None:
    """The project's pin of `file`; None outside of a DVC project, and where `data.dvc` pins other files.

    Raises:
        ArtifactError: `data.dvc` can't be read, or pins another md5 or size.
    """
    root = files.project_root()
    path = root / FILE
    if not (root / ".dvc").is_dir() or not path.is_file():
        return None
    again = f"`git checkout {FILE}` brings back the committed one; `dvc update` changes it"
    try:
        document = _Document.model_validate(yaml_reading.read_yaml(path))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"`{path}` can't be read as a .dvc file: {error}", hint=again) from error
    for out in document.outs:
        if PurePosixPath(out.path).name != file.name:
            continue
        if out.md5 is None or (out.md5, out.size) != (file.md5, file.num_bytes):
            raise ArtifactError(
                f"`{path}` pins another `{file.name}` than the published one: md5 {out.md5}, size {out.size}; "
                f"expected md5 {file.md5}, size {file.num_bytes}",
                hint=again,
            )
        return Pin(file, out.md5, root, root / out.path)
    return None
