"""Times eight students of one teacher: in one run with a teacher cache of every view, against eight separate runs.

The numbers are CPU seconds of this process with one thread, evaluation and checkpoints included; the two ways
alternate, and each round gives a ratio. Run it as `python benchmarks/many_students.py [--pairs res32x4:mv2,res20:res8]
[--rounds 3]`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import icdctl

STUDENTS = 8


def seconds(run: Callable[[], None]) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def measured(pair: str, folder: Path, *, rounds: int, train_images: int, epochs: int) -> dict[str, float]:
    """The seconds of both ways and their ratios, for one pair of models."""
    teacher, student = pair.split(":")
    sizes: dict[str, Any] = {"dataset": "digits100", "train_images": train_images, "test_images": 64, "device": "cpu"}
    trained = icdctl.train(model=teacher, **sizes, epochs=1, out=str(folder / f"{teacher}-{student}"))
    common = {**sizes, "epochs": epochs, "teacher": trained.out, "student": student, "method": "cd_sdd_dkd"}
    common["teacher_precision"] = "fp32"
    ratios, alone_seconds, together_seconds = [], [], []
    for number in range(rounds):
        out = folder / f"{teacher}-{student}-{number}"

        def alone(out: Path = out) -> None:
            for seed in range(STUDENTS):
                icdctl.distill(**common, seed=seed, teacher_mode="inline", out=str(out / f"alone-{seed}"))

        def together(out: Path = out) -> None:
            icdctl.distill_many(**common, seeds=range(STUDENTS), teacher_mode="cache", out=str(out / "together"))

        order = (alone, together) if number % 2 == 0 else (together, alone)
        found = {run.__name__: seconds(run) for run in order}
        alone_seconds.append(found["alone"])
        together_seconds.append(found["together"])
        ratios.append(found["alone"] / found["together"])
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "alone_seconds": statistics.median(alone_seconds),
        "together_seconds": statistics.median(together_seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", default="res32x4:mv2,res20:res8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-images", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["ICDCTL_HOME"] = str(Path(name) / "state")
        sizes = {"rounds": given.rounds, "train_images": given.train_images, "epochs": given.epochs}
        pairs = {pair: measured(pair, Path(name), **sizes) for pair in given.pairs.split(",")}
    print(json.dumps({"pairs": pairs, **sizes, "students": STUDENTS, "torch": torch.__version__}, indent=2))


if __name__ == "__main__":
    main()
