"""From a table of a paper to runs, and from runs to verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from icdctl import api, files
from icdctl.engine.observer import Observer
from icdctl.errors import ArtifactError, UsageError
from icdctl.grid.cells import Grid, GridCell, make_cell
from icdctl.methods import METHODS
from icdctl.science import tables, verdicts
from icdctl.science.paper import FAMILIES
from icdctl.science.tables import Cell, Table
from icdctl.science.verdicts import Compared, Judgement, Result

OWN_TEACHERS = {"digits100": "digits100-teacher"}
"""Data sets of which nobody publishes teachers -> the recipe that trains ours."""


def select(table: Table, *, texts: Sequence[str], family: str | None) -> tuple[Cell, ...]:
    """Some cells of a table.

    Args:
        table: from `tables.load`.
        texts: one of which stands in the name of each; all cells where there is none.
        family: of defaults; cells that belong to none are in all of them.

    Raises:
        UsageError: there is no such family, or no such cell.
    """
    if family is not None and family not in FAMILIES:
        raise UsageError(f"unknown family `{family}`", hint=f"choose {' or '.join(f'`{name}`' for name in FAMILIES)}")
    found = tables.select(table.cells, family=family)
    chosen = tuple(cell for cell in found if not texts or any(text in cell.key for text in texts))
    if not chosen:
        raise UsageError(
            f"no cell of `{table.name}` has {' or '.join(f'`{text}`' for text in texts)} in its name",
            hint=f"`icdctl reproduce {table.name} --list` shows them",
        )
    return chosen


def grid_of(cells: Sequence[Cell], *, num_seeds: int, options: Mapping[str, Any]) -> Grid:
    """The runs of those cells that can be run; equal cells of different tables are the same runs.

    Args:
        cells: of a table.
        num_seeds: seeds 0 to `num_seeds` - 1.
        options: that hold for all runs.

    Raises:
        UsageError: no seed is wanted.
    """
    if not 1 <= num_seeds <= 1000:
        raise UsageError(f"{num_seeds} seeds", hint="e.g. `--seeds 5`")
    made = [grid_cell(cell, options) for cell in cells if cell.why_not(METHODS) is None]
    return Grid(tuple(made), tuple(range(num_seeds)), files.project_root() / "runs", "the table")


def name_of(cell: Cell) -> str:
    """The folder of a cell's runs, and its name in params.yaml, where DVC takes a dot for a level of its own."""
    return cell.key.replace("/", "-").replace(".", "_").removesuffix("-time")


def grid_cell(cell: Cell, options: Mapping[str, Any]) -> GridCell:
    """A cell of a table as one of a grid, with options that hold besides its own."""
    stated: dict[str, Any] = {
        "dataset": cell.dataset,
        "teacher": cell.teacher,
        "student": cell.student,
        "method": cell.method,
        "scales": ",".join(map(str, cell.scales)) or None,
        "settings": dict(cell.settings) or None,
        **cell.overrides,
        **options,
    }
    return make_cell(
        name_of(cell), {key: value for key, value in stated.items() if value is not None}, origin="the table"
    )


def with_own_teachers(grid: Grid, *, observer: Observer | None = None) -> Grid:
    """The same runs, with teachers trained here for data sets of which nobody publishes any.

    They are trained once, with seed 0, to a run folder of their own beside the cells'.

    Raises:
        IcdctlError: a teacher can't be trained.
    """
    cells = []
    for cell in grid.cells:
        dataset, teacher = str(cell.options["dataset"]), cell.options.get("teacher")
        if teacher is None or dataset not in OWN_TEACHERS:
            cells.append(cell)
            continue
        folder = grid.folder / f"{dataset}-teacher-{teacher}"
        if not (folder / "metrics.json").is_file():
            given = {"dataset": dataset, "recipe": OWN_TEACHERS[dataset], "device": cell.options.get("device", "auto")}
            api.train(model=teacher, **given, out=str(folder), resume=True, observer=observer)
        cells.append(GridCell(cell.name, {**cell.options, "teacher": str(folder)}))
    return replace(grid, cells=tuple(cells))


def judge(table: Table, cells: Sequence[Cell], grid: Grid, *, margin: float | None, epoch: Compared) -> Judgement:
    """What the runs that are done say of the table.

    Args:
        table: from `tables.load`.
        cells: from `select`.
        grid: from `grid_of`.
        margin: the difference that does not matter; None for the table's.
        epoch: which of ours stands beside the published number.

    Raises:
        ArtifactError: the metrics of a run are broken.
    """
    of_name: dict[str, dict[int, Result]] = {}
    for run in grid.runs:
        if run.state == "done":
            of_name.setdefault(run.cell.name, {})[run.seed] = _result(table, run.metrics())
    measured = {cell.key: of_name[name_of(cell)] for cell in cells if name_of(cell) in of_name}
    return verdicts.judge(table, measured, methods=METHODS, cells=cells, margin=margin, epoch=epoch)


def judged(name: str) -> Judgement:
    """What all runs that are there say of a table; nothing is trained.

    Raises:
        UsageError: there is no such table.
        ArtifactError: the metrics of a run are broken, or no run of it is there.
    """
    table = tables.load(name)
    cells = select(table, texts=(), family=None)
    folders = [files.project_root() / "runs" / name_of(cell) for cell in cells]
    seeds = [int(run.name[1:]) for folder in folders for run in folder.glob("s*") if run.name[1:].isdigit()]
    if not seeds:
        raise ArtifactError(f"no run of table `{name}` is there", hint=f"`icdctl reproduce {name}` trains them")
    grid = grid_of(cells, num_seeds=max(seeds) + 1, options={})
    return judge(table, cells, grid, margin=None, epoch="as published")


def _result(table: Table, metrics: Mapping[str, Any]) -> Result:
    if table.metric == "seconds_per_step":
        return Result(final=float(metrics["seconds"]) / int(metrics["steps"]))
    best = metrics.get("best_top1")
    return Result(final=float(metrics["final_top1"]), best=None if best is None else float(best))


def write(judgement: Judgement, folder: Path) -> list[Path]:
    """The tables as Markdown, LaTeX, CSV and JSON.

    Raises:
        ArtifactError: the folder can't be written to.
    """
    found = verdicts.sheets(judgement)
    texts = {
        "table.md": verdicts.to_markdown(found),
        "table.tex": verdicts.to_latex(found),
        "cells.csv": verdicts.cells_csv(judgement),
        "claims.csv": verdicts.claims_csv(judgement),
    }
    for name, text in texts.items():
        files.write_text(folder / name, text)
    files.write_json(folder / "table.json", verdicts.as_json(judgement))
    return [folder / name for name in (*texts, "table.json")]
