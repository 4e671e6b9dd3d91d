"""The only readers of files from outside: what they accept is a regular file of limited size, with sound values.

A file that a user names, or that lies in a folder of icdctl, may have been replaced: by a pipe that never ends, a link
to `/dev/zero`, a list nested 100,000 deep, a number of 5,000 digits, half a character. So all files are opened by
`open_regular`, and JSON, tables and YAML (`icdctl.files.yaml_reading`) have one reader each, with limits.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import shutil
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from icdctl.errors import ArtifactError

LARGEST_FOREIGN_BYTES = 2 * 1024**3
"""Largest weights file, graph or image that is read; larger files are refused."""
LARGEST_TEXT_BYTES = 32 * 1024**2
"""Largest JSON file, table or other text that is read; larger files are refused."""
_DEEPEST = 100
"""Most levels of lists and mappings inside each other; what icdctl writes has fewer than ten."""
_MOST_DIGITS = 40
"""Most digits of a whole number: 128 bits have 39."""
_LONGEST_NUMBER = 400
"""Most characters of any number."""
_Place = tuple[object, ...]
"""The keys and numbers that lead to a value inside another one."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, unless it is something that may never end.

    Raises:
        OSError: it is missing, a folder, a device or a pipe, or may not be read; `strerror` says which.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a program that writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise OSError(errno.EINVAL, "its path holds a zero byte") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, *, most_bytes: int = LARGEST_TEXT_BYTES) -> bytes:
    """The content of a file of at most `most_bytes` bytes.

    Raises:
        OSError: as for `open_regular`, or the file is larger.
    """
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        # Read no more than the limit, because the file may grow meanwhile.
        content = file.read(min(length, most_bytes) + 1) if length <= most_bytes else b""
        content += file.read(most_bytes + 1 - len(content)) if len(content) > length else b""
    if length > most_bytes or len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {_size(most_bytes)}", str(path))
    return content


def copy_regular(source: Path, target: Path) -> None:
    """Copy the content of a file.

    Raises:
        OSError: as for `open_regular`, or `target` can't be written.
    """
    check_regular(source)
    shutil.copyfile(source, target)


def check_regular(path: Path) -> None:
    """Check that another library may open a file.

    Raises:
        OSError: as for `open_regular`.
    """
    open_regular(path).close()


def read_text(path: Path, *, most_bytes: int = LARGEST_TEXT_BYTES) -> str:
    """The content of a text file in UTF-8, its line breaks as they are.

    Raises:
        OSError: as for `read_regular`.
        ValueError: it is not UTF-8.
    """
    return _decoded(read_regular(path, most_bytes=most_bytes))


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text that may come from anywhere.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested too deep, names a key twice, or holds a number that is not finite
            or too long, a zero byte, or half of a surrogate pair.
    """
    text = content if isinstance(content, str) else _decoded(content)
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_short_int,
            object_pairs_hook=_without_twins,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    check_value(value)
    return value


def positive(value: object) -> float:
    """A number of a file that is finite and not below 0, such as a number of seconds.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{str(value)[:_MOST_DIGITS]} is not a number from 0 on")
    return float(value)


def percentage(value: object) -> float:
    """A number of a file as a percentage.

    Raises:
        ValueError: it is not a number from 0 to 100.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise ValueError(f"{str(value)[:_MOST_DIGITS]} is not a percentage from 0 to 100")
    return float(value)


def whole_number(value: object, *, low: int, high: int) -> int:
    """A number of a file, or text, as a whole number within bounds.

    Raises:
        ValueError: it is anything else.
    """
    digits = value.strip() if isinstance(value, str) else ""
    if digits.isascii() and digits.isdecimal() and len(digits) <= _MOST_DIGITS:
        value = int(digits)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{str(value)[:_MOST_DIGITS]} is not a whole number from {low} to {high}")
    return value


def check_value(value: object) -> None:
    """Check a value of JSON or YAML: how deep it is nested, its numbers, and that its text can be written again.

    Raises:
        ValueError: it holds what `parse_json` refuses.
    """
    seen: set[int] = set()  # YAML may name one list many times
    inside: list[tuple[object, _Place]] = [(value, ())]
    while inside:
        each, place = inside.pop()
        if isinstance(each, dict | list | tuple | set):
            if id(each) in seen:
                continue
            if len(place) == _DEEPEST:
                raise ValueError("it is nested too deep")
            seen.add(id(each))
            if isinstance(each, dict):
                inside += [(key, place) for key in each]
                inside += [(part, (*place, key)) for key, part in each.items()]
            else:
                inside += [(part, (*place, number)) for number, part in enumerate(each)]
        elif problem := _problem(each):
            raise ValueError(f"it holds {problem}" + (f", in `{_shown(place)}`" if place else ""))


def read_json(path: Path, *, what: str, hint: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: the kind of file, for the message, e.g. "run folder".
        hint: the hint where the file is missing or broken.

    Raises:
        ArtifactError: the file is missing, can't be read or is not JSON with sound values.
    """
    try:
        return parse_json(read_regular(path))
    except FileNotFoundError as error:
        raise ArtifactError(f"no {what}: `{path}` does not exist", hint=hint) from error
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        raise ArtifactError(f"{what} can't be read: `{path}`: {reason}", hint=hint) from error


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by the names in its first line.

    Raises:
        OSError: as for `read_regular`.
        ValueError: it is not UTF-8 or CSV, a name appears twice, or a row has more or fewer fields than names.
    """
    try:
        lines = list(csv.reader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"it is not CSV: {error}") from error
    if not lines:
        return []
    names, rows = lines[0], [line for line in lines[1:] if line]
    if len(set(names)) < len(names):
        raise ValueError("its first line names a column twice")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} fields, expected {len(names)}")
    return [dict(zip(names, row, strict=True)) for row in rows]


def read_foreign(path: Path, *, what: str, example: str, again: str) -> bytes:
    """Read a file from an untrusted source; the message says what it is instead, where it is a common mistake.

    Args:
        path: the file.
        what: the kind of file that is expected, for messages, e.g. "weight file".
        example: an example of the name of such a file.
        again: the hint where the file is empty.

    Raises:
        ArtifactError: the file is missing, a folder, unreadable, empty, larger than 2 GiB, a git-lfs pointer or a web
            page.
    """
    try:
        content = read_regular(path, most_bytes=LARGEST_FOREIGN_BYTES)
    except FileNotFoundError as error:
        raise ArtifactError(f"{what} `{path}` does not exist", hint="check the path") from error
    except IsADirectoryError as error:
        raise ArtifactError(
            f"`{path}` is a folder, not the {what}", hint=f"name the file in it, e.g. `{example}`"
        ) from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ArtifactError(
                f"`{path}` is refused: it is larger than 2 GiB", hint=f"name the right {what}"
            ) from error
        if error.filename is not None and not path.is_file() and path.exists():
            raise ArtifactError(
                f"`{path}` is a device or a pipe, not the {what}", hint="name a file on a disk"
            ) from error
        raise ArtifactError(
            f"{what} `{path}` can't be read: {error.strerror or error}", hint="check its permissions and the disk"
        ) from error
    _refuse_stand_in(path, content, what=what, again=again)
    return content


def _refuse_stand_in(path: Path, content: bytes, *, what: str, again: str) -> None:
    """Refuse what often lies in the place of a file that was to be downloaded."""
    if not content:
        raise ArtifactError(f"{what} `{path}` is empty", hint=again)
    if content.startswith(b"version https://git-lfs"):
        raise ArtifactError(
            f"`{path}` is a git-lfs pointer, not the {what} it points to",
            hint="run `git lfs pull` in the repository that it comes from",
        )
    if content[:512].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ArtifactError(
            f"`{path}` is a web page, not the {what}",
            hint="the server answered with a page (a login or an error) instead of the file; download it again",
        )


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8, at byte {error.start}") from error


def _problem(value: object) -> str | None:
    """What is wrong with a number or text; None for a sound one."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    if isinstance(value, int) and abs(value) >= 10**_MOST_DIGITS:
        return f"a whole number of more than {_MOST_DIGITS} digits"
    if isinstance(value, str):
        if "\0" in value:
            return "a zero byte"
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"half of a character (\\u{ord(value[error.start]):04x})"
    return None


def _shown(place: _Place) -> str:
    """The keys that lead to a value, for a message that can be printed."""
    text = ".".join(str(part)[:_MOST_DIGITS] for part in place)
    return text.encode("ascii", "backslashreplace").decode("ascii")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, a number that is not finite")


def _finite_float(text: str) -> float:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"it holds a number of {len(text):,} characters")
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:_MOST_DIGITS]}, a number that is not finite")
    return number


def _short_int(text: str) -> int:
    if len(text.lstrip("-")) > _MOST_DIGITS:
        raise ValueError(f"it holds a whole number of {len(text):,} digits")
    return int(text)


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names the key `{twin[:_MOST_DIGITS]}` twice")
    return found


def _size(num_bytes: int) -> str:
    return f"{num_bytes // 1024**2:,} MiB" if num_bytes >= 1024**2 else f"{num_bytes // 1024:,} KiB"
