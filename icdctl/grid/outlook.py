"""How far a grid is, how long the rest may take, and what a comparison of so many seeds can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from icdctl.grid.cells import Grid, GridCell, GridRun

EXTRAPOLATED_EPOCHS = 240
"""Of the runs that `icdctl bench` extrapolates to."""


@dataclass(frozen=True)
class CellOutlook:
    """A cell and its runs."""

    name: str
    done: int
    begun: int
    missing: int
    top1: tuple[float, ...]
    """Final-epoch top-1 of the runs that are done, by seed."""
    hours_left: float | None
    """Of one process on one device; None where nothing says how long a run takes."""

    def as_json(self) -> dict[str, Any]:
        """A line of `icdctl grid plan --json`."""
        return {**vars(self), "top1": list(self.top1)}


def outlook(grid: Grid, *, bench: Mapping[str, Any] | None = None) -> list[CellOutlook]:
    """Every cell with what is known of its runs.

    A run is taken to last as long as the cell's own runs that are done, on average; else as `icdctl bench` says.

    Args:
        grid: of the project.
        bench: what `icdctl bench --json` printed, if it was run.

    Raises:
        ArtifactError: the metrics of a run are broken.
    """
    found = []
    for cell in grid.cells:
        runs = [run for run in grid.runs if run.cell is cell]
        states = [run.state for run in runs]
        metrics = [run.metrics() for run, state in zip(runs, states, strict=True) if state == "done"]
        seconds = _seconds_a_run(cell, metrics, bench)
        left = [run for run, state in zip(runs, states, strict=True) if state != "done"]
        found.append(
            CellOutlook(
                cell.name,
                done=states.count("done"),
                begun=states.count("begun"),
                missing=states.count("missing"),
                top1=tuple(float(each["final_top1"]) for each in metrics),
                hours_left=0.0 if not left else None if seconds is None else _hours(cell, left, seconds),
            )
        )
    return found


def _seconds_a_run(
    cell: GridCell, metrics: Sequence[Mapping[str, Any]], bench: Mapping[str, Any] | None
) -> float | None:
    timed = [float(each["seconds"]) for each in metrics if isinstance(each.get("seconds"), int | float)]
    if timed:
        return sum(timed) / len(timed)
    pairs = (bench or {}).get("pairs", {})
    row = pairs.get(f"{cell.options.get('teacher')}:{cell.options.get('student')}", {})
    try:
        whole = float(row["extrapolated"]["run_seconds"])
    except (KeyError, TypeError, ValueError):
        return None
    return whole * float(cell.options.get("epochs", EXTRAPOLATED_EPOCHS)) / EXTRAPOLATED_EPOCHS


def _hours(cell: GridCell, left: Sequence[GridRun], seconds: float) -> float:
    """Of whole runs and of what is left of those that have begun."""
    epochs = cell.options.get("epochs")
    share = sum(1 - min(1.0, run.epochs_done / int(epochs)) if epochs else 1.0 for run in left)
    return share * seconds / 3600
