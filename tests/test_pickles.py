"""Pickles of weights and data sets: what asks for more memory than it has bytes is refused before it is unpickled."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from icdctl.data import cifar100
from icdctl.errors import ArtifactError
from icdctl.files.pickles import PickleRefusedError
from icdctl.models.pickles import check_pickles

KiB, GiB = 1024, 1024**3


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def under_a_key(value: bytes) -> bytes:
    return b"\x80\x02}" + text("w") + value + b"s."


def zipped(pickled: bytes, *more: tuple[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in (("archive/data.pkl", pickled), ("archive/version", b"3\n"), *more):
            archive.writestr(name, data)
    return content.getvalue()


def saved(value: object, *, is_zip: bool = True) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, _use_new_zipfile_serialization=is_zip)
    return content.getvalue()


def tensor_of(size: int, *, items: int, stride: int = 1, offset: int = 0) -> bytes:
    """A vector in a storage of so many items."""
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + number(items) + b"tQ"
    shape, steps = b"(" + number(size) + b"t", b"(" + number(stride) + b"t"
    hooks = call(named("collections", "OrderedDict"))
    return call(named("torch._utils", "_rebuild_tensor_v2"), storage, number(offset), shape, steps, b"\x89", hooks)


NUMPY = named("numpy", "dtype")
SCALAR = named("numpy.core.multiarray", "scalar")
ENCODE = named("_codecs", "encode")
HUGE = 4_000_000_000
HOSTILE: dict[str, tuple[bytes, str]] = {
    "bytearray": (call(named("builtins", "bytearray"), number(HUGE)), "`builtins.bytearray`"),
    "bytearray-of-python-2": (call(named("__builtin__", "bytearray"), number(HUGE)), "`__builtin__.bytearray`"),
    "numpy-void": (call(SCALAR, call(NUMPY, text("V2000000000"))), "NumPy type `V2000000000`"),
    "numpy-void-of-a-small-name": (call(SCALAR, call(NUMPY, text("V8"))), "NumPy type `V8`"),
    "numpy-structure": (call(NUMPY, text("f8,f8")), "NumPy type `f8,f8`"),
    "numpy-length-in-its-state": (
        call(NUMPY, text("S1")) + b"(" + number(3) + text("|") + b"NNN" + number(HUGE) + number(1) + b"tb",
        "more than a plain number",
    ),
    "numpy-subarray": (
        call(NUMPY, text("f8")) + b"(" + number(3) + text("<") + b"]NN" + number(8) + number(1) + b"tb",
        "more than a plain number",
    ),
    "codec-that-doubles": (
        call(ENCODE, call(ENCODE, text("x"), text("hex")), text("hex")),
        "encodes text in another way",
    ),
    "tensor-of-a-length": (call(named("torch", "FloatTensor"), number(HUGE)), "`torch.FloatTensor`"),
    "storage-of-a-length": (call(named("torch", "FloatStorage"), number(HUGE)), "memory that is not in the file"),
    "call-inside-a-call": (
        call(
            named("torch._tensor", "_rebuild_from_type_v2"),
            named("builtins", "bytearray"),
            named("torch", "Tensor"),
            b"(" + number(HUGE) + b"t",
            b"}",
        ),
        "`builtins.bytearray`",
    ),
    "tensor-beyond-its-storage": (tensor_of(10**9, items=4), "larger than its bytes"),
    "offset-beyond-its-storage": (tensor_of(4, items=4, offset=1), "larger than its bytes"),
    "steps-beyond-its-storage": (tensor_of(4, items=4, stride=2), "larger than its bytes"),
    "negative-size": (tensor_of(-1, items=4), "no view of its bytes"),
    "storage-beyond-the-file": (tensor_of(4, items=HUGE), "claim more bytes than the file has"),
    "copy-to-a-device": (
        call(named("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"), tensor_of(1, items=1)),
        "`torch._utils._rebuild_device_tensor_from_cpu_tensor`",
    ),
    "place-in-the-memo": (b"Nr" + struct.pack("<I", 2**31 - 1), "a place that can't be in use"),
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_asks_for_more_memory_than_it_has_bytes_is_refused(kind: str, is_zip: bool) -> None:
    pickled, reason = HOSTILE[kind]
    content = zipped(under_a_key(pickled)) if is_zip else legacy(under_a_key(pickled))
    tracemalloc.start()
    with pytest.raises(PickleRefusedError) as caught:
        check_pickles(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reason in str(caught.value)
    assert peak < 1024 * KiB


def legacy(pickled: bytes) -> bytes:
    facts: tuple[object, ...] = (0x1950A86A20F9469CFC6C, 1001, {})
    head = [pickle.dumps(value, protocol=2) for value in facts]
    return b"".join([*head, pickled, pickle.dumps([], protocol=2)])


def test_a_text_of_a_stated_length_is_not_made_room_for() -> None:
    content = zipped(b"\x80\x04\x8d" + struct.pack("<Q", 8 * GiB) + b"x.")
    with pytest.raises(ValueError, match="expected 8589934592 bytes"):
        check_pickles(content)


HONEST: dict[str, Callable[[], Any]] = {
    "state": lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict(),
    "views": lambda: {"t": torch.arange(12.0).reshape(3, 4).T, "part": torch.arange(9)[3:7], "one": torch.tensor(2.0)},
    "expanded": lambda: {"w": torch.zeros(1).expand(1000)},
    "empty": lambda: {"w": torch.zeros(0, 5), "n": torch.zeros(0)},
    "types": lambda: {str(kind): torch.zeros(3, dtype=kind) for kind in (torch.bool, torch.uint8, torch.bfloat16)},
    "complex": lambda: {"c": torch.zeros(3, dtype=torch.complex128), "h": torch.zeros(3, dtype=torch.half)},
    "parameter": lambda: {"w": torch.nn.Parameter(torch.zeros(3)), "o": collections.OrderedDict(a=torch.ones(1))},
    "shared": lambda: [torch.zeros(100)] * 3,
    "options": lambda: {"opt": argparse.Namespace(lr=0.1), "best": np.float64(71.5), "n": np.int64(3), "s": {1, 2}},
    "optimiser": lambda: _optimiser().state_dict(),
}


def _optimiser() -> torch.optim.Optimizer:
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weights])
    torch.autograd.backward(weights.sum())
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", HONEST)
def test_what_torch_saves_passes(kind: str, is_zip: bool) -> None:
    check_pickles(saved(HONEST[kind](), is_zip=is_zip))


# --- archives --------------------------------------------------------------------------------------------------------

END64 = "<IQHHIIQQQQ"


def _places(content: bytes) -> tuple[int, int, int]:
    """Where the directory, its large end and the locator are in an archive of torch."""
    locator = len(content) - 42
    assert content[locator : locator + 4] == b"PK\x06\x07"
    directory = struct.unpack_from("<Q", content, locator - 8)[0]
    return directory, locator - 56, locator


def _second_directory(content: bytes) -> bytes:
    """The locator leads to a directory that `zipfile` does not read."""
    directory, end64, locator = _places(content)
    entries = content[directory:end64]
    hidden = content[:end64] + content[end64:locator]
    place = len(content[:end64])
    again = len(hidden)
    count = struct.unpack_from("<Q", content, end64 + 24)[0]
    end = struct.pack(END64, 0x06064B50, 44, 45, 45, 0, 0, count, count, len(entries), again)
    return hidden + entries + end + struct.pack("<4sIQI", b"PK\x06\x07", 0, place, 1) + content[-22:]


def _other_number_of_entries(content: bytes) -> bytes:
    return content[:-22] + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, *struct.unpack("<2IH", content[-10:]))


def _same_names(content: bytes) -> bytes:
    return zipped(b"\x80\x02N.", ("ARCHIVE/DATA.PKL", b"\x80\x02N."))


ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "second-directory": (_second_directory, "not where both of its ends say"),
    "other-number-of-entries": (_other_number_of_entries, "two directories of entries"),
    "something-before-it": (lambda content: b"PK\x03\x04" + content, "directory of entries is not"),
    "a-comment": (lambda content: content[:-2] + b"\x02\x00" + b"hi", "not a zip file"),
    "a-second-end": (lambda content: content[:-42] + content[-22:] + content[-42:], "not a zip file"),
    "names-that-differ-by-case": (_same_names, "two of its entries have the same name"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_that_readers_see_in_two_ways_is_refused(kind: str) -> None:
    change, reason = ARCHIVES[kind]
    content = saved({"w": torch.zeros(4)})
    check_pickles(content)
    with pytest.raises((PickleRefusedError, zipfile.BadZipFile), match=reason):
        check_pickles(change(content))


# --- CIFAR-100 -------------------------------------------------------------------------------------------------------

RECONSTRUCT = named("numpy.core.multiarray", "_reconstruct")
NDARRAY = named("numpy", "ndarray")


def _array(state: bytes = b"") -> bytes:
    return call(RECONSTRUCT, NDARRAY, b"(" + number(10**10) + b"t", text("b")) + state


BYTE = call(NUMPY, text("u1"))
ARRAYS = {
    "bytes-that-are-absent": (_array(), "it holds no `data` and `fine_labels`"),
    "shape-without-bytes": (
        _array(b"(" + number(1) + b"(" + number(10**10) + b"t" + BYTE + b"\x89" + b"C\x01xtb"),
        "another shape than its bytes",
    ),
    "objects": (_array(b"(" + number(1) + b"(t" + BYTE + b"\x89]tb"), "more than numbers"),
    "type-of-a-length": (_array(b"(" + number(1) + b"(t" + call(NUMPY, text("V2000000000")) + b"\x89C\x00tb"), "V2000"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_a_data_set_have_their_bytes(tmp_path: Path, kind: str) -> None:
    pickled, reason = ARRAYS[kind]
    folder = tmp_path / cifar100.FOLDER
    folder.mkdir()
    (folder / "train").write_bytes(b"\x80\x03}C\x04data" + pickled + b"sC\x0bfine_labels]s.")
    with pytest.raises(ArtifactError, match=reason):
        cifar100.read_split(tmp_path, "train")
