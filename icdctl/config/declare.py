"""What is declared of each setting of a run: `icdctl.config.settings` declares them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

Command = Literal["train", "distill"]


class Given(Enum):
    """How the user gives a setting on the command line. Files, variables and keywords give all but COMPUTED ones."""

    FLAG = "flag"
    SET = "--set"
    KEYWORD = "keyword"
    """On no command line: a repeated configuration states it."""
    COMPUTED = "computed"
    """Nowhere: icdctl computes it from other settings."""


class Identity(Enum):
    """Whether a run may only be continued with the same value of a setting."""

    ALWAYS = "yes"
    WHEN_CHANGED = "where it is not the default"
    """Only if it is not the default, so that checkpoints from before there was such a setting are still found."""
    NEVER = "no"


class Panel(Enum):
    """Where `--help` shows a flag; the panels come in this order."""

    WHAT = "What"
    TRAINING = "Training"
    WHERE = "Where and how long"


@dataclass(frozen=True)
class Setting:
    """What is declared of a setting besides its type, bounds and default."""

    help: str
    """What to type, and what happens."""
    given: Given = Given.FLAG
    option: str | None = None
    """Name of the option that the setting is computed from, where the user does not give the setting itself."""
    identity: Identity = Identity.ALWAYS
    swept: bool = False
    """Whether `grid --sweep` may change it; it may always change settings that a recipe owns."""
    listed: bool = False
    """Whether one command may give several values, which make several runs."""
    in_run_name: bool = False
    """Whether the default name of a run folder shows a value that is not the default; it always does for recipes'."""
    commands: tuple[Command, ...] = ("train", "distill")
    """Commands that have the flag."""
    flag: str | None = None
    """The flag, where it is not named after the option."""
    flag_of_train: str | None = None
    """The flag of `icdctl train`, where it differs."""
    negative: bool = False
    """Whether there is a flag `--no-...` too."""
    panel: Panel = Panel.TRAINING
    metavar: str | None = None
    datasets: Mapping[str, int | float | bool] = field(default_factory=dict)
    """The data sets that have the setting, with their defaults; none where all have it."""
    shown_default: str | None = None
    """The default in the help, where it is not simply the value."""
