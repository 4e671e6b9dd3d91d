"""The run folder: locked by one process, refused if it holds something else, removed if no epoch was finished."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from icdctl import files, run_files
from icdctl.config.run_config import RunConfig
from icdctl.engine.run_state import ENVIRONMENT_FILE, RunInputs, RunState, claim_state, differences
from icdctl.errors import ArtifactError, UsageError

_WRITTEN = {ENVIRONMENT_FILE, "history.csv", "metrics.json", run_files.WEIGHTS_FILE}
"""Files that a run writes besides its config.json."""
_LENGTH = {"epochs", "max_steps"}
"""Settings that say how long a run is."""


@contextmanager
def claimed(
    config: RunConfig,
    inputs: RunInputs,
    *,
    resume: bool,
    waiting: Callable[[str], None] | None = None,
    message: Callable[[str], None] = lambda text: None,
) -> Iterator[RunState]:
    """Lock the run folder for one process; a run that dies before its first checkpoint leaves nothing behind.

    Args:
        config: the configuration of the run.
        inputs: what else it is made of.
        resume: whether a folder that already holds this run is accepted, and its state taken up.
        waiting: called with a message when another process is at work in it, which is then waited for; None to fail at
            once.
        message: called with what is taken up or discarded.

    Yields:
        The state that the run takes up, or a new one.

    Raises:
        UsageError, ArtifactError: it is in use, or holds something else.
    """
    out = Path(config.out)
    with held(out, waiting=waiting):
        existed = out.exists()
        if existed:
            _check_folder(out, config, resume=resume)
        state = claim_state(config, inputs, resume=resume, message=message)
        files.make_folder(out)
        # A run folder may have been copied: then two folders name one state.
        lock = state.folder.with_name(f".{state.folder.name}.lock")
        busy = f"the state of `{out}`, `{state.folder}`, is in use by another process"
        with files.locked(lock, busy=busy, hint="wait for it", waiting=waiting):
            try:
                yield state
            finally:
                # A finished run whose state was deleted keeps the files that describe it.
                if not state.exists and not (out / "metrics.json").is_file():
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
    name = files.sha256_bytes(str(out.resolve()).encode())[:20]
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
    inside = sorted(path.name for path in out.iterdir() if not _is_remains(path.name))
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
        hint = "resume with the same settings, or choose another folder with `--out`"
        weights = out / run_files.WEIGHTS_FILE
        if weights.is_file() and {text.split()[0] for text in changed} <= _LENGTH:
            hint = f"train on from its weights in another folder: `--init-weights {weights} --out {out}-more`"
        raise UsageError(f"run folder `{out}` holds a run with other settings: {', '.join(changed)}", hint=hint)


def _is_remains(name: str) -> bool:
    """Whether a file is a temporary one of a run that was killed while it wrote there."""
    return any(name.startswith(f".{written}.") for written in ("config.json", *_WRITTEN))


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


def _remove_new(out: Path, existed: bool) -> None:
    """Remove what this attempt put into a folder, and the folder itself if this attempt made it."""
    for name in ("config.json", ENVIRONMENT_FILE):
        (out / name).unlink(missing_ok=True)
    for path in [path for path in out.iterdir() if _is_remains(path.name)]:
        path.unlink(missing_ok=True)
    if not existed and out.is_dir() and not any(out.iterdir()):
        shutil.rmtree(out, ignore_errors=True)
