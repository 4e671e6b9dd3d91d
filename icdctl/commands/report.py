"""`icdctl report`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from icdctl import files
from icdctl.commands import console, options
from icdctl.commands.train_and_show import observed
from icdctl.errors import UsageError


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Run folders, or folders that hold run folders.",
            show_default="the finished cells of params.yaml, else `runs`",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the report to.")] = Path("report"),
    table: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE",
            help="Include a paper's table, judged on your own runs; may be repeated. `icdctl reproduce --list` shows "
            "all tables.",
            show_default=False,
        ),
    ] = None,
    detail: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Draw all figures for the pairs of models with this text in their name; may be repeated.",
            show_default="the first three pairs",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="3,14,15",
            help="Numbers of the test images whose patches are compared in a figure.",
            show_default="four chosen by a fixed seed",
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the report.")] = "icdctl report",
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Measure how long one image takes in ONNX Runtime.")
    ] = True,
    data_dir: str | None = None,
    device: str = "auto",
    as_json: options.Json = False,
) -> None:
    """Write a report on finished runs, as one page of results, figures and lineage.

    Example: icdctl report runs/demo
    """
    from icdctl import reporting
    from icdctl.papers import table_runs

    root = files.project_root()
    judgements = [table_runs.judged(name) for name in dict.fromkeys(table or [])]
    paths = list(runs or []) or _default_runs(root)
    report_options = reporting.ReportOptions(
        title=title,
        detailed=detail or (),
        images=None if images is None else _numbers(images),
        latency=latency,
        device=device,
        data_dir=data_dir,
    )
    with observed() as observer:
        written = reporting.build_report(paths, out, report_options, judgements=judgements, observer=observer)
    for note in written.notes:
        console.talk(f"note: {note}")
    if as_json:
        names = [str(path) for path in written.files]
        console.show_json({"cells": list(written.rows), "files": names, "notes": list(written.notes)})
        return
    console.show_line(str(out / "index.html"))


def _default_runs(root: Path) -> list[Path]:
    """The finished runs of the project's grid; if there are none, the folder `runs`."""
    from icdctl.api import planning
    from icdctl.grid.cells import PARAMS_FILE, read_grid, read_params
    from icdctl.grid.expansion import has_cells
    from icdctl.grid.status import run_statuses

    if (root / PARAMS_FILE).is_file() and has_cells(read_params(root)):
        known = run_statuses(read_grid(root).runs, planning.Planner())
        found = [each.run.folder for each in known if each.state == "done"]
        if found:
            return found
    return [root / "runs"]


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts) or len(set(parts)) < len(parts):
        raise UsageError(
            f"`--images {text[:80]}` is not a list of different numbers of images", hint="e.g. `--images 3,14,15`"
        )
    return [int(part) for part in parts]
