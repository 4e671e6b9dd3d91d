"""The files of a run folder: their names, the history in one, and a check of its weights."""

from __future__ import annotations

import math
from pathlib import Path

from icdctl import files
from icdctl.errors import ArtifactError

WEIGHTS_FILE = "student.safetensors"
HISTORY_FILE = "history.csv"
HASH_KEY = "weights_sha256"
"""Key in metrics.json for the hash of the weights in the same folder."""
_PERCENTAGES = ("_top1", "_top5")
"""How the names of columns in percent end."""
_LONGEST_SHOWN = 40
_MOST_SHOWN = 10


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
    path = run_folder / "metrics.json"
    stated = files.read_json(path, what="metrics", hint="train it again") if path.is_file() else None
    expected = stated.get(HASH_KEY) if isinstance(stated, dict) else None
    if expected not in (None, sha256):
        raise ArtifactError(
            f"`{run_folder / WEIGHTS_FILE}` has sha256 {sha256[:12]}..., `{path}` states {str(expected)[:12]}...: it "
            "has changed since its run wrote it",
            hint=hint,
        )
