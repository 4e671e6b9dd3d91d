"""`icdctl eval`: measure a classifier on test images."""

from __future__ import annotations

from typing import Annotated

import typer

from icdctl.commands import console, options
from icdctl.commands.train_and_show import observed
from icdctl.errors import first_few

_NAMED_CLASSES = 5


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Classifier to measure: a run folder, a weights file, `registry:NAME` or an .onnx file.",
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Second classifier, or a model's name for its registered teacher: also print how often the two agree.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Data set to test on; `icdctl list datasets` shows the names.",
            show_default="the one that it was trained on",
        ),
    ] = None,
    data_dir: str | None = None,
    test_images: int | None = None,
    device: str = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure a classifier on the test images: top-1, top-5, loss, calibration; with a teacher, agreement too.

    A run is measured on as many images of `digits100` as it was tested on, unless `--test-images` says otherwise.

    Example: icdctl eval runs/demo/distilled --teacher runs/demo/teacher
    """
    from icdctl import api

    with observed() as observer:
        result = api.evaluate(
            target,
            dataset=dataset,
            teacher=teacher,
            data_dir=data_dir,
            test_images=test_images,
            device=device,
            observer=observer,
        )
    if as_json:
        console.show_json(result.as_json())
        return
    numbers = result.numbers
    console.show_line(f"{'images':<11} {result.num_images:,} test images of {result.dataset}")
    console.show_line(f"{'top-1':<11} {numbers.top1:.2f}")
    console.show_line(f"{'top-5':<11} {numbers.top5:.2f}")
    console.show_line(f"{'loss':<11} {numbers.loss:.4f}")
    console.show_line(f"{'ece':<11} {numbers.ece:.2f} (calibration error in percent)")
    worst = numbers.worst_class
    console.show_line(f"{'worst class':<11} {result.class_names[worst]} ({numbers.per_class[worst]:.1f})")
    if numbers.untested:
        names = [result.class_names[number] for number in numbers.untested]
        shown = first_few(names, _NAMED_CLASSES)
        count = f"{len(names)} of {len(numbers.per_class)} classes"
        console.show_line(f"{'untested':<11} {count} have no test image: {shown}")
    if result.agreement is not None and result.fidelity is not None:
        console.show_line(f"{'agreement':<11} {result.agreement:.2f} (same class as `{teacher}`)")
        console.show_line(f"{'fidelity':<11} {result.fidelity:.4f} nats of KL divergence from it")
