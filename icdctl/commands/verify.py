"""`icdctl verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icdctl.commands import console, options
from icdctl.errors import ArtifactError


def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Export folder or .onnx file to check.")],
    against: Annotated[
        str | None,
        typer.Option(
            help="Trained model to compare the graph with: a run folder, a weights file or `registry:NAME`.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Data set that the `--against` model was trained on; needed for weights files that do not state it.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check an exported model: the hashes of its files, its format, and its values.

    The values of a folder are compared with the logits recorded at export; `--against` compares with the weights.

    Example: icdctl verify runs/demo/distilled/onnx --against runs/demo/distilled
    """
    from icdctl import data
    from icdctl.config.dataset_request import dataset_request
    from icdctl.exporting import verify_file, verify_folder
    from icdctl.registry import trained

    known = None if dataset is None else data.describe(dataset_request(dataset))
    model = None if against is None else trained.resolve(against, dataset=known)
    report = verify_folder(path, model) if path.is_dir() else verify_file(path, model)
    if as_json and report.passed:
        console.show_json(report.as_json())
    elif not as_json:
        console.show_table(
            ["check", "result", "found"], [[check.name, check.status, check.detail] for check in report.checks]
        )
    if not report.passed:
        reasons = "; ".join(f"{check.name}: {check.detail}" for check in report.failures)
        raise ArtifactError(f"`{path}` failed verification: {reasons}", hint="make it again with `icdctl export`")
