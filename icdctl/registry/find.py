"""Find registered artifacts by their folders; only the manifests of the versions in question are read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from icdctl.errors import ArtifactError, UsageError
from icdctl.registry.artifact import CARD_FILE, DVC_FILE, MANIFEST_FILE, Artifact, read_manifest

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)?")
_VERSION_FOLDER = re.compile(r"v([1-9][0-9]{0,8})")
_REFERENCE = re.compile(r"(?P<name>[^@]+)(?:@v(?P<version>[1-9][0-9]{0,8}))?")
_LONGEST_SHOWN = 200


def list_artifacts(folder: Path) -> list[Artifact]:
    """All versions of all names, sorted by name and version; empty if there is no registry.

    Raises:
        ArtifactError: a manifest is broken; the message names the file.
    """
    return [artifact for name in names(folder) for artifact in versions_of(folder, name)]


def find(folder: Path, reference: str) -> Artifact:
    """The artifact that `reference` names.

    Args:
        folder: the registry.
        reference: `NAME@vN`, or `NAME` for its newest version. The data set may be left out if only one data set has
            an artifact with this name.

    Raises:
        UsageError: `reference` does not have this form.
        ArtifactError: there is no such artifact, or its manifest is broken.
    """
    match = _REFERENCE.fullmatch(reference.removeprefix("registry:"))
    typed = match["name"] if match else reference
    check_name(typed)
    name = _whole_name(folder, typed)
    versions = version_numbers(folder, name)
    version = int(match["version"]) if match and match["version"] else versions[-1]
    if version not in versions:
        raise ArtifactError(
            f"no version {version} of `{name}`: it has {', '.join(f'v{number}' for number in versions)}",
            hint="`icdctl registry list` shows all of them",
        )
    return artifact_at(folder, name, version)


def find_teacher(folder: Path, *, model: str, dataset: str) -> Artifact | None:
    """The newest registered `model` that was trained on `dataset` without a teacher; None if there is none.

    Raises:
        ArtifactError: a manifest is broken.
    """
    facts = (model, dataset, "ce")
    rows = ((artifact, artifact.manifest) for artifact in list_artifacts(folder))
    return newest(artifact for artifact, row in rows if (row.model, row.dataset.name, row.method) == facts)


def lineage(folder: Path, artifact: Artifact) -> list[str]:
    """The lineage of an artifact: itself, its teacher, the teacher's teacher, as far as they are known.

    Registered models are listed as `NAME@vN`; a teacher that is not registered ends the list with its model and hash.
    """
    line: list[str] = []
    current: Artifact | None = artifact
    while current is not None and current.reference not in line:
        line.append(current.reference)
        teacher = current.manifest.teacher
        if teacher is None:
            break
        current = teacher_of(folder, current)
        if current is None:
            weights = f"sha256 {teacher.sha256[:12]}…" if teacher.sha256 else "no weights on record"
            line.append(f"{teacher.artifact or teacher.model} ({weights}, not in this registry)")
    return line


def teacher_of(folder: Path, artifact: Artifact) -> Artifact | None:
    """The registered teacher of an artifact; None if it is not registered or now has other weights."""
    teacher = artifact.manifest.teacher
    if teacher is None or teacher.artifact is None:
        return None
    try:
        found = find(folder, teacher.artifact)
    except (ArtifactError, UsageError):
        return None
    return found if found.sha256 == teacher.sha256 else None


def newest(artifacts: Iterable[Artifact]) -> Artifact | None:
    """The artifact that was registered last; None if there is none.

    Within a name, that is the highest version. Between names the serial numbers decide, and the clock only where an
    earlier version of icdctl, which gave none, registered both.
    """
    latest: dict[str, Artifact] = {}
    for artifact in sorted(artifacts, key=lambda artifact: artifact.version):
        latest[artifact.name] = artifact

    def order(artifact: Artifact) -> tuple[int, str, str]:
        return artifact.manifest.serial or 0, artifact.manifest.created, artifact.name

    return max(latest.values(), key=order, default=None)


def next_serial(folder: Path) -> int:
    """The serial number of the next version; versions whose manifest is broken don't count."""
    largest = 0
    for name in names(folder):
        for version in version_numbers(folder, name):
            with suppress(ArtifactError):
                largest = max(largest, artifact_at(folder, name, version).manifest.serial or 0)
    return largest + 1


def _whole_name(folder: Path, typed: str) -> str:
    known = names(folder)
    if typed in known:
        return typed
    same_end = [name for name in known if name.partition("/")[2] == typed]
    if len(same_end) == 1:
        return same_end[0]
    if same_end:
        raise ArtifactError(
            f"`{typed}` is the name of {len(same_end)} artifacts: `{'`, `'.join(same_end)}`",
            hint="write the whole name, with its data set",
        )
    if not known:
        raise ArtifactError(
            f"no artifact `{typed}`: nothing is registered in `{folder}`",
            hint="register a run with `icdctl registry add RUN_FOLDER`",
        )
    spellings = known if "/" in typed else [name.partition("/")[2] for name in known]
    nearest = difflib.get_close_matches(typed, spellings, n=1, cutoff=0.5)
    suggestion = f"did you mean `{nearest[0]}`? " if nearest else ""
    raise ArtifactError(f"no artifact `{typed}`", hint=f"{suggestion}`icdctl registry list` shows all of them")


def names(folder: Path) -> list[str]:
    """The names that have at least one version, sorted."""
    found = (f"{home.parent.name}/{home.name}" for dataset in _folders(folder) for home in _folders(dataset))
    return sorted(name for name in found if _NAME.fullmatch(name) and version_numbers(folder, name))


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else iter(())


def taken_numbers(home: Path) -> list[int]:
    """The numbers of all entries that are named like a version."""
    matches = (_VERSION_FOLDER.fullmatch(path.name) for path in home.iterdir())
    return [int(match[1]) for match in matches if match]


def version_numbers(folder: Path, name: str) -> list[int]:
    """The version numbers of a name, ascending.

    When git checks out a commit from before a version, the version's blobs stay behind, because git does not track
    them. Such a folder with blobs alone does not count as a version.
    """
    home = folder / name
    kept = (MANIFEST_FILE, CARD_FILE, DVC_FILE)
    return sorted(n for n in taken_numbers(home) if any((home / f"v{n}" / entry).is_file() for entry in kept))


def versions_of(folder: Path, name: str) -> list[Artifact]:
    """All versions of a name, ascending."""
    return [artifact_at(folder, name, version) for version in version_numbers(folder, name)]


def artifact_at(folder: Path, name: str, version: int) -> Artifact:
    """The artifact with this name and version.

    Raises:
        ArtifactError: its manifest is absent or broken.
    """
    path = folder / name / f"v{version}"
    return Artifact(name, version, path, read_manifest(path / MANIFEST_FILE))


def check_name(name: str) -> None:
    """Refuse a text that is not a valid name, or that could lead out of the registry.

    Raises:
        UsageError: the name is refused; the hint has an example.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            f"`{name[:_LONGEST_SHOWN]}` can't be the name of an artifact",
            hint="lower-case letters, digits, `.`, `_` and `-`, as in `cifar100/res8-kd`, and `@v2` for a version",
        )
