"""`icdctl demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icdctl.commands import console, options
from icdctl.commands.train_and_show import ProgressObserver
from icdctl.errors import IcdctlError


def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write to; nothing else is written.", show_default="runs/demo"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the three training runs.")] = 0,
    device: str = "auto",
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete an earlier demo in this folder and start again.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Run the whole job in two minutes: teacher, plain student, distilled student, ONNX, registry, report.

    Example: icdctl demo --out /tmp/demo
    """
    from icdctl import files
    from icdctl.demo import CAVEATS, CURVES_FILE, REPORT_FILE, TABLE_COLUMNS, run_demo, table_rows

    folder = out if out is not None else files.project_root() / "runs" / "demo"
    with console.progress() as display:
        result = run_demo(
            folder,
            seed=seed,
            device=device,
            restart=restart,
            stage=lambda label: ProgressObserver(display, label),
        )
    if as_json:
        console.show_json(result.as_json())
    else:
        console.show_table(TABLE_COLUMNS, table_rows(result))
        console.show_line(f"\ndistillation adds {result.gain:.1f} points; when you quote this number, note:")
        for caveat in CAVEATS:
            console.show_line(f"- {caveat}")
        console.show_line(f"\nreport  {folder / REPORT_FILE}\ncurves  {folder / CURVES_FILE}")
        console.show_line(f"try     icdctl eval {folder / 'distilled'} --teacher {folder / 'teacher'}")
        console.show_line(f"        icdctl report {folder}")
    failures = result.failures()
    if failures:
        raise IcdctlError("the demo ran, but " + "; ".join(failures), hint="run it again with another `--seed`")
