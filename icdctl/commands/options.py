"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from icdctl.errors import UsageError

_TRAINING = "Training"
_WHERE = "Where and how long"

DataDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Folder that holds the data sets' folders.",
        show_default="$ICDCTL_DATA or .icdctl/data",
        rich_help_panel=_WHERE,
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="0-4",
        help="Several seeds: a run folder each, trained together, on one teacher.",
        show_default=False,
        rich_help_panel=_TRAINING,
    ),
]
TestImages = Annotated[
    int | None,
    typer.Option(help="How many test images digits100 makes.", show_default="2000", rich_help_panel=_TRAINING),
]
Device = Annotated[
    str | None, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.", show_default="auto", rich_help_panel=_WHERE)
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Start, go on, or finish at once, whatever is there.", rich_help_panel=_WHERE),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A run's config.json, to repeat it.", rich_help_panel=_WHERE),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved configuration; train nothing.", rich_help_panel=_WHERE)
]
FromFile = Annotated[
    Path | None,
    typer.Option("--from", metavar="FILE", help="Take this copy, through the same checks.", show_default=False),
]
Mirror = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Ask here first: http, https or file, a folder of files.", show_default="$ICDCTL_MIRROR"
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Download nothing; say what is missing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else, on stdout.")]


def check_wanted(wanted: Sequence[str], from_file: Path | None, *, example: str) -> None:
    """Of a command that fetches: something is named, and one thing alone where a file is.

    Raises:
        UsageError: it is not so.
    """
    if not wanted:
        raise UsageError("nothing is named", hint=f"e.g. `{example}`; `--list` shows what there is")
    if from_file is not None and len(set(wanted)) != 1:
        raise UsageError(f"`--from` is one file, {len(set(wanted))} are wanted", hint="name the one that it is")
