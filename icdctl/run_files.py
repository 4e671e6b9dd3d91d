"""The files of a run folder: their names, and a check that the weights are those that the run wrote."""

from __future__ import annotations

from pathlib import Path

from icdctl import files
from icdctl.errors import ArtifactError

WEIGHTS_FILE = "student.safetensors"
HASH_KEY = "weights_sha256"
"""Key in metrics.json for the hash of the weights in the same folder."""


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
