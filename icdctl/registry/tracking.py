"""The files of registered versions in DVC, where the registry is the project's own and the project uses DVC."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath

from icdctl import files
from icdctl.files.dvc import run_dvc
from icdctl.registry.artifact import DVC_FILE, FILES_FOLDER, MANIFEST_FILE
from icdctl.registry.find import names, version_numbers


def is_untracked(folder: Path, place: Path) -> bool:
    """Whether DVC does not track the files of the version in `place`, though it tracks those of this registry.

    An `add` that is killed after the version has its place leaves such a version.
    """
    is_whole = (place / MANIFEST_FILE).is_file() and (place / FILES_FOLDER).is_dir()
    return is_whole and not (place / DVC_FILE).is_file() and _is_tracked(folder)


def complete(folder: Path, message: Callable[[str], None]) -> list[Path]:
    """Have DVC track the files of interrupted registrations; return their folders."""
    places = [folder / name / f"v{version}" for name in names(folder) for version in version_numbers(folder, name)]
    left = [place for place in places if is_untracked(folder, place)]
    for place in left:
        track(folder, place)
        message(f"`{place}`: its registration was interrupted before DVC tracked the files; they are tracked now")
    return left


def _is_tracked(folder: Path) -> bool:
    """Whether this is the project's own registry and the project uses DVC."""
    root = files.project_root()
    return (root / ".dvc").is_dir() and folder.resolve() == (root / "registry").resolve()


def track(folder: Path, place: Path) -> None:
    """Add the files of the version in `place` to DVC, if DVC tracks this registry."""
    if not _is_tracked(folder):
        return
    root = files.project_root()
    target = PurePath("registry") / place.relative_to(folder) / FILES_FOLDER
    run_dvc(
        root,
        "add",
        str(target),
        outcome="; nothing was registered",
        hint="look at `dvc doctor` and `dvc status`, then register the run again",
    )
