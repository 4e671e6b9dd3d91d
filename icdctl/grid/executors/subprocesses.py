"""Training packs in processes of this machine, one at a time in each slot; a slot may be a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from icdctl.errors import UsageError
from icdctl.grid.executors.protocol import Conditions, Trained
from icdctl.grid.grid_observer import PackObserver
from icdctl.grid.pack_folder import PackFolder
from icdctl.grid.packs import HINT_ON_MEMORY, Outcome, Pack, left_behind, not_begun

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 2.0
"""Seconds for processes that Ctrl-C has reached together with this one, before they get a signal from here."""
_KILLED_EXIT_CODE = 137
"""Exit code of a shell or container whose process got SIGKILL."""


class Subprocesses:
    """The executor that trains each pack in its own process."""

    def __init__(self, jobs: int | None = None, gpus: str | None = None) -> None:
        """
        Args:
            jobs: number of processes at a time; by default one, or one for each GPU.
            gpus: `0,1`: GPUs for the processes to share out, each process on one of them; None leaves
                `CUDA_VISIBLE_DEVICES` alone.

        Raises:
            UsageError: a name of a GPU is empty.
        """
        names = None if gpus is None else [name.strip() for name in gpus.split(",")]
        if names is None:
            self.slots: list[str | None] = [None] * (jobs or 1)
        elif "" in names:
            raise UsageError(f"GPUs `{gpus}` are not a list", hint="e.g. `--gpus 0,1`")
        else:
            self.slots = [names[index % len(names)] for index in range(jobs or len(names))]

    @property
    def num_slots(self) -> int:
        """See `Executor`."""
        return len(self.slots)

    def train(self, packs: Sequence[Pack], conditions: Conditions, observer: PackObserver) -> Trained:
        """See `Executor`."""
        free, waiting = list(self.slots), list(packs)
        children: list[_Child] = []
        try:
            while waiting or children:
                while waiting and free:
                    pack = waiting.pop(0)
                    if conditions.time.is_over:
                        yield pack, not_begun(pack)
                        continue
                    slot = free.pop(0)
                    observer.begun(pack, "" if slot is None else f"GPU {slot}")
                    children.append(_Child(pack, slot, conditions, observer))
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
            is_ctrl_c = isinstance(error, KeyboardInterrupt) and not error.args
            _end(children, grace=_GRACE_SECONDS if is_ctrl_c else 0.0)
            raise


class _Child:
    """A process that trains a pack."""

    def __init__(self, pack: Pack, slot: str | None, conditions: Conditions, observer: PackObserver) -> None:
        self.pack, self.slot, self._observer = pack, slot, observer
        # Files, not pipes: they are still there when this process dies and the child, an orphan, continues.
        self._temporary = tempfile.TemporaryDirectory(prefix="icdctl-grid-")
        folder = Path(self._temporary.name)
        self._files = PackFolder(folder)
        try:
            self._files.write_pack(pack, conditions)
        except BaseException:
            self._temporary.cleanup()
            raise
        self._said = _Lines(folder / "stderr.txt")
        self._progress = _Lines(self._files.progress)
        self.lines: list[str] = []
        environment = dict(os.environ) if slot is None else {**os.environ, "CUDA_VISIBLE_DEVICES": slot}
        with (folder / "stderr.txt").open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "icdctl.grid.worker", str(folder), *(run.label for run in pack.runs)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    def relay(self) -> None:
        """Pass on what it has written since the last time."""
        for line in self._said.read():
            self.lines.append(line)
            self._observer.message(f"{self.pack.label}: {line}")
        for line in self._progress.read()[-1:]:
            self._observer.doing(self.pack, line)

    def outcomes(self) -> list[Outcome]:
        """The outcomes of its runs, once it is over: those that it wrote, or what the run folders show if it died."""
        try:
            self.relay()
            written = self._files.read_outcomes(self.pack)
            return written or left_behind(self.pack, *_cause_of_death(self.process.returncode, self.lines))
        finally:
            self._temporary.cleanup()

    def close(self) -> None:
        """Pass on its last messages, once it is over and its outcomes are not needed any more."""
        self.relay()
        self._temporary.cleanup()


class _Lines:
    """A file that another process appends lines to."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[str]:
        """Complete new lines that are not blank; none where there is no file yet."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line for line in whole.decode("utf-8", "replace").splitlines() if line.strip()]


def _cause_of_death(code: int, lines: Sequence[str]) -> tuple[str, str]:
    """Why a process ended without writing outcomes, and what to do about it: a message and a hint."""
    again = "the same command continues from the last checkpoint"
    if code in (-signal.SIGKILL, _KILLED_EXIT_CODE):
        return f"its process was killed (exit code {code}), most likely because memory ran out", HINT_ON_MEMORY
    if code < 0:
        return f"its process was ended by signal {-code} ({signal.strsignal(-code)})", again
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or list(lines[-1:])
    return f"its process ended with exit code {code}" + (f": {said[0]}" if said else ""), again


def _end(children: Sequence[_Child], *, grace: float) -> None:
    """Let all processes save their states and end; a second interruption kills them.

    Args:
        children: those at work.
        grace: seconds that they get to end by themselves.
    """
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
        child.close()
