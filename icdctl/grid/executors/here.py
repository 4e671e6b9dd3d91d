"""Training packs in this process, one after another."""

from __future__ import annotations

from collections.abc import Sequence

from icdctl import api
from icdctl.api import planning
from icdctl.engine.run import Failure, Interrupted
from icdctl.errors import IcdctlError, is_out_of_memory
from icdctl.grid.cells import GridRun
from icdctl.grid.executors.protocol import Conditions, Trained
from icdctl.grid.grid_observer import PackObserver
from icdctl.grid.packs import HINT_ON_MEMORY, Outcome, Pack, failed, not_begun, stale_outcome
from icdctl.grid.status import run_status, set_aside


class Here:
    """The executor that trains in this process."""

    num_slots = 1

    def train(self, packs: Sequence[Pack], conditions: Conditions, observer: PackObserver) -> Trained:
        """See `Executor`."""
        for pack in packs:
            if conditions.time.is_over:
                yield pack, not_begun(pack)
                continue
            observer.begun(pack, "")
            yield pack, train_pack(pack, conditions, observer)


def train_pack(pack: Pack, conditions: Conditions, observer: PackObserver) -> list[Outcome]:
    """Train a pack in this process. It waits for a run that another process is training.

    Where the pack as a whole fails, its runs are trained one by one, so that each gets its own outcome.

    Args:
        pack: the pack to train.
        conditions: the conditions of all packs.
        observer: receives the progress.

    Returns:
        An outcome for each run, in order.

    Raises:
        Interrupted: the user or the system interrupted the training; the states are saved.
    """
    if conditions.time.is_over:
        return not_begun(pack)
    seconds = conditions.time.seconds
    limit = {} if seconds is None else {"time_limit": f"{max(seconds, 0.001):.3f}"}
    try:
        if conditions.replace:
            for run in pack.runs:
                _replace(run, conditions, observer)
        options = [{**run.options, **limit} for run in pack.runs]
        results = api.start(
            pack.runs[0].cell.command, options, resume=True, wait=True, observer=_EngineObserver(pack, observer)
        )
    except Interrupted:
        raise
    except Exception as error:  # a bug or a lack of memory in one pack must not end the others
        if len(pack.runs) == 1:
            return [_failure(pack.runs[0], error)]
        observer.message(f"{pack.label}: {_described(error)}; they are trained one by one")
        alone = [Pack((run,), pack.epochs) for run in pack.runs]
        return [outcome for each in alone for outcome in train_pack(each, conditions, observer)]
    return [_outcome(run, result) for run, result in zip(pack.runs, results, strict=True)]


class _EngineObserver:
    """Passes what the engine reports about one pack on to the observer of packs."""

    def __init__(self, pack: Pack, observer: PackObserver) -> None:
        self._pack, self._observer = pack, observer
        self._what, self._total, self._here = "", 0, 0

    def begin(self, what: str, total: int) -> None:
        """See `icdctl.engine.observer.Observer`."""
        self._what, self._total, self._here = what, total, 0
        self.advance(0)

    def advance(self, images: int) -> None:
        """See `icdctl.engine.observer.Observer`."""
        self._here += images
        share = f" {100 * self._here / self._total:.0f} %" if self._total else ""
        self._observer.doing(self._pack, f"{self._what}{share}")

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        """See `icdctl.engine.observer.Observer`. Epochs are in the histories of the run folders, for all to read."""

    def message(self, text: str) -> None:
        """See `icdctl.engine.observer.Observer`."""
        self._observer.message(text)


def _replace(run: GridRun, conditions: Conditions, observer: PackObserver) -> None:
    """Move a stale run out of the way."""
    planner = planning.Planner()

    def is_stale() -> bool:
        return run_status(run, planner).state == "stale"

    if is_stale():
        kept = set_aside(run.folder, conditions.root, is_stale=is_stale, waiting=observer.message)
        if kept is not None:
            observer.message(f"{run.label}: the run of other settings is now `{kept}`")


def _outcome(run: GridRun, result: api.RunResult | Failure) -> Outcome:
    if isinstance(result, Failure):
        return failed(run, result.error)
    if not result.finished:
        return Outcome(run.label, "stopped")
    return Outcome(run.label, "done", top1=result.top1, seconds=float(result.metrics["seconds"]))


def _failure(run: GridRun, error: Exception) -> Outcome:
    """The outcome of one run; where its cell was changed while another process trained it, that is the reason."""
    now = run_status(run, planning.Planner())
    if now.state == "stale":
        return stale_outcome(now)
    if isinstance(error, IcdctlError):
        return failed(run, error)
    hint = "train it alone with `icdctl train` or `icdctl distill` to see where that comes from"
    if is_out_of_memory(error):
        hint = HINT_ON_MEMORY
    return Outcome(run.label, "failed", message=_described(error), hint=hint)


def _described(error: Exception) -> str:
    if isinstance(error, IcdctlError):
        return error.message
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(": ")
