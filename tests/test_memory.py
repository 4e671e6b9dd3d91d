"""Out of memory, wherever it happens, is a known failure with a hint."""

from __future__ import annotations

import errno
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandLine
from torch import Tensor, nn

import icdctl as library
from icdctl.errors import ArtifactError, IcdctlError, is_out_of_memory, memory_reported

ERRORS: list[Exception] = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] data. DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    RuntimeError("could not create a primitive"),
    Exception("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]
"""What Python, torch, ONNX Runtime and the system raise where memory is short."""


class TooLarge(nn.Module):
    """Works on a few images, and has no memory for more."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.head, self.error = nn.Linear(3, 100), error

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[0] > 2:
            raise self.error
        logits: Tensor = self.head(images.mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_allocator_is_understood(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(IcdctlError, match="`cpu` ran out of memory") as caught, memory_reported(where="`cpu`"):
        raise error
    assert caught.value.__cause__ is error
    assert caught.value.hint


@pytest.mark.parametrize("error", [ValueError("a shape"), ArtifactError("`out of memory.pth` is broken", hint="again")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, memory_reported():
        raise error
    assert caught.value is error


def test_numpy_is_understood_as_it_really_fails() -> None:
    with pytest.raises(IcdctlError, match="icdctl ran out of memory: Unable to allocate"), memory_reported():
        np.empty((1 << 50,), np.uint8)


def test_torch_is_understood_as_it_really_fails() -> None:
    with pytest.raises(IcdctlError, match="icdctl ran out of memory"), memory_reported():
        torch.empty((1 << 50,), dtype=torch.uint8)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize("call", [library.evaluate, library.predict])
def test_the_library_raises_its_own_error(call: Any, error: Exception, tmp_path: pathlib.Path) -> None:
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    given = (TooLarge(error), tmp_path) if call is library.predict else (TooLarge(error),)
    with pytest.raises(IcdctlError, match="ran out of memory"):
        call(*given, dataset="digits100", device="cpu")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_command_says_it(icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail() -> pathlib.Path:
        raise error

    monkeypatch.setattr(pathlib.Path, "cwd", fail)
    code, out, err = icdctl("doctor")
    assert (code, out) == (1, "")
    assert err.startswith("error: icdctl ran out of memory")
    assert "\nhint: use fewer or smaller images" in err
