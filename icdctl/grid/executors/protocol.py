"""What every executor promises. `tests/test_executors.py` holds all of them to it."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from icdctl.grid.observer import PackObserver
from icdctl.grid.packs import Outcome, Pack

Trained = Generator[tuple[Pack, list[Outcome]], None, None]
"""Each pack as it is over, with an outcome for each of its runs, in order."""


class TimeLeft:
    """The time that is left for everything together."""

    def __init__(self, seconds: float | None) -> None:
        """
        Args:
            seconds: from now on; None for no limit.
        """
        self._until = None if seconds is None else time.monotonic() + seconds
        self._is_ended = False

    @property
    def seconds(self) -> float | None:
        """Seconds that are left, 0 or less where time is over; None where there is no limit."""
        if self._until is None:
            return None
        return 0.0 if self._is_ended else self._until - time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether no pack should begin any more."""
        seconds = self.seconds
        return seconds is not None and seconds <= 0

    def end(self) -> None:
        """Let no pack begin any more, where there is a limit: one has found that its next epoch would not fit."""
        self._is_ended = True


@dataclass(frozen=True)
class Conditions:
    """What holds for all packs."""

    root: Path
    """The folder of all runs."""
    replace: bool
    """Whether stale runs are moved out of the way and trained again; they fail otherwise."""
    time: TimeLeft


class Executor(Protocol):
    """Trains packs: packs go in, outcomes come out.

    There is no state to hand over from one process to another. A run folder is held by one process, and a run goes on
    from its checkpoint in whichever process trains it next. All processes must see the run folders and the state
    folder.
    """

    @property
    def num_slots(self) -> int:
        """How many packs it trains at a time."""

    def train(self, packs: Sequence[Pack], conditions: Conditions, observer: PackObserver) -> Trained:
        """Train packs until all of them are over.

        Args:
            packs: the packs to train, in the order in which they should begin.
            conditions: what holds for all of them.
            observer: hears of each pack that begins, what it is doing, and what its process says.

        Yields:
            Each pack as it is over. One failing run, and a process that dies, are outcomes: they stop no other run. A
            pack that would begin when `conditions.time.is_over` is over at once, with the outcomes of `not_begun`.
            Closing the generator ends what is at work, with its state saved.

        Raises:
            KeyboardInterrupt, Interrupted: the user or the system interrupted the training; all states are saved, and
                no process is left behind.
        """
