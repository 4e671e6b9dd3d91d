"""Training what a grid lacks: runs that can share a process are packed, and packs go to slots, one for each GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from icdctl import api, files
from icdctl.api import planning
from icdctl.config.run import check_device, parse_duration
from icdctl.engine.observer import Observer
from icdctl.engine.run import Failure, Interrupted, together_key
from icdctl.errors import ArtifactError, IcdctlError
from icdctl.grid.cells import GridRun
from icdctl.grid.status import Standing, set_aside, standing

LOG_FILE = "grid.jsonl"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 2.0
"""For processes that were interrupted together with this one, before they are told to stop."""
_KILLED_EXIT_CODE = 137
"""Of a shell or container whose process got SIGKILL."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a run, or that it has begun."""

    label: str
    state: Literal["begun", "done", "stopped", "failed"]
    """`stopped`: by a time limit; the same command goes on with it."""
    top1: float | None = None
    seconds: float | None = None
    message: str = ""
    hint: str = ""

    def as_json(self) -> dict[str, Any]:
        """What other processes are told of it."""
        return {key: value for key, value in vars(self).items() if value not in (None, "")}


@dataclass(frozen=True)
class Pack:
    """Runs that are trained in one process."""

    runs: tuple[GridRun, ...]
    epochs: int
    """Most of any of them."""

    @property
    def label(self) -> str:
        """What it is called in messages."""
        more = f" and {len(self.runs) - 1} more" if len(self.runs) > 1 else ""
        return f"{self.runs[0].label}{more}"


def packed(
    runs: Sequence[GridRun], *, most: int, num_slots: int, planner: planning.Planner
) -> tuple[list[Pack], list[Outcome]]:
    """Runs that can share data and teacher, together; and those whose configuration can't be, or that lack a teacher.

    Args:
        runs: to be trained.
        most: in one process.
        num_slots: how many processes there are at a time; none of them stays empty where there are runs enough.
        planner: resolves the configurations.
    """
    groups: dict[Any, list[tuple[GridRun, int]]] = {}
    refused = []
    for run in runs:
        try:
            config = planner.plan(run.cell.command, run.options)
        except IcdctlError as error:
            refused.append(_failed(run, error))
            continue
        groups.setdefault(together_key(config), []).append((run, config.epochs))
    num_planned = sum(map(len, groups.values()))
    while True:
        parts = [part for group in groups.values() for part in _in_parts(group, most)]
        if most == 1 or len(parts) >= min(num_slots, num_planned):
            break
        most -= 1
    packs = [Pack(tuple(run for run, _ in part), max(epochs for _, epochs in part)) for part in parts]
    return packs, refused


def _in_parts(group: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """Of about one size, none larger than `most`."""
    number = -(-len(group) // most)
    bounds = [len(group) * index // number for index in range(number + 1)]
    return [group[first:last] for first, last in pairwise(bounds)]


def seconds_of(time_limit: str | None, device: str | None) -> float | None:
    """What a time limit is in seconds; options that hold for all runs are looked at before any run is.

    Raises:
        UsageError: it is no duration, or there is no such device.
    """
    if device is not None:
        check_device(device)
    return parse_duration(time_limit)


def as_time_limit(seconds: float) -> str:
    """As `--time-limit` takes it, and not 0."""
    return f"{max(seconds, 0.001):.3f}"


def stale_outcome(stale: Standing) -> Outcome:
    """A run that is not trained because its folder holds another one."""
    message = f"the folder holds another run than the cell asks for: {stale.changes}"
    return _failed(stale.run, ArtifactError(message, hint=stale.error().hint))


def not_begun(pack: Pack) -> list[Outcome]:
    """Runs for which no time is left."""
    return [Outcome(run.label, "stopped", message="the time limit came first") for run in pack.runs]


def train_here(
    pack: Pack, *, root: Path, left: Callable[[], float | None], replace: bool, observer: Observer, tell: Tell
) -> list[Outcome]:
    """Train a pack in this process; a run that another process is at work on is waited for.

    Args:
        pack: to be trained.
        root: of all runs.
        left: how many seconds there are for it; None where there is no limit but the runs' own.
        replace: whether runs of other settings that lie in the folders are moved out of the way.
        observer: told of the progress.
        tell: told what else happens.

    Raises:
        Interrupted: by a person or the system; the states are saved.
    """
    seconds = left()
    if seconds is not None and seconds <= 0:
        return not_begun(pack)
    given = {} if seconds is None else {"time_limit": as_time_limit(seconds)}
    try:
        if replace:
            for run in pack.runs:
                _replace(run, root, observer.message, tell)
        options = [{**run.options, **given} for run in pack.runs]
        results = api.start(pack.runs[0].cell.command, options, resume=True, wait=True, observer=observer)
    except Interrupted:
        raise
    except Exception as error:
        if len(pack.runs) == 1:
            return [_told_failure(pack.runs[0], error)]
        tell(f"{pack.label}: {_described(error)}; they are trained one by one")
        return [
            outcome
            for run in pack.runs
            for outcome in train_here(
                Pack((run,), pack.epochs),
                root=root,
                left=left,
                replace=replace,
                observer=observer,
                tell=tell,
            )
        ]
    return [_outcome(run, result) for run, result in zip(pack.runs, results, strict=True)]


def _replace(run: GridRun, root: Path, waiting: Tell, tell: Tell) -> None:
    planner = planning.Planner()

    def is_stale() -> bool:
        return standing(run, planner).state == "stale"

    if is_stale():
        kept = set_aside(run.folder, root, is_stale=is_stale, waiting=waiting)
        if kept is not None:
            tell(f"{run.label}: the run of other settings is now `{kept}`")


def _outcome(run: GridRun, result: api.RunResult | Failure) -> Outcome:
    if isinstance(result, Failure):
        return _failed(run, result.error)
    if not result.finished:
        return Outcome(run.label, "stopped")
    return Outcome(run.label, "done", top1=result.top1, seconds=float(result.metrics["seconds"]))


def _failed(run: GridRun, error: IcdctlError) -> Outcome:
    return Outcome(run.label, "failed", message="; ".join(error.messages), hint="; ".join(error.hints))


def _told_failure(run: GridRun, error: Exception) -> Outcome:
    """Of one run; where the cell was changed while another process trained it, that is the reason."""
    now = standing(run, planning.Planner())
    if now.state == "stale":
        return stale_outcome(now)
    if isinstance(error, IcdctlError):
        return _failed(run, error)
    hint = "train it alone with `icdctl train` or `icdctl distill` to see where that comes from"
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        hint = _HINT_ON_MEMORY
    return Outcome(run.label, "failed", message=_described(error), hint=hint)


_HINT_ON_MEMORY = "train fewer at a time: a smaller `--together`, fewer `--jobs`, or a smaller `batch_size`"


def _described(error: Exception) -> str:
    if isinstance(error, IcdctlError):
        return error.message
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(": ")


class _Child:
    """A process that trains a pack."""

    def __init__(self, pack: Pack, slot: str | None, command: Sequence[str], tell: Tell) -> None:
        self.pack, self.slot, self._tell = pack, slot, tell
        # Files, no pipes: they are still there when this process dies and the child, an orphan, goes on.
        self._folder = tempfile.TemporaryDirectory(prefix="icdctl-grid-")
        self._told = Path(self._folder.name) / "outcomes.json"
        self._said = Path(self._folder.name) / "stderr.txt"
        self._offset = 0
        self.lines: list[str] = []
        labels = [label for run in pack.runs for label in ("--only", run.label)]
        environment = dict(os.environ) if slot is None else {**os.environ, "CUDA_VISIBLE_DEVICES": slot}
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "icdctl", *command, *labels, "--outcomes", str(self._told)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    def relay(self) -> None:
        """Tell what it has said since the last time, whole lines."""
        with self._said.open("rb") as said:
            said.seek(self._offset)
            content = said.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            if line.strip():
                self.lines.append(line)
                self._tell(f"{self.pack.label}: {line}")

    def outcomes(self) -> list[Outcome]:
        """What it wrote of its runs, or that it died."""
        self.relay()
        try:
            told = {item["label"]: Outcome(**item) for item in json.loads(self._told.read_text(encoding="utf-8"))}
            return [told[run.label] for run in self.pack.runs]
        except (OSError, ValueError, TypeError, LookupError):
            message, hint = _cause_of_death(self.process.returncode, self.lines)
            return [_left_behind(run, message, hint) for run in self.pack.runs]
        finally:
            self._folder.cleanup()


def _cause_of_death(code: int, lines: Sequence[str]) -> tuple[str, str]:
    """Of a process that ended without a word on its runs: a message and a hint."""
    again = "the same command goes on from the last checkpoint"
    if code in (-signal.SIGKILL, _KILLED_EXIT_CODE):
        return f"its process was killed (exit code {code}), most likely because memory ran out", _HINT_ON_MEMORY
    if code < 0:
        return f"its process was ended by signal {-code} ({signal.strsignal(-code)})", again
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or list(lines[-1:])
    return f"its process ended with exit code {code}" + (f": {said[0]}" if said else ""), again


def _left_behind(run: GridRun, message: str, hint: str) -> Outcome:
    """A run of a process that died: it may have been done before."""
    if standing(run, planning.Planner()).state == "done":
        return done_before(run)
    return Outcome(run.label, "failed", message=message, hint=hint)


def done_before(run: GridRun) -> Outcome:
    """Of a run that is done, by its metrics."""
    try:
        metrics = run.metrics()
    except IcdctlError as error:
        return _failed(run, error)
    return Outcome(run.label, "done", top1=float(metrics["final_top1"]), seconds=metrics.get("seconds"))


def train_in_slots(
    packs: Sequence[Pack],
    *,
    slots: Sequence[str | None],
    command: Callable[[], Sequence[str] | None],
    tell: Tell,
    on_begin: Callable[[Pack, str | None], None],
) -> Generator[tuple[Pack, list[Outcome]], None, None]:
    """Train packs in processes of their own, one at a time in each slot; close it to end them.

    Args:
        packs: to be trained.
        slots: what `CUDA_VISIBLE_DEVICES` is in each; None leaves it alone.
        command: of icdctl, that shows a process the same runs, as it is now; `--only LABEL` and `--outcomes FILE` are
            added. None where no time is left.
        tell: what a process says on stderr, a line at a time.
        on_begin: told of each pack that begins, and of its slot.

    Yields:
        Each pack as it is over, and what became of its runs.
    """
    free = list(slots)
    waiting = list(packs)
    children: list[_Child] = []
    try:
        while waiting or children:
            while waiting and free:
                pack = waiting.pop(0)
                arguments = command()
                if arguments is None:
                    yield pack, not_begun(pack)
                    continue
                slot = free.pop(0)
                on_begin(pack, slot)
                children.append(_Child(pack, slot, arguments, tell))
            over = [child for child in children if child.process.poll() is not None]
            for child in over:
                children.remove(child)
                free.append(child.slot)
                yield child.pack, child.outcomes()
            for child in children:
                child.relay()
            if not over:
                time.sleep(_POLL_SECONDS)
    except BaseException as error:
        # Ctrl-C reaches all processes of a terminal, a signal to this one does not.
        _end(children, grace=_GRACE_SECONDS if isinstance(error, KeyboardInterrupt) and not error.args else 0.0)
        raise


def _end(children: Sequence[_Child], *, grace: float) -> None:
    """Have all processes save their states and end; a second interruption kills them."""
    try:
        until = time.monotonic() + grace
        while time.monotonic() < until and any(child.process.poll() is None for child in children):
            time.sleep(_POLL_SECONDS)
        for child in children:
            child.process.terminate()
        for child in children:
            child.process.wait()
    except KeyboardInterrupt:
        for child in children:
            child.process.kill()
    for child in children:
        child.process.wait()
        child.outcomes()


def write_log(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Add a line a run to the grid's log: time, label, state, and what is known of it.

    Raises:
        ArtifactError: it can't be written.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    lines = "".join(_line({"time": now, **outcome.as_json()}) for outcome in outcomes)
    path = folder / LOG_FILE
    files.make_folder(folder)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        raise files.not_writable(path, error) from error


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
