"""Find the folders of finished runs below a path, and read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from icdctl import files
from icdctl.config.run_config import RunConfig
from icdctl.errors import ArtifactError
from icdctl.run_files import WEIGHTS_FILE, check_numbers, is_hashed
from icdctl.run_files import read_history as read_history

TRAIN_AGAIN_HINT = "train it again, or name the run folders that you want"
_TRIALS = "search.json"
"""The file that marks the folder of a search."""
_ABOVE_TRIALS = 2
"""How many folders the runs of a search's trials lie below that file: values, then seed."""
_MANIFEST = "manifest.json"
"""The file that lies beside a registered copy of a run."""
_NUMBERS = ("final_top1", "final_top5", "best_top1", "seconds")


@dataclass(frozen=True)
class RunMetrics:
    """The part of a run's metrics.json that reports use; accuracies are in percent."""

    final_top1: float
    final_top5: float | None
    best_top1: float | None
    """Top-1 at the best epoch on the test images; None for a run that watched held-out images instead."""
    seconds: float | None
    params: int | None
    """Number of parameters of the student."""
    teacher_source: str | None
    teacher_licence: str | None


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as its folder describes it."""

    folder: Path
    config: RunConfig
    metrics: RunMetrics
    history: tuple[Mapping[str, float], ...]
    """One mapping for each epoch: column of history.csv -> value."""
    versions: Mapping[str, object]
    """Package -> version that trained it."""
    sha256: str
    """Hash of its weights."""
    is_hashed: bool
    """Whether its numbers were compared with the hashes that it wrote; earlier versions wrote none."""

    @property
    def top1(self) -> float:
        """Top-1 on the test images at the final epoch, in percent."""
        return self.metrics.final_top1


def find_run_folders(path: Path) -> list[Path]:
    """The folders of finished runs at or below a path.

    Copies in a registry, trials of a search (whose accuracies only serve to choose settings) and hidden folders are
    left out.
    """
    inside = (each.relative_to(path) for each in path.rglob("metrics.json"))
    found = {path / each.parent for each in inside if not any(part.startswith(".") for part in each.parts)}
    return sorted(
        folder
        for folder in found
        if (folder / "config.json").is_file()
        and not (folder.parent / _MANIFEST).is_file()
        and not any((above / _TRIALS).is_file() for above in list(folder.parents)[:_ABOVE_TRIALS])
    )


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run.

    Raises:
        ArtifactError: the run is not finished, is broken, has changed, or was made by another version of icdctl.
    """
    hint = f"finish it with `--resume --out {folder}`, or leave it out"
    if not (folder / "metrics.json").is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise ArtifactError(f"run `{folder}` is not finished", hint=hint)
    metrics = files.read_json(folder / "metrics.json", what="metrics", hint=TRAIN_AGAIN_HINT)
    try:
        config = RunConfig.stated(files.read_json(folder / "config.json", what="config", hint=TRAIN_AGAIN_HINT))
        history = tuple(read_history(folder))
        numbers = _metrics(metrics)
    except (ValidationError, ValueError, TypeError, KeyError, OSError) as error:
        reason = f"{error.error_count()} fields" if isinstance(error, ValidationError) else str(error)
        raise ArtifactError(
            f"run `{folder}` is broken, or another version made it: {reason}", hint=TRAIN_AGAIN_HINT
        ) from error
    check_numbers(folder, metrics)
    sha256 = files.sha256_file(folder / WEIGHTS_FILE)
    return FinishedRun(folder, config, numbers, history, _versions(folder), sha256, is_hashed(metrics))


def _metrics(value: Mapping[str, Any]) -> RunMetrics:
    """The checked content of a metrics.json.

    Raises:
        KeyError, TypeError, ValueError: a number is missing, or is not one.
    """
    _check("final_top1", value["final_top1"], files.percentage)
    for key in ("final_top5", "best_top1", "seconds"):
        if value[key] is not None:
            _check(key, value[key], files.positive if key == "seconds" else files.percentage)
    params, source, licence = (value.get(key) for key in ("params", "teacher_source", "teacher_licence"))
    return RunMetrics(
        **{key: value[key] for key in _NUMBERS},
        params=params if isinstance(params, int) else None,
        teacher_source=str(source) if source else None,
        teacher_licence=str(licence) if licence else None,
    )


def _versions(folder: Path) -> Mapping[str, object]:
    """The package versions in a run's environment.json; empty if there is no such file."""
    path = folder / "environment.json"
    if not path.is_file():
        return {}
    environment = files.read_json(path, what="environment", hint=TRAIN_AGAIN_HINT)
    versions = environment.get("versions", {}) if isinstance(environment, dict) else None
    if not isinstance(versions, dict):
        raise ArtifactError(
            f"run `{folder}` is broken: its environment.json does not have the expected format", hint=TRAIN_AGAIN_HINT
        )
    return versions


def _check(key: str, value: object, read: Callable[[object], float]) -> None:
    try:
        read(value)
    except ValueError as error:
        raise ValueError(f"`{key}` is not a number: {error}") from error
