"""The files of a run folder: their names, and checks that weights and numbers are those that the run wrote.

metrics.json carries the hashes of the other files and of itself. What differs between two runs of one result is left
out of them: times, folders and the device. The times are compared with each other instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from icdctl import files
from icdctl.errors import ArtifactError

WEIGHTS_FILE = "student.safetensors"
CONFIG_FILE, HISTORY_FILE, METRICS_FILE = "config.json", "history.csv", "metrics.json"
HASH_KEY = "weights_sha256"
"""Key in metrics.json for the hash of the weights in the same folder."""
HISTORY_HASH_KEY = "history_sha256"
"""Key for the hash of the rows of history.csv without their column `seconds`."""
CONFIG_HASH_KEY = "config_sha256"
"""Key for the hash of the content of config.json without `NOT_OF_THE_RESULT`."""
METRICS_HASH_KEY = "metrics_sha256"
"""Key for the hash of the content of metrics.json without this key and the times."""
NOT_OF_THE_RESULT = (
    "checkpoint_every",
    "data_dir",
    "device",
    "init_weights",
    "out",
    "teacher_mode",
    "teacher_precision",
    "teacher_weights",
    "time_limit_seconds",
)
"""Settings that do not belong to the identity of a run."""
_TIMES = ("seconds", "images_per_second")
_AGREEING_SECONDS = 1e-6
"""Largest relative difference between the seconds of a run and the sum of those of its epochs."""
_PERCENTAGES = ("_top1", "_top5")
"""How the names of columns in percent end."""
_LONGEST_SHOWN = 40
_MOST_SHOWN = 10


def write_again_hint(run_folder: Path) -> str:
    """What to do about a run folder with a changed file."""
    return (
        f"restore the file from a copy, e.g. with `dvc checkout`; or repeat the run's command with `--resume --out "
        f"{run_folder}`, which writes it again from the run's state; or train it again"
    )


def hashes(run_folder: Path, metrics: Mapping[str, object]) -> dict[str, str]:
    """The entries of metrics.json that `check_numbers` compares.

    Args:
        run_folder: a folder with the final history.csv and config.json.
        metrics: all other entries.

    Raises:
        ArtifactError: one of the files can't be read.
    """
    found = {
        HISTORY_HASH_KEY: _history_sha256(run_folder / HISTORY_FILE, hint="train it again"),
        CONFIG_HASH_KEY: _config_sha256(run_folder / CONFIG_FILE, hint="train it again"),
    }
    return {**found, METRICS_HASH_KEY: _metrics_sha256({**metrics, **found})}


def check_numbers(run_folder: Path, metrics: object, *, hint: str | None = None) -> None:
    """Refuse a run whose metrics, history or configuration has changed since the run wrote it.

    Metrics of an earlier version have no hashes; then only their final accuracy is compared with history.csv.

    Args:
        run_folder: the run folder.
        metrics: the content of its metrics.json; one that is not an object is not refused here.
        hint: the hint of the error; None for `write_again_hint`.

    Raises:
        ArtifactError: a hash differs, two numbers that must agree do not, or a hashed file can't be read.
    """
    if not isinstance(metrics, dict):
        return
    hint = write_again_hint(run_folder) if hint is None else hint
    for key, path, digest in (
        (METRICS_HASH_KEY, run_folder / METRICS_FILE, lambda path, hint: _metrics_sha256(metrics)),
        (HISTORY_HASH_KEY, run_folder / HISTORY_FILE, _history_sha256),
        (CONFIG_HASH_KEY, run_folder / CONFIG_FILE, _config_sha256),
    ):
        stated = metrics.get(key)
        found = None if stated is None else digest(path, hint=hint)
        if found != stated:
            raise ArtifactError(
                f"`{path}` has changed since its run wrote it: the hash of its content is {str(found)[:12]}..., "
                f"`{run_folder / METRICS_FILE}` states {str(stated)[:12]}...",
                hint=hint,
            )
    _check_agreement(run_folder, metrics, hint)


def is_hashed(metrics: Mapping[str, object]) -> bool:
    """Whether metrics.json carries the hashes that `check_numbers` compares; earlier versions wrote none."""
    return all(metrics.get(key) is not None for key in (HISTORY_HASH_KEY, CONFIG_HASH_KEY, METRICS_HASH_KEY))


def _check_agreement(run_folder: Path, metrics: Mapping[str, object], hint: str) -> None:
    """Refuse metrics that disagree with the history, or with themselves; a history that can't be read is passed over,
    because only earlier versions wrote none beside metrics.
    """
    path, stated_in = run_folder / HISTORY_FILE, run_folder / METRICS_FILE
    try:
        rows = files.read_table(path)
        columns = {key: [float(row[key]) for row in rows] for key in rows[0]}
        last = {key: values[-1] for key, values in columns.items()}
    except (OSError, ValueError, IndexError):
        return
    # A run with validation images uses the test images only after its last epoch.
    for key, column in (("final_top1", "test_top1"), ("final_val_top1", "val_top1")):
        stated = _finite(metrics.get(key))
        if stated is not None and column in last and last[column] != stated:
            raise ArtifactError(
                f"`{stated_in}` states {key} {stated}, `{path}` ends with {column} {last[column]}: one has changed "
                "since the run wrote it",
                hint=hint,
            )
    seconds, rate = (_finite(metrics.get(key)) for key in _TIMES)
    if METRICS_HASH_KEY not in metrics or seconds is None or "seconds" not in columns:
        return
    spent = sum(columns["seconds"])
    if not math.isclose(spent, seconds, rel_tol=_AGREEING_SECONDS):
        raise ArtifactError(
            f"`{stated_in}` states {seconds} seconds, the epochs in `{path}` took {spent}: one has changed since the "
            "run wrote it",
            hint=hint,
        )
    images = None if rate is None else rate * seconds
    if images is not None and abs(images - round(images)) > 1e-9 * images:
        raise ArtifactError(
            f"`{stated_in}` states {rate} images per second in {seconds} seconds, which is no whole number of images: "
            "one has changed since the run wrote it",
            hint=hint,
        )


def _finite(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number and isinstance(value, int | float) else None


def _metrics_sha256(metrics: Mapping[str, object]) -> str:
    return files.content_sha256(metrics, without=(METRICS_HASH_KEY, *_TIMES))


def _config_sha256(path: Path, *, hint: str) -> str:
    stated = files.read_json(path, what="config", hint=hint)
    return files.content_sha256(stated if isinstance(stated, dict) else {}, without=NOT_OF_THE_RESULT)


def _history_sha256(path: Path, *, hint: str) -> str:
    try:
        rows = files.read_table(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"`{path}` can't be read: {error}", hint=hint) from error
    counted = [[*(name for name in rows[0] if name != "seconds")]] if rows else []
    counted += [[value for name, value in row.items() if name != "seconds"] for row in rows]
    return files.sha256_bytes(json.dumps(counted, separators=(",", ":")).encode())


def read_history(run_folder: Path) -> list[dict[str, float]]:
    """The rows of a run's history.csv: a mapping of column to value for each epoch, from 1 on.

    Raises:
        OSError: the file is missing, or no regular file.
        ValueError: it is broken: an epoch is missing, a value is not finite, or an accuracy not a percentage.
    """
    rows = [
        {key: _number(key, text) for key, text in row.items()} for row in files.read_table(run_folder / HISTORY_FILE)
    ]
    if not rows or not rows[0].keys() & {"test_top1", "val_top1"}:
        raise ValueError(f"{HISTORY_FILE} has no accuracy")
    epochs = [row.get("epoch") for row in rows]
    if epochs != list(range(1, len(rows) + 1)):
        shown = ", ".join(f"{epoch:g}" for epoch in epochs[:_MOST_SHOWN] if epoch is not None)
        raise ValueError(f"{HISTORY_FILE} has epochs {shown or 'without numbers'}, expected 1 to {len(rows)}")
    return rows


def _number(column: str, text: str) -> float:
    """A field of history.csv."""
    place = f"in column `{column[:_LONGEST_SHOWN]}`"
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{HISTORY_FILE} has `{text[:_LONGEST_SHOWN]}` {place}, expected a number") from error
    if not math.isfinite(value):
        raise ValueError(f"{HISTORY_FILE} holds a value that is not finite, {place}")
    if column.endswith(_PERCENTAGES):
        try:
            files.percentage(value)
        except ValueError as error:
            raise ValueError(f"{HISTORY_FILE}, {place}: {error}") from error
    return value


def check_as_written(run_folder: Path, sha256: str, *, hint: str) -> None:
    """Refuse weights that have changed since their run wrote them; a flipped byte on disk would not show otherwise.

    Args:
        run_folder: the run folder. One without metrics, or with older metrics that have no hash, is not refused.
        sha256: hash of the weights in the folder.
        hint: the hint of the error.

    Raises:
        ArtifactError: the metrics state another hash.
    """
    path = run_folder / METRICS_FILE
    stated = files.read_json(path, what="metrics", hint="train it again") if path.is_file() else None
    expected = stated.get(HASH_KEY) if isinstance(stated, dict) else None
    if expected not in (None, sha256):
        raise ArtifactError(
            f"`{run_folder / WEIGHTS_FILE}` has sha256 {sha256[:12]}..., `{path}` states {str(expected)[:12]}...: it "
            "has changed since its run wrote it",
            hint=hint,
        )
