"""The only module that prints: results on stdout, messages and progress on stderr.

Progress bars and colour appear only on a terminal, and colour never with `NO_COLOR` or `TERM=dumb`; rich takes care of
both.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

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
from icdctl.errors import ArtifactError, without_secrets


class _Stderr(Console):
    """Stderr whose failures are ignored: a closed terminal must not end a training run."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True

    def say(self, text: str) -> None:
        """Print a line with rich's markup, without wrapping it."""
        if not self.quiet:
            try:
                self.print(text, soft_wrap=True)
                return
            except OSError:  # the terminal is gone, the disk that stderr goes to is full, or rich can open no file
                self.quiet = True
        with suppress(OSError):
            os.write(2, f"{Text.from_markup(text).plain}\n".encode())


class _Stdout(io.TextIOWrapper):
    """Stdout that fails once at most: what comes after a failure goes nowhere, as it would fail again at the exit.

    A reader that has closed the pipe, such as `head`, has all that it wants: that is no failure.
    """

    def write(self, text: str, /) -> int:
        """Write text; the number of characters."""
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Send what was written."""
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if not isinstance(error, BrokenPipeError):
            raise error


def guard_stdout() -> None:
    """Prepare stdout of this process: a closed, full or narrow one (ASCII, cp1252) must not be a traceback."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: else the next file that is opened would get what libraries print
            os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Stdout(
            sys.stdout.buffer,
            encoding=sys.stdout.encoding,
            errors="backslashreplace",
            line_buffering=sys.stdout.line_buffering,
            write_through=sys.stdout.write_through,
        )


_shown: list[_Stderr] = []
"""The console of a live display, if one is shown: other lines are printed above it."""


def _stderr() -> _Stderr:
    return _shown[-1] if _shown else _Stderr()


def talk(message: str) -> None:
    """Print one line for the user on stderr."""
    _stderr().say(escape(_printable(without_secrets(message))))


def show_error(messages: Sequence[str], hints: Sequence[str]) -> None:
    """Print on stderr a line per error, a blank line, and a line per hint."""
    console = _stderr()
    for message in messages:
        console.say(f"[bold red]error:[/bold red] {escape(_printable(message))}")
    console.say("")
    for hint in hints:
        console.say(f"[bold]hint:[/bold] {escape(_printable(hint))}")


def show_json(value: object) -> None:
    """Print one JSON object on stdout; a command prints nothing else there.

    Where stdout can't take a character, all are escaped as JSON has it, so that the text stays JSON.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if _encodable(text) != text:
        text = json.dumps(value, indent=2, allow_nan=False)
    _write(text + "\n")


def show_line(text: str) -> None:
    """Print one line of results on stdout."""
    _write("\n".join(map(_printable, text.split("\n"))) + "\n")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout; numbers are aligned to the right.

    In a pipe, each row is one line. On a terminal, empty columns are left out, and a table that is too wide is wrapped
    between words or laid out differently, see `table_layout`.
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
    """A table for a live display; where the terminal is narrow, only the first column is folded."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*(escape(_printable(str(cell))) for cell in row))
    return table


def _write(text: str) -> None:
    """Write to stdout and flush."""
    if sys.stdout is None:
        raise ArtifactError("stdout is closed", hint="leave it open, or send it to a file")
    try:
        sys.stdout.write(_encodable(text))
        sys.stdout.flush()
    except OSError as error:
        raise ArtifactError(
            f"stdout can't be written: {error.strerror}", hint="send it to a place with room"
        ) from error


def _encodable(text: str) -> str:
    """The text with escapes (`\\u732b`) in place of the characters that stdout's encoding does not have."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _printable(text: str) -> str:
    """The text with control characters escaped, since file names and metadata may hold any."""
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    """A character as an escape that shells and Python read; a byte of a name that is no UTF-8 as that byte."""
    number = ord(char)
    if 0xDC80 <= number <= 0xDCFF:  # how Python holds such a byte
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on stderr with the time left; nothing is printed where stderr is not a terminal."""
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
    """A table on stderr that is updated while the block runs; nothing is printed where stderr is not a terminal.

    Args:
        columns: names of the columns.
        state: returns the current rows and a line to show below them; it is called from another thread.
        seconds: time between updates.
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
    """A display of amounts on stderr with rate and time left; nothing is printed where stderr is not a terminal.

    Yields:
        A function that takes the name of some work and its unit, "MB" or "images", and returns the function to call
        with the progress: (bytes or images done, bytes or images in all or None).
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
