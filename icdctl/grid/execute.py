"""Training what a grid lacks: runs that can share a process are packed, and packs go to slots, one for each GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from icdctl import api, files
from icdctl.engine.observer import Observer
from icdctl.engine.run import Failure, together_key
from icdctl.errors import IcdctlError
from icdctl.grid.cells import GridRun

LOG_FILE = "grid.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    label: str
    state: str
    """`done`, `stopped` (a time limit) or `failed`."""
    top1: float | None = None
    seconds: float | None = None
    message: str = ""
    hint: str = ""

    def as_json(self) -> dict[str, Any]:
        """A line of the log."""
        return {key: value for key, value in vars(self).items() if value not in (None, "")}


@dataclass(frozen=True)
class Pack:
    """Runs that are trained in one process."""

    runs: tuple[GridRun, ...]

    @property
    def label(self) -> str:
        """What it is called in messages."""
        more = f" and {len(self.runs) - 1} more" if len(self.runs) > 1 else ""
        return f"{self.runs[0].label}{more}"


def packed(runs: Sequence[GridRun], *, most: int) -> tuple[list[Pack], list[Outcome]]:
    """Runs that can share data and teacher, together; and those whose configuration can't be, or that lack a teacher.

    Args:
        runs: to be trained.
        most: in one process.
    """
    groups: dict[Any, list[GridRun]] = {}
    refused = []
    for run in runs:
        try:
            config = api.plan(run.cell.command, run.options)
        except IcdctlError as error:
            refused.append(Outcome(run.label, "failed", message=error.message, hint=error.hint))
            continue
        groups.setdefault(together_key(config), []).append(run)
    packs = [
        Pack(tuple(group[first : first + most])) for group in groups.values() for first in range(0, len(group), most)
    ]
    return packs, refused


def train_here(pack: Pack, *, observer: Observer | None = None) -> list[Outcome]:
    """Train a pack in this process; a run that another process is at work on is waited for."""
    try:
        results = api.start(
            pack.runs[0].cell.command, [run.options for run in pack.runs], resume=True, wait=True, observer=observer
        )
    except IcdctlError as error:
        return [Outcome(run.label, "failed", message=error.message, hint=error.hint) for run in pack.runs]
    return [_outcome(run, result) for run, result in zip(pack.runs, results, strict=True)]


def _outcome(run: GridRun, result: api.RunResult | Failure) -> Outcome:
    if isinstance(result, Failure):
        return Outcome(run.label, "failed", message=result.error.message, hint=result.error.hint)
    if not result.finished:
        return Outcome(run.label, "stopped")
    return Outcome(run.label, "done", top1=result.top1, seconds=float(result.metrics["seconds"]))


def train_in_slots(
    packs: Sequence[Pack], *, slots: Sequence[str | None], command: Sequence[str], tell: Callable[[str], None]
) -> Iterator[Outcome]:
    """Train packs in processes of their own, one at a time in each slot.

    Args:
        packs: to be trained.
        slots: what `CUDA_VISIBLE_DEVICES` is in each; None leaves it alone.
        command: of icdctl, that shows a process the same runs; `--only LABEL` and `--outcomes FILE` are added.
        tell: what a process says on stderr, a line at a time.
    """
    free: Queue[str | None] = Queue()
    for slot in slots:
        free.put(slot)
    processes: set[subprocess.Popen[str]] = set()
    lock = threading.Lock()

    def work(pack: Pack) -> list[Outcome]:
        slot = free.get()
        try:
            return _in_process(pack, slot, command, tell, processes, lock)
        finally:
            free.put(slot)

    pool = ThreadPoolExecutor(len(slots))
    try:
        for outcomes in pool.map(work, packs):
            yield from outcomes
    except BaseException:
        with lock:
            for process in processes:
                process.terminate()  # each saves its state
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _in_process(
    pack: Pack,
    slot: str | None,
    command: Sequence[str],
    tell: Callable[[str], None],
    processes: set[subprocess.Popen[str]],
    lock: threading.Lock,
) -> list[Outcome]:
    tell(f"{pack.label}: begun" + (f" on GPU {slot}" if slot is not None else ""))
    environment = dict(os.environ) if slot is None else {**os.environ, "CUDA_VISIBLE_DEVICES": slot}
    labels = [label for run in pack.runs for label in ("--only", run.label)]
    with tempfile.TemporaryDirectory(prefix="icdctl-grid-") as name:
        told = Path(name) / "outcomes.json"
        with subprocess.Popen(
            [sys.executable, "-m", "icdctl", *command, *labels, "--outcomes", str(told)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            with lock:
                processes.add(process)
            _, err = process.communicate()
            with lock:
                processes.discard(process)
        return _told(told, pack, err, process.returncode)


def _told(path: Path, pack: Pack, err: str, code: int) -> list[Outcome]:
    """What a process wrote of its runs, or that it died."""
    try:
        return [Outcome(**item) for item in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        lines = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
        reason = lines[0] if lines else f"its process ended with exit code {code}"
        return [Outcome(run.label, "failed", message=reason) for run in pack.runs]


def write_log(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Add lines to the grid's log."""
    files.make_folder(folder)
    with (folder / LOG_FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(outcome.as_json()) + "\n" for outcome in outcomes)
