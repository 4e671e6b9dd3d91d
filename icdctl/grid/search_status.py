"""The status of the searches of a grid's cells: what `grid status` shows of `grid run --search`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from icdctl import files
from icdctl.api import planning
from icdctl.errors import IcdctlError
from icdctl.grid.cells import Grid, GridCell
from icdctl.grid.forecast import CellForecast, forecast_cells
from icdctl.grid.search_space import Trial
from icdctl.grid.status import run_statuses
from icdctl.grid.trials import (
    LOCK_FILE,
    SEARCH_FILE,
    best_of,
    folder_of,
    read_trials,
    trial_runs,
    winner_of,
)


@dataclass(frozen=True)
class SearchStatus:
    """A search, and the cell that its best values make."""

    cell: str
    folder: Path
    trials: tuple[Trial, ...]
    """Trials that are over."""
    running: tuple[str, ...]
    """Folders of trials that a process is training, or is about to note."""
    begun: tuple[str, ...]
    """Folders of trials that were interrupted; the same command continues them."""
    winner: CellForecast | None
    """The cell with the best values; None before the first trial that succeeded."""
    note: str
    """Why the search can't continue, or why its trials can't be read."""

    @property
    def num_failed(self) -> int:
        """Number of trials that failed."""
        return sum(trial.val_top1 is None for trial in self.trials)

    @property
    def best(self) -> Trial | None:
        """The best trial on held-out training images."""
        return best_of(self.trials)

    def as_json(self) -> dict[str, object]:
        """An entry of `icdctl grid status --json`."""
        trials = [
            {
                "values": dict(trial.values),
                "state": "failed" if trial.val_top1 is None else "done",
                "val_top1": None if trial.val_top1 is None else trial.score,
            }
            for trial in self.trials
        ]
        best = self.best
        return {
            "cell": self.cell,
            "folder": str(self.folder),
            "done": len(self.trials) - self.num_failed,
            "failed": self.num_failed,
            "running": list(self.running),
            "begun": list(self.begun),
            "best": None if best is None else {"values": dict(best.values), "val_top1": best.score},
            "searched": None if self.winner is None else self.winner.as_json(),
            "trials": trials,
            "note": self.note,
        }


def search_statuses(grid: Grid) -> list[SearchStatus]:
    """The searches of all cells that have been searched."""
    found = (_of_cell(grid, cell) for cell in grid.cells if folder_of(grid, cell).is_dir())
    return [search for search in found if search is not None]


def _of_cell(grid: Grid, cell: GridCell) -> SearchStatus | None:
    folder = folder_of(grid, cell)
    of: dict[str, object] = {}
    trials: list[Trial] = []
    note = ""
    is_kept, is_searching = (folder / SEARCH_FILE).is_file(), files.is_locked(folder / LOCK_FILE)
    if is_kept:
        try:
            of, trials = read_trials(folder)
        except IcdctlError as error:
            note = error.message
    runs = _runs(grid, cell, of, trials)
    others = _others(folder, {each.name.rpartition("/")[2] for each in runs.cells})
    if not (is_kept or is_searching or others):
        return None
    changes = [each.changes for each in run_statuses(runs.runs, planning.Planner()) if each.state == "stale"]
    if changes:
        note = f"its trials had other settings: {changes[0]}"
    best = best_of(trials)
    winner = None
    if best is not None:
        (winner,) = forecast_cells(replace(grid, cells=(winner_of(cell, best),)))
    return SearchStatus(
        cell.name,
        folder,
        tuple(trials),
        running=others if is_searching else (),
        begun=() if is_searching else others,
        winner=winner,
        note=note,
    )


def _runs(grid: Grid, cell: GridCell, of: dict[str, object], trials: list[Trial]) -> Grid:
    """The runs of the trials that are noted, with the seeds and the share of held-out images that the file states."""
    seeds, options = of.get("seeds"), of.get("options")
    held_out = {key: options[key] for key in ("val_split",) if isinstance(options, dict) and key in options}
    return trial_runs(
        grid,
        replace(cell, options={**cell.options, **held_out}),
        [trial.values for trial in trials],
        seeds=[seed for seed in seeds if isinstance(seed, int)] if isinstance(seeds, list) else [],
    )


def _others(folder: Path, noted: Collection[str]) -> tuple[str, ...]:
    """Folders of trials that have begun, and are not noted."""
    found = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in noted)
    return tuple(path.name for path in found if any((run / "config.json").is_file() for run in path.glob("s*")))
