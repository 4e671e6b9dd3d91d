"""From folders to runs that may be compared: equal but for the seed, then equal but for the method."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from icdctl import data, files
from icdctl.config.run import RunConfig
from icdctl.errors import ArtifactError
from icdctl.methods import METHODS, SCALES
from icdctl.run_files import WEIGHTS_FILE

_AGAIN = "train it again, or name the run folders that you want"
_TRIALS = "search.json"
"""What a search has beside the runs of its trials, which lie so many folders below: values and seed."""
_ABOVE_TRIALS = 2
_MANIFEST = "manifest.json"
"""What a registered copy of a run has beside it."""
_OF_METHOD = ("command", "method", "recipe", "scales", "settings", "teacher", "teacher_sha256")
"""What may differ between a method and the one it builds on; `recipe` is a name for numbers that stand beside it."""
_SHORT_HASH = 6
_NUMBERS = ("final_top1", "final_top5", "best_top1", "seconds")


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

    @property
    def training(self) -> dict[str, Any]:
        """How it was trained, whatever the method."""
        return _training(self.config)

    def unlike(self, other: Cell) -> dict[str, tuple[Any, Any]]:
        """Settings that both methods have, and that are not the same: name -> values of this cell and the other."""
        mine, theirs = ({**cell.config.settings, "scales": cell.config.scales} for cell in (self, other))
        names = sorted(mine.keys() & theirs.keys()) if _loss(self) == _loss(other) else ["variant"]
        found = {name: (mine[name], theirs[name]) for name in names if mine[name] != theirs[name]}
        return {name: pair for name, pair in found.items() if pair[0] != () and pair[1] != ()}


@dataclass(frozen=True)
class Group:
    """Cells that may be compared: one data set, one teacher, one student."""

    name: str
    """Short, of letters, digits and dashes, and its own."""
    dataset: str
    """As weights and reports say it."""
    images: str
    """The same, numbered where runs of that name are tested on different images."""
    teacher: str | None
    """The model; None where all cells learn from labels alone."""
    teacher_sha256: str | None
    teacher_label: str | None
    """The model, with the first digits of the hash where another teacher is of the same model."""
    student: str
    cells: tuple[Cell, ...]
    """By method, from plain to CD."""

    @property
    def title(self) -> str:
        """For people."""
        pair = f"{self.teacher_label} to {self.student}" if self.teacher else f"{self.student} alone"
        return f"{pair} on {self.images}"

    @property
    def pair(self) -> str:
        """Teacher and student, short."""
        return f"{self.teacher_label} : {self.student}" if self.teacher else self.student

    @property
    def drawn(self) -> tuple[Cell, ...]:
        """The cells that have figures: the first of each method."""
        first: dict[str, Cell] = {}
        for cell in self.cells:
            first.setdefault(cell.config.method, cell)
        return tuple(first.values())

    @property
    def usual(self) -> dict[str, Any]:
        """Training that is not the same in all cells: name -> the value of those whose label does not say another."""
        return _usual([cell.training for cell in self.cells])

    @property
    def comparisons(self) -> tuple[tuple[Cell, Cell], ...]:
        """Each drawn cell with one that was trained alike and whose method it adds something to: CD with SDD, SDD with
        the plain method."""
        found = []
        for cell in self.drawn:
            base = next((base for base in self._built_on(cell) if base.training == cell.training), None)
            if base is not None:
                found.append((cell, base))
        return tuple(found)

    @property
    def unmatched(self) -> tuple[tuple[Cell, Cell], ...]:
        """Drawn cells that stand in no comparison, for what they build on was trained in another way: with that."""
        matched = {first.label for first, _ in self.comparisons}
        bases = [(cell, self._built_on(cell)) for cell in self.drawn if cell.label not in matched]
        return tuple((cell, found[0]) for cell, found in bases if found)

    def _built_on(self, cell: Cell) -> list[Cell]:
        """Cells of the methods it builds on; the nearest method first, then the nearest settings."""
        ranks = {method: rank for rank, method in enumerate(_bases(cell.config.method))}
        found = [other for other in self.cells if other.config.method in ranks]
        return sorted(found, key=lambda other: (ranks[other.config.method], len(cell.unlike(other))))


def _loss(cell: Cell) -> str:
    return METHODS[cell.config.method].family


def _bases(method: str) -> list[str]:
    """What a method builds on, the nearest first: methods with the same loss and less besides, then cross-entropy."""
    row = METHODS[method]
    rank = row.patches + row.cluster
    less = [
        (-(other.patches + other.cluster), name)
        for name, other in METHODS.items()
        if other.family == row.family and other.patches + other.cluster < rank
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
    groups, teachers = _grouped(_different(runs.values(), notes))
    return Gathered(groups, teachers, tuple(notes))


def _different(runs: Iterable[Run], notes: list[str]) -> list[Run]:
    """The runs without those that are another one once more, as the default value in a sweep is."""
    found: dict[str, Run] = {}
    for run in runs:
        first = found.setdefault(_as_text({**_settings(run.config), "seed": run.config.seed}), run)
        if first is not run:
            notes.append(f"{run.folder} is left out: the same run as {first.folder}")
    return list(found.values())


def _run_folders(path: Path) -> list[Path]:
    """Folders of finished runs at or below a path.

    Not among them: the registry's copies, trials of a search, whose accuracy is nobody's business, and what lies in
    hidden folders.
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
        broken = [key for key in _NUMBERS if not _is_number(metrics[key])]
        if broken or metrics["final_top1"] is None:
            raise ValueError(f"`{(broken or ['final_top1'])[0]}` is no number")
    except (ValidationError, ValueError, TypeError, KeyError, OSError) as error:
        reason = f"{error.error_count()} fields" if isinstance(error, ValidationError) else str(error)
        raise ArtifactError(f"run `{folder}` is broken, or of another version: {reason}", hint=_AGAIN) from error
    environment = (
        files.read_json(folder / "environment.json", what="environment", hint=_AGAIN)
        if (folder / "environment.json").is_file()
        else {}
    )
    if not isinstance(environment, dict) or not isinstance(environment.get("versions", {}), dict):
        raise ArtifactError(f"run `{folder}` is broken: its environment.json holds something else", hint=_AGAIN)
    return Run(folder, config, metrics, history, environment, files.sha256_file(folder / WEIGHTS_FILE))


def _is_number(value: Any) -> bool:
    """Or nothing: runs that watch held-out images have no best epoch on the test images."""
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def read_history(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's history.csv.

    Raises:
        OSError, ValueError: it is not there, or broken.
    """
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    if not rows or not rows[0].keys() & {"test_top1", "val_top1"}:
        raise ValueError("history.csv has no accuracy")
    return rows


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
    weights = {(teacher, sha256) for *_, teacher, sha256 in keys}
    alike = Counter(teacher for teacher, _ in weights)
    sets: dict[str, list[str]] = {}
    for key in sorted(keys):
        of_dataset = sets.setdefault(data.public_name(keys[key][0].config.dataset), [])
        if key[0] not in of_dataset:
            of_dataset.append(key[0])
    groups = []
    for key in sorted(keys):
        tested_on, student, teacher, sha256 = key
        dataset = data.public_name(keys[key][0].config.dataset)
        number = sets[dataset].index(tested_on) + 1
        images = dataset if len(sets[dataset]) == 1 else f"{dataset} (test images {number})"
        plain_name = "-".join(part for part in (dataset.replace(":", "-"), teacher, student) if part)
        name = "".join(char if char.isascii() and (char.isalnum() or char in "-_.") else "-" for char in plain_name)
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}-{names[name]}"
        label = f"{teacher} {sha256[:_SHORT_HASH]}" if alike[teacher] > 1 else teacher
        cells = _cells(keys[key])
        groups.append(Group(name, dataset, images, teacher or None, sha256 or None, label or None, student, cells))
    return tuple(groups), teachers


def _tested_on(config: RunConfig) -> str:
    """What decides which images a run is tested on."""
    asked = config.images
    told = [asked.name, config.test_images, config.test_split, config.image_size]
    return json.dumps([*told, config.split_seed if config.test_split else None])


def _cells(runs: Sequence[Run]) -> tuple[Cell, ...]:
    """Runs by all that decides them but seed and folder, with labels that tell them apart."""
    by_identity: dict[str, list[Run]] = {}
    for run in runs:
        by_identity.setdefault(_as_text(_settings(run.config)), []).append(run)
    for same in by_identity.values():
        same.sort(key=lambda run: run.config.seed)
    held = list(by_identity.values())
    kinds = {(same[0].config.method, _as_text(_training(same[0].config))) for same in held}
    num_methods = Counter(training for _, training in kinds)
    held.sort(key=lambda same: _place(same[0].config, num_methods))
    labels = _labels([same[0].config for same in held])
    return tuple(Cell(label, tuple(same)) for label, same in zip(labels, held, strict=True))


def _place(config: RunConfig, num_methods: Mapping[str, int]) -> tuple[int, int, int, str]:
    """Order of cells: by method, then the training that most methods share, then the method's own settings.

    Args:
        config: of a cell.
        num_methods: how many methods were trained in a way.
    """
    method = METHODS[config.method]
    ours = {key: value for key, value in config.settings.items() if key != "warmup_epochs"}
    own = sum(value != method.defaults.get(key, value) for key, value in ours.items())
    own += config.scales not in ((), SCALES)
    return (
        list(METHODS).index(config.method),
        -num_methods[_as_text(_training(config))],
        own,
        _as_text(_settings(config)),
    )


def _settings(config: RunConfig) -> dict[str, Any]:
    """What decides a run, but for seed and folder, on one level."""
    held = {key: value for key, value in config.identity.items() if key not in ("seed", "out", "settings")}
    return {**held, **config.settings}


def _training(config: RunConfig) -> dict[str, Any]:
    """What decides a run besides its seed, method and teacher."""
    return {key: value for key, value in config.identity.items() if key not in (*_OF_METHOD, "seed", "out")}


def _as_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _labels(configs: Sequence[RunConfig]) -> list[str]:
    """The method of each, the settings in which cells of that method differ, and what is unusual in its training."""
    trainings = [_training(config) for config in configs]
    usual = _usual(trainings)
    labels = []
    for config, training in zip(configs, trainings, strict=True):
        mine = _settings(config)
        alike = [_settings(other) for other in configs if other.method == config.method]
        of_method = mine.keys() - training.keys()
        told = sorted(key for key in of_method if any(other.get(key) != mine[key] for other in alike))
        told += [key for key, value in usual.items() if training[key] != value]
        labels.append(" ".join([config.method, *(f"{key}={short(mine[key])}" for key in told)]))
    return labels


def _usual(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of what is not the same in all, the value that most have; of equally many, the one that is switched off."""
    found = {}
    for key in sorted(trainings[0]):
        several = Counter(json.dumps(training[key]) for training in trainings)
        if len(several) > 1:
            is_on = {text: json.loads(text) not in (None, 0, [], "none") for text in several}
            found[key] = json.loads(min(several, key=lambda text: (-several[text], is_on[text], text)))
    return found


def short(value: Any) -> str:
    """A setting for people: `1,2,4`, `0.5`."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(map(short, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
