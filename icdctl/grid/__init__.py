"""Grids: cells of params.yaml or of a paper's table, each trained with several seeds.

>>> from pathlib import Path
>>> from icdctl import grid
>>> result = grid.train_grid(grid.read_grid(Path()), executor=grid.Subprocesses(jobs=2))
>>> [(outcome.label, outcome.top1) for outcome in result.outcomes]

The same call again continues where it was interrupted. An `observer` receives the progress; an `Executor` decides
where packs of runs are trained. Importing this package imports nothing heavy: a name is imported when it is first used.

What the files hold:

- what is to be trained: `cells` (cells, seeds and runs), `expansion` (the cells that pairs, methods and ablations of
  params.yaml stand for), `sweeps` (a cell for each combination of values);
- project files: `params_file` (writes into params.yaml, keeps its comments), `cells_file` (cells.yaml), `dvc_pipeline`
  (which entries dvc.yaml needs; `icdctl grid expand`), `stages` (what one stage of the pipeline does);
- training: `training` (`train_grid`), `packs` (runs that share a process, and their outcomes), `executors/` (where
  packs are trained), `pack_folder` and `worker` (a pack in a process of its own), `observer` (what is reported);
- what is known: `status` (the state of each run), `forecast` (hours left), `progress` (packs at work);
- searching settings: `search` (`search_grid`), `search_space` (what may be tried), `sampler` (what is tried next),
  `trials` (what was tried, kept in search.json), `search_status` (what `icdctl grid status` shows of it).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icdctl.grid.cells import Grid, GridCell, GridRun, make_cell, read_grid
    from icdctl.grid.executors.here import Here
    from icdctl.grid.executors.protocol import Executor
    from icdctl.grid.executors.subprocesses import Subprocesses
    from icdctl.grid.forecast import CellForecast, forecast_cells
    from icdctl.grid.grid_observer import GridObserver, GridPlan, SilentGridObserver
    from icdctl.grid.packs import Outcome, Pack
    from icdctl.grid.search import SearchResult, search_grid
    from icdctl.grid.search_space import parse_space
    from icdctl.grid.status import RunStatus, run_statuses
    from icdctl.grid.sweeps import parse_sweeps, swept
    from icdctl.grid.training import GridResult, train_grid

__all__ = [
    "CellForecast",
    "Executor",
    "Grid",
    "GridCell",
    "GridObserver",
    "GridPlan",
    "GridResult",
    "GridRun",
    "Here",
    "Outcome",
    "Pack",
    "RunStatus",
    "SearchResult",
    "SilentGridObserver",
    "Subprocesses",
    "forecast_cells",
    "make_cell",
    "parse_space",
    "parse_sweeps",
    "read_grid",
    "run_statuses",
    "search_grid",
    "swept",
    "train_grid",
]

_HOMES = {
    "CellForecast": "forecast",
    "Executor": "executors.protocol",
    "Grid": "cells",
    "GridCell": "cells",
    "GridObserver": "grid_observer",
    "GridPlan": "grid_observer",
    "GridResult": "training",
    "GridRun": "cells",
    "Here": "executors.here",
    "Outcome": "packs",
    "Pack": "packs",
    "RunStatus": "status",
    "SearchResult": "search",
    "SilentGridObserver": "grid_observer",
    "Subprocesses": "executors.subprocesses",
    "forecast_cells": "forecast",
    "make_cell": "cells",
    "parse_space": "search_space",
    "parse_sweeps": "sweeps",
    "read_grid": "cells",
    "run_statuses": "status",
    "search_grid": "search",
    "swept": "sweeps",
    "train_grid": "training",
}


if not TYPE_CHECKING:  # so that a name that is not there is an error for mypy too

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(import_module(f"icdctl.grid.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'icdctl.grid' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
