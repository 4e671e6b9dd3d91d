"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from icdctl.errors import UsageError

_TRAINING = "Training"
_WHERE = "Where and how long"

Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="0-4",
        help="Train once with each of these seeds (`0-4` or `0,3,7`), together, each in its own run folder.",
        show_default=False,
        rich_help_panel=_TRAINING,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the run in this folder from its last checkpoint; start it if there is none.",
        rich_help_panel=_WHERE,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Repeat a run: take every setting from its `config.json`; flags override it.",
        rich_help_panel=_WHERE,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print all settings, as they would be used, as JSON; train nothing.", rich_help_panel=_WHERE
    ),
]
FromFile = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Take this file instead of a download; it is verified in the same way.",
        show_default=False,
    ),
]
Mirror = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Try this folder of files first: an `http:`, `https:` or `file:` address.",
        show_default="$ICDCTL_MIRROR",
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Download nothing; fail where something is missing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


def check_wanted(wanted: Sequence[str], from_file: Path | None, *, example: str) -> None:
    """Check that a fetching command names something to fetch, and only one thing where it names a file.

    Raises:
        UsageError: nothing is named, or several things with one file.
    """
    if not wanted:
        raise UsageError("nothing is named", hint=f"e.g. `{example}`; `--list` shows what there is")
    if from_file is not None and len(set(wanted)) != 1:
        raise UsageError(f"`--from` gives one file for {len(set(wanted))} names", hint="name only what that file holds")
