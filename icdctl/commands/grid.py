"""`icdctl grid`: train the cells of params.yaml with all their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icdctl import files
from icdctl.commands import console, grid_training, options
from icdctl.commands.grid_search import SearchDisplay
from icdctl.commands.grid_search import report as report_search
from icdctl.commands.setting_flags import WithSettings
from icdctl.commands.train_and_show import observed
from icdctl.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from icdctl.grid import CellForecast, Grid
    from icdctl.grid.forecast import Bench
    from icdctl.grid.search_status import SearchStatus

app = typer.Typer(help="Train all cells of params.yaml, each with several seeds.", no_args_is_help=True)

Cells = Annotated[
    list[str] | None,
    typer.Argument(metavar="CELL", help="Cells to take, by their names in params.yaml.", show_default="all cells"),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="0-4", help="Train each cell with these seeds: `0-4` or `0,3,7`.", show_default="`seeds` of params.yaml"
    ),
]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=1,2,4",
        help="Train each cell once with each of these values: of a setting of its method (`gamma=1,2,4`), or of an "
        "option (`lr=0.05,0.1`). Separate values that are lists by `;` (`scales=1,2;1,2,4`). May be repeated; every "
        "combination is then trained.",
        show_default=False,
    ),
]


@app.command("plan", cls=WithSettings)
def plan(
    cells: Cells = None,
    seeds: Seeds = None,
    sweep: Sweep = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Forecast hours from this output of `icdctl bench --json`, for cells that never ran.",
            show_default=False,
        ),
    ] = None,
    delta: Annotated[
        float, typer.Option(help="Difference of two methods that the seeds should show, in points of top-1.")
    ] = 0.3,
    spread: Annotated[
        float, typer.Option("--sd", help="Expected standard deviation over seeds, in points of top-1.")
    ] = 0.25,
    data_dir: str | None = None,
    as_json: options.Json = False,
) -> None:
    """Show which runs are left, how long they may take, and how many seeds a comparison needs.

    Example: icdctl grid plan --delta 0.3
    """
    from icdctl.grid.forecast import forecast_cells, missing_data
    from icdctl.grid.search_status import search_statuses
    from icdctl.science.power import power_of, seeds_needed

    grid = _grid(cells, seeds, sweep, data_dir=data_dir)
    rows = forecast_cells(grid, bench=None if bench is None else _measured(bench))
    missing = missing_data(grid)
    hours = [row.hours_left for row in rows if row.hours_left is not None]
    needed, power = seeds_needed(delta, spread), power_of(len(grid.seeds), delta, spread)
    if as_json:
        facts = {"seeds": list(grid.seeds), "hours_left": sum(hours), "power": power, "seeds_needed": needed}
        absent = {name: str(folder) for name, folder in missing.items()}
        asked = {"delta": delta, "sd": spread, "missing_data": absent}
        console.show_json({"cells": [row.as_json() for row in rows], **facts, **asked})
        return
    _show(rows)
    unknown = len(rows) - len(hours)
    left = sum(row.begun + row.stale + row.missing for row in rows)
    about = [f"about {sum(hours):.1f} hours on one device"] if sum(hours) or not unknown else []
    about += [f"nothing says how long {unknown} of the cells take: `--bench FILE`"] if unknown else []
    console.talk(f"{left} of {len(grid.runs)} runs are left; {'; '.join(about)}")
    for name, folder in missing.items():
        console.talk(
            f"`{name}` is not in `{folder}`: `icdctl fetch-data {name}` downloads it, or `--data-dir` says where it is"
        )
    searched = [search.cell for search in search_statuses(grid)]
    if searched:
        console.talk(
            f"searches are not counted here, nor the cells that they make: `icdctl grid status` shows those of "
            f"{', '.join(searched)}"
        )
    seeds_text = ", ".join(map(str, grid.seeds))
    console.talk(
        f"seeds {seeds_text}: two cells that differ by {delta:g} points, with a spread of {spread:g} over seeds, are "
        f"distinguished with a power of {100 * power:.0f} %; 80 % takes {needed} seeds"
    )


@app.command("status")
def status(cells: Cells = None, seeds: Seeds = None, sweep: Sweep = None, as_json: options.Json = False) -> None:
    """Show the status of each cell, and of each search with the cell that it made.

    Example: icdctl grid status
    """
    from icdctl.grid.forecast import forecast_cells
    from icdctl.grid.search_status import search_statuses

    grid = _grid(cells, seeds, sweep)
    rows, searched = forecast_cells(grid), search_statuses(grid)
    if as_json:
        console.show_json(
            {"cells": [row.as_json() for row in rows], "searches": [search.as_json() for search in searched]}
        )
        return
    _show([*rows, *(search.winner for search in searched if search.winner is not None)])
    if searched:
        console.show_line("")
        _show_searches(searched)


@app.command("expand")
def expand(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if cells.yaml is out of date.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write all cells that params.yaml describes to cells.yaml, one a line, which dvc.yaml reads.

    Run it after each change of pairs, methods, ablations or cells in params.yaml.

    Teachers and data sets that new pairs need are added to params.yaml.

    Example: icdctl grid expand
    """
    from icdctl.grid import dvc_pipeline

    root = files.project_root()
    if check:
        dvc_pipeline.check(root)
        return
    done = dvc_pipeline.expand(root)
    for name in done.written.added:
        console.talk(f"{done.written.path}: added {name}")
    console.talk(f"{done.path}: {len(done.cells)} cells, {done.difference or 'unchanged'}")
    if as_json:
        changes = {what: list(names) for what, names in vars(done.difference).items()}
        needed = {"file": str(done.path), "cells": list(done.cells), "added_to_params": list(done.written.added)}
        console.show_json({**needed, **changes})


@app.command("run", cls=WithSettings)
def run(
    cells: Cells = None,
    seeds: Seeds = None,
    sweep: Sweep = None,
    jobs: grid_training.Jobs = None,
    gpus: grid_training.Gpus = None,
    together: grid_training.Together = 8,
    data_dir: str | None = None,
    device: str | None = None,
    time_limit: grid_training.TimeLimit = None,
    replace: grid_training.Replace = False,
    search: Annotated[
        str | None,
        typer.Option(
            metavar="optuna",
            help="Search instead of training all: try values of `--sweep`, which may be ranges (`gamma=0.5..8`), "
            "measure them on held-out training images, then train the best with all seeds.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="With --search: number of sets of values to try in all.", min=1)] = 20,
    trial_seeds: Annotated[int, typer.Option(help="With --search: number of seeds of each trial.", min=1)] = 1,
    val_split: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="With --search: share of the training images to hold out and measure trials on."
        ),
    ] = 0.1,
    as_json: options.Json = False,
) -> None:
    """Train the runs that are missing; those of one teacher share a process. A failed run does not stop the others.

    Run it again after any interruption: it continues from the last checkpoints.

    `runs/grid.jsonl` has a line for each run that begins or ends.

    Example: icdctl grid run --gpus 0,1
    """
    from icdctl.grid import parse_space, search_grid, train_grid

    if search is not None:
        _check_search(search, jobs, gpus)
        searched = search_grid(
            _grid(cells, seeds, None, data_dir=data_dir),
            parse_space(sweep or []),
            trials=trials,
            num_seeds=trial_seeds,
            val_split=val_split,
            together=together,
            replace=replace,
            time_limit=time_limit,
            device=device,
            observer=SearchDisplay(as_json),
        )
        report_search(searched, as_json)
        return
    result = train_grid(
        _grid(cells, seeds, sweep, data_dir=data_dir),
        executor=grid_training.make_executor(jobs, gpus),
        together=together,
        replace=replace,
        time_limit=time_limit,
        device=device,
        observer=grid_training.GridDisplay(),
    )
    grid_training.report(result, as_json)


def _check_search(name: str, jobs: int | None, gpus: str | None) -> None:
    """Refuse a search other than optuna's, or one in other processes.

    Raises:
        UsageError: with a hint.
    """
    if name != "optuna":
        raise UsageError(f"unknown search `{name}`", hint="choose `--search optuna`")
    if not grid_training.is_here(jobs, gpus):
        raise UsageError("a search trains its trials in this process", hint="leave out `--jobs` and `--gpus`")


@app.command("teacher")
def teacher(
    name: Annotated[
        str, typer.Argument(metavar="TEACHER", help="Teacher to make: a name under `teachers` in params.yaml.")
    ],
) -> None:
    """Fetch or train one teacher of params.yaml; the stages of dvc.yaml call this.

    Example: icdctl grid teacher digits100-res20
    """
    from icdctl.grid.stages import make_teacher

    with observed(name) as observer:
        console.show_line(str(make_teacher(files.project_root(), name, observer=observer)))


@app.command("evaluate", cls=WithSettings)
def evaluate(
    cell: Annotated[str, typer.Argument(metavar="CELL", help="Cell to measure, by its name in params.yaml.")],
    data_dir: str | None = None,
) -> None:
    """Measure the trained models of one cell on the test images; the stages of dvc.yaml call this.

    Example: icdctl grid evaluate res20-res8-dkd
    """
    from icdctl.grid.stages import evaluate_cell

    console.show_line(str(evaluate_cell(_grid([cell], None, None, data_dir=data_dir), files.project_root())))


def _grid(
    cells: Sequence[str] | None,
    seeds: str | None,
    sweep: Sequence[str] | None,
    *,
    data_dir: str | None = None,
) -> Grid:
    """The grid that the options describe; prints a line on stderr for each cell that a sweep leaves out.

    Args:
        cells: names; all where none is given.
        seeds: in place of those in params.yaml.
        sweep: as typed.
        data_dir: the folder of the data sets, for cells that state none themselves.
    """
    from icdctl.grid.cells import read_grid
    from icdctl.grid.sweeps import parse_sweeps, swept

    whole = read_grid(files.project_root(), seeds=seeds)
    grid = whole.chosen(cells or []).with_usual({} if data_dir is None else {"data_dir": data_dir})
    if not sweep:
        return grid
    made, left_out = swept(grid, parse_sweeps(sweep), taken={cell.name for cell in whole.cells})
    for line in left_out:
        console.talk(line)
    return made


def _measured(path: Path) -> Bench:
    """The JSON object that `icdctl bench --json` wrote."""
    hint = f"`icdctl bench --json > {path}`"
    value = files.read_json(path, what="benchmark", hint=hint)
    if not isinstance(value, dict) or not isinstance(value.get("pairs"), dict):
        raise ArtifactError(f"`{path}` is not a benchmark: it has no `pairs`", hint=hint)
    return value


def _show(rows: Sequence[CellForecast]) -> None:
    """Print a line for each cell."""
    shown = [
        [
            row.name,
            row.done,
            row.begun,
            row.stale,
            row.missing,
            f"{sum(row.top1) / len(row.top1):.2f}" if row.top1 else "",
            "" if row.hours_left is None else f"{row.hours_left:.2f}",
            row.note.splitlines()[0] if row.note else "",
        ]
        for row in rows
    ]
    console.show_table(["cell", "done", "begun", "stale", "missing", "mean top-1", "hours left", "note"], shown)


def _show_searches(searched: Sequence[SearchStatus]) -> None:
    """Print the number of trials in each state, and the best by top-1 on the held-out training images."""
    shown: list[list[object]] = []
    for search in searched:
        best = search.best
        shown.append(
            [
                search.cell,
                len(search.trials) - search.num_failed,
                len(search.running),
                len(search.begun),
                search.num_failed,
                "" if best is None else f"{best.score:.2f}",
                "" if best is None else ", ".join(f"{key} {value}" for key, value in best.values.items()),
                search.note,
            ]
        )
    columns = ["search of", "done", "running", "begun", "failed", "best held-out top-1", "with", "note"]
    console.show_table(columns, shown)
