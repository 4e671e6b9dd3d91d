"""A look at the files of `torch.save` before torch reads them: they may claim no more memory than they have bytes.

torch's own reader runs no code from a file. But it makes room for whatever a file asks for: a tensor of any size whose
bytes are elsewhere, a `bytearray` of any length, entries of the archive that Python's `zipfile` does not see.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

from icdctl.files.pickles import PickleRefusedError, PlainDtype, StandIn, encode_latin, numpy_scalar, refuse, unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first object in a file of `torch.save` from before torch 1.6."""
_LEGACY_PICKLES = 5
"""Objects in such a file: magic number, protocol, machine, what was saved, names of its storages."""
_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _END64_BYTES, _LOCATOR_BYTES = 22, 56, 20
_ITEM_BYTES = {"Double": 8, "Long": 8, "ComplexFloat": 8, "ComplexDouble": 16, "Half": 2, "BFloat16": 2, "Short": 2}
_ITEM_BYTES |= {"Byte": 1, "Char": 1, "Bool": 1, "Untyped": 1}
_USUAL_ITEM_BYTES = 4
_STORAGE = re.compile(r"(\w+)Storage")
_PLAIN_REBUILDS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
_PARAMETER_REBUILDS = {"_rebuild_parameter", "_rebuild_parameter_with_state"}


@dataclass(frozen=True)
class _StorageType:
    """Takes the place of a class of storages, which a file names but must not call."""

    item_bytes: int

    def __call__(self, *arguments: object) -> StandIn:
        raise PickleRefusedError("it asks for memory that is not in the file")


class _Storage(StandIn):
    """Takes the place of the bytes of tensors."""

    num_items: int


def check_pickles(content: bytes) -> None:
    """Check that torch may read a file: a zip archive of `torch.save`, or one of its older format.

    Raises:
        PickleRefusedError: the file is unsafe or claims too much; the message says how, as a clause.
        zipfile.BadZipFile, NotImplementedError, ValueError: the archive is broken.
        Exception: a pickle is broken; pickle's errors have no common base.
    """
    if content.startswith(b"PK"):
        for pickled in _pickles_of_zip(content):
            find, persistent = _stand_ins(len(content))
            unpickle(io.BytesIO(pickled), find, persistent=persistent)
        return
    stream = io.BytesIO(content)
    for number in range(_LEGACY_PICKLES):
        find, persistent = _stand_ins(len(content))
        found = unpickle(stream, find, persistent=persistent)
        if number == 0 and found != _LEGACY_MAGIC:
            return  # torch refuses it


def _pickles_of_zip(content: bytes) -> list[bytes]:
    """The pickles in an archive of which all readers see the same entries, all of them uncompressed."""
    _check_directory(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise PickleRefusedError("its entries are compressed, which torch.save never does")
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > len(content):
            raise PickleRefusedError("its entries claim more bytes than the file has")
        # torch looks names up without regard to case.
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise PickleRefusedError("two of its entries have the same name")
        return [archive.read(entry) for entry in entries if entry.filename.lower().endswith(".pkl")]


def _check_directory(content: bytes) -> None:
    """Refuse an archive whose end does not lead every reader to the same directory.

    The record at the end may have a larger one before it, and a locator that says where: `zipfile` takes the record
    that lies before the locator, torch's reader the one that it points to.
    """
    end = len(content) - _END_BYTES
    if end < 0 or content[end : end + 4] != _END or content.count(_END, max(0, end - 65535)) > 1:
        raise zipfile.BadZipFile("File is not a zip file")
    *_, count, size, offset, comment = struct.unpack("<4s4H2IH", content[end:])
    before = end
    locator = end - _LOCATOR_BYTES
    if locator >= 0 and content[locator : locator + 4] == _LOCATOR:
        _, _, place, _ = struct.unpack("<4sIQI", content[locator:end])
        before = locator - _END64_BYTES
        if place != before or content[before : before + 4] != _END64:
            raise PickleRefusedError("its directory of entries is not where both of its ends say")
        *_, count64, size64, offset64 = struct.unpack("<4sQ2H2I4Q", content[before:locator])
        for small, large, full in ((count, count64, 0xFFFF), (size, size64, 2**32 - 1), (offset, offset64, 2**32 - 1)):
            if small not in (full, large):
                raise PickleRefusedError("it has two directories of entries")
        size, offset = size64, offset64
    if offset + size != before or comment:
        raise PickleRefusedError("its directory of entries is not at its end")


def _stand_ins(most_bytes: int) -> tuple[Callable[[str, str], object], Callable[[object], object]]:
    """What takes the place of globals, and of storages, which together have at most that many bytes."""
    claimed: dict[str, int] = {}

    def persistent(pid: object) -> object:
        if isinstance(pid, tuple) and pid[:1] == ("module",):  # a whole module, which torch refuses by its name
            return StandIn
        if not (isinstance(pid, tuple) and len(pid) >= 5 and isinstance(pid[1], _StorageType)):
            raise PickleRefusedError("it refers to something that is no storage of a tensor")
        key, num_items = str(pid[2]), pid[4]
        if not isinstance(num_items, int) or num_items < 0:
            raise PickleRefusedError("it holds a storage without a length")
        claimed[key] = max(claimed.get(key, 0), num_items * pid[1].item_bytes)
        if sum(claimed.values()) > most_bytes:
            raise PickleRefusedError("its tensors claim more bytes than the file has: it is cut short, or hostile")
        storage = _Storage()
        assert isinstance(storage, _Storage)
        storage.num_items = num_items
        return storage

    return _find, persistent


def _find(module: str, name: str) -> object:
    """What takes the place of a global; torch decides afterwards whether it allows the name."""
    full = f"{module}.{name}"
    if module in ("builtins", "__builtin__") and name == "bytearray":
        return refuse(full)
    if full == "_codecs.encode":
        return encode_latin
    if module == "numpy" and name == "dtype":
        return PlainDtype
    if module.startswith("numpy"):
        return numpy_scalar if name == "scalar" else StandIn
    if module.split(".")[0] != "torch":
        return StandIn
    storage = _STORAGE.fullmatch(name)
    if storage:
        return _StorageType(_ITEM_BYTES.get(storage[1], _USUAL_ITEM_BYTES))
    if name == "_rebuild_from_type_v2":
        return _rebuild_from_type
    if name in _PLAIN_REBUILDS:
        return _rebuild_tensor
    if name.endswith("Tensor") or (name.startswith("_rebuild") and name not in _PARAMETER_REBUILDS):
        return refuse(full)
    return StandIn


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *others: object) -> StandIn:
    """Takes the place of a view of a storage; torch would enlarge a storage that is too small for it."""
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not isinstance(storage, _Storage) or not all(isinstance(each, int) and each >= 0 for each in numbers):
        raise PickleRefusedError("it holds a tensor that is no view of its bytes")
    assert isinstance(offset, int)
    assert isinstance(size, tuple)
    assert isinstance(stride, tuple)
    if len(size) != len(stride):
        raise PickleRefusedError("it holds a tensor that is no view of its bytes")
    is_empty = any(side == 0 for side in size)
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if not is_empty and last >= storage.num_items:
        raise PickleRefusedError("it holds a tensor that is larger than its bytes")
    return StandIn()


def _rebuild_from_type(function: object, kind: object, arguments: object, state: object) -> object:
    """Takes the place of a call whose result gets attributes."""
    if not callable(function) or not isinstance(arguments, tuple):
        raise PickleRefusedError("it holds a tensor that is no view of its bytes")
    return function(*arguments)
