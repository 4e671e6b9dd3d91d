"""The run folder: locked by one process, refused if it holds something else, removed if no epoch was finished."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from icdctl import files, run_files
from icdctl.config.run_config import RunConfig
from icdctl.engine.checkpoint import checkpoint_path
from icdctl.errors import ArtifactError, UsageError

_WRITTEN = {"environment.json", "history.csv", "metrics.json", run_files.WEIGHTS_FILE}
"""Files that a run writes besides its config.json."""


@contextmanager
def claimed(config: RunConfig, *, resume: bool, waiting: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Lock the run folder for one process; a run that dies before its first checkpoint leaves nothing behind.

    Args:
        config: the configuration of the run.
        resume: whether a folder that already holds this run is accepted.
        waiting: called with a message when another process is at work in it, which is then waited for; None to fail at
            once.

    Yields:
        The folder.

    Raises:
        UsageError, ArtifactError: it is in use, or holds something else.
    """
    out = Path(config.out)
    with held(out, waiting=waiting):
        existed = out.exists()
        if existed:
            _check_folder(out, config, resume=resume)
        files.make_folder(out)
        try:
            yield out
        finally:
            # A finished run whose state was deleted keeps the files that describe it.
            if not checkpoint_path(config.fingerprint).is_file() and not (out / "metrics.json").is_file():
                _remove_new(out, existed)


@contextmanager
def held(out: Path, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Lock a run folder for one process, whatever is in it.

    There are two locks: one beside the folder, for all processes that see it; one in the state folder, because a
    pipeline deletes a stage's outputs, the first lock among them, while a trainer that outlived its pipeline may
    still be at work.

    Args:
        out: the run folder.
        waiting: called with a message when another process is at work in it, which is then waited for; None to fail at
            once.

    Raises:
        ArtifactError: it is in use, or can't be written to.
    """
    busy = f"run folder `{out}` is in use by another process"
    hint = "wait for it, or choose another folder with `--out`"
    with (
        files.locked(state_lock_path(out), busy=busy, hint=hint, waiting=waiting),
        files.locked(lock_path(out), busy=busy, hint=hint, waiting=waiting),
    ):
        yield


def lock_path(out: Path) -> Path:
    """The lock of a run folder: beside it, because the folder may turn out to belong to something else."""
    whole = out.resolve()
    return whole.parent / f".{whole.name}.lock"


def state_lock_path(out: Path) -> Path:
    """The lock of a run folder in the state folder, held by the process that writes the run's state there."""
    name = files.sha256_bytes(os.fsencode(out.resolve()))[:20]
    return files.state_folder() / "locks" / f"{name}.lock"


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """The whole text of history.csv: one line per epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "epoch": int(row["epoch"])} for row in history)
    files.write_text(path, text.getvalue())


def _check_folder(out: Path, config: RunConfig, *, resume: bool) -> None:
    """Refuse a folder that holds something else, an existing run without `resume`, or another run with it."""
    if not out.is_dir():
        raise ArtifactError(f"`{out}` is a file, not a run folder", hint="choose another folder with `--out`")
    inside = sorted(path.name for path in out.iterdir())
    stated = out / "config.json"
    if not inside:
        return
    if not stated.is_file():
        if resume and _WRITTEN.issuperset(inside):  # by a run whose folder was taken away under it
            return
        raise ArtifactError(
            f"`{out}` is not empty and holds no run (`{inside[0]}`)", hint="choose another folder with `--out`"
        )
    if not resume:
        raise ArtifactError(
            f"run folder `{out}` exists",
            hint="continue it with `--resume`, or choose another folder with `--out`",
        )
    changed = differences(read_config(out, now_at=config.out), config)
    if changed:
        raise UsageError(
            f"run folder `{out}` holds a run with other settings: {', '.join(changed)}",
            hint="resume with the same settings, or choose another folder with `--out`",
        )


def read_config(out: Path, *, now_at: str) -> RunConfig:
    """The configuration of the run that a folder holds.

    Args:
        out: the run folder.
        now_at: the value of `out` to use instead of the recorded one, because folders are moved.

    Raises:
        ArtifactError: it can't be read, or is of another version.
    """
    path, hint = out / "config.json", f"delete `{out}` and start again"
    stated = files.read_json(path, what="config", hint=hint)
    try:
        return RunConfig(**{**stated, "out": now_at})
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"`{path}` is not a configuration of this version", hint=hint) from error


def differences(earlier: RunConfig, config: RunConfig) -> list[str]:
    """What makes two runs different, e.g. `gamma 4.0 -> 8.0`; empty where one may continue the other."""
    new, old = config.identity, earlier.identity
    return [_change(key, old[key], new[key]) for key in new if new[key] != old[key]]


def _change(key: str, old: Any, new: Any) -> str:
    """The change of one key: for settings, each that changed; for hashes, their first digits."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in inner)
    return f"{key} {str(old)[:12]} -> {str(new)[:12]}"


def _remove_new(out: Path, existed: bool) -> None:
    """Remove what this attempt put into a folder, and the folder itself if this attempt made it."""
    for name in ("config.json", "environment.json"):
        (out / name).unlink(missing_ok=True)
    if not existed and out.is_dir() and not any(out.iterdir()):
        shutil.rmtree(out, ignore_errors=True)
