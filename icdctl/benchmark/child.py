"""The process that runs the reference, and the pipe to it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from icdctl.errors import ArtifactError
from icdctl.files import LARGEST_TEXT_BYTES, JsonObject, parse_json

Ask = Callable[..., JsonObject]
"""Called with the name of a request and its details as keywords; returns the answer."""

_SCRIPT = Path(__file__).with_name("reference.py")


@contextmanager
def reference_process(
    folder: Path, checkout: Path, device: torch.device, *, num_threads: int, patience: float
) -> Iterator[Ask]:
    """Start the reference's process; it is killed when the block ends.

    Args:
        folder: the process's working folder, for the files that both sides exchange.
        checkout: the reference's folder, for error messages.
        device: the only device that the process sees; for a CPU it sees no CUDA device.
        num_threads: CPU threads of the process.
        patience: seconds to wait for an answer.

    Yields:
        A function that sends a request and returns the answer. It raises ArtifactError where the checkout fails, or its
        process ends or hangs.
    """
    log = folder / "reference.log"
    environment = {"LOGNAME": "bench", **os.environ, "OMP_NUM_THREADS": str(num_threads)}
    environment["CUDA_VISIBLE_DEVICES"] = _visible_devices(device)
    command = [sys.executable, "-P", "-B", "-W", "ignore", str(_SCRIPT)]
    with log.open("w") as log_file:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            cwd=folder,
            env=environment,
            text=True,
        )

        def ask(what: str, **details: object) -> JsonObject:
            return _answer(child, {"do": what, **details}, log, checkout, patience)

        try:
            yield ask
        finally:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # its reader may have ended
                        pipe.close()


def _answer(
    child: subprocess.Popen[str], request: JsonObject, log: Path, checkout: Path, patience: float
) -> JsonObject:
    """Send a request and wait for its answer.

    Raises:
        ArtifactError: the checkout fails, or its process ends or hangs.
    """
    assert child.stdin is not None
    assert child.stdout is not None
    hint = "run its own training script once to see whether it works in this environment"
    with suppress(BrokenPipeError):  # a missing answer is handled below
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
    ready, _, _ = select.select([child.stdout], [], [], patience)
    if not ready:
        raise ArtifactError(f"`{checkout}` did not answer within {patience:.0f} s", hint=hint)
    line = child.stdout.readline(LARGEST_TEXT_BYTES)
    if not line:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = f": {last[-1]}" if last else ""
        raise ArtifactError(f"the process of `{checkout}` ended{reason}", hint=hint)
    try:
        answer: JsonObject = parse_json(line)
    except ValueError as error:
        raise ArtifactError(f"the process of `{checkout}` gives no answer: {error}", hint=hint) from error
    if "error" in answer:
        raise ArtifactError(f"`{checkout}` fails at `{request['do']}`: {answer['error']}", hint=hint)
    return answer


def _visible_devices(device: torch.device) -> str:
    """The value of CUDA_VISIBLE_DEVICES for the reference: one device, since it would use all of them, or none."""
    if device.type == "cpu":
        return ""
    shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = device.index or 0
    return shown[index] if index < len(shown) else str(index)
