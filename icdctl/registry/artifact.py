"""One registered version: its manifest, its files and its card.

    <registry>/<dataset>/<student>-<method>/v3/manifest.json   small, kept in git
                                               card.md         small, kept in git
                                               files/          the blobs, kept out of git
                                               files.dvc       small, kept in git if the project uses DVC

`icdctl.registry` adds, lists, finds and verifies versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, field_validator

from icdctl import files
from icdctl.errors import ArtifactError
from icdctl.files import percentage
from icdctl.run_files import WEIGHTS_FILE

SCHEMA: Final = 1
MANIFEST_FILE = "manifest.json"
CARD_FILE = "card.md"
FILES_FOLDER = "files"
DVC_FILE = "files.dvc"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FileRecord(_Record):
    """A file at the time of registration."""

    sha256: Sha256
    """Hash of its content."""
    bytes: Annotated[int, Field(ge=0)]
    """Size of the file."""


class DatasetRecord(_Record):
    """The data set that the student was trained and tested on."""

    name: str
    """Name of the data set, as given to `--dataset`."""
    sha256: Sha256 | None
    """Hash of pixels and labels, training before test; null if the run did not record it."""
    source: str | None
    """Where the images come from; null if icdctl does not know."""
    licence: str | None
    """Terms of use that the images' publisher states; null if icdctl does not know."""
    split: dict[str, JsonValue] | None = None
    """How the images were divided, and hashes of the files of each part; null if the weights do not say it."""


class TeacherRecord(_Record):
    """The teacher that the student learnt from."""

    model: str
    """Name of the architecture, as in `icdctl list models`."""
    sha256: Sha256 | None
    """Hash of the teacher's weights file; null if there was none."""
    artifact: str | None
    """`NAME@vN` of the artifact with these weights; null if none was registered at that time."""
    source: str | None = None
    """Where the teacher's weights come from; null if the run did not record it."""
    licence: str | None = None
    """Terms of use that the publisher of the weights states; null if they were not published."""


class OnnxRecord(_Record):
    """The difference between the ONNX file and the weights, as `icdctl export` measured it."""

    passed: bool
    """True if no check failed."""
    max_error: float | None
    """Largest difference between two logits; null if it is not finite."""
    tolerance: float | None
    """Largest difference that passes."""
    agreement: float | None
    """Percent of images that both put into the same class; null if no images were given."""


class GitRecord(_Record):
    """The git checkout that trained the student."""

    commit: str
    """Full hash of the commit."""
    dirty: bool
    """True if files differed from that commit."""


class Manifest(_Record):
    """`manifest.json`: everything that is known about a version without its files."""

    schema_number: Literal[1] = Field(alias="schema")
    """Number of this format; it grows by one whenever a field changes its meaning."""
    name: str
    """Name of the artifact: `<dataset>/<student>-<method>`."""
    version: Annotated[int, Field(ge=1)]
    """Version number, counted from 1 for each name."""
    created: str
    """Time of registration: UTC, ISO 8601, with milliseconds."""
    files: dict[str, FileRecord]
    """Path below `files/` -> the file's record."""
    dataset: DatasetRecord
    """The data set that the student was trained on."""
    model: str
    """Architecture of the student, as in `icdctl list models`."""
    method: str
    """Training method, as in `icdctl list methods`; `ce` is training without a teacher."""
    variant: str | None
    """Variant of the method; null if it has only one."""
    teacher: TeacherRecord | None
    """The teacher; null for a model that was trained without one."""
    scales: tuple[int, ...]
    """Scales of the patches; empty for a method that reads no patches."""
    seed: int
    """Seed of initial weights, order of images and augmentation."""
    settings: dict[str, JsonValue]
    """The method's settings."""
    recipe: JsonValue
    """Name of the recipe that optimiser and schedule come from."""
    epochs: int
    """Number of epochs trained."""
    metrics: dict[str, JsonValue]
    """The whole `metrics.json` of the run; percent and seconds."""
    onnx: OnnxRecord | None
    """Verification of the ONNX file; null if no export was registered with the run."""
    git: GitRecord | None
    """The code that trained the student; null if it was not in a git checkout."""
    versions: dict[str, str | None]
    """Versions of Python and the main packages; null for a package that was not installed."""

    @field_validator("metrics")
    @classmethod
    def _percentages(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for key, number in value.items():
            if key.endswith(("_top1", "_top5")) and number is not None:
                try:
                    percentage(number)
                except ValueError as error:
                    raise ValueError(f"`{key[:40]}`: {error}") from error
        return value

    @field_validator("files")
    @classmethod
    def _inside(cls, value: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in value:
            path = PurePosixPath(name)
            if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != name or "\\" in name:
                raise ValueError(f"`{name}` is not a path below `{FILES_FOLDER}/`")
        if WEIGHTS_FILE not in value:
            raise ValueError(f"`{WEIGHTS_FILE}` is missing")
        return value

    def as_json(self) -> dict[str, JsonValue]:
        """The content of `manifest.json`."""
        return self.model_dump(mode="json", by_alias=True)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest from a file.

    Raises:
        ArtifactError: the file is absent or broken, or a later version of icdctl wrote it.
    """
    hint = f"restore it from git, e.g. `git checkout -- {path}`, or remove the folder `{path.parent}`"
    value = files.read_json(path, what="manifest", hint=hint)
    schema = value.get("schema") if isinstance(value, dict) else None
    if type(schema) is int and schema > SCHEMA:
        raise ArtifactError(
            f"manifest `{path}` has schema {schema}, this icdctl reads {SCHEMA}",
            hint="update icdctl: a later version wrote this file",
        )
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        raise ArtifactError(f"manifest `{path}` is broken: {first_problem(error)}", hint=hint) from error


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, on one line."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"`{place}`: {problem['msg']}" if place else str(problem["msg"])


@dataclass(frozen=True)
class Artifact:
    """A registered version on disk; its files may be absent until `dvc pull` fetches them."""

    name: str
    """`<dataset>/<student>-<method>`, derived from the folder."""
    version: int
    """Version number, derived from the folder."""
    folder: Path
    """`<registry>/<name>/v<version>`."""
    manifest: Manifest

    @property
    def reference(self) -> str:
        """`NAME@vN`, the form that commands take after `registry:`."""
        return f"{self.name}@v{self.version}"

    @property
    def sha256(self) -> str:
        """Hash of the weights file."""
        return self.manifest.files[WEIGHTS_FILE].sha256

    def file(self, name: str) -> Path:
        """Path of a registered file whose content was checked.

        Args:
            name: path below `files/`, e.g. `student.safetensors` or `onnx/model.onnx`.

        Raises:
            ArtifactError: this version has no such file, the file is absent, or its content has changed.
        """
        record = self.manifest.files.get(name)
        if record is None:
            raise ArtifactError(
                f"`{self.reference}` has no file `{name}`; it has {', '.join(sorted(self.manifest.files))}",
                hint=f"`icdctl registry show {self.reference}` shows the artifact",
            )
        path = self.folder / FILES_FOLDER / name
        if not path.is_file():
            raise ArtifactError(
                f"`{name}` of `{self.reference}` is not on this machine: `{path}` does not exist",
                hint=self._restore_hint(),
            )
        found = files.sha256_file(path)
        if found != record.sha256:
            raise ArtifactError(
                f"`{path}` has changed since it was registered: sha256 is {found[:12]}…, the manifest has "
                f"{record.sha256[:12]}…",
                hint=self._restore_hint(),
            )
        return path

    def _restore_hint(self) -> str:
        dvc_file = self.folder / DVC_FILE
        if dvc_file.is_file():
            return f"restore the registered file with `dvc pull --force {dvc_file}`"
        return (
            "git does not hold the registered files: fetch them with `dvc pull` in the project that registered them, "
            "or register the run again"
        )

    def as_json(self) -> dict[str, object]:
        """An entry of `icdctl registry list --json`."""
        manifest = self.manifest
        return {
            "name": self.name,
            "version": self.version,
            "reference": self.reference,
            "dataset": manifest.dataset.name,
            "model": manifest.model,
            "method": manifest.method,
            "variant": manifest.variant,
            "teacher": manifest.teacher.model if manifest.teacher else None,
            "teacher_artifact": manifest.teacher.artifact if manifest.teacher else None,
            "seed": manifest.seed,
            "epochs": manifest.epochs,
            "final_top1": manifest.metrics.get("final_top1"),
            "created": manifest.created,
            "sha256": self.sha256,
            "onnx": "onnx/model.onnx" in manifest.files,
            "folder": str(self.folder),
        }
