"""What `grid run` and `reproduce` share: options, the display of packs at work, and the printed result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from icdctl.commands import console

if TYPE_CHECKING:
    from icdctl.grid import Executor, GridPlan, GridResult, Outcome, Pack
    from icdctl.grid.progress import GridProgress

Jobs = Annotated[
    int | None,
    typer.Option(
        help="Train in this many processes at once.", show_default="this process, or one for each of `--gpus`", min=1
    ),
]
Gpus = Annotated[
    str | None,
    typer.Option(
        metavar="0,1",
        help="Train on the GPUs with these numbers, with one process at a time on each.",
        show_default=False,
    ),
]
Together = Annotated[
    int, typer.Option(help="Train at most this many students together in one process, on one teacher.", min=1)
]
Replace = Annotated[
    bool,
    typer.Option(
        "--replace",
        help="Train again where a run folder holds other settings; the old folder is moved to `runs/.replaced`.",
    ),
]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        metavar="90m",
        help="Stop after this time (`90m`, `1h30m`), save all states and exit with 0; the same command continues.",
    ),
]


def make_executor(jobs: int | None, gpus: str | None) -> Executor:
    """The executor for `--jobs` and `--gpus`: this process where neither is given.

    Raises:
        UsageError: the GPUs are not a list.
    """
    from icdctl import grid

    if is_here(jobs, gpus):
        return grid.Here()
    return grid.Subprocesses(jobs=jobs, gpus=gpus)


def is_here(jobs: int | None, gpus: str | None) -> bool:
    """Whether `--jobs` and `--gpus` leave the training in this process."""
    return gpus is None and jobs in (None, 1)


class GridDisplay:
    """Prints a line for each event of a grid, and on a terminal a table of the packs at work."""

    def __init__(self) -> None:
        self._progress: GridProgress | None = None
        self._shown = ExitStack()

    def start(self, plan: GridPlan) -> None:
        """See `icdctl.grid.grid_observer.GridObserver`."""
        from icdctl.grid.progress import COLUMNS, GridProgress

        self._progress = GridProgress(plan)
        console.talk(_announcement(plan))
        for outcome in plan.refused:
            console.talk(_line(outcome))
        self._shown.enter_context(console.live_table(COLUMNS, self._progress.state))

    def begun(self, pack: Pack, place: str) -> None:
        """See `icdctl.grid.grid_observer.PackObserver`."""
        if self._progress is not None:
            self._progress.begin(pack, place)
        console.talk(f"{pack.label}: begun" + (f" on {place}" if place else ""))

    def doing(self, pack: Pack, what: str) -> None:
        """See `icdctl.grid.grid_observer.PackObserver`."""
        if self._progress is not None:
            self._progress.doing(pack, what)

    def message(self, text: str) -> None:
        """See `icdctl.grid.grid_observer.PackObserver`."""
        console.talk(text)

    def ended(self, pack: Pack, outcomes: Sequence[Outcome]) -> None:
        """See `icdctl.grid.grid_observer.GridObserver`."""
        for outcome in outcomes:
            console.talk(_line(outcome))
        if self._progress is not None:
            self._progress.end(pack, outcomes)
            console.talk(self._progress.counts)

    def stop(self) -> None:
        """See `icdctl.grid.grid_observer.GridObserver`."""
        self._shown.close()


def _announcement(plan: GridPlan) -> str:
    """The line that says what is to be trained, and how long that may take."""
    from icdctl.grid.progress import duration

    text = f"{plan.num_to_train} of {plan.num_runs} runs to train, {plan.num_done} done before"
    if plan.refused:
        text += f", {len(plan.refused)} can't be trained"
    if plan.packs:
        text += f"; in {_number(len(plan.packs), 'pack')} on {_number(plan.num_slots, 'slot')}"
    if plan.seconds is not None:
        more = ", and more for cells without a forecast" if plan.forecast_is_partial else ""
        text += f", about {duration(plan.seconds)}{more}"
    return text


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _line(outcome: Outcome) -> str:
    """An outcome as one line."""
    top1 = "" if outcome.top1 is None else f", top-1 {outcome.top1:.2f}"
    message = f": {outcome.message.splitlines()[0]}" if outcome.message else ""
    return f"{outcome.label}: {outcome.state}{top1}{message}"


def report(result: GridResult, as_json: bool, *, earlier: Sequence[Outcome] = ()) -> None:
    """Print what became of the runs.

    Args:
        result: from `train_grid`.
        as_json: print one object.
        earlier: runs that were done before and that the table shows too.

    Raises:
        IcdctlError: some runs failed.
    """
    if as_json and not result.failed:
        console.show_json({"runs": [each.as_json() for each in result.outcomes], "already_done": result.num_before})
    elif not as_json:
        rows = [
            [each.label, each.state, "" if each.top1 is None else f"{each.top1:.2f}"]
            for each in (*earlier, *result.outcomes)
        ]
        if rows:
            console.show_table(["run", "state", "top-1"], rows)
    if result.is_stopped:
        console.talk("the time limit stopped some runs: run the same command again to continue them")
    if result.failed:
        raise result.error()
