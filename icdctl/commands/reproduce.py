"""`icdctl reproduce`: rerun a table of a paper, and test it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icdctl.commands import console, grid_training, options
from icdctl.commands.train_and_show import ProgressObserver, observed
from icdctl.errors import UsageError

if TYPE_CHECKING:
    from icdctl.papers.rerun import Rerun
    from icdctl.science.verdicts import Compared


def reproduce(
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="TABLE", help="Table to rerun, e.g. `icd-cifar100`; `--list` shows all.", show_default=False
        ),
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="List the tables, or the cells of TABLE; train nothing.")
    ] = False,
    seeds: Annotated[str, typer.Option(metavar="N", help="Train each cell with N seeds, 0 to N-1.")] = "5",
    cells: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Take only cells with this text in their name; may be repeated.", show_default=False
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help="Take only cells with gamma (the weight of the cluster term) as in one paper: `gamma2` or `gamma8`.",
            show_default="both",
        ),
    ] = None,
    train: Annotated[
        bool,
        typer.Option(
            "--train/--no-train", help="Train the runs that are missing, or judge only those that are finished."
        ),
    ] = True,
    margin: Annotated[
        float | None,
        typer.Option(help="Largest difference in top-1, in points, that counts as equal.", show_default="the table's"),
    ] = None,
    epoch: Annotated[
        str,
        typer.Option(
            help="Epoch of your runs to compare with the published number: `as published`, `final` or `best`."
        ),
    ] = "as published",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the tables to this folder.", show_default="runs/reproduce/TABLE"),
    ] = None,
    jobs: grid_training.Jobs = None,
    gpus: grid_training.Gpus = None,
    together: grid_training.Together = 8,
    data_dir: str | None = None,
    device: str | None = None,
    time_limit: grid_training.TimeLimit = None,
    replace: grid_training.Replace = False,
    as_json: options.Json = False,
) -> None:
    """Rerun a paper's table with several seeds, and test whether its numbers and its claims hold.

    Example: icdctl reproduce demo --seeds 5
    """
    if table is None or listing:
        if table is None and not listing:
            raise UsageError("no table is named", hint="e.g. `icdctl reproduce demo`; `--list` shows all")
        _list(table, cells or [], family, as_json)
        return
    from icdctl.papers.rerun import Wanted, rerun_table

    result = rerun_table(
        Wanted(table, tuple(cells or ()), family, _number_of(seeds)),
        observer=_Display(),
        options={} if data_dir is None else {"data_dir": data_dir},
        trains=train,
        executor=grid_training.make_executor(jobs, gpus) if train else None,
        together=together,
        replace=replace,
        time_limit=time_limit,
        device=device,
        margin=margin,
        epoch=_compared(epoch),
        out=out,
    )
    _report(result, as_json)


class _Display(grid_training.GridDisplay):
    """Prints the progress of a table that is rerun."""

    def teachers(self) -> AbstractContextManager[ProgressObserver]:
        """See `icdctl.papers.rerun.RerunObserver`."""
        return observed()


def _report(result: Rerun, as_json: bool) -> None:
    """Print the tables.

    Raises:
        IcdctlError: some runs failed.
    """
    from icdctl.science import verdict_formats

    failed = result.training is not None and result.training.failed
    if as_json and not failed:
        paths = [str(path) for path in result.files]
        console.show_json({**verdict_formats.as_json(result.judgement), "files": paths})
    elif not as_json:
        for sheet in verdict_formats.sheets(result.judgement):
            console.show_line(f"{sheet.title}\n")
            console.show_table(sheet.headers, sheet.rows)
            console.show_line("\n".join(["", *sheet.notes, ""]))
        for path in result.files:
            console.talk(str(path))
    if result.training is not None and failed:
        raise result.training.error()


def _number_of(seeds: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", seeds):
        raise UsageError(
            f"`--seeds {seeds[:80]}` is not a number of seeds", hint="e.g. `--seeds 5` for the seeds 0 to 4"
        )
    return int(seeds)


def _compared(text: str) -> Compared:
    if text == "final":
        return "final"
    if text == "best":
        return "best"
    if text == "as published":
        return "as published"
    raise UsageError(f"unknown epoch `{text}`", hint="choose `as published`, `final` or `best`")


def _list(table: str | None, texts: Sequence[str], family: str | None, as_json: bool) -> None:
    from icdctl.methods import METHODS
    from icdctl.papers import table_runs
    from icdctl.science import tables

    if table is None:
        rows = []
        for name in tables.TABLES:
            found = tables.load(name)
            runnable = sum(cell.why_not(METHODS) is None for cell in found.cells)
            rows.append({"name": name, "cells": len(found.cells), "runnable": runnable, "about": found.about})
    else:
        rows = [
            {
                "name": cell.key,
                "published": None if cell.reference is None else cell.reference.top1,
                "runs": cell.why_not(METHODS) or "yes",
                "note": cell.note,
            }
            for cell in table_runs.select(tables.load(table), texts=texts, family=family)
        ]
    if as_json:
        console.show_json({"tables" if table is None else "cells": rows})
        return
    console.show_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: object) -> object:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else value
