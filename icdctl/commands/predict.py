"""`icdctl predict`: classify image files."""

from __future__ import annotations

from typing import Annotated

import typer

from icdctl.commands import console, options
from icdctl.commands.train_and_show import observed


def predict(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Classifier: an .onnx file, an export folder, a run folder, a weights file or `registry:NAME`.",
        ),
    ],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, or folders of images.")],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to print per image, the most probable first.")] = 1,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Data set that the model was trained on; needed for weights files that do not state it.",
            show_default=False,
        ),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that can't be decoded. Otherwise the command fails.")
    ] = False,
    device: str = "auto",
    as_json: options.Json = False,
) -> None:
    """Classify image files of any size: print a line per image with its class and the probability.

    An ONNX file runs on the CPU, whatever `--device` says.

    Example: icdctl predict runs/demo/distilled/onnx photos --top 3
    """
    from icdctl import api

    with observed() as observer:
        result = api.predict(
            target, images, dataset=dataset, top=top, skip_broken=skip_broken, device=device, observer=observer
        )
    if as_json:
        console.show_json(result.as_json())
        return
    columns = ["image", "class", "probability"]
    for place in range(2, 1 + max((len(each.top) for each in result.predictions), default=0)):
        columns += [f"class {place}", f"probability {place}"]
    rows = [
        [each.image, *(cell for guess in each.top for cell in (guess.class_name, f"{guess.probability:.4f}"))]
        for each in result.predictions
    ]
    console.show_table(columns, rows)
