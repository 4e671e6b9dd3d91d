"""What `grid run` and `reproduce` share: train the runs that are missing, here or in processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icdctl import console, files
from icdctl.commands.training import observed
from icdctl.errors import IcdctlError, UsageError, combine

if TYPE_CHECKING:
    from icdctl.grid.cells import Grid
    from icdctl.grid.execute import Outcome

Jobs = Annotated[int, typer.Option(help="Processes at a time.")]
Gpus = Annotated[str | None, typer.Option(metavar="0,1", help="A process on each of these.", show_default=False)]
Together = Annotated[int, typer.Option(help="Most students in one process, on one teacher.")]
Only = Annotated[list[str] | None, typer.Option(hidden=True)]
Outcomes = Annotated[Path | None, typer.Option(hidden=True)]


@dataclass(frozen=True)
class Slots:
    """How much is trained at a time."""

    jobs: int
    gpus: str | None
    together: int

    @property
    def names(self) -> list[str | None]:
        """What `CUDA_VISIBLE_DEVICES` is in each process; None leaves it alone."""
        return [*self.gpus.split(",")] if self.gpus else [None] * self.jobs

    @property
    def is_here(self) -> bool:
        """Whether this process trains by itself."""
        return self.gpus is None and self.jobs == 1


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
        told = [IcdctlError(f"`{each.label}`: {each.message}", hint=each.hint or "see above") for each in self.failed]
        return combine(told)


def flags(**given: str | int | None) -> list[str]:
    """Options as arguments, those that were given."""
    stated = {f"--{key.replace('_', '-')}": str(value) for key, value in given.items() if value is not None}
    return [part for pair in stated.items() for part in pair]


def train_missing(
    grid: Grid, *, again: Sequence[str], slots: Slots, only: Sequence[str] | None, outcomes: Path | None
) -> Done:
    """Train every run of a grid that is not done.

    Args:
        grid: the runs.
        again: the command that shows another process the same grid.
        slots: how much at a time.
        only: labels of runs, for such a process.
        outcomes: where such a process writes what became of them; who asked for it then writes the log.

    Raises:
        UsageError: no process may run, or none may have a student.
    """
    from icdctl.grid import execute

    if slots.jobs < 1 or slots.together < 1:
        raise UsageError("`--jobs` and `--together` are 1 or more", hint="leave them out for the usual")
    runs = [run for run in grid.runs if not only or run.label in only]
    left = [run for run in runs if run.state != "done"]
    packs, found = execute.packed(left, most=slots.together)
    if slots.is_here:
        for pack in packs:
            with observed(pack.label) as observer:
                found += execute.train_here(pack, observer=observer)
            if outcomes is None:
                execute.write_log(grid.folder, found[-len(pack.runs) :])
    else:
        child = [*again, "--together", str(slots.together)]
        for outcome in execute.train_in_slots(packs, slots=slots.names, command=child, tell=console.talk):
            found.append(outcome)
            execute.write_log(grid.folder, [outcome])
            console.talk(f"{outcome.label}: {outcome.state}")
    if outcomes is not None:
        files.write_json(outcomes, [outcome.as_json() for outcome in found])
    return Done(tuple(found), len(runs) - len(left))


def report(done: Done, as_json: bool) -> None:
    """Print what was done.

    Raises:
        IcdctlError: some runs failed.
    """
    if as_json and not done.failed:
        console.show_json({"runs": [each.as_json() for each in done.outcomes], "already_done": done.num_before})
    elif not as_json:
        rows = [[each.label, each.state, "" if each.top1 is None else f"{each.top1:.2f}"] for each in done.outcomes]
        if rows:
            console.show_table(["run", "state", "top-1"], rows)
        console.talk(f"{done.num_before} runs were done already")
    if done.failed:
        raise done.error()
