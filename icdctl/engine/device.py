"""One device for a run, chosen once, with the precision that goes with it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from icdctl.config.run_config import check_device
from icdctl.errors import IcdctlError, UsageError, memory_reported

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Constants of malloc.h."""
_KEPT_BYTES, _KEPT_BYTES_OF_OLD_GLIBC = 1 << 30, 32 << 20


def resolve_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: another name.
        IcdctlError: this machine has no such device.
    """
    if check_device(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            found = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device"
            raise IcdctlError(
                f"device `{name}` is not there: torch {torch.__version__} sees {found}",
                hint="use `--device cpu` or `--device auto`; `icdctl doctor` shows what torch sees",
            )
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """`fp32`, `tf32` or `bf16`; `auto` is what the reference gets: tf32 convolutions on CUDA, fp32 elsewhere.

    Raises:
        UsageError: tf32 is wanted on a device that does not have it.
    """
    if name == "auto":
        return "tf32" if device.type == "cuda" else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise UsageError(f"precision `tf32` needs a CUDA device, the run is on `{device}`", hint="use `fp32` or `bf16`")
    return name


@cache
def _keep_freed_memory() -> None:
    """Have glibc keep large freed buffers for the next ones, from now on, in the whole process.

    By default it gives them back to the kernel, which returns them page by page: 41,000 page faults in a step of
    res32x4 to mv2, a tenth of its time. Without glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for largest in (_KEPT_BYTES, _KEPT_BYTES_OF_OLD_GLIBC):
        if mallopt(_M_MMAP_THRESHOLD, largest) == 1:
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
            return


def is_device_driven(device: torch.device) -> bool:
    """Whether steps are driven from the device, by a counter there, so that a graph may hold them."""
    return device.type == "cuda"


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream to work on beside the current one; None where there are no streams."""
    if device.type != "cuda":
        return None
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return stream


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on another stream, after all that is queued on the current one; no change for None."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


def join(stream: torch.cuda.Stream | None) -> None:
    """Make the current stream wait for all that is queued on another one; the host does not wait."""
    if stream is not None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)


def wait_for(device: torch.device) -> None:
    """Make the host wait until a device has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def backend_settings(device: torch.device, precision: str, *, deterministic: bool) -> Iterator[None]:
    """torch's global switches for one run, put back afterwards; out of memory becomes an error with a hint."""
    if device.type == "cpu":
        _keep_freed_memory()
    new_tensors: Any = torch.utils.deterministic  # torch leaves it untyped
    before = (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        new_tensors.fill_uninitialized_memory,
    )
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = not deterministic
    _use_deterministic_algorithms(deterministic)
    new_tensors.fill_uninitialized_memory = False  # a kernel for each new tensor, which nothing reads
    if device.type == "cuda":
        # Without it cuBLAS may sum in another order each time. Torch looks once, at the process's first product, which
        # be of an earlier run that was not to be deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    less = "a smaller `--batch-size`, `--teacher-mode inline` (nothing cached), or another `--device`"
    try:
        with (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
            memory_reported(where=f"`{device}`", hint=less),
        ):
            yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" in str(error):
            raise IcdctlError(
                f"`--deterministic` can't be kept on `{device}`: {str(error).partition(',')[0]}",
                hint="leave `--deterministic` out, choose another student, or use `--device cpu`",
            ) from error
        if "CUBLAS_WORKSPACE_CONFIG" in str(error):
            raise IcdctlError(
                f"`--deterministic` can't be kept on `{device}`: this process has used cuBLAS in another way before",
                hint="start it again with `CUBLAS_WORKSPACE_CONFIG=:4096:8` in its environment",
            ) from error
        raise
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[:2]
        _use_deterministic_algorithms(before[2])
        new_tensors.fill_uninitialized_memory = before[3]


def _use_deterministic_algorithms(wanted: bool) -> None:
    # Torch imports its compiler to tell it, which takes a second: not where nothing changes.
    if torch.are_deterministic_algorithms_enabled() != wanted:
        torch.use_deterministic_algorithms(wanted)
