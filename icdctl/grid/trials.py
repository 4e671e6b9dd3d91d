"""The trials of a search, kept in `search.json`.

A trial trains without some of the training images and is measured on these, never on the test images. The values of
the best trial then make a new cell, which is trained on all training images with every seed: only that cell is tested.
A search that is repeated or interrupted continues from its file: the next values depend only on the trials so far and
the seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from icdctl import files
from icdctl.api import planning
from icdctl.errors import ArtifactError, IcdctlError, UsageError
from icdctl.grid import sampler
from icdctl.grid.cells import Grid, GridCell, GridRun
from icdctl.grid.search_space import Range, Space, Trial
from icdctl.grid.status import run_statuses
from icdctl.grid.sweeps import changed

SEARCH_FILE, LOCK_FILE = "search.json", ".lock"
_HASH = "sha256"
"""Key in `search.json` for the hash of the rest; files of earlier versions have none."""


class Search:
    """The search of one cell: its space, and the trials so far."""

    def __init__(self, grid: Grid, cell: GridCell, space: Space, *, seeds: Sequence[int], val_split: float) -> None:
        """
        Args:
            grid: the grid of the cell.
            cell: the cell whose settings are searched.
            space: from `parse_space`.
            seeds: each trial is trained with all of them.
            val_split: share of the training images to hold out and measure trials on, above 0 and below 1.

        Raises:
            UsageError: the share is outside its bounds, or earlier trials have another space, cell, seeds or settings.
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
            IcdctlError: all trials failed.
        """
        found = best_of(self.trials)
        if found is None:
            raise IcdctlError(
                f"all trials of `{self.cell.name}` failed", hint="the messages above say why; search other values"
            )
        return found

    @property
    def winner(self) -> GridCell:
        """The cell with the best values, to be trained on all its training images."""
        return winner_of(self.cell, self.best)

    def ask(self, number: int) -> list[dict[str, str]]:
        """Values to try next; fewer where a small space has no others.

        Raises:
            UsageError: optuna is not installed.
        """
        return sampler.next_values(self.space, self.trials, number, seed=self._seeds[0])

    def runs_of(self, several: Sequence[Mapping[str, str]]) -> Grid:
        """The runs of values to try, as a separate grid."""
        return trial_runs(self._grid, replace(self.cell, options=self._options), several, seeds=self._seeds)

    def note(self, several: Sequence[Mapping[str, str]], runs: Sequence[GridRun], failed: Sequence[str]) -> None:
        """Record the results of values that were tried.

        Args:
            several: the values, from `ask`.
            runs: their runs, from `runs_of`.
            failed: labels of the runs that failed.

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
        content = self.as_json()
        files.write_json(self.folder / SEARCH_FILE, {**content, _HASH: files.content_sha256(content)})

    def as_json(self) -> dict[str, object]:
        """The content of `search.json` without its hash."""
        trials = [
            {"values": dict(trial.values), "val_top1": None if trial.val_top1 is None else list(trial.val_top1)}
            for trial in self.trials
        ]
        return {"of": self._identity(), "trials": trials}

    def _identity(self) -> dict[str, object]:
        """The settings that all trials must have in common."""
        axes = {key: vars(axis) if isinstance(axis, Range) else list(axis) for key, axis in self.space.items()}
        return {"cell": self.cell.name, "options": _deciding(self._options), "seeds": list(self._seeds), "space": axes}

    def read(self) -> None:
        """Read the trials in the file again: another process may have added some.

        Raises:
            UsageError, ArtifactError: as when the search was made.
        """
        path = self.folder / SEARCH_FILE
        if not path.is_file():
            return
        of, trials = read_trials(self.folder)
        hint = _from_scratch(self.folder)
        if {**of, "options": _deciding(of.get("options"))} != self._identity():
            raise UsageError(
                f"`{path}` has trials of another space, seeds or options of `{self.cell.name}`",
                hint=f"search the same again, or {hint}",
            )
        self.trials = trials
        # Options of all runs, as `epochs` in the section `train`, are not in the cell, but in the runs of its trials.
        for earlier in run_statuses(self.runs_of([trial.values for trial in self.trials]).runs, planning.Planner()):
            if earlier.state == "stale":
                raise UsageError(
                    f"trials of `{self.cell.name}` can't be compared with new ones, "
                    f"they had other settings: {earlier.changes}",
                    hint=f"take the change back, or {hint}",
                )


def _deciding(options: object) -> dict[str, object]:
    """Options that trials must have in common: not the machine that they run on, nor where its data lie."""
    held = options if isinstance(options, Mapping) else {}
    return {key: value for key, value in held.items() if key not in ("data_dir", "device", "time_limit")}


def folder_of(grid: Grid, cell: GridCell) -> Path:
    """The folder in which the search of a cell keeps its trials."""
    return grid.folder / f"{cell.name}-search"


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The trial with the highest score, the earliest of equals; None where all failed."""
    found = max(trials, key=lambda trial: trial.score, default=None)
    return None if found is None or found.val_top1 is None else found


def winner_of(cell: GridCell, best: Trial) -> GridCell:
    """The cell with the best values, to be trained on all its training images."""
    return replace(changed(cell, best.values), name=f"{cell.name}-searched")


def trial_runs(grid: Grid, cell: GridCell, several: Sequence[Mapping[str, str]], *, seeds: Sequence[int]) -> Grid:
    """The runs of values to try, as a separate grid.

    Args:
        grid: the grid of the cell.
        cell: the cell, with the options that its trials have.
        several: values to try.
        seeds: the seeds of each trial.
    """
    cells = []
    for values in several:
        made = changed(cell, values)
        label = made.name.removeprefix(f"{cell.name}-")
        cells.append(replace(made, name=f"{folder_of(grid, cell).name}/{label}"))
    return replace(grid, cells=tuple(cells), seeds=tuple(seeds))


def read_trials(folder: Path) -> tuple[dict[str, object], list[Trial]]:
    """The content of a `search.json`: what its trials have in common, and the trials.

    Raises:
        ArtifactError: it is missing or broken, or has changed since a search wrote it.
    """
    path, hint = folder / SEARCH_FILE, _from_scratch(folder)
    held = files.read_json(path, what="search", hint=hint)
    if isinstance(held, dict) and held.get(_HASH) not in (None, files.content_sha256(held, without=(_HASH,))):
        raise ArtifactError(f"`{path}` has changed since a search wrote it", hint=f"restore it from a copy, or {hint}")
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
        raise ArtifactError(f"`{path}` is not a search of this version: {error}", hint=hint) from error


def _from_scratch(folder: Path) -> str:
    return f"delete `{folder}` to search from scratch"


def _validated(run: GridRun) -> float:
    """Top-1 of a run on the images that it held out."""
    value = run.metrics().get("final_val_top1")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArtifactError(
            f"`{run.folder}` has no accuracy on held-out images", hint=f"delete `{run.folder}`, and search again"
        )
    return float(value)
