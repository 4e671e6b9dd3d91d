"""Searching a cell's settings with optuna, on held-out training images and never on the test images.

A trial trains without some of the training images and is judged on these. The values of the best trial then make a cell
of its own, trained on all training images with every seed: only that one is tested. Every trial is kept in
`search.json`, and a search that is repeated or interrupted goes on from it: what is asked next follows from the trials
so far and the seed alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icdctl import files
from icdctl.api import planning
from icdctl.config.run import RunConfig
from icdctl.errors import ArtifactError, IcdctlError, UsageError
from icdctl.grid.cells import Grid, GridCell, GridRun
from icdctl.grid.status import standings
from icdctl.grid.sweeps import changed, lacking, parse_sweeps, swept

SEARCH_FILE, LOCK_FILE = "search.json", ".lock"
_DIGITS = 4
"""Significant ones of a number from a range: a name for its folder, and no false precision."""


@dataclass(frozen=True)
class Range:
    """Numbers between two."""

    low: float
    high: float
    is_logarithmic: bool
    is_whole: bool


Space = Mapping[str, Range | tuple[str, ...]]
"""What is searched -> a range, or values to choose from."""


@dataclass(frozen=True)
class Trial:
    """Values that were tried."""

    values: Mapping[str, str]
    val_top1: tuple[float, ...] | None
    """On the held-out images at the final epoch, for each seed; None where a run failed."""

    @property
    def score(self) -> float:
        """What the search maximises."""
        return -math.inf if self.val_top1 is None else math.fsum(self.val_top1) / len(self.val_top1)


def parse_space(given: Sequence[str]) -> dict[str, Range | tuple[str, ...]]:
    """`["gamma=0.5..8", "lr=0.001..0.1:log", "temperature=2,4"]` as what is searched.

    Raises:
        UsageError: one is neither KEY=LOW..HIGH nor KEY=VALUES, or a key is named twice.
    """
    space: dict[str, Range | tuple[str, ...]] = {}
    for item in given:
        key, equals, text = item.partition("=")
        if ".." not in text:
            ((name, values),) = parse_sweeps([item]).items()
            found: Range | tuple[str, ...] = tuple(values)
        else:
            name = key.strip().replace("-", "_")
            found = _range(item, name, text)
        if not equals or not name or name in space:
            raise UsageError(f"`--sweep {item}` names no setting, or one for the second time", hint=_EXAMPLE)
        space[name] = found
    if not space:
        raise UsageError("nothing is searched", hint=_EXAMPLE)
    return space


_EXAMPLE = "e.g. `--search optuna --sweep gamma=0.5..8 --sweep lr=0.001..0.1:log --sweep temperature=2,4`"


def _range(item: str, name: str, text: str) -> Range:
    numbers, _, scale = text.partition(":")
    low_text, _, high_text = (part.strip() for part in numbers.partition(".."))
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        low, high = math.nan, math.nan
    if scale.strip() not in ("", "log") or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"`--sweep {item}` is no range LOW..HIGH or LOW..HIGH:log", hint=_EXAMPLE)
    if scale and low <= 0:
        raise UsageError(f"`--sweep {item}`: a logarithmic range begins above 0", hint=_EXAMPLE)
    known = RunConfig.model_fields.get(name)
    return Range(low, high, bool(scale), is_whole=known is not None and known.annotation is int)


def searchable(grid: Grid, space: Space) -> tuple[Grid, list[str]]:
    """The cells whose methods have all that is searched, and why others are left out.

    Raises:
        UsageError: there is none, or a range ends where no value can be.
    """
    axes = {
        key: [_text(axis.low, axis), _text(axis.high, axis)] if isinstance(axis, Range) else list(axis)
        for key, axis in space.items()
    }
    _, left_out = swept(grid, axes, taken=())
    return replace(grid, cells=tuple(cell for cell in grid.cells if lacking(cell, axes) is None)), left_out


class Search:
    """The trials of one cell."""

    def __init__(self, grid: Grid, cell: GridCell, space: Space, *, seeds: Sequence[int], val_split: float) -> None:
        """
        Args:
            grid: of the cell.
            cell: whose settings are searched.
            space: from `parse_space`.
            seeds: that each trial is trained with.
            val_split: share of the training images that a trial is judged on.

        Raises:
            UsageError: the share is none, or earlier trials were of another space, cell, seeds or settings.
            ArtifactError: the file of earlier trials is broken.
        """
        if not 0 < val_split < 1:
            raise UsageError(f"`--val-split {val_split:g}` leaves nothing to judge or to train on", hint="e.g. 0.1")
        self.cell, self.space = cell, dict(space)
        self._seeds = tuple(seeds)
        self._grid = grid
        self._options = {**cell.options, "val_split": val_split}
        self.folder = folder_of(grid, cell)
        self.trials: list[Trial] = []
        self.read()

    @property
    def best(self) -> Trial:
        """The trial with the highest score, the earliest of equals.

        Raises:
            IcdctlError: no trial got through.
        """
        found = best_of(self.trials)
        if found is None:
            raise IcdctlError(
                f"no trial of `{self.cell.name}` got through", hint="the messages above say why; search other values"
            )
        return found

    @property
    def winner(self) -> GridCell:
        """The cell with the best values, to be trained on all its training images."""
        return winner_of(self.cell, self.best)

    def ask(self, number: int) -> list[dict[str, str]]:
        """Values to try next; fewer where a small space has no others."""
        optuna = _optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return self._asked(self._study(optuna), optuna, number)

    def _asked(self, study: Any, optuna: Any, number: int) -> list[dict[str, str]]:
        distributions = {key: _distribution(axis, optuna) for key, axis in self.space.items()}
        tried = [dict(trial.values) for trial in self.trials]
        found: list[dict[str, str]] = []
        for _ in range(4 * number):  # the sampler may repeat itself
            asked = study.ask(distributions)
            values = {key: _text(asked.params[key], axis) for key, axis in self.space.items()}
            if values not in tried and values not in found:
                found.append(values)
            if len(found) == number:
                break
        return found

    def runs_of(self, several: Sequence[Mapping[str, str]]) -> Grid:
        """The runs of values to try, as a grid of their own."""
        return trial_runs(self._grid, replace(self.cell, options=self._options), several, seeds=self._seeds)

    def tell(self, several: Sequence[Mapping[str, str]], runs: Sequence[GridRun], failed: Sequence[str]) -> None:
        """Note what became of values that were tried.

        Args:
            several: that `ask` gave.
            runs: that `runs_of` made of them.
            failed: labels of those that did not get through.

        Raises:
            ArtifactError: metrics of a run are broken, or the file can't be written.
        """
        each = len(self._seeds)
        for place, values in enumerate(several):
            own = runs[place * each : (place + 1) * each]
            if any(run.label in failed for run in own):
                self.trials.append(Trial(dict(values), None))
                continue
            self.trials.append(Trial(dict(values), tuple(_validated(run) for run in own)))
        self._write()

    def as_json(self) -> dict[str, Any]:
        """What `search.json` holds."""
        trials = [
            {"values": dict(trial.values), "val_top1": None if trial.val_top1 is None else list(trial.val_top1)}
            for trial in self.trials
        ]
        return {"of": self._identity(), "trials": trials}

    def _identity(self) -> dict[str, Any]:
        """What trials must have in common."""
        axes = {key: vars(axis) if isinstance(axis, Range) else list(axis) for key, axis in self.space.items()}
        return {"cell": self.cell.name, "options": _deciding(self._options), "seeds": list(self._seeds), "space": axes}

    def read(self) -> None:
        """Take up the trials that are kept.

        Raises:
            UsageError, ArtifactError: as when the search was made.
        """
        path = self.folder / SEARCH_FILE
        if not path.is_file():
            return
        of, trials = read_trials(self.folder)
        hint = _anew(self.folder)
        if {**of, "options": _deciding(of.get("options"))} != self._identity():
            raise UsageError(
                f"`{path}` has trials of another space, seeds or options of `{self.cell.name}`",
                hint=f"search the same again, or {hint}",
            )
        self.trials = trials
        # Options of all runs, as `epochs` in the section `train`, are not in the cell: its trials tell.
        for earlier in standings(self.runs_of([trial.values for trial in self.trials]).runs, planning.Planner()):
            if earlier.state == "stale":
                raise UsageError(
                    f"trials of `{self.cell.name}` can't be compared with new ones, "
                    f"they had other settings: {earlier.changes}",
                    hint=f"take the change back, or {hint}",
                )

    def _write(self) -> None:
        files.write_json(self.folder / SEARCH_FILE, self.as_json())

    def _study(self, optuna: Any) -> Any:
        """A study that has seen the trials so far."""
        sampler = optuna.samplers.TPESampler(seed=self._seeds[0] + len(self.trials), constant_liar=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        distributions = {key: _distribution(axis, optuna) for key, axis in self.space.items()}
        states = optuna.trial.TrialState
        for trial in self.trials:
            params = {key: _value(trial.values[key], axis) for key, axis in self.space.items()}
            state = states.FAIL if trial.val_top1 is None else states.COMPLETE
            value = None if trial.val_top1 is None else trial.score
            made = optuna.trial.create_trial(params=params, distributions=distributions, value=value, state=state)
            study.add_trial(made)
        return study


def _deciding(options: Any) -> dict[str, Any]:
    """Those that trials must have in common: not on which machine they run, nor where its data lie."""
    held = options if isinstance(options, Mapping) else {}
    return {key: value for key, value in held.items() if key not in ("data_dir", "device", "time_limit")}


def folder_of(grid: Grid, cell: GridCell) -> Path:
    """Where the search of a cell keeps its trials."""
    return grid.folder / f"{cell.name}-search"


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The trial with the highest score, the earliest of equals; None where none got through."""
    found = max(trials, key=lambda trial: trial.score, default=None)
    return None if found is None or found.val_top1 is None else found


def winner_of(cell: GridCell, best: Trial) -> GridCell:
    """The cell with the best values, to be trained on all its training images."""
    return replace(changed(cell, best.values), name=f"{cell.name}-searched")


def trial_runs(grid: Grid, cell: GridCell, several: Sequence[Mapping[str, str]], *, seeds: Sequence[int]) -> Grid:
    """The runs of values to try, as a grid of their own.

    Args:
        grid: of the cell.
        cell: with the options that its trials have.
        several: values to try.
        seeds: of each trial.
    """
    cells = []
    for values in several:
        made = changed(cell, values)
        label = made.name.removeprefix(f"{cell.name}-")
        cells.append(replace(made, name=f"{folder_of(grid, cell).name}/{label}"))
    return replace(grid, cells=tuple(cells), seeds=tuple(seeds))


def read_trials(folder: Path) -> tuple[dict[str, Any], list[Trial]]:
    """What a `search.json` holds: what its trials have in common, and the trials.

    Raises:
        ArtifactError: it is missing, or broken.
    """
    path, hint = folder / SEARCH_FILE, _anew(folder)
    held = files.read_json(path, what="search", hint=hint)
    try:
        trials = [
            Trial(
                {str(key): str(value) for key, value in row["values"].items()},
                None if row["val_top1"] is None else tuple(map(float, row["val_top1"])),
            )
            for row in held["trials"]
        ]
        return dict(held["of"]), trials
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"`{path}` is no search of this version: {error}", hint=hint) from error


def _anew(folder: Path) -> str:
    return f"delete `{folder}` to search anew"


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UsageError("optuna is not installed", hint="`pip install 'icdctl[search]'`") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _distribution(axis: Range | tuple[str, ...], optuna: Any) -> Any:
    if isinstance(axis, tuple):
        return optuna.distributions.CategoricalDistribution(list(axis))
    if axis.is_whole:
        return optuna.distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.is_logarithmic)
    return optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.is_logarithmic)


def _text(value: float | str, axis: Range | tuple[str, ...]) -> str:
    """A value as `--sweep` takes it."""
    if isinstance(axis, tuple):
        return str(value)
    if axis.is_whole:
        return str(int(value))
    rounded = float(f"{value:.{_DIGITS}g}")
    return repr(min(max(rounded, axis.low), axis.high))


def _value(text: str, axis: Range | tuple[str, ...]) -> float | str:
    if isinstance(axis, tuple):
        return text
    return int(text) if axis.is_whole else float(text)


def _validated(run: GridRun) -> float:
    """Top-1 of a run on the images that it held out."""
    value = run.metrics().get("final_val_top1")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArtifactError(
            f"`{run.folder}` has no accuracy on held-out images", hint=f"delete `{run.folder}`, and search again"
        )
    return float(value)
