"""`icdctl validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icdctl.commands import console, options
from icdctl.commands.train_and_show import observed
from icdctl.errors import ArtifactError


def validate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="What to check: a run folder, a config.json, a weights file, an export folder, an .onnx file or "
            "`imagefolder:DIR`.",
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Data set that the model was trained on; needed for weights files that do not state it.",
            show_default=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check whether a run, a file or a folder of images is sound: complete, finite and consistent.

    Example: icdctl validate runs/demo/distilled
    """
    from icdctl.engine.observer import decoding
    from icdctl.validate import inspect

    with observed() as observer:
        checks = inspect(path, dataset=dataset, on_images=decoding(observer))
    broken = [check for check in checks if check.sound is False]
    if as_json and not broken:
        console.show_json({"path": str(path), "checks": [check.as_json() for check in checks]})
    elif not as_json:
        result = {True: "sound", False: "BROKEN", None: "skipped"}
        rows = [[check.what, result[check.sound], check.found] for check in checks]
        console.show_table(["what", "result", "found"], rows)
    if broken:
        raise ArtifactError(
            f"`{path}` is not sound: " + "; ".join(f"{check.what}: {check.found}" for check in broken),
            hint=broken[0].hint,
        )
