"""Sort runs for comparison: runs that differ only by seed form a cell, cells that may be compared form a group."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from icdctl import data, methods
from icdctl.config.run_config import RunConfig
from icdctl.methods import METHODS, SCALES
from icdctl.reporting.finished_runs import FinishedRun

_OF_METHOD = ("command", "method", "recipe", "scales", "settings", "teacher", "teacher_sha256")
"""Keys that may differ between a method and the one it builds on; the numbers of the `recipe` are compared by
themselves."""
_SHORT_HASH = 6


@dataclass(frozen=True)
class ReportCell:
    """A cell of a report: runs that differ only by their seed."""

    label: str
    """The method, with the settings in which it differs from other cells of the group."""
    runs: tuple[FinishedRun, ...]
    """The runs, sorted by seed."""

    @property
    def config(self) -> RunConfig:
        """The configuration of the first run."""
        return self.runs[0].config

    @property
    def top1(self) -> dict[int, float]:
        """Seed -> top-1 at the final epoch, in percent."""
        return {run.config.seed: run.top1 for run in self.runs}

    @property
    def training(self) -> dict[str, object]:
        """The part of the configuration that does not belong to the method: how the cell was trained."""
        return _training(self.config)

    def differing_settings(self, other: ReportCell) -> dict[str, tuple[object, object]]:
        """Settings that both methods have and in which they differ: name -> values of this cell and of the other."""
        mine, theirs = ({**cell.config.settings, "scales": cell.config.scales} for cell in (self, other))
        names = sorted(mine.keys() & theirs.keys()) if _family(self) == _family(other) else ["variant"]
        found = {name: (mine[name], theirs[name]) for name in names if mine[name] != theirs[name]}
        return {name: pair for name, pair in found.items() if pair[0] != () and pair[1] != ()}


@dataclass(frozen=True)
class RunGroup:
    """Cells that may be compared: they share data set, teacher and student."""

    name: str
    """A short and unique name of letters, digits and dashes."""
    dataset: str
    """Public name of the data set, as in weights files and reports."""
    images: str
    """The same name, numbered if runs with this name are tested on different images."""
    teacher: str | None
    """The teacher's architecture; None if all cells learn from labels alone."""
    teacher_sha256: str | None
    teacher_label: str | None
    """The teacher's architecture, with the first digits of its hash if another teacher has the same one."""
    student: str
    """The student's architecture."""
    cells: tuple[ReportCell, ...]
    """The cells, sorted by method from plain to CD."""

    @property
    def title(self) -> str:
        """Heading of the group in the report."""
        pair = f"{self.teacher_label} to {self.student}" if self.teacher else f"{self.student} alone"
        return f"{pair} on {self.images}"

    @property
    def pair(self) -> str:
        """Teacher and student in a short form, for tables."""
        return f"{self.teacher_label} : {self.student}" if self.teacher else self.student

    @property
    def drawn(self) -> tuple[ReportCell, ...]:
        """The cells that appear in figures: the first of each method."""
        first: dict[str, ReportCell] = {}
        for cell in self.cells:
            first.setdefault(cell.config.method, cell)
        return tuple(first.values())

    @property
    def usual(self) -> dict[str, object]:
        """Training options that differ between cells: name -> the value that holds unless a label states another."""
        return _usual([cell.training for cell in self.cells])

    @property
    def comparisons(self) -> tuple[tuple[ReportCell, ReportCell], ...]:
        """Each drawn cell with a cell that its method builds on and that was trained in the same way: CD with SDD, SDD
        with the plain method."""
        found = []
        for cell in self.drawn:
            base = next((base for base in self._built_on(cell) if base.training == cell.training), None)
            if base is not None:
                found.append((cell, base))
        return tuple(found)

    @property
    def uncompared(self) -> tuple[tuple[ReportCell, ReportCell], ...]:
        """Drawn cells without a comparison, each with the cell that it builds on, which was trained in another way."""
        matched = {first.label for first, _ in self.comparisons}
        bases = [(cell, self._built_on(cell)) for cell in self.drawn if cell.label not in matched]
        return tuple((cell, found[0]) for cell, found in bases if found)

    def _built_on(self, cell: ReportCell) -> list[ReportCell]:
        """The cells of the methods that a cell builds on; the nearest method first, then the nearest settings."""
        ranks = {method: rank for rank, method in enumerate(methods.builds_on(cell.config.method))}
        found = [other for other in self.cells if other.config.method in ranks]
        return sorted(found, key=lambda other: (ranks[other.config.method], len(cell.differing_settings(other))))


def _family(cell: ReportCell) -> str:
    return methods.get(cell.config.method).family


def without_duplicates(runs: Iterable[FinishedRun], notes: list[str]) -> list[FinishedRun]:
    """The runs without repetitions of another run, such as the default value in a sweep."""
    found: dict[str, FinishedRun] = {}
    for run in runs:
        first = found.setdefault(_as_text({**_settings(run.config), "seed": run.config.seed}), run)
        if first is not run:
            notes.append(f"{run.folder} is left out: the same run as {first.folder}")
    return list(found.values())


def group_runs(runs: Sequence[FinishedRun]) -> tuple[tuple[RunGroup, ...], dict[str, FinishedRun]]:
    """The groups, and the runs that trained the teachers: hash of the weights -> run. These are in no group."""
    wanted = {run.config.teacher_sha256 for run in runs if run.config.teacher_sha256}
    teachers = {run.sha256: run for run in runs if run.sha256 in wanted}
    students = [run for run in runs if run.sha256 not in teachers]
    keys: dict[tuple[str, str, str, str], list[FinishedRun]] = {}
    alone: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in students:
        place = (_tested_on(run.config), run.config.student)
        if run.config.teacher is None:
            alone.setdefault(place, []).append(run)
        else:
            keys.setdefault((*place, run.config.teacher, run.config.teacher_sha256 or ""), []).append(run)
    for place, plain in alone.items():  # the same plain students are compared with those of each teacher
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
        groups.append(RunGroup(name, dataset, images, teacher or None, sha256 or None, label or None, student, cells))
    return tuple(groups), teachers


def _tested_on(config: RunConfig) -> str:
    """The options that decide which images a run is tested on, as text."""
    options = [config.images.name, config.test_images, config.test_split, config.image_size]
    return json.dumps([*options, config.split_seed if config.test_split else None])


def _cells(runs: Sequence[FinishedRun]) -> tuple[ReportCell, ...]:
    """The runs sorted into cells, with labels that distinguish the cells."""
    by_identity: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_identity.setdefault(_as_text(_settings(run.config)), []).append(run)
    for same in by_identity.values():
        same.sort(key=lambda run: run.config.seed)
    held = list(by_identity.values())
    kinds = {(same[0].config.method, _as_text(_training(same[0].config))) for same in held}
    num_methods = Counter(training for _, training in kinds)
    held.sort(key=lambda same: _place(same[0].config, num_methods))
    labels = _labels([same[0].config for same in held])
    return tuple(ReportCell(label, tuple(same)) for label, same in zip(labels, held, strict=True))


def _place(config: RunConfig, num_methods: Mapping[str, int]) -> tuple[tuple[int, str], int, int, str]:
    """Sorting key of a cell: the method, then the training that most methods share, then the method's settings.

    Args:
        config: configuration of the cell's first run.
        num_methods: training, as text -> number of methods that were trained in this way.
    """
    method = methods.get(config.method)
    ours = {key: value for key, value in config.settings.items() if key != "warmup_epochs"}
    own = sum(value != method.defaults.get(key, value) for key, value in ours.items())
    own += config.scales not in ((), SCALES)
    return (
        _listed_at(config.method),
        -num_methods[_as_text(_training(config))],
        own,
        _as_text(_settings(config)),
    )


def _listed_at(method: str) -> tuple[int, str]:
    """Sorting key: in the order in which methods are listed, those that are made of others behind them."""
    return list(METHODS).index(method) if method in METHODS else len(METHODS), method


def _settings(config: RunConfig) -> dict[str, object]:
    """Everything that decides the numbers of a run, except the seed, as one flat mapping."""
    held = {key: value for key, value in config.identity.items() if key not in ("seed", "settings")}
    return {**held, "dataset": config.dataset, **config.settings}


def _training(config: RunConfig) -> dict[str, object]:
    """Everything that decides the numbers of a run, except seed, method and teacher."""
    held = {key: value for key, value in config.identity.items() if key not in (*_OF_METHOD, "seed")}
    return {**held, "dataset": config.dataset}


def _as_text(settings: Mapping[str, object]) -> str:
    return json.dumps(settings, sort_keys=True)


def _labels(configs: Sequence[RunConfig]) -> list[str]:
    """A label for each cell: its method, the settings in which cells of that method differ, and unusual training."""
    trainings = [_training(config) for config in configs]
    usual = _usual(trainings)
    labels = []
    for config, training in zip(configs, trainings, strict=True):
        mine = _settings(config)
        alike = [_settings(other) for other in configs if other.method == config.method]
        of_method = mine.keys() - training.keys()
        shown = sorted(key for key in of_method if any(other.get(key) != mine[key] for other in alike))
        shown += [key for key, value in usual.items() if training[key] != value]
        labels.append(" ".join([config.method, *(f"{key}={short(mine[key])}" for key in shown)]))
    return labels


def _usual(trainings: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The most frequent value of each option that differs; among equally frequent values, one that means off."""
    found = {}
    for key in sorted(trainings[0]):
        values = {json.dumps(training[key]): training[key] for training in trainings}
        if len(values) > 1:
            several = Counter(json.dumps(training[key]) for training in trainings)
            is_on = {text: value not in (None, 0, [], (), "none") for text, value in values.items()}
            found[key] = values[min(several, key=lambda text: (-several[text], is_on[text], text))]
    return found


def short(value: object) -> str:
    """The value of a setting as text for tables: `1,2,4`, `0.5`."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(map(short, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
