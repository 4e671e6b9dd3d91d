"""Collect the finished runs below some folders, sorted into cells and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from icdctl.errors import ArtifactError, first_few
from icdctl.reporting.finished_runs import TRAIN_AGAIN_HINT, FinishedRun, find_run_folders, read_run
from icdctl.reporting.run_groups import RunGroup, group_runs, without_duplicates


@dataclass(frozen=True)
class CollectedRuns:
    """The finished runs of a report."""

    groups: tuple[RunGroup, ...]
    teachers: Mapping[str, FinishedRun]
    """Hash of a teacher's weights -> the run that trained it, if that run is among the folders."""
    notes: tuple[str, ...] = field(default=())
    """Which folders were left out, and why."""


def collect_runs(paths: Sequence[Path]) -> CollectedRuns:
    """Read the finished runs in these folders, and sort them into groups.

    Args:
        paths: run folders, or folders that hold run folders at any depth.

    Raises:
        ArtifactError: a folder holds no finished run, or a run folder that was named itself is broken.
    """
    runs: dict[Path, FinishedRun] = {}
    notes = []
    for path in paths:
        if (path / "config.json").is_file():
            runs.setdefault(path.resolve(), read_run(path))
            continue
        found = find_run_folders(path)
        for folder in found:
            try:
                runs.setdefault(folder.resolve(), read_run(folder))
            except ArtifactError as error:
                notes.append(f"{folder} is left out: {error.message}")
        if not found:
            raise ArtifactError(
                f"`{path}` holds no finished run", hint="name a run folder: one that `icdctl distill --out DIR` wrote"
            )
    if not runs:
        raise ArtifactError(f"none of {len(notes)} runs can be read: {notes[0]}", hint=TRAIN_AGAIN_HINT)
    unhashed = [str(run.folder) for run in runs.values() if not run.is_hashed]
    if unhashed:
        notes.append(
            f"{len(unhashed)} of {len(runs)} runs have no hashes, because an earlier version of icdctl trained them; "
            f"only their accuracy was compared with their history: {first_few(unhashed, 3)}"
        )
    groups, teachers = group_runs(without_duplicates(runs.values(), notes))
    return CollectedRuns(groups, teachers, tuple(notes))
