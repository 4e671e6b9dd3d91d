"""Searching the settings of cells: trials on held-out training images, then the best values with every seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from icdctl import files
from icdctl.errors import UsageError
from icdctl.grid.cells import Grid
from icdctl.grid.grid_observer import GridObserver, SilentGridObserver
from icdctl.grid.packs import Outcome, done_before
from icdctl.grid.search_space import Space, searchable
from icdctl.grid.training import MOST_TOGETHER, GridResult, GridTraining
from icdctl.grid.trials import LOCK_FILE, Search


class SearchObserver(GridObserver, Protocol):
    """Receives the progress of a search, and of the training of its trials and best cells."""

    def searched(self, search: Search) -> None:
        """All trials of a cell are over, and the cell with the best values is trained."""


class SilentSearchObserver(SilentGridObserver):
    """An observer that shows nothing."""

    def searched(self, search: Search) -> None:
        """See `SearchObserver`."""


@dataclass(frozen=True)
class SearchResult:
    """The results of the searches of a grid."""

    searches: tuple[Search, ...]
    """Searches that are over, one for each cell; fewer where a time limit came first."""
    training: GridResult
    """The runs of the cells with the best values."""
    earlier: tuple[Outcome, ...]
    """Runs of these cells that were done before."""


def search_grid(
    grid: Grid,
    space: Space,
    *,
    trials: int = 20,
    num_seeds: int = 1,
    val_split: float = 0.1,
    together: int = MOST_TOGETHER,
    replace: bool = False,
    time_limit: str | float | None = None,
    device: str | None = None,
    observer: SearchObserver | None = None,
) -> SearchResult:
    """Search each cell's settings in this process, then train a cell with the best values with every seed.

    Call it again with the same arguments after any interruption, or with more trials: it continues from `search.json`.

    Args:
        grid: the cells; those without the settings that are searched are left out, with a message.
        space: the values to try, from `parse_space`.
        trials: number of trials of each cell in all.
        num_seeds: seeds of each trial, the first ones of the grid.
        val_split: share of the training images to hold out and measure trials on.
        together: largest number of runs in one process.
        replace: whether runs of other settings are trained again.
        time_limit: the limit for everything together: `90m`, or seconds.
        device: the device of all runs, in place of their own.
        observer: receives the progress.

    Raises:
        UsageError: the space fits no cell, the grid has too few seeds, or optuna is not installed.
        IcdctlError: all trials of a cell failed.
        Interrupted, KeyboardInterrupt: the user or the system interrupted the search; the states are saved.
    """
    if num_seeds > len(grid.seeds):
        raise UsageError(
            f"`--trial-seeds {num_seeds}`, and the grid has {len(grid.seeds)}", hint="give it more `seeds`"
        )
    seen: SearchObserver = SilentSearchObserver() if observer is None else observer
    wanted, left_out = searchable(grid, space)
    for line in left_out:
        seen.message(line)
    training = GridTraining(together=together, replace=replace, time_limit=time_limit, device=device, observer=seen)
    searches = [Search(wanted, cell, space, seeds=grid.seeds[:num_seeds], val_split=val_split) for cell in wanted.cells]
    return _run(wanted, searches, trials, together, training, seen)


def _run(
    grid: Grid, searches: Sequence[Search], trials: int, together: int, training: GridTraining, observer: SearchObserver
) -> SearchResult:
    """Run one search after another, each with the training of its best cell."""
    finished: list[Search] = []
    outcomes: list[Outcome] = []
    earlier: list[Outcome] = []
    num_before = 0
    for search in searches:
        if not _try_values(search, trials, together, training, observer):
            observer.message("the time limit came first: run the same command again to continue the search")
            break
        best = replace(grid, cells=(search.winner,))
        result = training.train(best)
        outcomes += result.outcomes
        num_before += result.num_before
        now = {each.label for each in result.outcomes}
        earlier += [done_before(run) for run in best.runs if run.label not in now]
        finished.append(search)
        observer.searched(search)
    return SearchResult(tuple(finished), GridResult(tuple(outcomes), num_before), tuple(earlier))


def _try_values(search: Search, trials: int, together: int, training: GridTraining, observer: SearchObserver) -> bool:
    """Run the trials, as many at a time as share a process; return False if the time ran out."""
    name = search.cell.name
    busy = f"another process searches `{name}`"
    with files.locked(search.folder / LOCK_FILE, busy=busy, hint="wait for it", waiting=observer.message):
        search.read()
        while len(search.trials) < trials:
            asked = search.ask(min(together, trials - len(search.trials)))
            if not asked:
                observer.message(f"`{name}`: all values of the space were tried")
                break
            wanted = search.runs_of(asked)
            result = training.train(wanted, is_tested=False)
            if result.is_stopped:
                return False
            search.note(asked, wanted.runs, [each.label for each in result.failed])
            best = search.best
            values = ", ".join(f"{key} {value}" for key, value in best.values.items())
            observer.message(f"`{name}`: {len(search.trials)} trials, best {best.score:.2f} with {values}")
    return True
