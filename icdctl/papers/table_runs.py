"""The runs of a paper's table, their teachers, and the verdicts on them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from icdctl import api, files
from icdctl.api import planning
from icdctl.engine.observer import Observer
from icdctl.errors import ArtifactError, UsageError
from icdctl.grid.cells import Grid, GridCell, GridRun, make_cell
from icdctl.grid.dvc_pipeline import OWN_TEACHERS
from icdctl.grid.status import RunStatus, run_statuses, set_aside, state_of
from icdctl.grid.training import same_command_continues
from icdctl.methods import METHODS
from icdctl.science import experiments, tables, verdict_formats, verdicts
from icdctl.science.experiments import Cell, PaperTable
from icdctl.science.paper import FAMILIES
from icdctl.science.verdicts import Compared, Judgement, Result


def select(table: PaperTable, *, texts: Sequence[str], family: str | None) -> tuple[Cell, ...]:
    """Some cells of a table.

    Args:
        table: from `tables.load`.
        texts: take cells with one of these texts in their name; all cells where it is empty.
        family: `gamma2` or `gamma8`, the defaults of a paper; cells that belong to no family are in both.

    Raises:
        UsageError: there is no such family, or no such cell.
    """
    if family is not None and family not in FAMILIES:
        raise UsageError(f"unknown family `{family}`", hint=f"choose {' or '.join(f'`{name}`' for name in FAMILIES)}")
    found = experiments.select(table.cells, family=family)
    chosen = tuple(cell for cell in found if not texts or any(text in cell.key for text in texts))
    if not chosen:
        raise UsageError(
            f"no cell of `{table.name}` has {' or '.join(f'`{text}`' for text in texts)} in its name",
            hint=f"`icdctl reproduce {table.name} --list` shows them",
        )
    return chosen


def grid_of(cells: Sequence[Cell], *, num_seeds: int, options: Mapping[str, object]) -> Grid:
    """The runs of those cells that can be run; equal cells of different tables are the same runs.

    Args:
        cells: cells of a table.
        num_seeds: each cell is run with the seeds 0 to `num_seeds` - 1.
        options: options that hold for all runs.

    Raises:
        UsageError: no seed is wanted.
    """
    if not 1 <= num_seeds <= 1000:
        raise UsageError(f"{num_seeds} seeds", hint="e.g. `--seeds 5`")
    made = [grid_cell(cell, options) for cell in cells if cell.why_not(METHODS) is None]
    return Grid(tuple(made), tuple(range(num_seeds)), files.project_root() / "runs", "the table")


def name_of(cell: Cell) -> str:
    """The folder of a cell's runs, and its name in params.yaml."""
    return folder_name(cell.key)


def folder_name(key: str) -> str:
    """The key of a cell in paths and in params.yaml, where DVC would read a dot as a level of its own."""
    return key.replace("/", "-").replace(".", "_").removesuffix("-time")


def grid_cell(cell: Cell, options: Mapping[str, object]) -> GridCell:
    """A cell of a table as a cell of a grid, with options in addition to its own."""
    stated: dict[str, object] = {
        "dataset": cell.dataset,
        "teacher": cell.teacher,
        "student": cell.student,
        "method": cell.method,
        "scales": list(cell.scales) or None,
        "settings": dict(cell.settings) or None,
        **cell.overrides,
        **options,
    }
    return make_cell(
        name_of(cell), {key: value for key, value in stated.items() if value is not None}, origin="the table"
    )


def with_own_teachers(grid: Grid) -> Grid:
    """The same runs, with our own teachers for data sets without published ones; see `train_own_teachers`."""
    cells = []
    for cell in grid.cells:
        folder = _own_teacher(grid, cell)
        cells.append(cell if folder is None else replace(cell, options={**cell.options, "teacher": str(folder)}))
    return replace(grid, cells=tuple(cells))


def _own_teacher(grid: Grid, cell: GridCell) -> Path | None:
    """The run folder, beside the cells' folders, of the teacher trained for a cell; None where there is none."""
    dataset, teacher = str(cell.options.get("dataset")), cell.options.get("teacher")
    if teacher is None or dataset not in OWN_TEACHERS:
        return None
    return grid.folder / f"{dataset}-teacher-{teacher}"


def train_own_teachers(
    grid: Grid,
    *,
    replaces: bool,
    device: str | None,
    message: Callable[[str], None],
    observer: Observer | None = None,
) -> None:
    """Train the teachers of `with_own_teachers` that are missing, once, with seed 0.

    Args:
        grid: from `grid_of`.
        replaces: whether a teacher that was trained with other settings is trained again.
        device: the device to train on.
        message: called with a line about each folder that is moved out of the way.
        observer: receives the progress.

    Raises:
        IcdctlError: a teacher can't be trained, or was trained with other settings.
        Interrupted: the user or the system interrupted the training; the state is saved.
    """
    planner = planning.Planner()
    wanted = {folder: cell for cell in grid.cells if (folder := _own_teacher(grid, cell)) is not None}
    for folder, cell in wanted.items():
        dataset, model = str(cell.options["dataset"]), cell.options["teacher"]
        given = {"student": model, "dataset": dataset, "recipe": OWN_TEACHERS[dataset], "out": str(folder)}
        state, changes = state_of(folder, "train", given, planner)
        if state == "stale" and not replaces:
            raise ArtifactError(
                f"teacher `{folder}` was trained with other settings: {changes}",
                hint="take the change back, or train it again, and all its students, with `--replace`",
            )
        if state == "stale":
            kept = set_aside(folder, grid.folder, is_stale=partial(_is_stale, folder, given), waiting=message)
            message(f"the teacher with other settings was moved to `{kept}`")
        if state != "done":
            with same_command_continues():
                (result,) = api.start("train", [{**given, "device": device}], resume=True, wait=True, observer=observer)
            if isinstance(result, api.Failure):
                raise result.error


def _is_stale(folder: Path, given: Mapping[str, object]) -> bool:
    return state_of(folder, "train", given, planning.Planner())[0] == "stale"


def judge(
    table: PaperTable, cells: Sequence[Cell], runs: Sequence[RunStatus], *, margin: float | None, epoch: Compared
) -> Judgement:
    """Verdicts on the table by the runs that are done; stale runs are ignored.

    Args:
        table: from `tables.load`.
        cells: from `select`.
        runs: the status of each run of `with_own_teachers(grid_of(...))`.
        margin: the difference that does not matter, in points of top-1; None for the table's.
        epoch: the epoch of our runs to compare with the published number.

    Raises:
        ArtifactError: the metrics of a run are broken.
    """
    of_name: dict[str, dict[int, Result]] = {}
    for run in [each.run for each in runs if each.state == "done"]:
        of_name.setdefault(run.cell.name, {})[run.seed] = _result(table, run)
    measured = {cell.key: of_name[name_of(cell)] for cell in cells if name_of(cell) in of_name}
    return verdicts.judge(table, measured, methods=METHODS, cells=cells, margin=margin, epoch=epoch)


def judged(name: str) -> Judgement:
    """Verdicts on a table by all existing runs; nothing is trained.

    Raises:
        UsageError: there is no such table.
        ArtifactError: the metrics of a run are broken, or the table has no run.
    """
    table = tables.load(name)
    cells = select(table, texts=(), family=None)
    folders = [files.project_root() / "runs" / name_of(cell) for cell in cells]
    seeds = [
        int(run.name[1:])
        for folder in folders
        for run in folder.glob("s*")
        if re.fullmatch(r"[0-9]{1,9}", run.name[1:])
    ]
    if not seeds:
        raise ArtifactError(f"table `{name}` has no runs", hint=f"`icdctl reproduce {name}` trains them")
    grid = with_own_teachers(grid_of(cells, num_seeds=max(seeds) + 1, options={}))
    return judge(table, cells, run_statuses(grid.runs, planning.Planner()), margin=None, epoch="as published")


def _result(table: PaperTable, run: GridRun) -> Result:
    metrics = run.metrics()
    try:
        if table.metric == "seconds_per_step":
            return Result(final=float(metrics["seconds"]) / int(metrics["steps"]))
        best = metrics.get("best_top1")
        return Result(final=float(metrics["final_top1"]), best=None if best is None else float(best))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArtifactError(
            f"metrics of `{run.folder}` are not what icdctl writes: {error}",
            hint=f"delete `{run.folder}`, and train it again",
        ) from error


def write(judgement: Judgement, folder: Path) -> list[Path]:
    """Write the tables as Markdown, LaTeX, CSV and JSON; return the paths.

    Raises:
        ArtifactError: the folder can't be written to.
    """
    found = verdict_formats.sheets(judgement)
    texts = {
        "table.md": verdict_formats.to_markdown(found),
        "table.tex": verdict_formats.to_latex(found),
        "cells.csv": verdict_formats.cells_csv(judgement),
        "claims.csv": verdict_formats.claims_csv(judgement),
    }
    for name, text in texts.items():
        files.write_text(folder / name, text)
    files.write_json(folder / "table.json", verdict_formats.as_json(judgement))
    return [folder / name for name in (*texts, "table.json")]
