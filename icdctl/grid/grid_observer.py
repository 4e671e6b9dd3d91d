"""What a grid reports while it is trained, to the command line or to a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from icdctl.grid.packs import Outcome, Pack


@dataclass(frozen=True)
class GridPlan:
    """The runs that are about to be trained."""

    packs: tuple[Pack, ...]
    refused: tuple[Outcome, ...]
    """Runs that can't be trained, each with its reason."""
    num_done: int
    """Number of runs that were done before."""
    num_slots: int
    """Number of packs that are trained at a time."""
    seconds: float | None
    """Forecast of the time that the packs take; None where that is not known."""
    forecast_is_partial: bool
    """Whether there are cells that the forecast knows nothing about."""

    @property
    def num_to_train(self) -> int:
        """Number of runs in the packs."""
        return sum(len(pack.runs) for pack in self.packs)

    @property
    def num_runs(self) -> int:
        """Number of runs of the grid."""
        return self.num_to_train + len(self.refused) + self.num_done


class PackObserver(Protocol):
    """Receives the progress of packs from an executor."""

    def begun(self, pack: Pack, place: str) -> None:
        """A pack is at work; `place` says where (`GPU 0`), empty where that needs no mention."""

    def doing(self, pack: Pack, what: str) -> None:
        """What a pack does at the moment: `decoding images 40 %`."""

    def message(self, text: str) -> None:
        """A line that the user should read, often from the engine."""


class GridObserver(PackObserver, Protocol):
    """Receives the progress of a grid; it never changes the training."""

    def start(self, plan: GridPlan) -> None:
        """Training begins. Runs in `plan.refused` have failed already and are not reported again."""

    def ended(self, pack: Pack, outcomes: Sequence[Outcome]) -> None:
        """A pack is over; an outcome for each of its runs, in order."""

    def stop(self) -> None:
        """Training has ended: all packs are over, an error occurred, or the user interrupted."""


class SilentGridObserver:
    """An observer that shows nothing."""

    def start(self, plan: GridPlan) -> None:
        """See `GridObserver`."""

    def begun(self, pack: Pack, place: str) -> None:
        """See `PackObserver`."""

    def doing(self, pack: Pack, what: str) -> None:
        """See `PackObserver`."""

    def message(self, text: str) -> None:
        """See `PackObserver`."""

    def ended(self, pack: Pack, outcomes: Sequence[Outcome]) -> None:
        """See `GridObserver`."""

    def stop(self) -> None:
        """See `GridObserver`."""
