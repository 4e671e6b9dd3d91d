"""`icdctl export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from icdctl.commands import console, options
from icdctl.errors import UsageError


def export(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="Trained model to export: a run folder, a weights file or `registry:NAME`."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder to create for the export.",
            show_default="`onnx` beside the weights; `onnx` in the current folder for `registry:`",
        ),
    ] = None,
    input_kind: Annotated[
        str,
        typer.Option(
            "--input",
            help="Input of the graph. `uint8`: pixels \\[batch, H, W, 3], which the graph normalises; `float`: "
            "\\[batch, 3, H, W], normalised by the caller.",
        ),
    ] = "uint8",
    opset: Annotated[int, typer.Option(help="ONNX operator set, 18 to 23; a higher one needs a newer runtime.")] = 18,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Data set that the model was trained on; needed for weights files that do not state it.",
            show_default=False,
        ),
    ] = None,
    data_dir: str | None = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing export in this folder.")] = False,
    as_json: options.Json = False,
) -> None:
    """Export a trained model to ONNX and verify with onnxruntime that it computes the same as PyTorch.

    Example: icdctl export runs/demo/distilled
    """
    from icdctl import api

    with console.progress() as display:
        display.add_task("exporting and verifying", total=None, note="")
        result = api.export(
            target,
            out,
            input_kind=_input_kind(input_kind),
            opset=opset,
            dataset=dataset,
            data_dir=data_dir,
            replace=replace,
        )
    if as_json:
        console.show_json(result.as_json())
        return
    report = result.report
    agreement = (
        f"not measured: {result.unmeasured}"
        if report.agreement is None
        else f"{report.agreement:.2f} % of up to 1,000 test images get the same class as in PyTorch"
    )
    console.show_line(f"{'file':<11} {result.model_file} ({result.num_bytes / 1e6:.2f} MB, opset {opset})")
    console.show_line(f"{'verified':<11} largest difference {report.max_error:.1e}, allowed {report.tolerance:.1e}")
    console.show_line(f"{'agreement':<11} {agreement}")
    if result.accuracy is not None:
        console.show_line(
            f"{'top-1':<11} {result.accuracy['top1']:.2f} with onnxruntime on {result.accuracy['images']:,} test images"
        )
    elif report.agreement is not None:
        console.show_line(f"{'top-1':<11} not measured: {result.unmeasured}")
    console.show_line(f"{'card':<11} {result.folder / 'README.md'}")
    console.talk(f"`icdctl predict {result.folder} IMAGE` classifies image files with this model")


def _input_kind(name: str) -> Literal["uint8", "float"]:
    if name == "uint8":
        return "uint8"
    if name == "float":
        return "float"
    raise UsageError(f"unknown input `{name}`", hint="choose `--input uint8` or `--input float`")
