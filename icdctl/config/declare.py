"""What can be declared of a setting of a run. `icdctl.config.settings` declares them all."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

Command = Literal["train", "distill"]


class Given(Enum):
    """How the user gives a setting on the command line. Files, variables and keywords give all but COMPUTED ones."""

    FLAG = "flag"
    SET = "--set"
    KEYWORD = "keyword"
    """Not at all: a repeated configuration states it."""
    COMPUTED = "computed"
    """Not at all, and nowhere else: icdctl works it out from other settings."""


class Identity(Enum):
    """Whether a setting is part of what runs must have in common to continue each other."""

    ALWAYS = "yes"
    WHEN_CHANGED = "where it is not the default"
    """So that checkpoints of runs that began before there was such a setting are still found."""
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
    """Name of the text that the setting is worked out from, where the user does not give the setting itself."""
    identity: Identity = Identity.ALWAYS
    swept: bool = False
    """`grid --sweep` may change it. It may change whatever a recipe owns."""
    listed: bool = False
    """One command may give several values, which make several runs."""
    in_run_name: bool = False
    """The default name of a run folder shows a value that is not the default. It always does for the recipe's."""
    commands: tuple[Command, ...] = ("train", "distill")
    """Which have the flag."""
    flag: str | None = None
    """Its name where it is not that of the option."""
    flag_of_train: str | None = None
    """The same, of `icdctl train` alone."""
    negative: bool = False
    """There is a flag `--no-...` too."""
    panel: Panel = Panel.TRAINING
    metavar: str | None = None
    shown_default: str | None = None
    """What the help says of the default where that is not simply its value."""
