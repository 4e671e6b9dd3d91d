"""One registered version: what its manifest says, where its files are, and its card.

    <registry>/<dataset>/<student>-<method>/v3/manifest.json   small, kept in git
                                               card.md         small, kept in git
                                               files/          the blobs, kept out of git
                                               files.dvc       small, kept in git, where DVC is in use

`icdctl.registry` makes, lists, finds and verifies them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, field_validator

from icdctl import files
from icdctl.errors import ArtifactError
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
    """A registered file as it was on the day."""

    sha256: Sha256
    """Of its content."""
    bytes: Annotated[int, Field(ge=0)]
    """Its size."""


class DatasetRecord(_Record):
    """What the student was trained and tested on."""

    name: str
    """As given to `--dataset`."""
    sha256: Sha256 | None
    """Of pixels and labels, training then test; null where the run did not say."""
    source: str | None
    """Where the pixels come from; null where icdctl does not know."""
    licence: str | None
    """What their publisher says on their use; null where icdctl does not know."""


class TeacherRecord(_Record):
    """Whom the student learnt from."""

    model: str
    """A name of `icdctl list models`."""
    sha256: Sha256 | None
    """Of its weights file; null where there was none."""
    artifact: str | None
    """`NAME@vN` of the registered artifact with these weights, if there was one on the day."""
    source: str | None = None
    """Where its weights come from; null where the run did not say."""
    licence: str | None = None
    """What the publisher of its weights says on their use; null where nobody published them."""


class OnnxRecord(_Record):
    """How far the ONNX file's numbers are from the weights' own, as `icdctl export` measured."""

    passed: bool
    """No check failed."""
    max_error: float | None
    """Largest difference of a logit; null where it is not finite."""
    tolerance: float | None
    """What it was allowed to be."""
    agreement: float | None
    """Percent of images for which both name the same class; null where no images were given."""


class GitRecord(_Record):
    """The code that trained it."""

    commit: str
    """Full hash."""
    dirty: bool
    """Whether files differed from that commit."""


class Manifest(_Record):
    """`manifest.json`: everything that is known of a version without its files."""

    schema_number: Literal[1] = Field(alias="schema")
    """Of this layout; raised by one when a field changes its meaning."""
    name: str
    """`<dataset>/<student>-<method>`."""
    version: Annotated[int, Field(ge=1)]
    """Counts from 1 within a name."""
    created: str
    """When it was registered: UTC, ISO 8601, milliseconds."""
    files: dict[str, FileRecord]
    """By path below `files/`."""
    dataset: DatasetRecord
    """What it was trained on."""
    model: str
    """Of the student; a name of `icdctl list models`."""
    method: str
    """A name of `icdctl list methods`; `ce` is training without a teacher."""
    variant: str | None
    """Which reading of the method, where it has several."""
    teacher: TeacherRecord | None
    """Null for a model trained without one."""
    scales: tuple[int, ...]
    """Patch grids."""
    seed: int
    """Of initial weights, order and augmentation."""
    settings: dict[str, JsonValue]
    """The method's own numbers."""
    recipe: JsonValue
    """What optimiser and schedule came from."""
    epochs: int
    """Trained."""
    metrics: dict[str, JsonValue]
    """`metrics.json` of the run, whole; percent and seconds."""
    onnx: OnnxRecord | None
    """Null where no export was registered with it."""
    git: GitRecord | None
    """Null where the run was not made in a git checkout."""
    versions: dict[str, str | None]
    """Of Python and the packages that matter; null for one that was not installed."""

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

    def as_json(self) -> dict[str, Any]:
        """What `manifest.json` holds."""
        return self.model_dump(mode="json", by_alias=True)


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        ArtifactError: it is absent or broken, or a later icdctl wrote it.
    """
    hint = f"put back what git has, e.g. `git checkout -- {path}`, or remove the folder `{path.parent}`"
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
    """The first thing that pydantic found wrong, on one line."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"`{place}`: {problem['msg']}" if place else str(problem["msg"])


@dataclass(frozen=True)
class Artifact:
    """A version on disk; its files may be absent (`dvc pull` brings them)."""

    name: str
    """`<dataset>/<student>-<method>`, from where it lies."""
    version: int
    """From where it lies."""
    folder: Path
    """`<registry>/<name>/v<version>`."""
    manifest: Manifest

    @property
    def reference(self) -> str:
        """`NAME@vN`, what commands take after `registry:`."""
        return f"{self.name}@v{self.version}"

    @property
    def sha256(self) -> str:
        """Of the weights file."""
        return self.manifest.files[WEIGHTS_FILE].sha256

    def file(self, name: str) -> Path:
        """A registered file, its content checked.

        Args:
            name: path below `files/`, e.g. `student.safetensors` or `onnx/model.onnx`.

        Raises:
            ArtifactError: this version has no such file, it is not here, or it is no longer what was registered.
        """
        record = self.manifest.files.get(name)
        if record is None:
            raise ArtifactError(
                f"`{self.reference}` has no file `{name}`; it has {', '.join(sorted(self.manifest.files))}",
                hint=f"`icdctl registry show {self.reference}`",
            )
        path = self.folder / FILES_FOLDER / name
        if not path.is_file():
            raise ArtifactError(f"`{name}` of `{self.reference}` is not here: no `{path}`", hint=self._restore_hint())
        found = files.sha256_file(path)
        if found != record.sha256:
            raise ArtifactError(
                f"`{path}` is not what was registered: sha256 is {found[:12]}…, the manifest has {record.sha256[:12]}…",
                hint=self._restore_hint(),
            )
        return path

    def _restore_hint(self) -> str:
        dvc_file = self.folder / DVC_FILE
        if dvc_file.is_file():
            return f"bring back what was registered with `dvc pull --force {dvc_file}`"
        return (
            "its files are kept out of git: bring them with `dvc pull` in the project that registered it, "
            "or register the run again"
        )

    def as_json(self) -> dict[str, Any]:
        """A line of `icdctl registry list --json`."""
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


def card(artifact: Artifact) -> str:
    """`card.md`: what a person should know before using the artifact, in Markdown."""
    manifest = artifact.manifest
    sections = [
        f"# {artifact.reference}",
        _summary(manifest),
        _table(("", "value"), _numbers(manifest)),
        "## Training",
        _training(manifest),
        "## Teacher",
        _teacher(manifest.teacher),
        "## Data",
        _data(manifest.dataset),
        "## Use",
        _usage(artifact),
        "## Limits",
        _limits(manifest),
        "## Files",
        "Below `files/`; `icdctl registry verify` compares them with these hashes.",
        _table(
            ("file", "bytes", "sha256"),
            [(f"`{name}`", f"{row.bytes:,}", f"`{row.sha256}`") for name, row in sorted(manifest.files.items())],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(manifest: Manifest) -> str:
    how = (
        f"distilled from {manifest.teacher.model} with `{manifest.method}`"
        if manifest.teacher
        else f"trained without a teacher (`{manifest.method}`)"
    )
    variant = f", variant `{manifest.variant}`" if manifest.variant else ""
    return f"A {manifest.model} image classifier for {manifest.dataset.name}, {how}{variant}."


def _numbers(manifest: Manifest) -> list[tuple[str, ...]]:
    metrics = manifest.metrics
    rows: list[tuple[str, ...]] = [("top-1, final epoch", f"**{_percent(metrics.get('final_top1'))}**")]
    if "final_top5" in metrics:
        rows.append(("top-5, final epoch", _percent(metrics["final_top5"])))
    for key, where in (("best_top1", "test images"), ("best_val_top1", "validation images")):
        if metrics.get(key) is not None:
            epoch = metrics.get("best_epoch", "unknown")
            rows.append((f"best top-1 on the {where} (epoch {epoch})", _percent(metrics[key])))
    if type(metrics.get("params")) is int:
        rows.append(("parameters", f"{metrics['params']:,}"))
    if manifest.onnx:
        rows.append(("ONNX against weights", _verdict(manifest.onnx)))
    return rows


def _verdict(onnx: OnnxRecord) -> str:
    parts = ["passed" if onnx.passed else "NOT passed"]
    if onnx.max_error is not None and onnx.tolerance is not None:
        parts.append(f"largest error {onnx.max_error:.2g} of {onnx.tolerance:.2g} allowed")
    if onnx.agreement is not None:
        parts.append(f"same class for {onnx.agreement:.2f} % of images")
    return ", ".join(parts)


def _training(manifest: Manifest) -> str:
    versions = [(name, version) for name, version in manifest.versions.items() if version is not None]
    rows: list[tuple[str, ...]] = [
        ("epochs", str(manifest.epochs)),
        ("seed", str(manifest.seed)),
        ("scales", ", ".join(map(str, manifest.scales)) or "none"),
        ("settings", f"`{json.dumps(manifest.settings)}`"),
        ("recipe", f"`{json.dumps(manifest.recipe)}`"),
        ("registered", manifest.created),
        ("code", _code(manifest.git)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions) or "not on record"),
    ]
    return _table(("", "value"), rows)


def _code(git: GitRecord | None) -> str:
    if git is None:
        return "not in a git checkout"
    return f"`{git.commit}`" + (" with uncommitted changes" if git.dirty else "")


def _teacher(teacher: TeacherRecord | None) -> str:
    if teacher is None:
        return "None: it learnt from the labels alone."
    where = f"registered as `{teacher.artifact}`" if teacher.artifact else "not in this registry when this was added"
    weights = f"sha256 of its weights `{teacher.sha256}`" if teacher.sha256 else "no weights on record"
    lines = [
        f"{teacher.model}, {where}; {weights}.",
        "",
        f"- Source of its weights: {teacher.source or 'not on record'}",
        f"- Licence of its weights: {teacher.licence or 'none stated'}",
    ]
    return "\n".join(lines)


def _data(dataset: DatasetRecord) -> str:
    lines = [
        f"- Source: {dataset.source or 'not known to icdctl'}",
        f"- Licence: {dataset.licence or 'not known to icdctl: ask whoever gave you the images'}",
    ]
    if dataset.sha256:
        lines.append(f"- sha256 of pixels and labels: `{dataset.sha256}`")
    return "\n".join(lines)


def _usage(artifact: Artifact) -> str:
    dataset, target = artifact.manifest.dataset.name, f"registry:{artifact.reference}"
    return (
        "```\n"
        f"icdctl eval {target}\n"
        f"icdctl distill --teacher {target} --student MODEL --dataset {dataset} --method kd\n"
        "```"
    )


def _limits(manifest: Manifest) -> str:
    lines = [
        f"- One run with one seed ({manifest.seed}): no mean, no spread. Compare methods over several seeds.",
        "- The headline is the final epoch's; "
        + (
            "the test images were looked at once, after it."
            if manifest.metrics.get("best_val_top1") is not None
            else "the best epoch was picked on the test images and is no fair estimate."
        ),
        f"- Measured on the test images of {manifest.dataset.name} alone; other images may give other results.",
    ]
    if manifest.onnx is None:
        lines.append("- No ONNX file was registered with it; `icdctl export` makes one.")
    return "\n".join(lines)


def _percent(value: JsonValue) -> str:
    return f"{value:.2f} %" if isinstance(value, int | float) else "not on record"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
