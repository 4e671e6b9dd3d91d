"""What `train` and `distill` share: run, show progress, print the result."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from icdctl.commands import console
from icdctl.errors import IcdctlError, UsageError, combine

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from icdctl.config.declare import Command
    from icdctl.engine.run import Failure
    from icdctl.engine.run_output import RunResult


_SECONDS_BETWEEN_LINES = 30.0
"""Seconds between lines of progress in a log: a short run prints none, a long one shows that it is alive."""


class ProgressObserver:
    """Shows a run as a progress bar with the time left; as a line now and then where stderr is not a terminal."""

    def __init__(self, display: Progress, label: str = "") -> None:
        self._display = display
        self._label = f"{label}: " if label else ""
        self._task: TaskID | None = None
        self._last_line = time.monotonic()

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
            if self._display.disable and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                console.talk(f"{self._label}{note}")

    def message(self, text: str) -> None:
        """See `icdctl.engine.observer.Observer`."""
        console.talk(text)


@contextmanager
def observed(label: str = "") -> Iterator[ProgressObserver]:
    """An observer for the block, with its own display."""
    with console.progress() as display:
        yield ProgressObserver(display, label)


def run_training(
    command: Command,
    options: dict[str, object],
    *,
    config_file: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    seeds: str | None = None,
    as_teacher: bool = False,
) -> None:
    """Train as the options say, register the result if it is wanted as a teacher, and print it.

    Lists among the options make several runs, which share data and teacher.

    Raises:
        IcdctlError: with a message and a hint.
    """
    from icdctl import api
    from icdctl.api import planning
    from icdctl.config.expand import expand
    from icdctl.engine.run import Failure
    from icdctl.models.backbones import allow_typed

    several = expand(options, seeds=seeds)
    for each in several:
        allow_typed(each.get("student"))
    in_folder = len(several) > 1
    if len(several) > 1 and as_teacher:
        raise UsageError(
            "`--as-teacher` registers one run, but these options make several", hint="train the teacher by itself"
        )
    if dry_run:
        planned = [
            config.model_dump(mode="json")
            for config in planning.plan_many(command, several, config_file, in_folder=in_folder)
        ]
        console.show_json(planned[0] if len(planned) == 1 else {"runs": planned})
        return
    with observed() as observer:
        results = api.start(
            command, several, config_file=config_file, in_folder=in_folder, resume=resume, observer=observer
        )
    if len(results) > 1:
        _show_many(results, as_json)
        return
    (result,) = results
    if isinstance(result, Failure):
        raise result.error
    artifact = _registered(result) if as_teacher and result.finished else None
    if as_json:
        console.show_json({**result.as_json(), **({} if artifact is None else {"artifact": artifact})})
        return
    _show(result)
    if artifact is not None:
        console.show_line(f"{'teacher':<11} {artifact}, found by `--teacher {shlex.quote(result.config.student)}`")


def _show_many(results: Sequence[RunResult | Failure], as_json: bool) -> None:
    """Print a line for each run; then report the failures together.

    Raises:
        IcdctlError: some of them failed.
    """
    from icdctl.engine.run import Failure

    failures = [result for result in results if isinstance(result, Failure)]
    done = [result for result in results if not isinstance(result, Failure)]
    if as_json and not failures:
        console.show_json({"runs": [result.as_json() for result in done]})
    elif not as_json:
        rows = [
            [str(result.out), f"{result.top1:.2f}" if result.finished else "", f"{result.metrics['seconds']:.0f} s"]
            if result.finished
            else [str(result.out), "", "stopped"]
            for result in done
        ]
        console.show_table(["run folder", "top-1", "time"], rows)
    if failures:
        reported = [
            IcdctlError(f"`{each.config.out}`: {'; '.join(each.error.messages)}", hint="; ".join(each.error.hints))
            for each in failures
        ]
        raise combine(reported)


def _registered(result: RunResult) -> str:
    """The run's reference in the project's registry: a new version, or the one that already holds these weights."""
    from icdctl import data, files, registry, run_files

    folder = registry.default_folder()
    trained_on = data.public_name(result.config.dataset)
    newest = registry.find_teacher(folder, model=result.config.student, dataset=trained_on)
    if newest is not None and newest.sha256 == files.sha256_file(result.out / run_files.WEIGHTS_FILE):
        return newest.reference
    return registry.add(folder, result.out, message=console.talk).reference


def _show(result: RunResult) -> None:
    metrics = result.metrics
    if not result.finished:
        console.show_line(f"stopped; continue with `--resume --out {result.out}`")
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
