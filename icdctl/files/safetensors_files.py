"""Safetensors files: their texts, read without their tensors and without torch, and both.

Tensors are loaded from the bytes of a file, never from a file that is mapped into memory: the system ends a process
that reads behind the end of a mapped file, which another program may cut short at any time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from icdctl.files.reading import LARGEST_TEXT_BYTES, open_regular, parse_json, read_regular

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX_BYTES = 8
"""The file begins with the length of its header."""


def texts_in(content: bytes) -> dict[str, str]:
    """The metadata of a file, from its bytes: name -> text.

    Raises:
        ValueError: the header is cut short or not sound.
    """
    length = int.from_bytes(content[:_PREFIX_BYTES], "little")
    return _texts(_header(content[_PREFIX_BYTES : _PREFIX_BYTES + length], length))


def read_texts(path: Path) -> dict[str, str]:
    """The metadata of a file, of which the header alone is read; the length of the whole is checked.

    Raises:
        OSError: it is missing, may not be read, or is no regular file.
        ValueError: it is not a complete safetensors file.
    """
    with open_regular(path) as file:
        prefix = file.read(_PREFIX_BYTES)
        length = int.from_bytes(prefix, "little")
        header = _header(file.read(min(length, LARGEST_TEXT_BYTES)), length)
        actual = os.fstat(file.fileno()).st_size
    ends = [0, *(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")]
    expected = len(prefix) + length + max(ends)
    if len(prefix) < _PREFIX_BYTES or actual != expected:
        raise ValueError(f"it has {actual:,} bytes, its header says {expected:,}")
    return _texts(header)


def read_tensors(path: Path, *, most_bytes: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, once its header agrees with its length: one that is not sound takes no
    memory.

    Raises:
        OSError: as for `read_texts`, or it is larger than `most_bytes`.
        ValueError: it is not a complete safetensors file, or holds a type that torch does not have.
    """
    import safetensors.torch  # not at the head, because it imports torch

    read_texts(path)
    content = read_regular(path, most_bytes=most_bytes)
    try:
        return safetensors.torch.load(content), texts_in(content)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from error


def _header(content: bytes, length: int) -> dict[str, dict[str, list[int]]]:
    """The header, whose entries have the fields that are read."""
    if len(content) < length or not length:
        raise ValueError("it ends within its header")
    header = parse_json(content)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    for name, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        is_sound = isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)
        if not (is_sound or name == "__metadata__"):
            raise ValueError(f"its header has no place for `{name[:80]}`")
    return header


def _texts(header: dict[str, dict[str, list[int]]]) -> dict[str, str]:
    texts = header.get("__metadata__") or {}
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("its metadata are not texts")
    return {name: str(text) for name, text in texts.items()}
