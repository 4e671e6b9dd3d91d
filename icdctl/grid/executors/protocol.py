"""The protocol of executors. `tests/test_executors.py` tests all of them."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from icdctl.grid.grid_observer import PackObserver
from icdctl.grid.packs import Outcome, Pack

Trained = Generator[tuple[Pack, list[Outcome]], None, None]
"""Each pack when it is over, with an outcome for each of its runs, in order."""


class TimeLeft:
    """The time that is left for all packs together."""

    def __init__(self, seconds: float | None) -> None:
        """
        Args:
            seconds: time from now on; None for no limit.
        """
        self._until = None if seconds is None else time.monotonic() + seconds
        self._is_ended = False

    @property
    def seconds(self) -> float | None:
        """Seconds that are left, 0 or less when the time is over; None where there is no limit."""
        if self._until is None:
            return None
        return 0.0 if self._is_ended else self._until - time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether no pack should begin any more."""
        seconds = self.seconds
        return seconds is not None and seconds <= 0

    def end(self) -> None:
        """If there is a limit, let no further pack begin: one found that its next epoch would not fit."""
        self._is_ended = True


@dataclass(frozen=True)
class Conditions:
    """The conditions of all packs."""

    root: Path
    """The folder of all runs."""
    replace: bool
    """Whether stale runs are moved out of the way and trained again; otherwise they fail."""
    time: TimeLeft


class Executor(Protocol):
    """Trains packs: packs go in, outcomes come out.

    Processes pass no state to each other. A run folder is locked by one process, and a run continues from its
    checkpoint in whichever process trains it next. All processes must see the run folders and the state
    folder.
    """

    @property
    def num_slots(self) -> int:
        """Number of packs that it trains at a time."""

    def train(self, packs: Sequence[Pack], conditions: Conditions, observer: PackObserver) -> Trained:
        """Train packs until all of them are over.

        Args:
            packs: the packs to train, in the order in which they should begin.
            conditions: the conditions of all packs.
            observer: receives which pack begins, what it is doing, and the messages of its process.

        Yields:
            Each pack when it is over. A failing run or a dying process is an outcome and stops no other run. A pack
            that would begin when `conditions.time.is_over` is over at once, with the outcomes of `not_begun`. Closing
            the generator ends the packs at work, with their states saved.

        Raises:
            KeyboardInterrupt, Interrupted: the user or the system interrupted the training; all states are saved, and
                no process is left behind.
        """
