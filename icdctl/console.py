"""The one place that prints. stdout is data, stderr is talk.

Progress bars and colour appear on a terminal alone, and never with `NO_COLOR` or `TERM=dumb`; rich sees to both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
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


def talk(message: str) -> None:
    """One line for the person at the terminal, on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(escape(message))


def warn(message: str) -> None:
    """A line on stderr that starts with `warning:`."""
    talk(f"warning: {message}")


def show_error(message: str, hint: str) -> None:
    """An error, a blank line, and what to do about it, on stderr."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/bold red] {escape(message)}\n\n[bold]hint:[/bold] {escape(hint)}")


def show_json(value: Any) -> None:
    """One JSON object on stdout, and nothing else there."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def show_line(text: str) -> None:
    """One line of data on stdout."""
    sys.stdout.write(text + "\n")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """A table on stdout; numbers are aligned to the right. Piped output is plain text and never cut."""
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, highlight=False, width=None if terminal else 200)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


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
        disable=not console.is_terminal,
        transient=False,
    ) as display:
        yield display


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
        disable=not console.is_terminal,
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
