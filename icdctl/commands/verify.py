"""`icdctl verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icdctl.commands import console, options
from icdctl.errors import ArtifactError


def verify(
    path: Annotated[Path, typer.Argument(help="An export folder or an .onnx file.")],
    against: Annotated[
        str | None,
        typer.Option(help="Run folder, weights file or `registry:NAME` to compare values with.", show_default=False),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Of `--against` weights that do not say it.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check an export: a folder by its hashes and recorded values, a file or `--against` by values.

    Example: icdctl verify runs/demo/distilled/onnx --against runs/demo/distilled
    """
    from icdctl import data
    from icdctl.exporting import verify_file, verify_folder
    from icdctl.registry import trained

    known = None if dataset is None else data.describe(data.request(dataset))
    target = None if against is None else trained.resolve(against, dataset=known)
    report = verify_folder(path, target) if path.is_dir() else verify_file(path, target)
    if as_json and report.passed:
        console.show_json(report.as_json())
    elif not as_json:
        console.show_table(
            ["check", "result", "found"], [[check.name, check.status, check.detail] for check in report.checks]
        )
    if not report.passed:
        reasons = "; ".join(f"{check.name}: {check.detail}" for check in report.failures)
        raise ArtifactError(f"`{path}` failed verification: {reasons}", hint="make it again with `icdctl export`")
