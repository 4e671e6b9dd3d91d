"""A process that trains one pack: `python -m icdctl.grid.worker FOLDER [LABEL...]`.

FOLDER is a `PackFolder`. The labels are only for the user: with them `ps` shows what the worker trains. Messages go to
stderr, a line each. The exit code is 0 where the outcomes are written, 130 or 143 where the worker was interrupted (the
states of its runs are saved), and 1 where it could not train at all.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from icdctl.errors import IcdctlError

if TYPE_CHECKING:
    from icdctl.grid.packs import Pack

_INTERRUPTED, _TERMINATED = 130, 143
_PROGRESS_SECONDS = 0.5
"""Seconds between two lines of progress: a step may take less than a millisecond."""


def main(arguments: list[str]) -> int:
    """Train the pack that a folder describes; return the exit code.

    Args:
        arguments: the folder, then any labels.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        # Not at the head: torch takes seconds, and a signal that comes meanwhile must end this process in order too.
        from icdctl.grid.executors.here import train_pack
        from icdctl.grid.pack_folder import PackFolder

        folder = PackFolder(Path(arguments[0]))
        pack, conditions = folder.read_pack()
        folder.write_outcomes(train_pack(pack, conditions, _Relay(folder.progress)))
    except KeyboardInterrupt as interrupt:
        _say("error: interrupted")
        return _TERMINATED if interrupt.args else _INTERRUPTED
    except IcdctlError as error:
        for message in error.messages:
            _say(f"error: {message}")
        return error.exit_code
    return 0


class _Relay:
    """Writes the progress of the pack to its folder, for the process that started this one."""

    def __init__(self, progress: Path) -> None:
        self._progress = progress
        self._written = -_PROGRESS_SECONDS

    def begun(self, pack: Pack, place: str) -> None:
        """See `icdctl.grid.grid_observer.PackObserver`. The process that started this one knows."""

    def doing(self, pack: Pack, what: str) -> None:
        """See `icdctl.grid.grid_observer.PackObserver`."""
        now = time.monotonic()
        if now - self._written < _PROGRESS_SECONDS:
            return
        self._written = now
        # An orphan continues even if the folder was deleted or its disk is full.
        with suppress(OSError), self._progress.open("a", encoding="utf-8") as file:
            file.write(f"{what}\n")

    def message(self, text: str) -> None:
        """See `icdctl.grid.grid_observer.PackObserver`."""
        _say(text)


def _say(text: str) -> None:
    with suppress(OSError):  # a full disk must not end a training
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _terminate(number: int, frame: FrameType | None) -> None:
    """Stop as on Ctrl-C, so that states are saved; the argument marks it as another signal."""
    raise KeyboardInterrupt(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
