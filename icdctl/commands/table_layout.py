"""Layout of tables as lines of text: one line per row for programs, and a layout that fits the terminal for users.

No word is broken. A table that is too wide is wrapped between words; if that does not suffice, the first column is put
above the others; if that does not suffice either, each row becomes a record with one line per field.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

Row = Sequence[str]
Line = tuple[str, bool]
"""A text, and whether it is a heading."""

_GAP = "  "
_INDENT = "    "
_MOST_LINES = 3
"""Most lines per row on average; higher rows are hard to read as rows."""
_FEW_COLUMNS = 3
"""A table of up to 3 columns counts as a list and is never laid out as records; long words may exceed the width."""
_LEAST_REMARK = 24


def piped(columns: Row, rows: Sequence[Row], numeric: Sequence[bool]) -> Iterator[str]:
    """The table with one line per row, however wide.

    Args:
        columns: names of the columns.
        rows: a text for each column.
        numeric: for each column, whether it is aligned to the right.
    """
    widths = _natural(columns, rows)
    for row in (columns, *rows):
        yield from _wrapped(row, widths, numeric)


def for_terminal(columns: Row, rows: Sequence[Row], numeric: Sequence[bool], *, width: int) -> Iterator[Line]:
    """The table in a layout that fits the terminal, line by line.

    Args:
        columns: names of the columns; those that are empty in all rows are left out.
        rows: a text for each column.
        numeric: for each column, whether it is aligned to the right.
        width: width of the terminal in characters.
    """
    filled = [place for place in range(len(columns)) if place == 0 or not rows or any(row[place] for row in rows)]
    columns, numeric = [columns[place] for place in filled], [numeric[place] for place in filled]
    rows = [[row[place] for place in filled] for row in rows]
    widths = _fitting(columns, rows, width)
    if widths is not None:
        yield from _as_table(columns, rows, widths, numeric)
        return
    beside = _fitting(columns[1:], [row[1:] for row in rows], width - len(_INDENT))
    if beside is not None:
        yield columns[0], True
        for line in _wrapped(columns[1:], beside, numeric[1:]):
            yield _INDENT + line, True
        for row in rows:
            yield row[0], False
            for line in _wrapped(row[1:], beside, numeric[1:]):
                yield _INDENT + line, False
        return
    yield from _as_records(columns, rows, width)


def _as_table(columns: Row, rows: Sequence[Row], widths: Sequence[int], numeric: Sequence[bool]) -> Iterator[Line]:
    for line in _wrapped(columns, widths, numeric):
        yield line, True
    for row in rows:
        for line in _wrapped(row, widths, numeric):
            yield line, False


def _as_records(columns: Row, rows: Sequence[Row], width: int) -> Iterator[Line]:
    """Each row as its first cell with one line per field below it; empty fields are left out."""
    longest = max(map(cell_len, columns))
    for row in rows:
        yield row[0], True
        for column, cell in zip(columns[1:], row[1:], strict=True):
            lines = _words(cell, width - len(_INDENT) - longest - len(_GAP)) if cell else []
            for number, line in enumerate(lines):
                name = column if number == 0 else ""
                yield f"{_INDENT}{_padded(name, longest)}{_GAP}{line}", False


def _fitting(columns: Row, rows: Sequence[Row], width: int) -> list[int] | None:
    """Column widths that fit, break no word and keep rows low; None where there are none."""
    widest = _natural(columns, rows)
    room = width - len(_GAP) * (len(columns) - 1)
    if sum(widest) <= room:
        return widest
    least = [max(_longest_word(row[place]) for row in (columns, *rows)) for place in range(len(columns))]
    is_list = len(columns) <= _FEW_COLUMNS
    if is_list:
        least[-1] = min(least[-1], max(_LEAST_REMARK, room - sum(least[:-1])))
    left = max(room - sum(least), 0)
    if sum(least) > room and not is_list:
        return None
    found = list(least)
    # Columns that need little more get all of it; the others share the rest.
    waiting = sorted(range(len(columns)), key=lambda place: widest[place] - least[place])
    for number, place in enumerate(waiting):
        more = min(widest[place] - least[place], left // (len(waiting) - number))
        found[place] += more
        left -= more
    heights = [max(len(_words(cell, size)) for cell, size in zip(row, found, strict=True)) for row in rows]
    return found if is_list or sum(heights) <= _MOST_LINES * len(heights) else None


def _natural(columns: Row, rows: Sequence[Row]) -> list[int]:
    return [max(cell_len(row[place]) for row in (columns, *rows)) for place in range(len(columns))]


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=1)


def _words(text: str, width: int) -> list[str]:
    """The text wrapped into lines of whole words; at least one line."""
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False) or [""]


def _wrapped(row: Row, widths: Sequence[int], numeric: Sequence[bool]) -> Iterator[str]:
    """The lines of a row, with its cells wrapped to the widths."""
    cells = [
        [cell] if cell_len(cell) <= width else _words(cell, width) for cell, width in zip(row, widths, strict=True)
    ]
    for number in range(max(map(len, cells))):
        parts = [
            _padded(lines[number] if number < len(lines) else "", width, to_the_right=is_number)
            for lines, width, is_number in zip(cells, widths, numeric, strict=True)
        ]
        yield _GAP.join(parts).rstrip()


def _padded(text: str, width: int, *, to_the_right: bool = False) -> str:
    space = " " * max(width - cell_len(text), 0)
    return space + text if to_the_right else text + space
