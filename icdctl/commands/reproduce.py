"""`icdctl reproduce`: a table of a paper, rerun and tested."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icdctl import files
from icdctl.commands import console, many, options
from icdctl.commands.training import observed
from icdctl.errors import UsageError

if TYPE_CHECKING:
    from icdctl.grid.cells import Grid
    from icdctl.science.verdicts import Compared


def reproduce(
    table: Annotated[
        str | None, typer.Argument(metavar="TABLE", help="e.g. `icd-cifar100`; `--list` shows all.", show_default=False)
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Show the tables, or the cells of one.")] = False,
    seeds: Annotated[str, typer.Option(metavar="N", help="How many of each cell: 0 to N-1.")] = "5",
    cells: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Only cells with this in their name; may be repeated.", show_default=False),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="`gamma2` or `gamma8`: which defaults of the papers.", show_default="both")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Train what is missing, or judge what is there.")
    ] = True,
    margin: Annotated[
        float | None, typer.Option(help="The difference that does not matter, in points.", show_default="the table's")
    ] = None,
    epoch: Annotated[
        str, typer.Option(help="Of our runs: `as published`, `final` or `best`, beside the published number.")
    ] = "as published",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the written tables.", show_default="runs/reproduce/TABLE"),
    ] = None,
    jobs: many.Jobs = None,
    gpus: many.Gpus = None,
    together: many.Together = 8,
    data_dir: options.DataDir = None,
    device: options.Device = None,
    time_limit: many.TimeLimit = None,
    replace: many.Replace = False,
    only: many.Only = None,
    outcomes: many.Outcomes = None,
    as_json: options.Json = False,
) -> None:
    """Rerun a paper's table with several seeds, and say whether it holds: tests of equivalence, and of the claims.

    Example: icdctl reproduce demo --seeds 5
    """
    from icdctl.api import planning
    from icdctl.grid.status import standings
    from icdctl.papers import reproduce
    from icdctl.science import tables, verdicts

    if table is None or listing:
        if table is None and not listing:
            raise UsageError("no table is named", hint="e.g. `icdctl reproduce demo`; `--list` shows all")
        _list(table, cells or [], family, as_json)
        return
    chosen = tables.load(table)
    wanted = reproduce.select(chosen, texts=cells or [], family=family)
    compared = _compared(epoch)
    given = {} if data_dir is None else {"data_dir": data_dir}
    plain = reproduce.grid_of(wanted, num_seeds=_number_of(seeds), options=given)
    grid = reproduce.with_own_teachers(plain)
    if outcomes is None:
        _warn_of_changes(plain)
    done = None
    if train:
        if outcomes is None:
            with observed() as observer, many.same_command_goes_on():
                reproduce.train_own_teachers(
                    plain, replaces=replace, device=device, tell=console.talk, observer=observer
                )
        passed = many.flags(family=family, data_dir=data_dir, device=device, seeds=seeds)
        done = many.train_missing(
            grid,
            again=["reproduce", table, *passed, *(part for text in cells or [] for part in ("--cells", text))],
            slots=many.Slots(jobs=jobs, gpus=gpus, together=together),
            replace=replace,
            time_limit=time_limit,
            device=device,
            only=only,
            outcomes=outcomes,
        )
    if outcomes is not None:
        return
    runs = standings(grid.runs, planning.Planner())
    for run in runs:
        if run.state == "stale":
            console.talk(f"warning: {run.run.label} is left out, it was trained with other settings: {run.changes}")
    judgement = reproduce.judge(chosen, wanted, runs, margin=margin, epoch=compared)
    folder = out or files.project_root() / "runs" / "reproduce" / table
    written = reproduce.write(judgement, folder)
    if as_json and not (done and done.failed):
        console.show_json({**verdicts.as_json(judgement), "files": [str(path) for path in written]})
    elif not as_json:
        for sheet in verdicts.sheets(judgement):
            console.show_line(f"{sheet.title}\n")
            console.show_table(sheet.headers, sheet.rows)
            console.show_line("\n".join(["", *sheet.notes, ""]))
        for path in written:
            console.talk(str(path))
    if done is not None and done.failed:
        raise done.error()


def _number_of(seeds: str) -> int:
    if not (seeds.isascii() and seeds.isdecimal()):
        raise UsageError(f"`--seeds {seeds}` is no number of seeds", hint="e.g. `--seeds 5` for the seeds 0 to 4")
    return int(seeds)


def _warn_of_changes(grid: Grid) -> None:
    """Say where the project's own options make other runs of a table's cells than the published ones."""
    from icdctl.config import sources
    from icdctl.papers.pipeline import changed_by

    train = sources.gather({}).given
    changed: dict[str, None] = {}
    num_changed = 0
    for cell in grid.cells if train else ():
        try:
            found = changed_by(train, cell)
        except UsageError:  # told of each run that can't be trained
            continue
        changed.update(dict.fromkeys(found))
        num_changed += bool(found)
    if changed:
        console.talk(
            f"warning: `train` of params.yaml or `ICDCTL_` variables change {', '.join(changed)} in {num_changed} of "
            f"{len(grid.cells)} cells: these are not the runs that the table is of"
        )


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
    from icdctl.papers import reproduce
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
            for cell in reproduce.select(tables.load(table), texts=texts, family=family)
        ]
    if as_json:
        console.show_json({"tables" if table is None else "cells": rows})
        return
    console.show_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: object) -> object:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else value
