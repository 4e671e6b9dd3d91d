"""`icdctl grid run --search optuna`: trials on held-out images, then the best values with every seed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from icdctl import files
from icdctl.commands import console, many
from icdctl.errors import UsageError

if TYPE_CHECKING:
    from icdctl.grid.cells import Grid
    from icdctl.grid.execute import Outcome
    from icdctl.grid.search import Search


def run_search(
    name: str,
    grid: Grid,
    sweeps: Sequence[str],
    *,
    slots: many.Slots,
    replace: bool,
    time_limit: str | None,
    device: str | None,
    trials: int,
    num_seeds: int,
    val_split: float,
    as_json: bool,
) -> None:
    """Search each cell's settings, then train the cell with the best ones.

    Args:
        name: `optuna`.
        grid: the cells.
        sweeps: what is searched, as typed.
        slots: how much at a time.
        replace: whether runs of other settings are trained again.
        time_limit: of all together.
        device: of all runs.
        trials: of each cell, in all.
        num_seeds: of each trial: the first of the grid's.
        val_split: share of the training images that trials are judged on.
        as_json: print one object.

    Raises:
        UsageError: another name, a space that can't be, or slots in other processes.
        IcdctlError: no trial got through, or a run of the best values did not.
    """
    from icdctl.grid.execute import as_time_limit, done_before, seconds_of
    from icdctl.grid.search import Search, parse_space, searchable

    if name != "optuna":
        raise UsageError(f"unknown search `{name}`", hint="choose `--search optuna`")
    if not slots.is_here:
        raise UsageError("a search trains its trials in this process", hint="leave out `--jobs` and `--gpus`")
    if num_seeds > len(grid.seeds):
        raise UsageError(
            f"`--trial-seeds {num_seeds}`, and the grid has {len(grid.seeds)}", hint="give it more `seeds`"
        )
    space = parse_space(sweeps)
    grid, left_out = searchable(grid, space)
    for line in left_out:
        console.talk(line)
    started, limit = time.monotonic(), seconds_of(time_limit, device)

    def train(wanted: Grid, is_tested: bool) -> many.Done:
        left = None if limit is None else as_time_limit(limit - (time.monotonic() - started))
        return many.train_missing(
            wanted,
            again=(),
            slots=slots,
            replace=replace,
            time_limit=left,
            device=device,
            is_tested=is_tested,
        )

    seeds = grid.seeds[:num_seeds]
    searches = [Search(grid, cell, space, seeds=seeds, val_split=val_split) for cell in grid.cells]
    told: dict[str, Any] = {}
    outcomes: list[Outcome] = []
    earlier: list[Outcome] = []
    num_before = 0
    for search in searches:
        if not _try(search, trials, slots.together, train):
            console.talk("the time limit came first: run the same command again, and the search goes on")
            break
        wanted = dataclasses.replace(grid, cells=(search.winner,))
        done = train(wanted, True)
        outcomes += done.outcomes
        num_before += done.num_before
        now = {each.label for each in done.outcomes}
        earlier += [done_before(run) for run in wanted.runs if run.label not in now]
        told[search.cell.name] = {**search.as_json(), "best": dict(search.best.values), "cell": search.winner.name}
        if not as_json:
            _show(search)
    done = many.Done(tuple(outcomes), num_before)
    if as_json and not done.failed:
        runs = [each.as_json() for each in done.outcomes]
        console.show_json({"searched": told, "runs": runs, "already_done": num_before})
    else:
        many.report(done, as_json, earlier=earlier)


def _try(search: Search, trials: int, together: int, train: Callable[[Grid, bool], many.Done]) -> bool:
    """Trial after trial, as many at a time as share a process; False where time ran out."""
    from icdctl.grid.search import LOCK_FILE

    busy = f"another process searches `{search.cell.name}`"
    with files.locked(search.folder / LOCK_FILE, busy=busy, hint="wait for it", waiting=console.talk):
        search.read()
        while len(search.trials) < trials:
            asked = search.ask(min(together, trials - len(search.trials)))
            if not asked:
                console.talk(f"`{search.cell.name}`: all values of the space were tried")
                break
            wanted = search.runs_of(asked)
            done = train(wanted, False)
            if any(each.state == "stopped" for each in done.outcomes):
                return False
            search.tell(asked, wanted.runs, [each.label for each in done.failed])
            best = search.best
            values = ", ".join(f"{key} {value}" for key, value in best.values.items())
            console.talk(f"`{search.cell.name}`: {len(search.trials)} trials, best {best.score:.2f} with {values}")
    return True


def _show(search: Search) -> None:
    """All trials, the best first."""
    keys = list(search.space)
    rows = [
        [place, *(trial.values[key] for key in keys), "failed" if trial.val_top1 is None else f"{trial.score:.2f}"]
        for place, trial in sorted(enumerate(search.trials), key=lambda item: -item[1].score)
    ]
    console.show_line(f"{search.cell.name}: top-1 on held-out training images")
    console.show_table(["trial", *keys, "held-out top-1"], rows)
    console.show_line(f"\n{search.winner.name}: the best values, on all training images")
