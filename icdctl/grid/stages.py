"""Stages of the pipeline that train or evaluate one entry of params.yaml: a teacher, or a cell.

`dvc.yaml` runs them in the project's root.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path

from icdctl import api, files
from icdctl.api import planning
from icdctl.config.lookup import OPTIONS
from icdctl.engine.observer import Observer
from icdctl.errors import ArtifactError, UsageError, unknown_name
from icdctl.grid.cells import PARAMS_FILE, Grid, GridRun, read_params
from icdctl.grid.status import run_status
from icdctl.grid.training import same_command_continues
from icdctl.run_files import WEIGHTS_FILE
from icdctl.teachers import FetchOptions, fetch_teacher, find_published

TEACHERS, RESULTS = "teachers", "results"
_PIPELINE_KEYS = ("source", "after", "model")
_LARGEST_DIFFERENCE = 0.05
"""Largest accepted difference in top-1, in points, from the run's own number: near ties differ between devices."""


def make_teacher(root: Path, key: str, *, observer: Observer | None = None) -> Path:
    """Fetch or train the teacher of that name in the `teachers` of params.yaml.

    Args:
        root: the folder of the project.
        key: the name of the teacher.
        observer: receives the progress of training.

    Returns:
        `teachers/<key>`, with its weights.

    Raises:
        UsageError: there is no such teacher, or its entry can't be used.
        IcdctlError: it can't be fetched or trained.
    """
    stated = read_params(root).get(TEACHERS)
    entries = stated if isinstance(stated, dict) else {}
    if key not in entries:
        raise unknown_name(f"teacher of `{PARAMS_FILE}`", key, list(map(str, entries)), listing="icdctl grid --help")
    entry = entries[key]
    if not isinstance(entry, dict) or not {"dataset", "model", "source"} <= entry.keys():
        raise UsageError(
            f"teacher `{key}` in `{PARAMS_FILE}` states no `dataset`, `model` and `source`",
            hint="e.g. `{dataset: cifar100, model: res32x4, source: fetch}`",
        )
    out = root / TEACHERS / key
    if entry["source"] == "fetch":
        published = find_published(f"{entry['dataset']}/{entry['model']}")
        fetched = fetch_teacher(published, FetchOptions(data_folder=root / "data"))
        files.make_folder(out)
        shutil.copyfile(fetched.path, out / WEIGHTS_FILE)
    elif entry["source"] == "train":
        options = {name: value for name, value in entry.items() if name not in _PIPELINE_KEYS}
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise unknown_name(f"option of teacher `{key}`", unknown[0], OPTIONS, listing="icdctl train --dry-run")
        given = {**options, "student": entry["model"], "out": str(out)}
        with same_command_continues():
            (result,) = api.start("train", [given], resume=True, wait=True, observer=observer)
        if isinstance(result, api.Failure):
            raise result.error
    else:
        raise UsageError(f"teacher `{key}` has source `{entry['source']}`", hint="choose `fetch` or `train`")
    return out


def evaluate_cell(grid: Grid, root: Path) -> Path:
    """Measure the weights of a cell's runs on the test images, and write the results beside the runs' own numbers.

    Args:
        grid: a grid of one cell.
        root: the folder of the project.

    Returns:
        `results/<cell>.json`.

    Raises:
        ArtifactError: a run is not done, or is stale, or its weights do not reach the number that it states.
    """
    (cell,) = grid.cells
    planner = planning.Planner()
    seeds = {str(run.seed): _evaluated(run, planner) for run in grid.runs}
    finals = [float(run.metrics()["final_top1"]) for run in grid.runs]
    path = root / RESULTS / f"{cell.name}.json"
    summary = {
        "cell": cell.name,
        "method": cell.method,
        "seeds": seeds,
        "mean_final_top1": statistics.fmean(finals),
        "sd_final_top1": statistics.stdev(finals) if len(finals) > 1 else None,
    }
    files.write_json(path, summary)
    return path


def _evaluated(run: GridRun, planner: planning.Planner) -> dict[str, object]:
    now = run_status(run, planner)
    if now.state == "stale":
        raise now.error()
    if now.state != "done":
        raise ArtifactError(f"run `{run.folder}` is not done", hint=f"`icdctl grid run {run.cell.name}`")
    metrics = run.metrics()
    options = run.cell.options
    found = api.evaluate(run.folder, teacher=options.get("teacher"), data_dir=options.get("data_dir"))
    stated, reached = float(metrics["final_top1"]), found.numbers.top1
    if abs(stated - reached) > _LARGEST_DIFFERENCE:
        raise ArtifactError(
            f"weights of `{run.folder}` reach top-1 {reached:.2f}, its metrics state {stated:.2f}",
            hint=f"something changed them: delete the folder, and `icdctl grid run {run.cell.name}`",
        )
    measured = {"final_top1": stated, "best_top1": metrics.get("best_top1"), "final_top5": metrics.get("final_top5")}
    compared = {} if found.agreement is None else {"agreement": found.agreement, "fidelity": found.fidelity}
    return {**measured, "loss": found.numbers.loss, "ece": found.numbers.ece, **compared}
