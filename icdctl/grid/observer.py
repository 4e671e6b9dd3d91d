"""What a grid reports while it is trained, to the command line or to a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from icdctl.grid.packs import Outcome, Pack


@dataclass(frozen=True)
class GridPlan:
    """What is about to be trained."""

    packs: tuple[Pack, ...]
    refused: tuple[Outcome, ...]
    """Runs that can't be trained, each with its reason."""
    num_done: int
    """Runs that were done before."""
    num_slots: int
    """Packs that are trained at a time."""
    seconds: float | None
    """Forecast of the time that the packs take; None where no run that is done says how long one takes."""
    forecast_is_partial: bool
    """Whether there are cells that the forecast knows nothing about."""

    @property
    def num_to_train(self) -> int:
        """Runs in the packs."""
        return sum(len(pack.runs) for pack in self.packs)

    @property
    def num_runs(self) -> int:
        """Runs of the grid."""
        return self.num_to_train + len(self.refused) + self.num_done


class PackObserver(Protocol):
    """Hears from an executor how its packs go."""

    def begun(self, pack: Pack, place: str) -> None:
        """A pack is at work; `place` says where (`GPU 0`), empty where there is nothing to say."""

    def doing(self, pack: Pack, what: str) -> None:
        """What a pack does at the moment: `decoding images 40 %`."""

    def message(self, text: str) -> None:
        """Something that the user should read, often a line of the engine."""


class GridObserver(PackObserver, Protocol):
    """Hears how the training of a grid goes; it never changes it."""

    def start(self, plan: GridPlan) -> None:
        """Training begins. Runs in `plan.refused` have failed already and are not reported again."""

    def ended(self, pack: Pack, outcomes: Sequence[Outcome]) -> None:
        """A pack is over; an outcome for each of its runs, in order."""

    def stop(self) -> None:
        """Nothing is at work any more, whether all went well, an error came or the user interrupted."""


class SilentGridObserver:
    """Hears everything and says nothing."""

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
