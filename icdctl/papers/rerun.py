"""Rerunning a table of a paper: its teachers, the runs that are missing, then the verdicts on all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from icdctl import files
from icdctl.api import planning
from icdctl.config import sources
from icdctl.engine.observer import Observer
from icdctl.errors import UsageError
from icdctl.grid import Executor, Grid, GridObserver, GridResult, run_statuses, train_grid
from icdctl.grid.training import MOST_TOGETHER
from icdctl.papers import table_runs
from icdctl.papers.params_entries import changed_by
from icdctl.science import tables
from icdctl.science.verdicts import Compared, Judgement


class RerunObserver(GridObserver, Protocol):
    """Receives the progress of a table that is rerun."""

    def teachers(self) -> AbstractContextManager[Observer]:
        """An observer for the training of teachers, which comes before the grid's; its display ends with the block."""


@dataclass(frozen=True)
class Rerun:
    """The result of rerunning a table."""

    judgement: Judgement
    training: GridResult | None
    """The outcomes of the runs; None where none was to be trained."""
    files: tuple[Path, ...]
    """The written tables."""


@dataclass(frozen=True)
class Wanted:
    """The part of a table that is rerun."""

    table: str
    texts: Sequence[str] = ()
    """Only cells with one of these texts in their name; all cells where it is empty."""
    family: str | None = None
    """Defaults of the papers, `gamma2` or `gamma8`; None for both."""
    num_seeds: int = 5
    """Each cell is run with the seeds 0 to `num_seeds` - 1."""


def rerun_table(
    wanted: Wanted,
    *,
    observer: RerunObserver,
    options: Mapping[str, object] | None = None,
    trains: bool = True,
    executor: Executor | None = None,
    together: int = MOST_TOGETHER,
    replace: bool = False,
    time_limit: str | None = None,
    device: str | None = None,
    margin: float | None = None,
    epoch: Compared = "as published",
    out: Path | None = None,
) -> Rerun:
    """Train the missing runs of a table, judge all runs that are done, and write the tables.

    Args:
        wanted: the table, its cells and seeds.
        observer: receives the progress.
        options: options that hold for all runs, besides those of their cells.
        trains: whether missing runs are trained; otherwise only existing runs are judged.
        executor, together, replace, time_limit, device: see `icdctl.grid.train_grid`.
        margin: the difference that does not matter, in points of top-1; None for the table's.
        epoch: the epoch of our runs to compare with the published number.
        out: the folder of the written tables, by default `runs/reproduce/<table>` in the project.

    Raises:
        UsageError: there is no such table, family or cell, or no seed is wanted.
        IcdctlError: a teacher can't be trained, or the tables can't be written. Runs that fail are not raised: see
            `Rerun.training`.
    """
    table = tables.load(wanted.table)
    cells = table_runs.select(table, texts=wanted.texts, family=wanted.family)
    plain = table_runs.grid_of(cells, num_seeds=wanted.num_seeds, options=options or {})
    grid = table_runs.with_own_teachers(plain)
    for line in _warnings_of_changes(plain):
        observer.message(line)
    training = None
    if trains:
        with observer.teachers() as progress:
            table_runs.train_own_teachers(
                plain, replaces=replace, device=device, message=observer.message, observer=progress
            )
        training = train_grid(
            grid,
            executor=executor,
            together=together,
            replace=replace,
            time_limit=time_limit,
            device=device,
            observer=observer,
        )
    statuses = run_statuses(grid.runs, planning.Planner())
    for each in statuses:
        if each.state == "stale":
            observer.message(
                f"warning: {each.run.label} is left out, it was trained with other settings: {each.changes}"
            )
    judgement = table_runs.judge(table, cells, statuses, margin=margin, epoch=epoch)
    folder = out or files.project_root() / "runs" / "reproduce" / wanted.table
    return Rerun(judgement, training, tuple(table_runs.write(judgement, folder)))


def _warnings_of_changes(grid: Grid) -> list[str]:
    """A warning where the project's own options change cells of a table from the published ones."""
    train = sources.collect({}).given
    changed: dict[str, None] = {}
    num_changed = 0
    for cell in grid.cells if train else ():
        try:
            found = changed_by(train, cell)
        except UsageError:  # reported for each run, as the reason why it can't be trained
            continue
        changed.update(dict.fromkeys(found))
        num_changed += bool(found)
    if not changed:
        return []
    return [
        f"warning: `train` of params.yaml or `ICDCTL_` variables change {', '.join(changed)} in {num_changed} of "
        f"{len(grid.cells)} cells: these runs are not those of the table"
    ]
