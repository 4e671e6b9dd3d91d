"""Times whole runs on random images in the shape of CIFAR-100: one student, or many students at once.

An epoch is 782 steps, the evaluation of 10,000 images and a checkpoint. The output has the seconds of each epoch; the
first includes the captures of graphs, and 240 times the median of the others is the extrapolated time of a run. Run it
as `python benchmarks/gpu_runs.py --pairs res32x4:mv2 --epochs 4`, or without a GPU with `--device cpu --images 256`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from icdctl.benchmark import clocks
from icdctl.benchmark.workload import Plan, build_config, fresh_model, parse_pairs, random_dataset
from icdctl.engine.device import resolve_device
from icdctl.engine.observer import SilentObserver
from icdctl.engine.run import Failure, run_together

EPOCHS = 240


class Clock(SilentObserver):
    """Notes the time when all students have finished an epoch, and the messages of the run."""

    def __init__(self, students: int) -> None:
        self.students, self.rows = students, 0
        self.ends: list[float] = []
        self.said: list[str] = []

    def begin(self, what: str, total: int) -> None:
        if what == "training":
            self.ends.append(time.perf_counter())

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        self.rows += 1
        if self.rows % self.students == 0:
            self.ends.append(time.perf_counter())

    def message(self, text: str) -> None:
        self.said.append(text)


def measured(
    pair: str, folder: Path, *, students: int, epochs: int, images: int, device: str, mode: str
) -> dict[str, object]:
    """The times of one pair: seconds of each epoch, and extrapolated minutes of a run."""
    (known,) = parse_pairs(pair)
    dataset = random_dataset(images, max(1, images // 5), seed=0)
    config = build_config(Plan(method="cd_sdd_dkd", device=device, teacher_mode=mode), known)
    out = folder / f"{known.teacher}-{known.student}"
    configs = [
        config.model_copy(update={"epochs": epochs, "out": str(out / str(number))}) for number in range(students)
    ]
    clock = Clock(students)
    place = resolve_device(device)
    if place.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(place)
    teacher = fresh_model(known.teacher, dataset, seed=0, is_teacher=True)
    results = run_together(configs, dataset, teacher=teacher, observer=clock)
    failed = [result.error.message for result in results if isinstance(result, Failure)]
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    return {
        "students": students,
        "teacher_mode": mode,
        "teacher_precision": None if isinstance(results[0], Failure) else results[0].config.teacher_precision,
        "epoch_seconds": seconds,
        "extrapolated_minutes": EPOCHS * statistics.median(seconds[1:]) / 60 if len(seconds) > 1 else None,
        "peak_bytes": torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None,
        "said": clock.said,
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", default="res32x4:mv2,res32x4:shuv1,wrn40_2:vgg8")
    parser.add_argument("--students", type=int, default=1, help="students of each pair, trained at once")
    parser.add_argument("--epochs", type=int, default=4, help="epochs to run")
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--teacher-mode", default="ahead")
    given = parser.parse_args()
    sizes = {"students": given.students, "epochs": given.epochs, "images": given.images, "device": given.device}
    with tempfile.TemporaryDirectory() as name:
        os.environ["ICDCTL_HOME"] = str(Path(name) / "state")
        pairs = {pair: measured(pair, Path(name), **sizes, mode=given.teacher_mode) for pair in given.pairs.split(",")}
    found = {"pairs": pairs, **sizes, "device": clocks.describe(resolve_device(given.device), "auto")}
    print(json.dumps(found | {"versions": clocks.package_versions()}, indent=2))


if __name__ == "__main__":
    main()
