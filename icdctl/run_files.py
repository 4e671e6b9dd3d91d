"""The files of a run folder: their names, and whether the weights are as written."""

from __future__ import annotations

from pathlib import Path

from icdctl import files
from icdctl.errors import ArtifactError

WEIGHTS_FILE = "student.safetensors"
HASH_KEY = "weights_sha256"
"""Key in metrics.json: the hash of the weights beside it."""


def check_as_written(run_folder: Path, sha256: str, *, hint: str) -> None:
    """Refuse weights that are not those that the run in that folder left; a byte that flipped on disk looks sound.

    Args:
        run_folder: of a run; one without metrics, or from before they stated a hash, is not refused.
        sha256: of the weights in it.
        hint: what a person does about it.

    Raises:
        ArtifactError: its metrics state another hash.
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
