"""Times DVC's own work for the papers' pipeline: a second `dvc repro`, with nothing to do.

The stages, parameters and dependencies are those of dvc.yaml, params.yaml and cells.yaml; the commands are replaced
by ones that write a small file, so that DVC's own work is all there is. Run it as `python benchmarks/pipeline.py`; it
needs git.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from icdctl import versions

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5


def standing_in(pipeline: dict[str, Any]) -> dict[str, Any]:
    """The pipeline with commands that only write the outputs of the stages."""
    for stage in pipeline["stages"].values():
        what = stage.get("do", stage)
        paths = [next(iter(out)) if isinstance(out, dict) else out for out in what.get("outs", [])]
        files = [next(iter(out)) if isinstance(out, dict) else out for out in what.get("metrics", [])]
        commands = [f"mkdir -p {path} && echo 1 > {path}/file" for path in paths]
        commands += [f"mkdir -p {Path(path).parent} && echo '{{}}' > {path}" for path in files]
        what["cmd"] = " && ".join(commands) or "true"
    return pipeline


def dvc(folder: Path, *arguments: str) -> float:
    """Run a command of DVC; wall seconds."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"dvc {' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - begun


def main() -> None:
    """Make the project, run it once, then time runs that find nothing to do."""
    with tempfile.TemporaryDirectory(prefix="icdctl-pipeline-") as name:
        folder = Path(name)
        pipeline = standing_in(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8")))
        (folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False), encoding="utf-8")
        for file in ("params.yaml", "cells.yaml"):
            (folder / file).write_bytes((ROOT / file).read_bytes())
        subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
        dvc(folder, "init", "--quiet")
        dvc(folder, "config", "core.analytics", "false")
        first = dvc(folder, "repro")
        stages = len(yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"])
        again = [dvc(folder, "repro") for _ in range(REPEATS)]
    seconds = statistics.median(again)
    facts = {
        "stages": stages,
        "first_seconds": first,
        "noop_seconds": {"median": seconds, "low": min(again), "high": max(again), "repeats": REPEATS},
        "noop_seconds_per_stage": seconds / stages,
        "versions": versions.versions(["dvc"]),
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
