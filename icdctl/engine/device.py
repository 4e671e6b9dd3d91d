"""One device for a run, chosen once, with the precision that goes with it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from icdctl.config import check_device
from icdctl.errors import IcdctlError, UsageError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
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
        UsageError: tf32 was asked for on a device that has none.
    """
    if name == "auto":
        return "tf32" if device.type == "cuda" else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise UsageError(f"precision `tf32` needs a CUDA device, the run is on `{device}`", hint="use `fp32` or `bf16`")
    return name


@cache
def _keep_freed_memory() -> None:
    """Have glibc keep large freed buffers for the next ones, from now on, in the whole process.

    By itself it gives them back to the kernel, which returns them page by page: 41,000 page faults a step of res32x4 to
    mv2, a tenth of its time. Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for largest in (_KEPT_BYTES, _KEPT_BYTES_OF_OLD_GLIBC):
        if mallopt(_M_MMAP_THRESHOLD, largest) == 1:
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
            return


@contextmanager
def backend_settings(device: torch.device, precision: str, *, deterministic: bool) -> Iterator[None]:
    """torch's global switches for one run, put back afterwards; out of memory becomes an error with a hint."""
    if device.type == "cpu":
        _keep_freed_memory()
    before = (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator has no exception of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise IcdctlError(
            f"`{device}` ran out of memory: {str(error).splitlines()[0]}",
            hint="a smaller `--batch-size`, `--teacher-mode inline` (nothing cached), or another `--device`",
        ) from error
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[:2]
        torch.use_deterministic_algorithms(before[2])
