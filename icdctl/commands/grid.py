"""`icdctl grid`: the cells of params.yaml, all their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icdctl import files
from icdctl.commands import console, many, options
from icdctl.commands.training import observed
from icdctl.errors import ArtifactError

if TYPE_CHECKING:
    from icdctl.grid.cells import Grid
    from icdctl.grid.search_status import SearchOutlook

app = typer.Typer(help="Train the cells of params.yaml with all their seeds.", no_args_is_help=True)

Cells = Annotated[list[str] | None, typer.Argument(metavar="CELL", help="All by default.", show_default=False)]
Seeds = Annotated[str | None, typer.Option(metavar="0-4", help="In place of those in params.yaml.", show_default=False)]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=1,2,4",
        help="Each cell once for each value of a setting of its method, or of an option as `lr` or `epochs`; `;` "
        "between values that are lists (`scales=1,2;1,2,4`); may be repeated.",
        show_default=False,
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
    data_dir: options.DataDir = None,
    as_json: options.Json = False,
) -> None:
    """Show what there is to train, how long it may take, and how many seeds a comparison needs.

    Example: icdctl grid plan --delta 0.3
    """
    from icdctl.grid.forecast import missing_data, outlook
    from icdctl.grid.search_status import searches
    from icdctl.science.compare import power_of, seeds_needed

    grid = _grid(cells, seeds, sweep, data_dir=data_dir)
    rows = outlook(grid, bench=None if bench is None else _measured(bench))
    missing = missing_data(grid)
    hours = [row.hours_left for row in rows if row.hours_left is not None]
    needed, power = seeds_needed(delta, spread), power_of(len(grid.seeds), delta, spread)
    if as_json:
        facts = {"seeds": list(grid.seeds), "hours_left": sum(hours), "power": power, "seeds_needed": needed}
        absent = {name: str(folder) for name, folder in missing.items()}
        told = {**facts, "delta": delta, "sd": spread, "missing_data": absent}
        console.show_json({"cells": [row.as_json() for row in rows], **told})
        return
    _show(rows)
    unknown = len(rows) - len(hours)
    left = sum(row.begun + row.stale + row.missing for row in rows)
    about = [f"about {sum(hours):.1f} hours on one device"] if sum(hours) or not unknown else []
    about += [f"nothing says how long {unknown} of the cells take: `--bench FILE`"] if unknown else []
    console.talk(f"{left} of {len(grid.runs)} runs are left; {'; '.join(about)}")
    for name, folder in missing.items():
        console.talk(
            f"`{name}` is not in `{folder}`: `icdctl fetch-data {name}` brings it, or `--data-dir` says where it is"
        )
    searched = [search.cell for search in searches(grid)]
    if searched:
        console.talk(
            f"searches are not counted here, nor the cells that they make: `icdctl grid status` shows those of "
            f"{', '.join(searched)}"
        )
    seeds_said = ", ".join(map(str, grid.seeds))
    console.talk(
        f"seeds {seeds_said}: two cells that differ by {delta:g} points, with a spread of {spread:g} over seeds, are "
        f"told apart with a power of {100 * power:.0f} %; 80 % takes {needed} seeds"
    )


@app.command("status")
def status(cells: Cells = None, seeds: Seeds = None, sweep: Sweep = None, as_json: options.Json = False) -> None:
    """Show how far each cell is, and each search with the cell that it made.

    Example: icdctl grid status
    """
    from icdctl.grid.forecast import outlook
    from icdctl.grid.search_status import searches

    grid = _grid(cells, seeds, sweep)
    rows, searched = outlook(grid), searches(grid)
    if as_json:
        told = {"cells": [row.as_json() for row in rows], "searches": [search.as_json() for search in searched]}
        console.show_json(told)
        return
    _show([*rows, *(search.winner for search in searched if search.winner is not None)])
    if searched:
        console.show_line("")
        _show_searches(searched)


@app.command("run")
def run(
    cells: Cells = None,
    seeds: Seeds = None,
    sweep: Sweep = None,
    jobs: many.Jobs = None,
    gpus: many.Gpus = None,
    together: many.Together = 8,
    data_dir: options.DataDir = None,
    device: options.Device = None,
    time_limit: many.TimeLimit = None,
    replace: many.Replace = False,
    only: many.Only = None,
    search: Annotated[
        str | None,
        typer.Option(
            metavar="optuna",
            help="Try values of `--sweep`, ranges `0.5..8` too, on held-out training images; then train the best.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Of a search, in all.", min=1)] = 20,
    trial_seeds: Annotated[int, typer.Option(help="Seeds of each trial.", min=1)] = 1,
    val_split: Annotated[float, typer.Option(help="Share of the training images that trials are judged on.")] = 0.1,
    outcomes: many.Outcomes = None,
    as_json: options.Json = False,
) -> None:
    """Train what is missing; runs that share a teacher share a process. One that fails does not stop the others.

    Run it again after any interruption: it goes on from the last checkpoints. What happens is a line each in
    `runs/grid.jsonl`.

    Example: icdctl grid run --gpus 0,1
    """
    slots = many.Slots(jobs=jobs, gpus=gpus, together=together)
    if search is not None:
        from icdctl.commands.search import run_search

        run_search(
            search,
            _grid(cells, seeds, None, data_dir=data_dir),
            sweep or [],
            slots=slots,
            replace=replace,
            time_limit=time_limit,
            device=device,
            trials=trials,
            num_seeds=trial_seeds,
            val_split=val_split,
            as_json=as_json,
        )
        return
    grid = _grid(cells, seeds, sweep, data_dir=data_dir, tells=outcomes is None)
    again = ["grid", "run", *(cells or []), *many.flags(seeds=seeds, data_dir=data_dir, device=device)]
    again += [part for item in sweep or [] for part in ("--sweep", item)]
    done = many.train_missing(
        grid,
        again=again,
        slots=slots,
        replace=replace,
        time_limit=time_limit,
        device=device,
        only=only,
        outcomes=outcomes,
    )
    if outcomes is None:
        many.report(done, as_json)


@app.command("teacher")
def teacher(name: Annotated[str, typer.Argument(help="A name in the `teachers` of params.yaml.")]) -> None:
    """Fetch or train a teacher of params.yaml, as a stage of the pipeline does.

    Example: icdctl grid teacher digits100-res20
    """
    from icdctl.grid.stages import make_teacher

    with observed(name) as observer, many.same_command_goes_on():
        console.show_line(str(make_teacher(files.project_root(), name, observer=observer)))


@app.command("evaluate")
def evaluate(
    cell: Annotated[str, typer.Argument(help="A name in the `cells` of params.yaml.")],
    data_dir: options.DataDir = None,
) -> None:
    """Measure the weights of a cell's runs, as a stage of the pipeline does.

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
    tells: bool = True,
) -> Grid:
    """The grid that is asked for.

    Args:
        cells: names; all where none is given.
        seeds: in place of those in params.yaml.
        sweep: as typed.
        data_dir: of cells that state none themselves.
        tells: whether what a sweep leaves out is said.
    """
    from icdctl.grid.cells import read_grid
    from icdctl.grid.sweeps import parse_sweeps, swept

    whole = read_grid(files.project_root(), seeds=seeds)
    grid = whole.chosen(cells or []).with_usual({} if data_dir is None else {"data_dir": data_dir})
    if not sweep:
        return grid
    made, left_out = swept(grid, parse_sweeps(sweep), taken={cell.name for cell in whole.cells})
    for line in left_out if tells else []:
        console.talk(line)
    return made


def _measured(path: Path) -> dict[str, Any]:
    """What `icdctl bench --json` wrote."""
    hint = f"`icdctl bench --json > {path}`"
    value = files.read_json(path, what="benchmark", hint=hint)
    if not isinstance(value, dict) or not isinstance(value.get("pairs"), dict):
        raise ArtifactError(f"`{path}` is no benchmark: it has no `pairs`", hint=hint)
    return value


def _show(rows: Sequence[Any]) -> None:
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


def _show_searches(searched: Sequence[SearchOutlook]) -> None:
    """Trials by what became of them; the best of them by the training images that were held out."""
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
