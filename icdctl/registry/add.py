"""Register a finished run: check it, copy it, hash the copy, describe it, and give it the next version number."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, StringConstraints, ValidationError

from icdctl import files
from icdctl.errors import ArtifactError
from icdctl.registry.artifact import (
    CARD_FILE,
    FILES_FOLDER,
    MANIFEST_FILE,
    SCHEMA,
    Artifact,
    DatasetRecord,
    FileRecord,
    GitRecord,
    Manifest,
    OnnxRecord,
    TeacherRecord,
    first_problem,
)
from icdctl.registry.artifact_card import card
from icdctl.registry.find import check_name, list_artifacts, newest, next_serial, taken_numbers, versions_of
from icdctl.registry.tracking import complete, track
from icdctl.run_files import WEIGHTS_FILE, check_as_written, check_numbers

RUN_FILES = (WEIGHTS_FILE, "config.json", "history.csv", "metrics.json", "environment.json")
EXPORT_FILES = ("model.onnx", "model.json", "verify.json", "README.md", "manifest.json")

_NEW = "version"
"""What the temporary folder of a version is named after."""
_OLD_NEW = ".new-"
"""How the name of that folder began in earlier versions."""
_STALE_SECONDS = 24 * 3600
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}


class _Config(BaseModel):
    """The part of a run's `config.json` that the registry reads."""

    method: str
    dataset: str
    student: str
    teacher: str | None
    teacher_sha256: str | None = None
    scales: tuple[int, ...] | None = None
    seed: int
    settings: dict[str, JsonValue]
    recipe: JsonValue = None


class _Metrics(BaseModel):
    """The part of a run's `metrics.json` that the registry reads; the manifest keeps the whole file."""

    final_top1: float
    epochs: int
    variant: str | None = None
    dataset_sha256: str | None = None
    teacher_source: str | None = None
    teacher_licence: str | None = None


class _Git(GitRecord):
    model_config = ConfigDict(extra="ignore")


class _Environment(BaseModel):
    """The part of a run's `environment.json` that the registry reads."""

    versions: dict[str, str | None]
    git: _Git | None = None


class _Verdict(OnnxRecord):
    """The part of an export's `verify.json` that the registry reads."""

    model_config = ConfigDict(extra="ignore")


class _Facts(BaseModel):
    """The part of an export's `model.json` that the registry reads."""

    weights_sha256: str


_FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _ExportManifest(BaseModel):
    """The part of an export's `manifest.json` that the registry reads."""

    files: dict[_FileName, FileRecord]


@dataclass(frozen=True)
class _Run:
    config: _Config
    metrics: _Metrics
    all_metrics: dict[str, JsonValue]
    environment: _Environment
    split: dict[str, JsonValue] | None
    """How its images were divided, as the metadata of its weights say it."""


@dataclass(frozen=True)
class _Export:
    onnx: OnnxRecord
    sha256: dict[str, str]
    """File name -> hash, for all files except the export's manifest itself."""


class _RegisteredAlready(ArtifactError):
    """The run is registered already, as `artifact`."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(
            f"this run is registered already, as `{artifact.reference}`",
            hint=f"`icdctl registry show {artifact.reference}` shows it",
        )
        self.artifact = artifact


def add(
    folder: Path,
    run_folder: Path,
    *,
    export_folder: Path | None = None,
    name: str | None = None,
    message: Callable[[str], None] = lambda text: None,
) -> Artifact:
    """Register a finished run as the next version of its name.

    First, earlier registrations that were interrupted before DVC tracked their files are completed. If one of them is
    this run's, it is the result.

    Args:
        folder: the registry.
        run_folder: the folder that `icdctl train` or `icdctl distill` wrote; its files are copied.
        export_folder: the folder that `icdctl export` made from this run; it is registered with the run.
        name: the artifact's name, by default the run's `<dataset>/<student>-<method>`. A name without a `/` is put
            below the run's data set.
        message: called with a line for each registration that is completed.

    Raises:
        UsageError: `name` is not a valid name.
        ArtifactError: the run is unfinished, broken or already registered, or the registry can't be written.
    """
    completed = complete(folder, message)
    run = _read_run(run_folder)
    export = _read_export(export_folder, run_folder) if export_folder else None
    chosen = _name_of(run.config, name)
    home = folder / chosen
    files.make_folder(home)
    _remove_left(home)
    with files.temporary_beside(home / _NEW, is_folder=True) as building:
        records = {row: _copy(run_folder / row, building / FILES_FOLDER / row) for row in RUN_FILES}
        if export and export_folder:
            records |= _copy_export(export_folder, export, building / FILES_FOLDER)
        draft = _manifest(folder, chosen, run, records, export.onnx if export else None)
        try:
            artifact = _publish(folder, building, draft)
        except _RegisteredAlready as error:
            if error.artifact.folder in completed:
                return error.artifact
            raise
        try:
            track(folder, artifact.folder)
        except BaseException:
            artifact.folder.rename(building)
            raise
    return artifact


def _read_run(run_folder: Path) -> _Run:
    """Read and check the JSON files of a run, before anything is written."""
    config_path = run_folder / "config.json"
    if not config_path.is_file():
        raise ArtifactError(
            f"`{run_folder}` is not a run folder: it has no `config.json`",
            hint="name a folder that `icdctl train` or `icdctl distill` wrote",
        )
    hint = f"finish the run with `--resume --out {run_folder}`, or train it again"
    missing = [name for name in RUN_FILES if not (run_folder / name).is_file()]
    if missing:
        raise ArtifactError(f"run `{run_folder}` is not finished: it has no `{'`, `'.join(missing)}`", hint=hint)
    run = _read_facts(run_folder, hint)
    check_numbers(run_folder, run.all_metrics)
    check_as_written(run_folder, files.sha256_file(run_folder / WEIGHTS_FILE), hint=hint)
    return run


def _read_facts(run_folder: Path, hint: str) -> _Run:
    config, _ = _read(run_folder / "config.json", _Config, hint)
    metrics, all_metrics = _read(run_folder / "metrics.json", _Metrics, hint)
    environment, _ = _read(run_folder / "environment.json", _Environment, hint)
    split = _split_in(run_folder / WEIGHTS_FILE, hint)
    return _Run(config, metrics, all_metrics, environment, split)


def _read_export(export_folder: Path, run_folder: Path) -> _Export:
    """Read the JSON files of an export, and check that it was made from this run's weights."""
    hint = f"export it again: `icdctl export {run_folder} --out {export_folder}`"
    missing = [name for name in EXPORT_FILES if not (export_folder / name).is_file()]
    if missing:
        raise ArtifactError(f"`{export_folder}` is not an export: it has no `{'`, `'.join(missing)}`", hint=hint)
    listed, _ = _read(export_folder / "manifest.json", _ExportManifest, hint)
    facts, _ = _read(export_folder / "model.json", _Facts, hint)
    verdict, _ = _read(export_folder / "verify.json", _Verdict, hint)
    weights = files.sha256_file(run_folder / WEIGHTS_FILE)
    if facts.weights_sha256 != weights:
        raise ArtifactError(
            f"`{export_folder}` was made from other weights: sha256 {facts.weights_sha256[:12]}…, the run has "
            f"{weights[:12]}…",
            hint=hint,
        )
    return _Export(OnnxRecord(**verdict.model_dump()), {name: row.sha256 for name, row in listed.files.items()})


Document = TypeVar("Document", bound=BaseModel)


def _read(path: Path, kind: type[Document], hint: str) -> tuple[Document, dict[str, JsonValue]]:
    """A JSON file, parsed as `kind` and as a plain value."""
    value = files.read_json(path, what="file", hint=hint)
    try:
        return kind.model_validate(value), value
    except ValidationError as error:
        raise ArtifactError(f"`{path}` is broken: {first_problem(error)}", hint=hint) from error


def _split_in(path: Path, hint: str) -> dict[str, JsonValue] | None:
    """How the images were divided, as the metadata of weights say it; None if an earlier version wrote them.

    Safetensors states its own length, so a truncated file is detected here without reading it all.
    """
    try:
        metadata = files.parse_json(files.read_texts(path).get("icdctl", "{}"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"weights `{path}` are broken: {error}", hint=hint) from error
    split = metadata.get("split") if isinstance(metadata, dict) else None
    return split if isinstance(split, dict) else None


def _name_of(config: _Config, given: str | None) -> str:
    from icdctl.data import public_name  # not at the head, because it imports torch

    dataset = _slug(public_name(config.dataset))
    name = f"{dataset}/{_slug(config.student)}-{_slug(config.method)}" if given is None else given
    check_name(name)
    return name if "/" in name else f"{dataset}/{name}"


def _slug(text: str) -> str:
    """`text` in the characters that names may have."""
    return re.sub(r"\.{2,}", ".", re.sub(r"[^a-z0-9._-]+", "-", text.lower())).strip("-._")


def _remove_left(home: Path) -> None:
    """Remove the folders of killed `add`s; the folder of an `add` at work is marked as in use."""
    for path in home.glob(".*"):
        with suppress(FileNotFoundError):
            if not path.name.startswith(_OLD_NEW):
                files.remove_abandoned(path)
            elif time.time() - path.stat().st_mtime > _STALE_SECONDS:  # earlier versions made no mark
                shutil.rmtree(path, ignore_errors=True)


def _copy(source: Path, target: Path) -> FileRecord:
    """Copy a file and record hash and size of the copy."""
    files.make_folder(target.parent)
    try:
        files.copy_regular(source, target)
    except OSError as error:
        if source.is_file() and os.access(source, os.R_OK):
            raise files.not_writable(target, error) from error
        raise ArtifactError(
            f"`{source}` can't be read: {error.strerror or error}; nothing was registered", hint="check its permissions"
        ) from error
    return FileRecord(sha256=files.sha256_file(target), bytes=target.stat().st_size)


def _copy_export(export_folder: Path, export: _Export, target: Path) -> dict[str, FileRecord]:
    """Copy the files that an export's manifest lists, and the manifest."""
    records = {}
    for name in (*sorted(export.sha256), "manifest.json"):
        row = f"onnx/{name}"
        records[row] = _copy(export_folder / name, target / row)
        if name in export.sha256 and records[row].sha256 != export.sha256[name]:
            raise ArtifactError(
                f"`{export_folder / name}` has changed since it was exported", hint="export it again: `icdctl export`"
            )
    return records


def _manifest(folder: Path, name: str, run: _Run, records: dict[str, FileRecord], onnx: OnnxRecord | None) -> Manifest:
    from icdctl.data import public_name, row_of  # not at the head, because it imports torch

    config = run.config
    row = row_of(config.dataset)
    try:
        return Manifest(
            schema=SCHEMA,
            name=name,
            version=1,  # `_publish` sets the final number
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z",
            files=records,
            dataset=DatasetRecord(
                name=public_name(config.dataset),
                sha256=run.metrics.dataset_sha256,
                source=row.source if row else None,
                licence=row.licence if row else None,
                split=run.split,
            ),
            teacher=_teacher_record(folder, run),
            onnx=onnx,
            **_facts(run),
        )
    except ValidationError as error:
        raise ArtifactError(
            f"the run has an impossible value: {first_problem(error)}",
            hint="its files were edited, or written by another program; train it again",
        ) from error


def _facts(run: _Run) -> dict[str, Any]:
    """The entries of a manifest that the files of the run decide."""
    config, git = run.config, run.environment.git
    variant = config.settings.get("variant", run.metrics.variant)
    return {
        "model": config.student,
        "method": config.method,
        "variant": None if variant is None else str(variant),
        "scales": config.scales or (),
        "seed": config.seed,
        "settings": config.settings,
        "recipe": config.recipe,
        "epochs": run.metrics.epochs,
        "metrics": run.all_metrics,
        "git": GitRecord(**git.model_dump()) if git else None,
        "versions": run.environment.versions,
    }


def differing_facts(artifact: Artifact) -> list[str]:
    """The entries of a version's manifest that its own files contradict.

    Raises:
        ArtifactError: a file is missing or broken.
    """
    facts = _facts(_read_facts(artifact.folder / FILES_FOLDER, hint="register the run again"))
    return [key for key, value in facts.items() if getattr(artifact.manifest, key) != value]


def _teacher_record(folder: Path, run: _Run) -> TeacherRecord | None:
    config = run.config
    if config.teacher is None:
        return None
    registered = None
    if config.teacher_sha256 is not None:
        same = [artifact for artifact in list_artifacts(folder) if artifact.sha256 == config.teacher_sha256]
        registered = newest(same)
    return TeacherRecord(
        model=config.teacher,
        sha256=config.teacher_sha256,
        artifact=registered.reference if registered else None,
        source=run.metrics.teacher_source,
        licence=run.metrics.teacher_licence,
    )


def _publish(folder: Path, building: Path, draft: Manifest) -> Artifact:
    """Rename the built folder to the next version number.

    If another process takes that number first, its version is checked for being the same run, and the next number is
    tried.
    """
    home = building.parent
    while True:
        _refuse_twin(versions_of(folder, draft.name), draft)
        version = max(taken_numbers(home), default=0) + 1
        manifest = draft.model_copy(update={"version": version, "serial": next_serial(folder)})
        text = card(Artifact(draft.name, version, home / f"v{version}", manifest))
        artifact = Artifact(draft.name, version, home / f"v{version}", manifest.with_hashes(text))
        files.write_json(building / MANIFEST_FILE, artifact.manifest.as_json())
        files.write_text(building / CARD_FILE, text)
        try:
            building.rename(artifact.folder)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise files.not_writable(artifact.folder, error) from error
        else:
            return artifact


def _refuse_twin(registered: Iterable[Artifact], draft: Manifest) -> None:
    """Refuse a run that is registered already, unless it now comes with an export that is not registered yet."""
    keys = [WEIGHTS_FILE, "metrics.json", "config.json"]
    if draft.onnx:
        keys.append("onnx/model.onnx")
    for artifact in registered:
        if all(artifact.manifest.files.get(key) == draft.files[key] for key in keys):
            raise _RegisteredAlready(artifact)
