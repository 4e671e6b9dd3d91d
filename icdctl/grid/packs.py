"""Packs: the runs that one process trains together, on one teacher; and the outcome of each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

from icdctl.api import planning
from icdctl.engine.run import together_key
from icdctl.errors import ArtifactError, IcdctlError
from icdctl.grid.cells import GridRun
from icdctl.grid.status import RunStatus, run_status

HINT_ON_MEMORY = "train fewer at a time: a smaller `--together`, fewer `--jobs`, or a smaller `batch_size`"
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """The begin or the end of a run: one line of `runs/grid.jsonl`."""

    label: str
    """`CELL/sSEED`."""
    state: Literal["begun", "done", "stopped", "failed"]
    """`stopped` means by a time limit or an interruption; the same call continues the run."""
    top1: float | None = None
    """Top-1 on the test images after the final epoch, in percent."""
    seconds: float | None = None
    """Seconds of training, all attempts together."""
    message: str = ""
    """Why it stopped or failed."""
    hint: str = ""

    def as_json(self) -> dict[str, object]:
        """All fields that are not empty, for `--json`, the log and other processes."""
        return {key: value for key, value in vars(self).items() if value not in (None, "")}


@dataclass(frozen=True)
class Pack:
    """Runs that are trained in one process."""

    runs: tuple[GridRun, ...]
    epochs: int
    """Epochs of the longest run."""

    @property
    def label(self) -> str:
        """Its name in messages: `kd/s0 and 4 more`."""
        more = f" and {len(self.runs) - 1} more" if len(self.runs) > 1 else ""
        return f"{self.runs[0].label}{more}"


def make_packs(
    runs: Sequence[GridRun], *, most: int, num_slots: int, planner: planning.Planner
) -> tuple[list[Pack], list[Outcome]]:
    """Put runs that can share data and teacher into packs.

    Args:
        runs: the runs to train.
        most: largest number of runs in one pack.
        num_slots: number of packs that are trained at a time; packs are made smaller until no slot stays empty.
        planner: resolves the configurations.

    Returns:
        The packs, and a `failed` outcome for each run whose configuration is wrong or whose teacher is missing.
    """
    groups: dict[tuple[object, ...], list[tuple[GridRun, int]]] = {}
    refused = []
    for run in runs:
        try:
            config = planner.plan(run.cell.command, run.options)
        except IcdctlError as error:
            refused.append(failed(run, error))
            continue
        groups.setdefault(together_key(config), []).append((run, config.epochs))
    num_planned = sum(map(len, groups.values()))
    while True:
        parts = [part for group in groups.values() for part in _split(group, most)]
        if most == 1 or len(parts) >= min(num_slots, num_planned):
            break
        most -= 1
    packs = [Pack(tuple(run for run, _ in part), max(epochs for _, epochs in part)) for part in parts]
    return packs, refused


def _split(group: Sequence[T], most: int) -> list[Sequence[T]]:
    """Parts of about equal size, none larger than `most`."""
    number = -(-len(group) // most)
    bounds = [len(group) * index // number for index in range(number + 1)]
    return [group[first:last] for first, last in pairwise(bounds)]


def failed(run: GridRun, error: IcdctlError) -> Outcome:
    """The outcome of a run that a known error ended."""
    return Outcome(run.label, "failed", message="; ".join(error.messages), hint="; ".join(error.hints))


def stale_outcome(stale: RunStatus) -> Outcome:
    """The outcome of a run that is not trained because its folder holds another run."""
    message = f"the folder holds a run with other settings than the cell: {stale.changes}"
    return failed(stale.run, ArtifactError(message, hint=stale.error().hint))


def not_begun(pack: Pack) -> list[Outcome]:
    """The outcomes of runs for which no time is left."""
    return [Outcome(run.label, "stopped", message="the time limit came first") for run in pack.runs]


def done_before(run: GridRun) -> Outcome:
    """The outcome of a run that is done, read from its metrics."""
    try:
        metrics = run.metrics()
    except IcdctlError as error:
        return failed(run, error)
    return Outcome(run.label, "done", top1=float(metrics["final_top1"]), seconds=metrics.get("seconds"))


def left_behind(pack: Pack, message: str, hint: str) -> list[Outcome]:
    """The outcomes of a pack whose process died: some of its runs may have been done by then.

    Args:
        pack: the pack that was at work.
        message: why the process died.
        hint: what to do about it.
    """
    planner = planning.Planner()
    return [
        done_before(run)
        if run_status(run, planner).state == "done"
        else Outcome(run.label, "failed", message=message, hint=hint)
        for run in pack.runs
    ]
