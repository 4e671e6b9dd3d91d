"""The progress of a grid: a row for each pack that is at work, and how much is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from icdctl.grid.grid_observer import GridPlan
from icdctl.grid.packs import Outcome, Pack

COLUMNS = ("at work on", "on", "epoch", "top-1", "time", "left")


@dataclass
class _Work:
    """A pack at work."""

    pack: Pack
    place: str
    begun: float
    epochs_before: int
    """Epochs of all its runs together, before this attempt."""
    doing: str = ""


class GridProgress:
    """Follows packs by the histories in their run folders, where every executor writes them."""

    def __init__(self, plan: GridPlan) -> None:
        """
        Args:
            plan: what is about to be trained.
        """
        self._num_runs, self._num_before = plan.num_runs, plan.num_done
        self._work: dict[str, _Work] = {}
        self._states = Counter(outcome.state for outcome in plan.refused)
        self._started = time.monotonic()

    def begin(self, pack: Pack, place: str) -> None:
        """A pack is at work; `place` is the GPU, or empty."""
        self._work[pack.label] = _Work(pack, place, time.monotonic(), _epochs(pack)[0])

    def doing(self, pack: Pack, what: str) -> None:
        """What a pack does before its first epoch is over: decoding images, filling the teacher cache."""
        if pack.label in self._work:
            self._work[pack.label].doing = what

    def end(self, pack: Pack, outcomes: Sequence[Outcome]) -> None:
        """A pack is over, whether it was ever at work or not."""
        self._work.pop(pack.label, None)
        self._states.update(outcome.state for outcome in outcomes)

    @property
    def counts(self) -> str:
        """`5 of 12 runs done, 1 failed`."""
        done = self._num_before + self._states["done"]
        others = [f"{number} {state}" for state, number in sorted(self._states.items()) if state != "done"]
        return ", ".join([f"{done} of {self._num_runs} runs done", *others])

    def state(self) -> tuple[list[list[object]], str]:
        """Rows under `COLUMNS`, and a line on the whole grid; may be called from another thread."""
        now = time.monotonic()
        rows = [self._row(work, now) for work in list(self._work.values())]
        return rows, f"{self.counts}, {duration(now - self._started)} so far"

    def _row(self, work: _Work, now: float) -> list[object]:
        pack, spent = work.pack, now - work.begun
        done, least, top1 = _epochs(pack)
        new = done - work.epochs_before
        left = max(0, len(pack.runs) * pack.epochs - done)
        reached = f"{sum(top1) / len(top1):.2f}" if top1 else ""
        return [
            pack.label,
            work.place,
            f"{least}/{pack.epochs}" if new or not work.doing else work.doing,
            reached,
            duration(spent),
            duration(spent / new * left) if new else "",
        ]


def _epochs(pack: Pack) -> tuple[int, int, list[float]]:
    """Epochs of all runs together, epochs of the run that has done the fewest, and the last top-1 of each run."""
    histories = [run.history for run in pack.runs]
    top1 = []
    for history in histories:
        if history:
            last = history[-1]
            top1.append(last["test_top1"] if "test_top1" in last else last["val_top1"])
    return sum(map(len, histories)), min(map(len, histories)), top1


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
