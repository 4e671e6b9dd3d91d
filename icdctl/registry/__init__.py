"""The artifact registry: numbered, hashed and described copies of finished runs.

A version appears as a whole or not at all (it is built in a hidden folder beside its place, then renamed), and nothing
changes it afterwards. `icdctl.registry.artifact` describes its folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from icdctl import files
from icdctl.errors import ArtifactError
from icdctl.registry.add import add
from icdctl.registry.artifact import FILES_FOLDER, Artifact, Manifest
from icdctl.registry.artifact_card import card
from icdctl.registry.find import (
    artifact_at,
    find,
    find_teacher,
    lineage,
    list_artifacts,
    names,
    teacher_of,
    version_numbers,
)

__all__ = [
    "Artifact",
    "Manifest",
    "VerifiedArtifact",
    "add",
    "card",
    "default_folder",
    "find",
    "find_teacher",
    "lineage",
    "list_artifacts",
    "verify",
]


def default_folder() -> Path:
    """The folder of the project's registry."""
    return files.project_root() / "registry"


@dataclass(frozen=True)
class VerifiedArtifact:
    """The outcome of comparing a registered version with its manifest."""

    reference: str
    """`NAME@vN`, derived from the version's folder."""
    folder: Path
    ok: tuple[str, ...] = ()
    """Files that are as they were registered."""
    changed: tuple[str, ...] = ()
    """Files whose content has changed."""
    absent: tuple[str, ...] = ()
    """Files that are not on this machine; `dvc pull` may fetch them."""
    extra: tuple[str, ...] = ()
    """Files that were not registered."""
    problems: tuple[str, ...] = ()
    """Faults of the manifest."""
    notes: tuple[str, ...] = ()
    """Remarks about something that is not damage, e.g. that the teacher is no longer registered."""

    @property
    def sound(self) -> bool:
        """True if nothing contradicts the manifest; files may be absent."""
        return not (self.changed or self.extra or self.problems)

    @property
    def summary(self) -> str:
        """The outcome on one line, for the terminal."""
        found = {"changed": self.changed, "absent": self.absent, "not registered": self.extra}
        parts = [f"{len(self.ok)} ok", *(f"{what}: {', '.join(names)}" for what, names in found.items() if names)]
        return "; ".join([*parts, *self.problems, *self.notes])

    def as_json(self) -> dict[str, object]:
        """An entry of `icdctl registry verify --json`."""
        return {
            "reference": self.reference,
            "folder": str(self.folder),
            "sound": self.sound,
            "ok": list(self.ok),
            "changed": list(self.changed),
            "absent": list(self.absent),
            "extra": list(self.extra),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def verify(folder: Path, reference: str | None = None) -> list[VerifiedArtifact]:
    """Compare versions with their manifests, by hash.

    Args:
        folder: the registry.
        reference: the version to verify, as `find` takes it; None for all versions.

    Raises:
        UsageError, ArtifactError: the version is not found, as in `find`. When all versions are verified, a broken
            manifest is a problem in the result instead.
    """
    if reference is not None:
        return [_verified(folder, find(folder, reference))]
    findings = []
    for name in names(folder):
        for version in version_numbers(folder, name):
            try:
                findings.append(_verified(folder, artifact_at(folder, name, version)))
            except ArtifactError as error:
                place = folder / name / f"v{version}"
                findings.append(VerifiedArtifact(f"{name}@v{version}", place, problems=(error.message,)))
    return findings


def _verified(folder: Path, artifact: Artifact) -> VerifiedArtifact:
    blobs = artifact.folder / FILES_FOLDER
    here = {str(path.relative_to(blobs).as_posix()) for path in blobs.rglob("*") if path.is_file()}
    registered = artifact.manifest.files
    hashes = {name: files.sha256_file(blobs / name) for name in sorted(here & registered.keys())}
    said = f"{artifact.manifest.name}@v{artifact.manifest.version}"
    problems = []
    if said != artifact.reference:
        problems.append(f"the manifest names `{said}`, but the folder is that of `{artifact.reference}`")
    notes = []
    teacher = artifact.manifest.teacher
    if teacher is not None and teacher.artifact is not None and teacher_of(folder, artifact) is None:
        notes.append(f"its teacher `{teacher.artifact}` is no longer registered, or now has other weights")
    return VerifiedArtifact(
        artifact.reference,
        artifact.folder,
        ok=tuple(name for name, sha256 in hashes.items() if sha256 == registered[name].sha256),
        changed=tuple(name for name, sha256 in hashes.items() if sha256 != registered[name].sha256),
        absent=tuple(sorted(registered.keys() - here)),
        extra=tuple(sorted(here - registered.keys())),
        problems=tuple(problems),
        notes=tuple(notes),
    )
