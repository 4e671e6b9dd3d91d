"""Registered artifacts: numbered, hashed and described copies of finished runs.

A version appears whole or not at all (it is built in `.new-*` beside its place and renamed), and nothing changes it
afterwards. Its folder is described in `icdctl.registry.artifact`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icdctl import files
from icdctl.errors import ArtifactError
from icdctl.registry.add import add
from icdctl.registry.artifact import FILES_FOLDER, Artifact, Manifest, card
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
    "Verification",
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
    """The project's registry."""
    return files.project_root() / "registry"


@dataclass(frozen=True)
class Verification:
    """What became of a registered version."""

    reference: str
    """`NAME@vN`, from where it lies."""
    folder: Path
    ok: tuple[str, ...] = ()
    """Files as they were registered."""
    changed: tuple[str, ...] = ()
    """Files with another content."""
    absent: tuple[str, ...] = ()
    """Files that are not here; `dvc pull` may bring them."""
    extra: tuple[str, ...] = ()
    """Files that were not registered."""
    problems: tuple[str, ...] = ()
    """What is wrong with the manifest."""
    notes: tuple[str, ...] = ()
    """What is good to know and no damage, e.g. that its teacher is not registered any more."""

    @property
    def sound(self) -> bool:
        """Nothing contradicts the manifest; files may be absent."""
        return not (self.changed or self.extra or self.problems)

    @property
    def summary(self) -> str:
        """All of it on one line, for a person."""
        found = {"changed": self.changed, "absent": self.absent, "not registered": self.extra}
        parts = [f"{len(self.ok)} ok", *(f"{what}: {', '.join(names)}" for what, names in found.items() if names)]
        return "; ".join([*parts, *self.problems, *self.notes])

    def as_json(self) -> dict[str, Any]:
        """A line of `icdctl registry verify --json`."""
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


def verify(folder: Path, reference: str | None = None) -> list[Verification]:
    """Compare versions with their manifests, by hash.

    Args:
        folder: the registry.
        reference: as `find` takes it; all versions otherwise.

    Raises:
        UsageError, ArtifactError: as `find`. A broken manifest is a finding when all are verified.
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
                findings.append(Verification(f"{name}@v{version}", place, problems=(error.message,)))
    return findings


def _verified(folder: Path, artifact: Artifact) -> Verification:
    blobs = artifact.folder / FILES_FOLDER
    here = {str(path.relative_to(blobs).as_posix()) for path in blobs.rglob("*") if path.is_file()}
    registered = artifact.manifest.files
    hashes = {name: files.sha256_file(blobs / name) for name in sorted(here & registered.keys())}
    said = f"{artifact.manifest.name}@v{artifact.manifest.version}"
    problems = [] if said == artifact.reference else [f"the manifest says `{said}`, it lies at `{artifact.reference}`"]
    notes = []
    teacher = artifact.manifest.teacher
    if teacher is not None and teacher.artifact is not None and teacher_of(folder, artifact) is None:
        notes.append(f"its teacher `{teacher.artifact}` is not registered any more, or is another one now")
    return Verification(
        artifact.reference,
        artifact.folder,
        ok=tuple(name for name, sha256 in hashes.items() if sha256 == registered[name].sha256),
        changed=tuple(name for name, sha256 in hashes.items() if sha256 != registered[name].sha256),
        absent=tuple(sorted(registered.keys() - here)),
        extra=tuple(sorted(here - registered.keys())),
        problems=tuple(problems),
        notes=tuple(notes),
    )
