"""The process in which the reference runs, and the pipe to it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from icdctl.errors import ArtifactError

Ask = Callable[..., dict[str, Any]]
"""(what to do, details by keyword) -> the answer."""

_SCRIPT = Path(__file__).with_name("reference.py")


@contextmanager
def reference_process(
    folder: Path, checkout: Path, device: torch.device, *, num_threads: int, patience: float
) -> Iterator[Ask]:
    """The reference's process, ended with the block.

    Args:
        folder: of what is handed over; the process works there.
        checkout: named in errors.
        device: all that CUDA shows the process, or nothing of it for a CPU.
        num_threads: of the CPU.
        patience: seconds to wait for an answer.

    Yields:
        A function that sends a request and returns the answer; it raises ArtifactError where the checkout fails, or its
        process ends or hangs.
    """
    log = folder / "reference.log"
    environment = {"LOGNAME": "bench", **os.environ, "OMP_NUM_THREADS": str(num_threads)}
    environment["CUDA_VISIBLE_DEVICES"] = _visible_devices(device)
    command = [sys.executable, "-P", "-B", "-W", "ignore", str(_SCRIPT)]
    with log.open("w") as talk:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=talk,
            cwd=folder,
            env=environment,
            text=True,
        )

        def ask(what: str, **details: Any) -> dict[str, Any]:
            return _answer(child, {"do": what, **details}, log, checkout, patience)

        try:
            yield ask
        finally:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # its reader may be gone
                        pipe.close()


def _answer(
    child: subprocess.Popen[str], request: dict[str, Any], log: Path, checkout: Path, patience: float
) -> dict[str, Any]:
    """
    Raises:
        ArtifactError: the checkout fails, or its process ends or hangs.
    """
    assert child.stdin is not None
    assert child.stdout is not None
    hint = "run its own training script once to see whether it works in this environment"
    with suppress(BrokenPipeError):  # the answer, or its absence, says why
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
    ready, _, _ = select.select([child.stdout], [], [], patience)
    if not ready:
        raise ArtifactError(f"`{checkout}` did not answer within {patience:.0f} s", hint=hint)
    line = child.stdout.readline()
    if not line:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        told = f": {last[-1]}" if last else ""
        raise ArtifactError(f"the process of `{checkout}` ended{told}", hint=hint)
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ArtifactError(f"`{checkout}` fails at `{request['do']}`: {answer['error']}", hint=hint)
    return answer


def _visible_devices(device: torch.device) -> str:
    """What CUDA shows the reference: one device, for it would spread over all, or none."""
    if device.type == "cpu":
        return ""
    shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = device.index or 0
    return shown[index] if index < len(shown) else str(index)
