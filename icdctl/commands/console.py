"""The one place that prints. stdout is data, stderr is talk.

Progress bars and colour appear on a terminal alone, and never with `NO_COLOR` or `TERM=dumb`; rich sees to both.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from icdctl.commands import table_layout
from icdctl.errors import ArtifactError


class _Stderr(Console):
    """Stderr, for a person who may have left: what can't be told any more must not end a training."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def on_broken_pipe(self) -> None:
        """Say nothing from now on."""
        self.quiet = True

    def say(self, text: str) -> None:
        """A line with rich's markup, however long."""
        try:
            self.print(text, soft_wrap=True)
        except OSError:  # the terminal is gone, or the disk that stderr goes to is full
            self.quiet = True


_shown: list[_Stderr] = []
"""Where a display is under way: lines go above it."""


def _stderr() -> _Stderr:
    return _shown[-1] if _shown else _Stderr()


def talk(message: str) -> None:
    """One line for the person at the terminal, on stderr."""
    _stderr().say(escape(_printable(message)))


def show_error(messages: Sequence[str], hints: Sequence[str]) -> None:
    """What is wrong, a blank line, and what to do about it, on stderr, a line each."""
    console = _stderr()
    for message in messages:
        console.say(f"[bold red]error:[/bold red] {escape(_printable(message))}")
    console.say("")
    for hint in hints:
        console.say(f"[bold]hint:[/bold] {escape(_printable(hint))}")


def show_json(value: Any) -> None:
    """One JSON object on stdout, and nothing else there."""
    _write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def show_line(text: str) -> None:
    """One line of data on stdout."""
    _write("\n".join(map(_printable, text.split("\n"))) + "\n")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; numbers are aligned to the right.

    Piped, each row is one line. On a terminal columns that say nothing are left out, and what is too wide for it is
    wrapped between words, or laid out in another way.
    """
    shown = [[_printable(str(cell)) for cell in row] for row in rows]
    numeric = [bool(rows) and all(isinstance(row[place], int | float) for row in rows) for place in range(len(columns))]
    if sys.stdout is None or not sys.stdout.isatty():
        _write("".join(f"{line}\n" for line in table_layout.piped(columns, shown, numeric)))
        return
    text = io.StringIO()
    console = Console(file=text, highlight=False, width=Console().width, force_terminal=True)
    for line, is_heading in table_layout.for_terminal(columns, shown, numeric, width=console.width):
        console.print(Text(line, style="bold" if is_heading else ""), soft_wrap=True)
    _write(text.getvalue())


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """One that changes while it is shown: where there is little room, the first column alone gives way."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*(escape(_printable(str(cell))) for cell in row))
    return table


def _write(text: str) -> None:
    """To stdout, at once. Whoever stopped reading wants no more of it, and that is no failure."""
    if sys.stdout is None:
        raise ArtifactError("stdout is closed", hint="leave it open, or send it to a file")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        # What is left in the buffer would fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ArtifactError(
            f"stdout can't be written: {error.strerror}", hint="send it to a place with room"
        ) from error


def _printable(text: str) -> str:
    """The text with control characters spelled out: file names and metadata may hold any."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on stderr with the time left; it prints nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
        transient=False,
    ) as display:
        yield display


@contextmanager
def live_table(
    columns: Sequence[str], state: Callable[[], tuple[Sequence[Sequence[object]], str]], *, seconds: float = 1.0
) -> Iterator[None]:
    """A table on stderr that keeps up with what is going on; nothing where stderr is not a terminal.

    Args:
        columns: their names.
        state: the rows as they are now, and a line below them; it is asked from another thread.
        seconds: from one time to the next.
    """
    if not sys.stderr.isatty():
        yield
        return

    def render() -> Group:
        rows, line = state()
        return Group(_table(columns, rows), escape(_printable(line)))

    console = _Stderr()
    with Live(get_renderable=render, console=console, refresh_per_second=1 / seconds, transient=True):
        _shown.append(console)
        try:
            yield
        finally:
            _shown.remove(console)


@contextmanager
def amounts() -> Iterator[Callable[[str, str], Callable[[int, int | None], None]]]:
    """A display of amounts on stderr with rate and time left, likewise silent where stderr is not a terminal.

    Yields:
        From what is under way and its unit, "MB" or "images", to a function of (bytes or images here, in all).
    """
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        disable=not sys.stderr.isatty(),
        transient=True,
    ) as display:

        def begin(name: str, unit: str) -> Callable[[int, int | None], None]:
            number = display.add_task(name, total=None, amount="", visible=False)
            scale = 1e6 if unit == "MB" else 1.0
            digits = 1 if unit == "MB" else 0

            def show(here: int, total: int | None) -> None:
                speed = next(task.speed for task in display.tasks if task.id == number) or 0.0
                amount = f"{here / scale:,.{digits}f} {unit}, {speed / scale:,.{digits}f} {unit}/s"
                display.update(number, completed=here, total=total, amount=amount, visible=True)

            return show

        yield begin
