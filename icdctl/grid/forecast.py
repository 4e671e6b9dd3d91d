"""How far a grid is, and how long the rest may take."""

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
from icdctl.grid.status import Standing, standings

EXTRAPOLATED_EPOCHS = 240
"""Of the runs that `icdctl bench` extrapolates to."""
_ANY_TEACHER = planning.StandIn(("custom", "", ""), None)


@dataclass(frozen=True)
class CellOutlook:
    """A cell and its runs."""

    name: str
    done: int
    begun: int
    stale: int
    missing: int
    top1: tuple[float, ...]
    """Final-epoch top-1 of the runs that are done, by seed."""
    hours_left: float | None
    """Of one process on one device; None where nothing says how long a run takes."""
    note: str
    """How stale runs differ from the cell, what is wrong with those that are done, or why it can't be trained."""

    def as_json(self) -> dict[str, Any]:
        """A line of `icdctl grid plan --json`."""
        return {**vars(self), "top1": list(self.top1)}


def outlook(
    grid: Grid, *, bench: Mapping[str, Any] | None = None, known: Sequence[Standing] | None = None
) -> list[CellOutlook]:
    """Every cell with what is known of its runs.

    A run is taken to last as long as the cell's own runs that are done, on average; else as `icdctl bench` says.

    Args:
        grid: of the project.
        bench: what `icdctl bench --json` printed, if it was run.
        known: how far its runs are, in order, where that was looked at.
    """
    planner = planning.Planner()
    states = standings(grid.runs, planner) if known is None else known
    return [
        _of_cell(cell, list(group), planner, bench, grid.teachers)
        for cell, group in groupby(states, key=lambda standing: standing.run.cell)
    ]


def missing_data(grid: Grid) -> dict[str, Path]:
    """Published data sets that cells are trained on and that are not here -> the folder where they should be."""
    planner = planning.Planner()
    found: dict[str, Path] = {}
    for cell in grid.cells:
        try:
            images = planner.plan(cell.command, cell.options, stand_in=_ANY_TEACHER).images
        except IcdctlError:  # told beside the cell
            continue
        if not data.is_there(images.name, images.folder):
            found[images.name] = images.folder
    return found


def _of_cell(
    cell: GridCell,
    runs: Sequence[Standing],
    planner: planning.Planner,
    bench: Mapping[str, Any] | None,
    teachers: Mapping[str, str],
) -> CellOutlook:
    states = [standing.state for standing in runs]
    notes = [standing.changes for standing in runs if standing.state == "stale"]
    metrics = []
    for run in [standing.run for standing in runs if standing.state == "done"]:
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
    left = [standing for standing in runs if standing.state != "done"]
    hours = 0.0 if not left else None
    if left and seconds is not None and epochs is not None:
        begun = [min(1.0, len(each.run.history) / epochs) for each in left if each.state == "begun"]
        hours = (len(left) - sum(begun)) * seconds / 3600
    return CellOutlook(
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
    bench: Mapping[str, Any] | None,
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
