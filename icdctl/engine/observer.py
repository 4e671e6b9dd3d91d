"""The protocol by which a run reports its progress."""

from __future__ import annotations

from typing import Protocol

from icdctl.data import OnImages


class Observer(Protocol):
    """Receives the progress of runs; it never changes them."""

    def begin(self, what: str, total: int) -> None:
        """A piece of work begins: `total` images."""

    def advance(self, images: int) -> None:
        """So many more images are done."""

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        """An epoch is over: its row of history, and the number of epochs in all."""

    def message(self, text: str) -> None:
        """A line that the user should read."""


class SilentObserver:
    """An observer that shows nothing."""

    def begin(self, what: str, total: int) -> None:
        """See `Observer`."""

    def advance(self, images: int) -> None:
        """See `Observer`."""

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        """See `Observer`."""

    def message(self, text: str) -> None:
        """See `Observer`."""


def decoding(observer: Observer) -> OnImages:
    """A callback (images done, in all) that passes the progress of decoding to an observer."""
    here = 0

    def advance(done: int, total: int | None) -> None:
        nonlocal here
        if done < here or here == 0:
            here = 0
            observer.begin("decoding images", total or 0)
        observer.advance(done - here)
        here = done

    return advance
