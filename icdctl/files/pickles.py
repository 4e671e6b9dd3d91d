"""Pickles from untrusted sources, limited in what they allocate.

A pickle is a program. An allow-list of names keeps it from running code, and yet a few bytes may ask for any amount of
memory: a place in the unpickler's memo, text of a stated length, `bytearray(4_000_000_000)`. So `unpickle` reads the
opcodes first, and builds stand-ins instead of the objects that a file asks for.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, NoReturn

_MOST_OPCODES = 3_000_000
"""Most opcodes; a checkpoint with an optimiser's state of 1,000 tensors has about 200,000."""
_LARGEST_ITEM = 64
"""Most bytes of a NumPy number."""
_PLAIN_DTYPE = re.compile(r"[<>|=]?[?biufcSU][0-9]{0,2}")


class PickleRefusedError(Exception):
    """The pickle is unsafe or asks for too much; the message says which, as a clause."""


class StandIn:
    """Takes the place of an object of any class: whatever is done to it, it stays empty."""

    def __new__(cls, *arguments: object, **keywords: object) -> StandIn:
        return super().__new__(cls)

    def __call__(self, *arguments: object, **keywords: object) -> StandIn:
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Do nothing, as `extend`, `add` and `update`, which opcodes call."""

    extend = add = update = append


class PlainDtype(StandIn):
    """Takes the place of a NumPy dtype."""

    def __new__(cls, text: object = "", *flags: object) -> PlainDtype:
        if not isinstance(text, str) or not _PLAIN_DTYPE.fullmatch(text):
            raise PickleRefusedError(f"it asks for a NumPy type `{str(text)[:40]}`, which is more than a plain number")
        made = super().__new__(cls)
        assert isinstance(made, PlainDtype)
        made.text = text.lstrip("<>|=")
        made.order = "<"
        return made

    text: str
    """Kind and number of bytes, as in `u1`."""
    order: str
    """`<` or `>`: which byte comes first."""

    def __setstate__(self, state: object) -> None:
        """Take over the byte order, and refuse fields, subarrays and other lengths."""
        parts = state if isinstance(state, tuple) else ()
        if len(parts) < 7 or any(part is not None for part in parts[2:5]) or not _is_small(parts[5]):
            raise PickleRefusedError("it asks for a NumPy type that is more than a plain number")
        self.order = ">" if parts[1] == ">" else "<"


def _is_small(value: object) -> bool:
    return isinstance(value, int) and value <= _LARGEST_ITEM


def encode_latin(text: object, encoding: object = "latin1") -> bytes:
    """Takes the place of `_codecs.encode`, with which old protocols hold bytes; other codecs may multiply the length.

    Raises:
        PickleRefusedError: it is not that.
    """
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise PickleRefusedError("it encodes text in another way than pickles do")
    return text.encode("latin-1")


def numpy_scalar(dtype: object, content: object = b"") -> StandIn:
    """Takes the place of a NumPy number."""
    if not isinstance(dtype, PlainDtype) or not isinstance(content, bytes | str) or len(content) > _LARGEST_ITEM:
        raise PickleRefusedError("it holds a NumPy number that is no number")
    return StandIn()


def refuse(name: str) -> Callable[..., NoReturn]:
    """What takes the place of something that must not be called."""

    def refused(*arguments: object, **keywords: object) -> NoReturn:
        raise PickleRefusedError(f"it asks for `{name}`, which is more than plain tensors")

    return refused


def unpickle(
    stream: io.BytesIO,
    find: Callable[[str, str], object],
    *,
    persistent: Callable[[object], object] | None = None,
    encoding: str = "latin-1",
) -> Any:
    """Load one pickle, after a look at its opcodes.

    Args:
        stream: positioned at the pickle; afterwards it is positioned behind it.
        find: returns what takes the place of a global, by module and name.
        persistent: returns what takes the place of an object outside of the pickle.
        encoding: for the strings of Python 2.

    Raises:
        PickleRefusedError: it asks for too much, or `find` refuses it.
        Exception: it is broken; pickle's errors have no common base.
    """
    start = stream.tell()
    _check_opcodes(stream)
    stream.seek(start)

    class Limited(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str) -> object:
            return find(module_name, global_name)

        def persistent_load(self, pid: object) -> object:
            if persistent is None:
                raise pickle.UnpicklingError("it refers to objects outside of it")
            return persistent(pid)

    return Limited(stream, encoding=encoding).load()


def _check_opcodes(stream: io.BytesIO) -> None:
    """Read the opcodes up to the end of a pickle, without doing what they say.

    Raises:
        PickleRefusedError: there are too many, or a place in the memo lies beyond those that can be in use.
        ValueError: one is cut short, or unknown.
    """
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number >= _MOST_OPCODES:
            raise PickleRefusedError(f"it has more than {_MOST_OPCODES:,} steps")
        # The unpickler makes room for all places up to the one that is named.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > number:
            raise PickleRefusedError("it names a place that can't be in use")
