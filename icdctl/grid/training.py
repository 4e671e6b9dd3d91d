"""Training a grid: find what is missing, put it into packs, hand these to an executor, log and report what happens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from icdctl import files
from icdctl.api import planning
from icdctl.config.run_config import check_device, parse_duration
from icdctl.engine.run import Interrupted
from icdctl.errors import IcdctlError, combine
from icdctl.grid.cells import Grid
from icdctl.grid.executors.here import Here
from icdctl.grid.executors.protocol import Conditions, Executor, TimeLeft
from icdctl.grid.forecast import forecast_cells
from icdctl.grid.grid_observer import GridObserver, GridPlan, SilentGridObserver
from icdctl.grid.packs import Outcome, Pack, make_packs, stale_outcome
from icdctl.grid.status import RunStatus, run_statuses

LOG_FILE = "grid.jsonl"
"""In the folder of all runs: a line for each run that begins, is done, stops or fails."""
MOST_TOGETHER = 8
"""Largest number of runs in one pack, where the caller names none."""


@dataclass(frozen=True)
class GridResult:
    """The outcomes of the runs of a grid."""

    outcomes: tuple[Outcome, ...]
    """Runs that were trained now, were stopped, or failed."""
    num_before: int
    """Number of runs that were done before."""

    @property
    def failed(self) -> list[Outcome]:
        """Runs that failed."""
        return [outcome for outcome in self.outcomes if outcome.state == "failed"]

    @property
    def is_stopped(self) -> bool:
        """Whether a time limit stopped some runs: the same call continues them."""
        return any(outcome.state == "stopped" for outcome in self.outcomes)

    def error(self) -> IcdctlError:
        """All failures as one error; runs that failed for the same reason share a line."""
        labels: dict[tuple[str, str], list[str]] = {}
        for each in self.failed:
            labels.setdefault((each.message, each.hint or "see above"), []).append(each.label)
        problems = [
            IcdctlError(f"`{names[0]}`{f' and {len(names) - 1} more' if names[1:] else ''}: {message}", hint=hint)
            for (message, hint), names in labels.items()
        ]
        return combine(problems)


def train_grid(
    grid: Grid,
    *,
    executor: Executor | None = None,
    together: int = MOST_TOGETHER,
    replace: bool = False,
    time_limit: str | float | None = None,
    device: str | None = None,
    observer: GridObserver | None = None,
) -> GridResult:
    """Train every run of a grid that is not done. One that fails does not stop the others.

    Call it again with the same grid after any interruption: each run continues from its last checkpoint.
    `grid.jsonl` in the grid's folder gets a line for each run that begins or ends.

    Args:
        grid: the runs, e.g. from `read_grid`.
        executor: trains the packs; by default this process.
        together: largest number of runs in one process, on one teacher.
        replace: whether runs of other settings are trained again, their old folders kept in `.replaced` beside the
            cells; they fail otherwise.
        time_limit: the limit for all runs together: `90m`, or seconds.
        device: the device of all runs, in place of their own.
        observer: receives the progress.

    Returns:
        The outcome of each run; a failure is not raised, see `GridResult.error`.

    Raises:
        UsageError: the time limit is not a duration, or there is no such device.
        Interrupted, KeyboardInterrupt: the user or the system interrupted the training; the states are saved.
    """
    training = GridTraining(
        executor=executor, together=together, replace=replace, time_limit=time_limit, device=device, observer=observer
    )
    return training.train(grid)


class GridTraining:
    """Trains grids, one after another, by one executor and within one time limit."""

    def __init__(
        self,
        *,
        executor: Executor | None = None,
        together: int = MOST_TOGETHER,
        replace: bool = False,
        time_limit: str | float | None = None,
        device: str | None = None,
        observer: GridObserver | None = None,
    ) -> None:
        """See `train_grid` for the arguments; the time limit counts from now."""
        if device is not None:
            check_device(device)
        self.time = TimeLeft(parse_duration(time_limit))
        self._device, self._together, self._replace = device, together, replace
        self._executor: Executor = Here() if executor is None else executor
        self._observer: GridObserver = SilentGridObserver() if observer is None else observer

    def train(self, grid: Grid, *, is_tested: bool = True) -> GridResult:
        """Train what is missing of one grid.

        Args:
            grid: the runs.
            is_tested: whether accuracies on the test images are reported and logged. Those of trials are not, since
                trials must not be chosen by them.

        Raises:
            Interrupted, KeyboardInterrupt: see `train_grid`.
        """
        wanted = grid if self._device is None else grid.given({"device": self._device})
        plan = self._plan(wanted)
        _write_log(wanted.folder, plan.refused)
        try:
            self._observer.start(plan)
            with same_command_continues():
                trained = self._train(plan.packs, wanted.folder, is_tested)
        finally:
            self._observer.stop()
        return GridResult((*plan.refused, *trained), plan.num_done)

    def _plan(self, grid: Grid) -> GridPlan:
        planner = planning.Planner()
        statuses = run_statuses(grid.runs, planner)
        missing = [each.run for each in statuses if each.state != "done" and (self._replace or each.state != "stale")]
        num_slots = self._executor.num_slots
        packs, refused = make_packs(missing, most=self._together, num_slots=num_slots, planner=planner)
        if not self._replace:
            refused = [stale_outcome(each) for each in statuses if each.state == "stale"] + refused
        seconds, is_partial = _seconds_left(grid, statuses, min(num_slots, len(packs)))
        return GridPlan(
            tuple(packs),
            tuple(refused),
            num_done=sum(each.state == "done" for each in statuses),
            num_slots=num_slots,
            seconds=seconds,
            forecast_is_partial=is_partial,
        )

    def _train(self, packs: Sequence[Pack], folder: Path, is_tested: bool) -> list[Outcome]:
        """Let the executor train packs; log and report each one when it is over."""
        watched = _Watched(folder, self._observer)
        found: list[Outcome] = []
        try:
            with closing(self._executor.train(packs, Conditions(folder, self._replace, self.time), watched)) as trained:
                for pack, outcomes in trained:
                    shown = outcomes if is_tested else [dataclasses.replace(each, top1=None) for each in outcomes]
                    watched.end(pack, shown)
                    found += shown
                    if any(outcome.state == "stopped" for outcome in shown):
                        self.time.end()
        except (KeyboardInterrupt, IcdctlError):
            watched.log_interruption()
            raise
        return found


class _Watched:
    """Logs what an executor reports, and passes it on to the observer of the grid."""

    def __init__(self, folder: Path, observer: GridObserver) -> None:
        self._folder, self._observer = folder, observer
        self._at_work: list[Pack] = []

    def begun(self, pack: Pack, place: str) -> None:
        """See `icdctl.grid.grid_observer.PackObserver`."""
        self._at_work.append(pack)
        self._observer.begun(pack, place)
        _write_log(self._folder, [Outcome(run.label, "begun") for run in pack.runs])

    def doing(self, pack: Pack, what: str) -> None:
        """See `icdctl.grid.grid_observer.PackObserver`."""
        self._observer.doing(pack, what)

    def message(self, text: str) -> None:
        """See `icdctl.grid.grid_observer.PackObserver`."""
        self._observer.message(text)

    def end(self, pack: Pack, outcomes: Sequence[Outcome]) -> None:
        """A pack is over, whether it was ever at work or not."""
        if pack in self._at_work:
            self._at_work.remove(pack)
        _write_log(self._folder, outcomes)
        self._observer.ended(pack, outcomes)

    def log_interruption(self) -> None:
        """Log that the packs that were at work are stopped."""
        runs = [run for pack in self._at_work for run in pack.runs]
        _write_log(self._folder, [Outcome(run.label, "stopped", message="interrupted") for run in runs])


def _write_log(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Append a line for each outcome: time, label, state, and what else is known.

    Args:
        folder: the folder of all runs.
        outcomes: what has just happened.

    Raises:
        ArtifactError: the log can't be written.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    lines = [json.dumps({"time": now, **outcome.as_json()}, ensure_ascii=False) + "\n" for outcome in outcomes]
    path = folder / LOG_FILE
    files.make_folder(folder)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:
        raise files.not_writable(path, error) from error


def _seconds_left(grid: Grid, statuses: Sequence[RunStatus], num_at_once: int) -> tuple[float | None, bool]:
    """Forecast of the time that is left, and whether cells are missing from it.

    Args:
        grid: the runs.
        statuses: the status of each run, in order.
        num_at_once: number of packs at a time; 0 where there is nothing to train.
    """
    if num_at_once == 0:
        return None, False
    hours = [row.hours_left for row in forecast_cells(grid, known=statuses)]
    known = sum(each for each in hours if each is not None)
    return (3600 * known / num_at_once if known else None), None in hours


@contextmanager
def same_command_continues() -> Iterator[None]:
    """If a run in the block is interrupted, let the hint name the command for all runs, not the one for that run.

    Raises:
        Interrupted: with that hint.
    """
    try:
        yield
    except Interrupted as error:
        interrupted = Interrupted(error.message, hint="run the same command again to continue from there")
        interrupted.exit_code = error.exit_code
        raise interrupted from error
