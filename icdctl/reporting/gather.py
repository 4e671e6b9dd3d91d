"""From folders to runs that may be compared: equal but for the seed, then equal but for the method."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from icdctl import data, files
from icdctl.config import RunConfig
from icdctl.errors import ArtifactError, UsageError
from icdctl.methods import METHODS
from icdctl.registry import WEIGHTS_FILE

_AGAIN = "train it again, or name the run folders that you want"
_MANIFEST = "manifest.json"
"""What a registered copy of a run has beside it."""


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells."""

    folder: Path
    config: RunConfig
    metrics: Mapping[str, Any]
    history: tuple[Mapping[str, float], ...]
    environment: Mapping[str, Any]
    sha256: str
    """Of its weights."""

    @property
    def top1(self) -> float:
        """On the test images, in percent, at the final epoch."""
        return float(self.metrics["final_top1"])


@dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed alone."""

    label: str
    """The method, and what sets it apart from other cells of the group with that method."""
    runs: tuple[Run, ...]
    """By seed."""

    @property
    def config(self) -> RunConfig:
        """Of the first run."""
        return self.runs[0].config

    @property
    def top1(self) -> dict[int, float]:
        """Seed -> final-epoch top-1."""
        return {run.config.seed: run.top1 for run in self.runs}


@dataclass(frozen=True)
class Group:
    """Cells that may be compared: one data set, one teacher, one student."""

    name: str
    """Short, of letters, digits and dashes, and its own."""
    dataset: str
    """As weights and reports say it."""
    teacher: str | None
    """The model; None where all cells learn from labels alone."""
    teacher_sha256: str | None
    student: str
    cells: tuple[Cell, ...]
    """By method, from plain to CD."""

    @property
    def title(self) -> str:
        """For people."""
        pair = f"{self.teacher} to {self.student}" if self.teacher else f"{self.student} alone"
        return f"{pair} on {self.dataset}"

    @property
    def drawn(self) -> tuple[Cell, ...]:
        """The cells that have figures: the first of each method."""
        first: dict[str, Cell] = {}
        for cell in self.cells:
            first.setdefault(cell.config.method, cell)
        return tuple(first.values())

    @property
    def comparisons(self) -> tuple[tuple[Cell, Cell], ...]:
        """Each drawn cell with the one whose method it adds something to: CD with SDD, SDD with the plain method."""
        drawn = {cell.config.method: cell for cell in self.drawn}
        found = []
        for method, cell in drawn.items():
            base = next((name for name in _bases(method) if name in drawn), None)
            if base is not None:
                found.append((cell, drawn[base]))
        return tuple(found)


def _bases(method: str) -> list[str]:
    """What a method builds on, the nearest first: methods with the same loss and less besides, then cross-entropy."""
    row = METHODS[method]
    rank = row.patches + row.cluster
    less = [
        (-(other.patches + other.cluster), name)
        for name, other in METHODS.items()
        if other.loss == row.loss and other.patches + other.cluster < rank
    ]
    return [*(name for _, name in sorted(less)), *(["ce"] if method != "ce" else [])]


@dataclass(frozen=True)
class Gathered:
    """What was found."""

    groups: tuple[Group, ...]
    teachers: Mapping[str, Run]
    """Hash of the weights -> its own run, where that is among the folders."""
    notes: tuple[str, ...] = field(default=())
    """What was left out, and why."""


def gather(paths: Sequence[Path]) -> Gathered:
    """The runs in these folders, sorted.

    Args:
        paths: run folders, or folders that hold run folders at any depth.

    Raises:
        ArtifactError: a folder holds no finished run, or one that was named is broken.
        UsageError: two folders hold the same run.
    """
    runs: dict[Path, Run] = {}
    notes = []
    for path in paths:
        if (path / "config.json").is_file():
            runs.setdefault(path.resolve(), read_run(path))
            continue
        found = _run_folders(path)
        for folder in found:
            try:
                runs.setdefault(folder.resolve(), read_run(folder))
            except ArtifactError as error:
                notes.append(f"{folder} is left out: {error.message}")
        if not found:
            raise ArtifactError(
                f"`{path}` holds no finished run", hint="name a run folder: what `icdctl distill --out DIR` made"
            )
    if not runs:
        raise ArtifactError(f"no run of {len(notes)} can be read: {notes[0]}", hint=_AGAIN)
    groups, teachers = _grouped(list(runs.values()))
    return Gathered(groups, teachers, tuple(notes))


def _run_folders(path: Path) -> list[Path]:
    """Folders of finished runs at or below a path, without the registry's copies and what lies in hidden folders."""
    inside = (each.relative_to(path) for each in path.rglob("metrics.json"))
    found = {path / each.parent for each in inside if not any(part.startswith(".") for part in each.parts)}
    return sorted(
        folder for folder in found if (folder / "config.json").is_file() and not (folder.parent / _MANIFEST).is_file()
    )


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        ArtifactError: it is not finished, or of another version, or broken.
    """
    hint = f"finish it with `--resume --out {folder}`, or leave it out"
    if not (folder / "metrics.json").is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise ArtifactError(f"run `{folder}` is not finished", hint=hint)
    metrics = files.read_json(folder / "metrics.json", what="metrics", hint=_AGAIN)
    try:
        config = RunConfig(**files.read_json(folder / "config.json", what="config", hint=_AGAIN))
        history = tuple(read_history(folder))
        if not isinstance(metrics["final_top1"], int | float) or not history:
            raise ValueError("no accuracy")
    except (ValidationError, ValueError, TypeError, KeyError, OSError) as error:
        reason = f"{error.error_count()} fields" if isinstance(error, ValidationError) else str(error)
        raise ArtifactError(f"run `{folder}` is broken, or of another version: {reason}", hint=_AGAIN) from error
    environment = (
        files.read_json(folder / "environment.json", what="environment", hint=_AGAIN)
        if (folder / "environment.json").is_file()
        else {}
    )
    return Run(folder, config, metrics, history, environment, files.sha256_file(folder / WEIGHTS_FILE))


def read_history(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's history.csv.

    Raises:
        OSError, ValueError: it is not there, or broken.
    """
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _grouped(runs: Sequence[Run]) -> tuple[tuple[Group, ...], dict[str, Run]]:
    """Groups, and the teachers' own runs, which are in no group."""
    wanted = {run.config.teacher_sha256 for run in runs if run.config.teacher_sha256}
    teachers = {run.sha256: run for run in runs if run.sha256 in wanted}
    students = [run for run in runs if run.sha256 not in teachers]
    keys: dict[tuple[str, str, str, str], list[Run]] = {}
    alone: dict[tuple[str, str], list[Run]] = {}
    for run in students:
        place = (_tested_on(run.config), run.config.student)
        if run.config.teacher is None:
            alone.setdefault(place, []).append(run)
        else:
            keys.setdefault((*place, run.config.teacher, run.config.teacher_sha256 or ""), []).append(run)
    for place, plain in alone.items():  # the same plain students stand beside each teacher's
        beside = [key for key in keys if key[:2] == place]
        for key in beside:
            keys[key] = [*plain, *keys[key]]
        if not beside:
            keys[(*place, "", "")] = plain
    names: dict[str, int] = {}
    groups = []
    for key in sorted(keys):
        _, student, teacher, sha256 = key
        dataset = data.public_name(keys[key][0].config.dataset)
        plain_name = "-".join(part for part in (dataset.replace(":", "-"), teacher, student) if part)
        name = "".join(char if char.isascii() and (char.isalnum() or char in "-_.") else "-" for char in plain_name)
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}-{names[name]}"
        groups.append(Group(name, dataset, teacher or None, sha256 or None, student, _cells(keys[key])))
    return tuple(groups), teachers


def _tested_on(config: RunConfig) -> str:
    """What decides which images a run is tested on."""
    asked = config.images
    told = [asked.name, config.test_images, config.test_split, config.image_size]
    return json.dumps([*told, config.split_seed if config.test_split else None])


def _cells(runs: Sequence[Run]) -> tuple[Cell, ...]:
    """Runs by all that decides them but seed and folder, with labels that tell them apart.

    Raises:
        UsageError: two folders hold the same run.
    """
    by_identity: dict[str, list[Run]] = {}
    for run in runs:
        by_identity.setdefault(json.dumps(_settings(run.config), sort_keys=True), []).append(run)
    for same in by_identity.values():
        same.sort(key=lambda run: run.config.seed)
        for first, second in itertools.pairwise(same):
            if first.config.seed == second.config.seed:
                raise UsageError(
                    f"`{first.folder}` and `{second.folder}` are the same run, seed {first.config.seed}",
                    hint="name one of them",
                )
    order = list(METHODS)
    held = sorted(by_identity.values(), key=lambda same: (order.index(same[0].config.method), _plainness(same[0])))
    labels = _labels([same[0].config for same in held])
    return tuple(Cell(label, tuple(same)) for label, same in zip(labels, held, strict=True))


def _plainness(run: Run) -> tuple[int, str]:
    """Cells with the method's own settings come first."""
    config = run.config
    defaults = METHODS[config.method].defaults
    own = sum(value != defaults.get(key, value) for key, value in config.settings.items() if key != "warmup_epochs")
    return own + (config.scales not in ((), (1, 2, 4))), json.dumps(_settings(config), sort_keys=True)


def _settings(config: RunConfig) -> dict[str, Any]:
    """What decides a run, but for seed and folder, on one level."""
    held = {key: value for key, value in config.identity.items() if key not in ("seed", "out")}
    settings = held.pop("settings")
    return {**held, **settings}


def _labels(configs: Sequence[RunConfig]) -> list[str]:
    """The method of each, and the settings in which cells of one method differ."""
    labels = []
    for config in configs:
        alike = [_settings(other) for other in configs if other.method == config.method]
        mine = _settings(config)
        apart = [key for key in mine if any(other.get(key) != mine[key] for other in alike)]
        labels.append(" ".join([config.method, *(f"{key}={_short(mine[key])}" for key in sorted(apart))]))
    return labels


def _short(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(map(_short, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
