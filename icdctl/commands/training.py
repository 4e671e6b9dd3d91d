"""What `train` and `distill` share: run, show progress, print the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from icdctl import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from icdctl.engine.member import RunResult


class ProgressObserver:
    """Shows a run as a progress bar with the time left."""

    def __init__(self, display: Progress, label: str = "") -> None:
        self._display = display
        self._label = f"{label}: " if label else ""
        self._task: TaskID | None = None

    def begin(self, what: str, total: int) -> None:
        """See `icdctl.engine.observer.Observer`."""
        self._task = self._display.add_task(f"{self._label}{what}", total=total, note="")

    def advance(self, images: int) -> None:
        """See `icdctl.engine.observer.Observer`."""
        if self._task is not None:
            self._display.advance(self._task, images)

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        """See `icdctl.engine.observer.Observer`."""
        if self._task is not None:
            watched = "test" if "test_top1" in row else "val"
            note = f"epoch {row['epoch']:.0f}/{epochs} {watched} top-1 {row[f'{watched}_top1']:.2f}"
            self._display.update(self._task, note=note)

    def message(self, text: str) -> None:
        """See `icdctl.engine.observer.Observer`."""
        console.talk(text)


@contextmanager
def observed(label: str = "") -> Iterator[ProgressObserver]:
    """An observer for the block, with a display of its own."""
    with console.progress() as display:
        yield ProgressObserver(display, label)


def run_training(
    command: Literal["train", "distill"],
    options: dict[str, Any],
    *,
    config_file: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    as_teacher: bool = False,
) -> None:
    """Train as the options say, register the outcome if it is wanted as a teacher, and print it.

    Raises:
        IcdctlError: with a message and a hint.
    """
    from icdctl import api

    if dry_run:
        console.show_json(api.plan(command, options, config_file).model_dump(mode="json"))
        return
    with observed() as observer:
        result = api.start(command, options, config_file=config_file, resume=resume, observer=observer)
    artifact = _registered(result) if as_teacher and result.finished else None
    if as_json:
        console.show_json({**result.as_json(), **({} if artifact is None else {"artifact": artifact})})
        return
    _show(result)
    if artifact is not None:
        console.show_line(f"{'teacher':<11} {artifact}, found by `--teacher {result.config.student}`")


def _registered(result: RunResult) -> str:
    """The run as an artifact of the project's registry: a new version, or the one that holds these very weights."""
    from icdctl import data, files, registry

    folder = registry.default_folder()
    trained_on = data.public_name(result.config.dataset)
    newest = registry.find_teacher(folder, model=result.config.student, dataset=trained_on)
    if newest is not None and newest.sha256 == files.sha256_file(result.out / registry.WEIGHTS_FILE):
        return newest.reference
    return registry.add(folder, result.out).reference


def _show(result: RunResult) -> None:
    metrics = result.metrics
    if not result.finished:
        console.show_line(f"stopped; go on with `--resume --out {result.out}`")
        return
    if metrics["best_top1"] is not None:
        best = f"best {metrics['best_top1']:.2f} in epoch {metrics['best_epoch']}, chosen on the test set"
    else:
        best = (
            f"validation {metrics['final_val_top1']:.2f}, best {metrics['best_val_top1']:.2f} in epoch "
            f"{metrics['best_epoch']}"
        )
    rows = [
        ("run folder", str(result.out)),
        ("top-1", f"{metrics['final_top1']:.2f} in the final epoch ({best})"),
        ("top-5", f"{metrics['final_top5']:.2f}"),
        ("test loss", f"{metrics['final_loss']:.4f}"),
        ("variant", metrics["variant"]),
        *([("skipped", f"{metrics['skipped_images']} images")] if metrics["skipped_images"] else []),
        ("time", f"{metrics['seconds']:.1f} s, {metrics['images_per_second']:,.0f} images/s"),
    ]
    for name, value in rows:
        console.show_line(f"{name:<11} {value}")
