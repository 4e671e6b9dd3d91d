"""What `grid run` and `reproduce` share: train the runs that are missing, here or in processes of their own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icdctl import files
from icdctl.commands import console
from icdctl.errors import IcdctlError, UsageError, combine

if TYPE_CHECKING:
    from icdctl.grid.cells import Grid
    from icdctl.grid.execute import Outcome, Pack
    from icdctl.grid.progress import Board
    from icdctl.grid.status import Standing

Jobs = Annotated[
    int | None, typer.Option(help="Processes at a time.", show_default="1, or one for each of `--gpus`", min=1)
]
Gpus = Annotated[str | None, typer.Option(metavar="0,1", help="A process on each of these.", show_default=False)]
Together = Annotated[int, typer.Option(help="Most students in one process, on one teacher.", min=1)]
Replace = Annotated[
    bool,
    typer.Option(
        "--replace", help="Train again what was trained with other settings; the old folders go to `runs/.replaced`."
    ),
]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        metavar="90m", help="Of the whole command: stop in time, save, and leave with 0; the same command goes on."
    ),
]
Only = Annotated[list[str] | None, typer.Option(hidden=True)]
Outcomes = Annotated[Path | None, typer.Option(hidden=True)]


@dataclass(frozen=True)
class Slots:
    """How much is trained at a time."""

    jobs: int | None
    gpus: str | None
    together: int

    @property
    def names(self) -> list[str | None]:
        """What `CUDA_VISIBLE_DEVICES` is in each process; None leaves it alone.

        Raises:
            UsageError: a name is empty.
        """
        if self.gpus is None:
            return [None] * (self.jobs or 1)
        gpus = [name.strip() for name in self.gpus.split(",")]
        if "" in gpus:
            raise UsageError(f"GPUs `{self.gpus}` are no list", hint="e.g. `--gpus 0,1`")
        number = self.jobs or len(gpus)
        return [gpus[index % len(gpus)] for index in range(number)]

    @property
    def is_here(self) -> bool:
        """Whether this process trains by itself."""
        return self.gpus is None and self.jobs in (None, 1)


@dataclass(frozen=True)
class Done:
    """What became of the runs of a grid."""

    outcomes: tuple[Outcome, ...]
    """Of those that were trained now, or failed."""
    num_before: int
    """Done before."""

    @property
    def failed(self) -> list[Outcome]:
        """Those that did not get through."""
        return [outcome for outcome in self.outcomes if outcome.state == "failed"]

    def error(self) -> IcdctlError:
        """All failures together."""
        labels: dict[tuple[str, str], list[str]] = {}
        for each in self.failed:
            labels.setdefault((each.message, each.hint or "see above"), []).append(each.label)
        told = [
            IcdctlError(f"`{names[0]}`{f' and {len(names) - 1} more' if names[1:] else ''}: {message}", hint=hint)
            for (message, hint), names in labels.items()
        ]
        return combine(told)


def flags(**given: str | int | None) -> list[str]:
    """Options as arguments, those that were given."""
    stated = {f"--{key.replace('_', '-')}": str(value) for key, value in given.items() if value is not None}
    return [part for pair in stated.items() for part in pair]


@contextmanager
def same_command_goes_on() -> Iterator[None]:
    """Where a run within is interrupted, the hint is the command that was typed, not that of the run alone."""
    from icdctl.engine.run import Interrupted

    try:
        yield
    except Interrupted as error:
        told = Interrupted(error.message, hint="run the same command again: it goes on from there")
        told.exit_code = error.exit_code
        raise told from error


def train_missing(
    grid: Grid,
    *,
    again: Sequence[str],
    slots: Slots,
    replace: bool,
    time_limit: str | None,
    device: str | None,
    only: Sequence[str] | None = None,
    outcomes: Path | None = None,
    is_tested: bool = True,
) -> Done:
    """Train every run of a grid that is not done.

    Args:
        grid: the runs.
        again: the command that shows another process the same grid.
        slots: how much at a time.
        replace: whether runs of other settings are trained again; they fail otherwise.
        time_limit: of all together.
        device: of all of them, in place of their own.
        only: labels of runs, for such a process.
        outcomes: where such a process writes what became of them; who asked for it then tells and logs it.
        is_tested: whether accuracies on the test images are told and logged; not those of trials, which must not be
            chosen by them.

    Raises:
        UsageError: the GPUs are no list, the time limit no duration, or there is no such device.
        Interrupted: by a person or the system; the states are saved.
    """
    from icdctl.api import planning
    from icdctl.grid import execute
    from icdctl.grid.status import standings

    names = slots.names
    limit = execute.seconds_of(time_limit, device)
    planner = planning.Planner()
    grid = grid.given({} if device is None else {"device": device})
    states = standings([run for run in grid.runs if not only or run.label in only], planner)
    left = [each for each in states if each.state != "done" and (replace or each.state != "stale")]
    packs, found = execute.packed(
        [each.run for each in left], most=slots.together, num_slots=len(names), planner=planner
    )
    if not replace:
        found = [execute.stale_outcome(each) for each in states if each.state == "stale"] + found
    is_child = outcomes is not None
    num_before = sum(each.state == "done" for each in states)
    counts = (len(states) - num_before, num_before)
    training = _Training(grid, counts, slots, limit, replace=replace, is_child=is_child, is_tested=is_tested)
    training.board.count(found)
    if is_child:  # done by another process since this one was asked for them
        found += [execute.done_before(each.run) for each in states if each.state == "done"]
    else:
        _announce(grid, states, packs, names)
        execute.write_log(grid.folder, found)
        for outcome in found:
            console.talk(_line(outcome))
    with same_command_goes_on():
        found += training.train(packs, again)
    if outcomes is not None:
        files.write_json(outcomes, [outcome.as_json() for outcome in found])
    return Done(tuple(found), num_before)


def _announce(grid: Grid, states: Sequence[Standing], packs: Sequence[Pack], names: Sequence[str | None]) -> None:
    """What is about to be done, and how long that may take."""
    from icdctl.grid.forecast import outlook
    from icdctl.grid.progress import duration

    num_runs = sum(len(pack.runs) for pack in packs)
    num_before = sum(each.state == "done" for each in states)
    told = f"{num_runs} of {len(states)} runs to train, {num_before} done before"
    num_refused = len(states) - num_before - num_runs
    if num_refused:
        told += f", {num_refused} can't be trained"
    if packs:
        told += f"; in {_number(len(packs), 'pack')} on {_number(len(names), 'slot')}"
        hours = [row.hours_left for row in outlook(grid, known=states)]
        known = sum(each for each in hours if each is not None)
        if known:
            more = "" if None not in hours else " and what nothing is known of"
            told += f", about {duration(3600 * known / min(len(names), len(packs)))}{more}"
    console.talk(told)


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _line(outcome: Outcome) -> str:
    """An outcome for a person."""
    top1 = "" if outcome.top1 is None else f", top-1 {outcome.top1:.2f}"
    message = f": {outcome.message.splitlines()[0]}" if outcome.message else ""
    return f"{outcome.label}: {outcome.state}{top1}{message}"


class _Seen:
    """Shows on the board what the pack that is trained in this process does."""

    def __init__(self, board: Board, pack: Pack) -> None:
        self.board, self._pack = board, pack
        self._what, self._total, self._here = "", 0, 0

    def begin(self, what: str, total: int) -> None:
        """See `icdctl.engine.observer.Observer`."""
        self._what, self._total, self._here = what, total, 0
        self.advance(0)

    def advance(self, images: int) -> None:
        """See `icdctl.engine.observer.Observer`."""
        self._here += images
        share = f" {100 * self._here / self._total:.0f} %" if self._total else ""
        self.board.doing(self._pack, f"{self._what}{share}")

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        """See `icdctl.engine.observer.Observer`; the board reads it in the run folder."""

    def message(self, text: str) -> None:
        """See `icdctl.engine.observer.Observer`."""
        console.talk(text)


class _Training:
    """Trains packs, and shows and logs how that goes."""

    def __init__(
        self,
        grid: Grid,
        counts: tuple[int, int],
        slots: Slots,
        limit: float | None,
        *,
        replace: bool,
        is_child: bool,
        is_tested: bool,
    ) -> None:
        """
        Args:
            grid: the runs.
            counts: of those to train, and of those done before.
            slots: how much at a time.
            limit: of all together, in seconds.
            replace: whether runs of other settings are moved out of the way.
            is_child: whether another process asked for it, and tells and logs what becomes of it.
            is_tested: whether accuracies on the test images are told and logged.
        """
        from icdctl.grid.progress import Board

        self._folder, self._slots, self._limit = grid.folder, slots, limit
        self._replace, self._is_child, self._is_tested = replace, is_child, is_tested
        self.board = Board(*counts)
        self._started = time.monotonic()
        self._is_over = False
        """A pack has found that its next epoch would not fit."""

    def train(self, packs: Sequence[Pack], again: Sequence[str]) -> list[Outcome]:
        """Pack after pack, or many at a time: what became of their runs."""
        from icdctl.grid.progress import COLUMNS

        found: list[Outcome] = []
        try:
            with console.live_table(COLUMNS, self.board.state):
                if self._slots.is_here:
                    for pack in packs:
                        found += self._end(pack, self._here(pack))
                else:
                    with closing(self._in_slots(packs, again)) as trained:
                        for pack, outcomes in trained:
                            found += self._end(pack, outcomes)
        except (KeyboardInterrupt, IcdctlError):
            self._log_interrupted()
            raise
        return found

    def _log_interrupted(self) -> None:
        from icdctl.grid import execute

        runs = [run for pack in self.board.at_work for run in pack.runs]
        if not self._is_child:
            stopped = [execute.Outcome(run.label, "stopped", message="interrupted") for run in runs]
            execute.write_log(self._folder, stopped)

    def _here(self, pack: Pack) -> list[Outcome]:
        from icdctl.grid import execute

        left = self._time_left()
        if left is not None and left <= 0:
            return execute.not_begun(pack)
        self._begin(pack, None)
        return execute.train_here(
            pack,
            root=self._folder,
            left=self._time_left,
            replace=self._replace,
            observer=_Seen(self.board, pack),
            tell=console.talk,
        )

    def _in_slots(
        self, packs: Sequence[Pack], again: Sequence[str]
    ) -> Generator[tuple[Pack, list[Outcome]], None, None]:
        from icdctl.grid import execute

        def command() -> list[str] | None:
            left = self._time_left()
            if left is not None and left <= 0:
                return None
            limit = None if left is None else execute.as_time_limit(left)
            given = flags(together=self._slots.together, time_limit=limit)
            return [*again, *given, *(["--replace"] if self._replace else [])]

        return execute.train_in_slots(
            packs, slots=self._slots.names, command=command, tell=console.talk, on_begin=self._begin
        )

    def _time_left(self) -> float | None:
        """Seconds; None where there is no limit."""
        if self._limit is None:
            return None
        return 0.0 if self._is_over else self._limit - (time.monotonic() - self._started)

    def _begin(self, pack: Pack, slot: str | None) -> None:
        from icdctl.grid import execute

        place = "" if slot is None else f"GPU {slot}"
        self.board.begin(pack, place)
        if not self._is_child:
            console.talk(f"{pack.label}: begun" + (f" on {place}" if place else ""))
            execute.write_log(self._folder, [execute.Outcome(run.label, "begun") for run in pack.runs])

    def _end(self, pack: Pack, outcomes: list[Outcome]) -> list[Outcome]:
        from icdctl.grid import execute

        if not self._is_tested:
            outcomes = [dataclasses.replace(outcome, top1=None) for outcome in outcomes]
        self.board.end(pack, outcomes)
        self._is_over |= any(outcome.state == "stopped" for outcome in outcomes)
        if not self._is_child:
            execute.write_log(self._folder, outcomes)
            for outcome in outcomes:
                console.talk(_line(outcome))
            console.talk(self.board.counts)
        return outcomes


def report(done: Done, as_json: bool, *, earlier: Sequence[Outcome] = ()) -> None:
    """Print what was done.

    Args:
        done: what became of the runs.
        as_json: print one object.
        earlier: of runs done before, those that a table shows too.

    Raises:
        IcdctlError: some runs failed.
    """
    if as_json and not done.failed:
        console.show_json({"runs": [each.as_json() for each in done.outcomes], "already_done": done.num_before})
    elif not as_json:
        rows = [
            [each.label, each.state, "" if each.top1 is None else f"{each.top1:.2f}"]
            for each in (*earlier, *done.outcomes)
        ]
        if rows:
            console.show_table(["run", "state", "top-1"], rows)
    if any(each.state == "stopped" for each in done.outcomes):
        console.talk("the time limit stopped some runs: run the same command again, and they go on")
    if done.failed:
        raise done.error()
