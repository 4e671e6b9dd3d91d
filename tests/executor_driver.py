"""All executors, and a process that trains the grid of the current folder by one of them, to be killed or interrupted.

`python executor_driver.py NAME [CELL...]` prints the outcomes as JSON, and messages on stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from icdctl.engine.run import Interrupted
from icdctl.grid import Executor, GridPlan, Here, Outcome, Pack, Subprocesses, read_grid, train_grid

EXECUTORS: dict[str, Callable[[], Executor]] = {
    "here": Here,
    "subprocesses": lambda: Subprocesses(jobs=2),
}
"""Every executor must pass `test_executors.py`: add a line here for a new one."""


class Recorder:
    """Keeps what it hears, and writes messages to stderr."""

    def __init__(self) -> None:
        self.plan: GridPlan | None = None
        self.events: list[tuple[str, str]] = []
        """`begun`, `doing`, `ended`, and the label of the pack; or `stop`."""
        self.messages: list[str] = []

    def start(self, plan: GridPlan) -> None:
        """See `GridObserver`."""
        self.plan = plan

    def begun(self, pack: Pack, place: str) -> None:
        """See `PackObserver`."""
        self.events.append(("begun", pack.label))

    def doing(self, pack: Pack, what: str) -> None:
        """See `PackObserver`."""
        assert what
        self.events.append(("doing", pack.label))

    def message(self, text: str) -> None:
        """See `PackObserver`."""
        self.messages.append(text)
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def ended(self, pack: Pack, outcomes: Sequence[Outcome]) -> None:
        """See `GridObserver`."""
        self.events.append(("ended", pack.label))

    def stop(self) -> None:
        """See `GridObserver`."""
        self.events.append(("stop", ""))


def main() -> int:
    """Train; return the exit code."""
    name, *cells = sys.argv[1:]
    try:
        result = train_grid(read_grid(Path.cwd()).chosen(cells), executor=EXECUTORS[name](), observer=Recorder())
    except (KeyboardInterrupt, Interrupted):
        return 130
    sys.stdout.write(json.dumps([outcome.as_json() for outcome in result.outcomes]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
