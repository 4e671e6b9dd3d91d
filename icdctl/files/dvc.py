"""DVC, run as a child process: it is a program of its own, with its own imports and locks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from icdctl.errors import ArtifactError


def run_dvc(root: Path, *arguments: str, outcome: str = "", hint: str) -> str:
    """Run a dvc command and return what it prints; it waits for another one at work in the project.

    Args:
        root: the project.
        arguments: the words of the command; without `-q`, because with it dvc fails without a message.
        outcome: what a failure leads to, for the end of the message.
        hint: the hint of the error.

    Raises:
        ArtifactError: the command failed.
    """
    # `-P` keeps modules in the project from being imported in place of DVC's.
    result = subprocess.run(
        [sys.executable, "-P", "-m", "dvc", "--wait-for-lock", *arguments],
        cwd=root,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        reason = (result.stderr.strip() or result.stdout.strip() or "it printed no reason").splitlines()[0]
        raise ArtifactError(f"`dvc {' '.join(arguments)}` failed ({result.returncode}): {reason}{outcome}", hint=hint)
    return result.stdout
