"""The run folder: held by one process, refused where it holds something else, taken away where nothing came of it."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from icdctl import files
from icdctl.config import RunConfig
from icdctl.engine.checkpoint import checkpoint_path
from icdctl.errors import ArtifactError, UsageError


@contextmanager
def claimed(config: RunConfig, *, resume: bool, waiting: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Hold the run folder for one process; a run that dies before its first checkpoint leaves nothing behind.

    Args:
        config: of the run.
        resume: whether a folder that holds this very run is welcome.
        waiting: told that another process is at work in it, which is then waited for; None to fail at once.

    Yields:
        The folder.

    Raises:
        UsageError, ArtifactError: it is in use, or holds something else.
    """
    out = Path(config.out)
    busy = f"run folder `{out}` is in use by another process"
    hint = "wait for it, or choose another folder with `--out`"
    with files.locked(lock_path(out), busy=busy, hint=hint, waiting=waiting):
        existed = out.exists()
        if existed:
            _check_folder(out, config, resume=resume)
        files.make_folder(out)
        try:
            yield out
        finally:
            if not checkpoint_path(config.fingerprint).is_file():
                _remove_new(out, existed)


def lock_path(out: Path) -> Path:
    """The lock of a run folder: beside it, for the folder may turn out to be somebody else's."""
    whole = out.resolve()
    return whole.parent / f".{whole.name}.lock"


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """history.csv, whole: a line an epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "epoch": int(row["epoch"])} for row in history)
    files.write_text(path, text.getvalue())


def _check_folder(out: Path, config: RunConfig, *, resume: bool) -> None:
    """Refuse a folder that holds something else, or a run without `resume`, or another run with it."""
    if not out.is_dir():
        raise ArtifactError(f"`{out}` is a file, not a run folder", hint="choose another folder with `--out`")
    inside = sorted(path.name for path in out.iterdir())
    stated = out / "config.json"
    if not inside:
        return
    if not stated.is_file():
        raise ArtifactError(
            f"`{out}` is not empty and holds no run (`{inside[0]}`)", hint="choose another folder with `--out`"
        )
    if not resume:
        raise ArtifactError(
            f"run folder `{out}` exists",
            hint="go on with it by `--resume`, or choose another folder with `--out`",
        )
    held = files.read_json(stated, what="config", hint=f"delete `{out}` and start again")
    try:
        earlier = RunConfig(**{**held, "out": config.out})
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"`{stated}` is no configuration of this version", hint=f"delete `{out}` and start again"
        ) from error
    if earlier.fingerprint != config.fingerprint:
        new, old = config.identity, earlier.identity
        changed = [_change(key, old[key], new[key]) for key in new if new[key] != old[key]]
        raise UsageError(
            f"run folder `{out}` holds a run with other settings: {', '.join(changed)}",
            hint="resume with the same settings, or choose another folder with `--out`",
        )


def _change(key: str, old: Any, new: Any) -> str:
    """What changed of one key; of settings, which of them; of hashes, their first digits."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in inner)
    return f"{key} {str(old)[:12]} -> {str(new)[:12]}"


def _remove_new(out: Path, existed: bool) -> None:
    """Take away what this attempt put into a folder, and the folder where this attempt made it."""
    for name in ("config.json", "environment.json"):
        (out / name).unlink(missing_ok=True)
    if not existed and out.is_dir() and not any(out.iterdir()):
        shutil.rmtree(out, ignore_errors=True)
