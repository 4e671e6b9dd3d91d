"""How far the searches of a grid's cells are: what `grid status` shows of `grid run --search`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icdctl import files
from icdctl.api import planning
from icdctl.errors import IcdctlError
from icdctl.grid.cells import Grid, GridCell
from icdctl.grid.forecast import CellOutlook, outlook
from icdctl.grid.search import (
    LOCK_FILE,
    SEARCH_FILE,
    Trial,
    best_of,
    folder_of,
    read_trials,
    trial_runs,
    winner_of,
)
from icdctl.grid.status import standings


@dataclass(frozen=True)
class SearchOutlook:
    """A search, and the cell that its best values make."""

    cell: str
    folder: Path
    trials: tuple[Trial, ...]
    """Those that are over."""
    running: tuple[str, ...]
    """Folders of those that a process is at, or waits to note."""
    begun: tuple[str, ...]
    """The same, where no process is at the search any more: the same command goes on with them."""
    winner: CellOutlook | None
    """None before the first trial that got through."""
    note: str
    """Why it can't go on, or why its trials can't be read."""

    @property
    def num_failed(self) -> int:
        """Trials that did not get through."""
        return sum(trial.val_top1 is None for trial in self.trials)

    @property
    def best(self) -> Trial | None:
        """On held-out training images."""
        return best_of(self.trials)

    def as_json(self) -> dict[str, Any]:
        """A line of `icdctl grid status --json`."""
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


def searches(grid: Grid) -> list[SearchOutlook]:
    """The searches of those cells that were ever searched."""
    found = (_of_cell(grid, cell) for cell in grid.cells if folder_of(grid, cell).is_dir())
    return [search for search in found if search is not None]


def _of_cell(grid: Grid, cell: GridCell) -> SearchOutlook | None:
    folder = folder_of(grid, cell)
    of: dict[str, Any] = {}
    trials: list[Trial] = []
    note = ""
    is_kept, is_searching = (folder / SEARCH_FILE).is_file(), files.is_locked(folder / LOCK_FILE)
    if is_kept:
        try:
            of, trials = read_trials(folder)
        except IcdctlError as error:
            note = error.message
    stated, options = of.get("seeds"), of.get("options")
    seeds = [seed for seed in stated if isinstance(seed, int)] if isinstance(stated, list) else []
    held_out = {key: options[key] for key in ("val_split",) if isinstance(options, dict) and key in options}
    runs = trial_runs(
        grid, replace(cell, options={**cell.options, **held_out}), [trial.values for trial in trials], seeds=seeds
    )
    others = _others(folder, {each.name.rpartition("/")[2] for each in runs.cells})
    if not (is_kept or is_searching or others):
        return None
    changes = [each.changes for each in standings(runs.runs, planning.Planner()) if each.state == "stale"]
    if changes:
        note = f"its trials had other settings: {changes[0]}"
    best = best_of(trials)
    winner = None
    if best is not None:
        (winner,) = outlook(replace(grid, cells=(winner_of(cell, best),)))
    return SearchOutlook(
        cell.name,
        folder,
        tuple(trials),
        running=others if is_searching else (),
        begun=() if is_searching else others,
        winner=winner,
        note=note,
    )


def _others(folder: Path, noted: Collection[str]) -> tuple[str, ...]:
    """Trials that have begun, and are not noted."""
    found = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in noted)
    return tuple(path.name for path in found if any((run / "config.json").is_file() for run in path.glob("s*")))
