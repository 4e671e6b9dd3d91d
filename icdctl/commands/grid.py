"""`icdctl grid`: the cells of params.yaml, all their seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icdctl import console, files
from icdctl.commands import options
from icdctl.commands.training import observed
from icdctl.errors import IcdctlError, UsageError, combine

if TYPE_CHECKING:
    from icdctl.grid.cells import Grid, GridRun
    from icdctl.grid.execute import Outcome

app = typer.Typer(help="Train the cells of params.yaml with all their seeds.", no_args_is_help=True)

Cells = Annotated[list[str] | None, typer.Argument(metavar="[CELL]...", help="All by default.", show_default=False)]
Seeds = Annotated[str | None, typer.Option(metavar="0-4", help="In place of those in params.yaml.", show_default=False)]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=1,2,4", help="Each cell once for each value of a setting of its method; may be repeated."
    ),
]


@app.command("plan")
def plan(
    cells: Cells = None,
    seeds: Seeds = None,
    sweep: Sweep = None,
    bench: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `icdctl bench --json` printed, to tell hours.", show_default=False),
    ] = None,
    delta: Annotated[float, typer.Option(help="Difference of two methods that should be seen, in points.")] = 0.3,
    spread: Annotated[float, typer.Option("--sd", help="Standard deviation of a cell over seeds, in points.")] = 0.25,
    as_json: options.Json = False,
) -> None:
    """Show what there is to train, how long it may take, and how many seeds a comparison needs.

    Example: icdctl grid plan --delta 0.3
    """
    from icdctl.grid.outlook import outlook
    from icdctl.science.compare import seeds_needed

    grid = _grid(cells, seeds, sweep)
    timed = None if bench is None else files.read_json(bench, what="benchmark", hint="`icdctl bench --json > FILE`")
    rows = outlook(grid, bench=timed)
    hours = [row.hours_left for row in rows if row.hours_left is not None]
    needed = seeds_needed(delta, spread)
    if as_json:
        facts = {"seeds": list(grid.seeds), "hours_left": sum(hours), "seeds_needed": needed, "delta": delta}
        console.show_json({"cells": [row.as_json() for row in rows], **facts, "sd": spread})
        return
    _show(rows)
    unknown = len(rows) - len(hours)
    left = sum(row.begun + row.missing for row in rows)
    more = f", and {unknown} cells of which nothing says how long they take" if unknown else ""
    console.talk(f"{left} of {len(grid.runs)} runs are left, about {sum(hours):.1f} hours on one device{more}")
    console.talk(
        f"{len(grid.seeds)} seeds a cell; to see a difference of {delta:g} points with 80 % power at a spread of "
        f"{spread:g}, {needed} are needed"
    )


@app.command("status")
def status(cells: Cells = None, seeds: Seeds = None, sweep: Sweep = None, as_json: options.Json = False) -> None:
    """Show how far each cell is.

    Example: icdctl grid status
    """
    from icdctl.grid.outlook import outlook

    rows = outlook(_grid(cells, seeds, sweep))
    if as_json:
        console.show_json({"cells": [row.as_json() for row in rows]})
    else:
        _show(rows)


@app.command("run")
def run(
    cells: Cells = None,
    seeds: Seeds = None,
    sweep: Sweep = None,
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 1,
    gpus: Annotated[
        str | None, typer.Option(metavar="0,1", help="A process on each of these.", show_default=False)
    ] = None,
    together: Annotated[int, typer.Option(help="Most students in one process, on one teacher.")] = 8,
    device: options.Device = None,
    time_limit: options.TimeLimit = None,
    only: Annotated[list[str] | None, typer.Option(hidden=True)] = None,
    outcomes: Annotated[Path | None, typer.Option(hidden=True)] = None,
    as_json: options.Json = False,
) -> None:
    """Train what is missing; runs that share a teacher share a process. One that fails does not stop the others.

    Example: icdctl grid run --gpus 0,1
    """
    from icdctl.grid import execute

    if jobs < 1 or together < 1:
        raise UsageError("`--jobs` and `--together` are 1 or more", hint="leave them out for the usual")
    grid = _grid(cells, seeds, sweep).given(options.given_options(device=device, time_limit=time_limit))
    runs = [each for each in grid.runs if not only or each.label in only]
    left = [each for each in runs if each.state != "done"]
    packs, found = execute.packed(left, most=together)
    slots: list[str | None] = [*gpus.split(",")] if gpus else [None] * jobs
    if len(slots) == 1 and gpus is None:
        for pack in packs:
            with observed(pack.label) as observer:
                done = execute.train_here(pack, observer=observer)
            found += done if outcomes is not None else _logged(grid, done)  # who asks for them writes the log
    else:
        arguments = _passed_on(seeds, sweep, together, device, time_limit)
        for outcome in execute.train_in_slots(packs, slots=slots, arguments=arguments, tell=console.talk):
            found += _logged(grid, [outcome])
            console.talk(f"{outcome.label}: {outcome.state}")
    if outcomes is not None:
        files.write_json(outcomes, [outcome.as_json() for outcome in found])
    _report(runs, left, found, as_json)


def _grid(cells: Sequence[str] | None, seeds: str | None, sweep: Sequence[str] | None) -> Grid:
    from icdctl.grid.cells import parse_sweeps, read_grid

    grid = read_grid(files.project_root(), seeds=seeds).chosen(cells or [])
    return grid.swept(parse_sweeps(sweep)) if sweep else grid


def _passed_on(
    seeds: str | None, sweep: Sequence[str] | None, together: int, device: str | None, time_limit: str | None
) -> list[str]:
    """The options that a process of its own needs to see the same grid."""
    given: list[str] = ["--together", str(together)]
    for flag, value in (("--seeds", seeds), ("--device", device), ("--time-limit", time_limit)):
        given += [] if value is None else [flag, value]
    return given + [part for item in sweep or [] for part in ("--sweep", item)]


def _logged(grid: Grid, outcomes: Iterable[Outcome]) -> list[Outcome]:
    from icdctl.grid.execute import write_log

    found = list(outcomes)
    for outcome in found:
        write_log(grid.folder, outcome)
    return found


def _report(runs: Sequence[GridRun], left: Sequence[GridRun], found: Sequence[Outcome], as_json: bool) -> None:
    """What was done; then the failures, together.

    Raises:
        IcdctlError: some of them failed.
    """
    failed = [outcome for outcome in found if outcome.state == "failed"]
    if as_json and not failed:
        console.show_json({"runs": [outcome.as_json() for outcome in found], "already_done": len(runs) - len(left)})
    elif not as_json:
        rows = [[each.label, each.state, "" if each.top1 is None else f"{each.top1:.2f}"] for each in found]
        if rows:
            console.show_table(["run", "state", "top-1"], rows)
        console.talk(f"{len(runs) - len(left)} of {len(runs)} runs were done already")
    if failed:
        raise combine(
            [IcdctlError(f"`{each.label}`: {each.message}", hint=each.hint or "see above") for each in failed]
        )


def _show(rows: Sequence[Any]) -> None:
    shown = [
        [
            row.name,
            row.done,
            row.begun,
            row.missing,
            f"{sum(row.top1) / len(row.top1):.2f}" if row.top1 else "",
            "" if row.hours_left is None else f"{row.hours_left:.2f}",
        ]
        for row in rows
    ]
    console.show_table(["cell", "done", "begun", "missing", "mean top-1", "hours left"], shown)
