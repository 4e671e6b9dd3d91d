"""The status of the runs of a grid: from the files in their folders, and whether those are still what the cells say."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from icdctl import files, teachers
from icdctl.api import planning
from icdctl.engine.run_folder import held, read_config
from icdctl.engine.run_state import differences
from icdctl.errors import ArtifactError, IcdctlError, UsageError
from icdctl.grid.cells import GridRun

State = Literal["done", "begun", "stale", "missing"]
REPLACED = ".replaced"
"""Folder beside the cells that keeps replaced runs."""


@dataclass(frozen=True)
class RunStatus:
    """A run and its state."""

    run: GridRun
    state: State
    """`stale` means that the folder holds a run with other settings than the cell's."""
    changes: str = ""
    """How a stale run differs from its cell: `gamma 4.0 -> 8.0`."""

    def error(self) -> ArtifactError:
        """The error for callers that need the run of the cell, where the folder's run is stale."""
        return ArtifactError(
            f"`{self.run.folder}` holds a run with other settings than the cell `{self.run.cell.name}`: {self.changes}",
            hint="take the change back, or train it again: `icdctl grid run` and `icdctl reproduce` do so with "
            f"`--replace`, and keep the old folder in `{REPLACED}` beside the cells",
        )


def run_statuses(runs: Iterable[GridRun], planner: planning.Planner) -> list[RunStatus]:
    """The status of each run, in order."""
    return [run_status(run, planner) for run in runs]


def run_status(run: GridRun, planner: planning.Planner) -> RunStatus:
    """The status of a run. A run without a folder costs nothing; weights are read once for all runs of a planner."""
    state, changes = state_of(run.folder, run.cell.command, run.options, planner)
    return RunStatus(run, state, changes)


def state_of(
    folder: Path, command: Literal["train", "distill"], options: Mapping[str, object], planner: planning.Planner
) -> tuple[State, str]:
    """The state of the run in a folder, and how it differs from given options.

    Where the teacher is not on this machine, the teacher that the run states is accepted, if it is the same model.

    Args:
        folder: the run folder.
        command: the command that trains such a run.
        options: the options that it should have.
        planner: resolves the configuration.

    Returns:
        The state, and the differences as text: empty unless the run is stale.
    """
    is_done = (folder / "metrics.json").is_file()
    if not (folder / "config.json").is_file():
        return ("stale", "it has metrics, and no `config.json` says of what") if is_done else ("missing", "")
    try:
        earlier = read_config(folder, now_at=str(folder))
    except ArtifactError as error:
        return "stale", error.message
    teacher = (earlier.teacher or "", earlier.teacher_weights or "", earlier.teacher_sha256 or "")
    stand_in = planning.StandIn(_other_model(options.get("teacher"), earlier.teacher) or teacher, earlier.init_sha256)
    try:
        changed = differences(earlier, planner.plan(command, {**options, "out": str(folder)}, stand_in=stand_in))
    except UsageError as error:
        return "stale", f"the cell can't be trained: {error.messages[0]}"
    except IcdctlError:  # something else is missing, e.g. the folder of images: nothing to compare with
        changed = []
    if changed:
        return "stale", ", ".join(changed)
    return ("done" if is_done else "begun"), ""


def _other_model(named: object, earlier: str | None) -> tuple[str, str, str] | None:
    """The teacher of a model's name, where the run had another model."""
    if named is None or earlier is None:
        return None
    try:
        model = teachers.model_of(str(named))
    except IcdctlError:
        return None
    return None if model in (None, earlier) else (str(model), "", "")


def set_aside(
    folder: Path, root: Path, *, is_stale: Callable[[], bool], waiting: Callable[[str], None] | None = None
) -> Path | None:
    """Move a stale run out of the way, and keep it.

    Args:
        folder: the run folder.
        root: the folder of all runs.
        is_stale: called once no other process is at work there, because that process may have replaced the run.
        waiting: called with a message where another process is at work in the folder, which is then waited for; None
            to fail at once.

    Returns:
        The run's new folder; None where there is nothing to move any more.

    Raises:
        ArtifactError: it can't be moved.
    """
    with held(folder, waiting=waiting):
        if not is_stale():
            return None
        place = root / REPLACED / folder.relative_to(root).parent
        files.make_folder(place)
        taken = {path.name for path in place.iterdir()}
        number = next(n for n in range(1, len(taken) + 2) if f"{folder.name}-{n}" not in taken)
        target = place / f"{folder.name}-{number}"
        try:
            shutil.move(folder, target)
        except OSError as error:
            raise files.not_writable(target, error) from error
        return target
