"""The artifact registry: numbered, hashed and described copies of finished runs.

A version appears as a whole or not at all (it is built in a hidden folder beside its place, then renamed), and nothing
changes it afterwards. `icdctl.registry.artifact` describes its folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from icdctl import files
from icdctl.errors import ArtifactError
from icdctl.registry.add import RUN_FILES, add, differing_facts
from icdctl.registry.artifact import CARD_FILE, FILES_FOLDER, Artifact, Manifest
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
from icdctl.registry.tracking import is_untracked

__all__ = [
    "Artifact",
    "Manifest",
    "VerifiedArtifact",
    "add",
    "card",
    "card_problem",
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
    """Compare versions with their manifests, by hash, and manifests with what they describe.

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
    ok = tuple(name for name, sha256 in hashes.items() if sha256 == registered[name].sha256)
    return VerifiedArtifact(
        artifact.reference,
        artifact.folder,
        ok=ok,
        changed=tuple(name for name, sha256 in hashes.items() if sha256 != registered[name].sha256),
        absent=tuple(sorted(registered.keys() - here)),
        extra=tuple(sorted(here - registered.keys())),
        problems=tuple(_problems(artifact, ok)),
        notes=tuple(_notes(folder, artifact)),
    )


def _problems(artifact: Artifact, ok: Collection[str]) -> Iterator[str]:
    """What contradicts the manifest besides changed files, or what the manifest says of unchanged ones wrongly."""
    manifest = artifact.manifest
    said = f"{manifest.name}@v{manifest.version}"
    if said != artifact.reference:
        yield f"the manifest names `{said}`, but the folder is that of `{artifact.reference}`"
    problem = card_problem(artifact)
    if problem is not None:
        yield problem
    elif manifest.created not in _card_text(artifact.folder / CARD_FILE):
        yield f"the manifest says that it was registered at {manifest.created}, `{CARD_FILE}` says another time"
    for name in ok:
        size = (artifact.folder / FILES_FOLDER / name).stat().st_size
        if size != manifest.files[name].bytes:
            yield f"the manifest says that `{name}` has {manifest.files[name].bytes} bytes, but it has {size}"
    if set(RUN_FILES) <= set(ok):
        try:
            differing = differing_facts(artifact)
        except ArtifactError as error:
            yield error.message
        else:
            if differing:
                yield f"the manifest contradicts the registered files: {', '.join(f'`{key}`' for key in differing)}"


def _card_text(path: Path) -> str:
    return files.read_regular(path).decode("utf-8", errors="replace")


def _notes(folder: Path, artifact: Artifact) -> Iterator[str]:
    """Remarks about something that is not damage."""
    teacher = artifact.manifest.teacher
    if teacher is not None and teacher.artifact is not None and teacher_of(folder, artifact) is None:
        yield f"its teacher `{teacher.artifact}` is no longer registered, or now has other weights"
    if artifact.manifest.sha256 is None:
        yield "an earlier version of icdctl registered it, without hashes of manifest and card"
        path = artifact.folder / CARD_FILE
        if path.is_file() and _card_text(path) != card(artifact):
            yield f"`{CARD_FILE}` is not what this version of icdctl writes for its manifest"
    if is_untracked(folder, artifact.folder):
        yield f"DVC does not track its files; `dvc add {artifact.folder / FILES_FOLDER}` or the next `add` completes it"


def card_problem(artifact: Artifact) -> str | None:
    """How `card.md` differs from what was registered; None if it does not, or if there is no hash to compare with."""
    path, expected = artifact.folder / CARD_FILE, artifact.manifest.card_sha256
    if not path.is_file():
        return f"`{CARD_FILE}` is missing"
    if expected is not None and files.sha256_file(path) != expected:
        return f"`{CARD_FILE}` has changed since it was registered"
    return None
