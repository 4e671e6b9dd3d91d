"""Grids on disk, and the command line in processes of its own, for the tests that kill them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from icdctl.api import planning

PLAIN: dict[str, Any] = {"student": "res8", "method": "ce"}
TRAIN: dict[str, Any] = {"dataset": "digits100", "train_images": 400, "test_images": 50, "epochs": 8, "device": "cpu"}
_LONGEST_WAIT_SECONDS = 120.0


def write_params(cells: Mapping[str, Any], **changes: Any) -> None:
    """params.yaml in the current folder: small plain runs, but for what is changed."""
    content = {"train": TRAIN, "seeds": [0], "cells": dict(cells), **changes}
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def write_run(
    folder: Path, command: Literal["train", "distill"], options: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    """A run folder as it would be after a run that nobody has time for; its teacher need not be here."""
    stand_in = planning.StandIn((str(options.get("teacher")), "/elsewhere/teacher.safetensors", "0" * 64), None)
    config = planning.Planner().plan(command, {**options, "out": str(folder)}, stand_in=stand_in)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")


class Process:
    """A command of icdctl, or another Python program, in a process of its own."""

    def __init__(self, *arguments: str, name: str, program: Sequence[str] = ("-m", "icdctl")) -> None:
        self._out, self._err = Path(f"{name}.out").absolute(), Path(f"{name}.err").absolute()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def out(self) -> str:
        """Its stdout so far."""
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """Its stderr so far."""
        return self._err.read_text(encoding="utf-8")

    def wait(self) -> int:
        """Its exit code, once it is over."""
        return self.process.wait(timeout=_LONGEST_WAIT_SECONDS)

    def send(self, number: signal.Signals) -> None:
        """A signal to it alone."""
        self.process.send_signal(number)


@contextmanager
def started(*arguments: str, name: str = "first", program: Sequence[str] = ("-m", "icdctl")) -> Iterator[Process]:
    """A command that is at work; it is ended with the block."""
    running = Process(*arguments, name=name, program=program)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def wait_until(holds: Callable[[], object], *, what: str) -> None:
    """Look again and again; fail where it takes too long."""
    until = time.monotonic() + _LONGEST_WAIT_SECONDS
    while not holds():
        assert time.monotonic() < until, f"waited in vain for: {what}"
        time.sleep(0.02)


def epochs_of(run: str) -> list[str]:
    """The lines of a run's history, without their head."""
    try:
        return (Path("runs") / run / "history.csv").read_text(encoding="utf-8").splitlines()[1:]
    except OSError:
        return []


def goes_on(err: str, num_epochs: int) -> bool:
    """Whether a process says that it continues after so many epochs; a state may be one ahead of its history."""
    return any(f"continuing after epoch {number} of" in err for number in (num_epochs, num_epochs + 1))


def processes_naming(text: str) -> list[int]:
    """Ids of the processes that have `text` among their arguments (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def process_at(run: str) -> int | None:
    """Id of the process that holds a run folder, by its lock; None where there is none (Linux)."""
    folder, _, name = run.rpartition("/")
    lock = Path("runs").absolute() / folder / f".{name}.lock"
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if path.readlink() == lock:
                return int(path.parts[2])
        except OSError:
            continue
    return None
