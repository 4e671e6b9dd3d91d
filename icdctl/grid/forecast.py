"""The forecast of a grid: the status of each cell, and how long the rest may take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from icdctl import data
from icdctl.api import planning
from icdctl.errors import ArtifactError, IcdctlError
from icdctl.grid.cells import Grid, GridCell
from icdctl.grid.status import RunStatus, run_statuses

EXTRAPOLATED_EPOCHS = 240
"""Epochs of the run that `icdctl bench` extrapolates to."""
Bench = Mapping[str, Any]
"""The JSON object that `icdctl bench --json` printed."""
_ANY_TEACHER = planning.StandIn(("custom", "", ""), None)


@dataclass(frozen=True)
class CellForecast:
    """A cell, the number of its runs in each state, and how long the rest may take."""

    name: str
    done: int
    begun: int
    stale: int
    missing: int
    top1: tuple[float, ...]
    """Final-epoch top-1 of the runs that are done, by seed."""
    hours_left: float | None
    """Hours for one process on one device; None where that is not known."""
    note: str
    """How stale runs differ from the cell, problems of runs that are done, or why the cell can't be trained."""

    def as_json(self) -> dict[str, object]:
        """An entry of `icdctl grid plan --json`."""
        return {**vars(self), "top1": list(self.top1)}


def forecast_cells(
    grid: Grid, *, bench: Bench | None = None, known: Sequence[RunStatus] | None = None
) -> list[CellForecast]:
    """Every cell with what is known about its runs.

    A run is expected to take as long as the finished runs of its cell, on average; else as `icdctl bench` says.

    Args:
        grid: the grid of the project.
        bench: what `icdctl bench --json` printed, if it was run.
        known: the status of each run, in order, where that is known already.
    """
    planner = planning.Planner()
    statuses = run_statuses(grid.runs, planner) if known is None else known
    return [
        _of_cell(cell, list(group), planner, bench, grid.teachers)
        for cell, group in groupby(statuses, key=lambda status: status.run.cell)
    ]


def missing_data(grid: Grid) -> dict[str, Path]:
    """Published data sets that cells are trained on and that are not here -> the folder where each should be."""
    planner = planning.Planner()
    found: dict[str, Path] = {}
    for cell in grid.cells:
        try:
            images = planner.plan(cell.command, cell.options, stand_in=_ANY_TEACHER).images
        except IcdctlError:  # reported beside the cell
            continue
        if not data.is_there(images.name, images.folder):
            found[images.name] = images.folder
    return found


def _of_cell(
    cell: GridCell,
    runs: Sequence[RunStatus],
    planner: planning.Planner,
    bench: Bench | None,
    teachers: Mapping[str, str],
) -> CellForecast:
    states = [each.state for each in runs]
    notes = [each.changes for each in runs if each.state == "stale"]
    metrics = []
    for run in [each.run for each in runs if each.state == "done"]:
        try:
            metrics.append(run.metrics())
        except ArtifactError as error:
            notes.append(error.message)
    try:
        epochs = planner.plan(cell.command, cell.options, stand_in=_ANY_TEACHER).epochs
    except IcdctlError as error:
        epochs = None
        notes.append(error.messages[0])
    seconds = None if epochs is None else _seconds_a_run(cell, epochs, metrics, bench, teachers)
    left = [each for each in runs if each.state != "done"]
    hours = 0.0 if not left else None
    if left and seconds is not None and epochs is not None:
        begun = [min(1.0, len(each.run.history) / epochs) for each in left if each.state == "begun"]
        hours = (len(left) - sum(begun)) * seconds / 3600
    return CellForecast(
        cell.name,
        done=states.count("done"),
        begun=states.count("begun"),
        stale=states.count("stale"),
        missing=states.count("missing"),
        top1=tuple(float(each["final_top1"]) for each in metrics),
        hours_left=hours,
        note="; ".join(dict.fromkeys(notes)),
    )


def _seconds_a_run(
    cell: GridCell,
    epochs: int,
    metrics: Sequence[Mapping[str, Any]],
    bench: Bench | None,
    teachers: Mapping[str, str],
) -> float | None:
    timed = [float(each["seconds"]) for each in metrics if isinstance(each.get("seconds"), int | float)]
    if timed:
        return sum(timed) / len(timed)
    teacher = str(cell.options.get("teacher"))
    try:
        row = (bench or {})["pairs"][f"{teachers.get(teacher, teacher)}:{cell.options.get('student')}"]
        whole = float(row["extrapolated"]["run_seconds"])
    except (KeyError, TypeError, ValueError):
        return None
    return whole * epochs / EXTRAPOLATED_EPOCHS if math.isfinite(whole) else None
