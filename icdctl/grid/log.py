"""`runs/grid.jsonl`: a line for each run that begins, is done, stops or fails."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from icdctl import files
from icdctl.grid.packs import Outcome

LOG_FILE = "grid.jsonl"


def write_log(folder: Path, outcomes: Sequence[Outcome]) -> None:
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
