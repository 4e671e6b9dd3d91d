"""The speed of a run by itself: steps, their parts, work, memory."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from icdctl.benchmark import ceilings as ceiling
from icdctl.benchmark import measure, work
from icdctl.benchmark.measure import PhaseClock
from icdctl.benchmark.workload import (
    EPOCH,
    Pair,
    Plan,
    Session,
    Stepper,
    build_config,
    fresh_model,
    random_dataset,
)
from icdctl.engine.device import backend_settings, resolve_device, resolve_precision
from icdctl.engine.step import TrainingStep
from icdctl.engine.teacher import Answer

_METHOD = "cd_sdd_dkd"
EPOCHS = 240
"""Of the run that times are extrapolated to."""
_PUBLISHED_IMAGES = {"train": 50_000, "test": 10_000}
"""Of CIFAR-100."""
_TRAIN_IMAGES = 50_000
_TEST_IMAGES = {"cpu": 500, "cuda": 10_000}
_WARMUP_SHARE, _SPLIT_SHARE, _CEILING_SHARE, _LONGEST_CEILING = 0.15, 0.25, 0.05, 1.0
_SYNC_STEPS = 10

Tell = Callable[[str], None]


def measure_pairs(plan: Plan, pairs: list[Pair], *, seconds: float, tell: Tell) -> dict[str, Any]:
    """Time training steps of each pair.

    Args:
        plan: what all pairs share.
        pairs: teachers and students.
        seconds: of the timed window of each.
        tell: told what is under way.

    Returns:
        `device`, `versions`, `ceilings` and, under `pairs`, by label: times in milliseconds or seconds as their names
        say, rates in images per second.

    Raises:
        UsageError, IcdctlError: see the messages.
    """
    configs = [build_config(replace(plan, method=plan.method or _METHOD), pair) for pair in pairs]
    device = resolve_device(plan.device)
    precision = resolve_precision(configs[0].precision, device)
    with measure.threads(plan.threads), backend_settings(device, precision, deterministic=False):
        described = measure.describe(device, precision)
        tell("measuring the device: matmul, copy")
        each = min(_LONGEST_CEILING, _CEILING_SHARE * seconds)
        rates = ceiling.measure_ceilings(device, precision, seconds=each, seed=plan.seed)
        found = {}
        for pair, config in zip(pairs, configs, strict=True):
            tell(f"{pair.label}: making models and images")
            batch_size = config.batch_size
            # Full batches alone, of about as many images as CIFAR-100 has.
            num_train = max(1, _TRAIN_IMAGES // batch_size) * batch_size
            dataset = random_dataset(num_train, _TEST_IMAGES[device.type], seed=plan.seed)
            teacher = fresh_model(pair.teacher, dataset, seed=plan.seed, is_teacher=True)
            student = fresh_model(pair.student, dataset, seed=plan.seed + 1, is_teacher=False)
            session = Session(config, dataset, teacher, student, device=device, precision=precision)
            found[pair.label] = _measure(session, pair, rates, seconds=seconds, tell=tell)
    described["load_after"] = measure.load()
    return {"device": described, "versions": measure.versions(), "ceilings": rates, "pairs": found}


def _measure(session: Session, pair: Pair, rates: Mapping[str, float], *, seconds: float, tell: Tell) -> dict[str, Any]:
    device, config = session.place.device, session.config
    step = Stepper(session)
    tell(f"{pair.label}: timing steps for {seconds:g} s, after {_WARMUP_SHARE * seconds:g} s of warm-up")
    measure.time_steps(step, seconds=_WARMUP_SHARE * seconds, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timing = measure.time_steps(step, seconds=seconds, device=device)
    memory = _peak_memory(device)
    tell(f"{pair.label}: evaluation, parts of a step, work")
    evaluation = measure.repeat(session.evaluate, seconds=0.0, device=device, fewest=1)
    split = _split(session, seconds=_SPLIT_SHARE * seconds)
    step_ms = measure.percentile(timing.step_ms, 50)
    counted = _count(session)
    return {
        "teacher": pair.teacher,
        "student": pair.student,
        "method": config.method,
        "batch_size": config.batch_size,
        "precision": session.place.precision,
        "teacher_mode": session.teacher_mode,
        "num_steps": len(timing.step_ms),
        "step_ms": _percentiles(timing.step_ms),
        "wall_step_ms": _percentiles(timing.wall_ms),
        "images_per_second": 1e3 * config.batch_size / step_ms,
        "wall_images_per_second": 1e3 * config.batch_size / measure.percentile(timing.wall_ms, 50),
        "evaluation": {"images": len(session.place.watched_images), "seconds": evaluation},
        "extrapolated": _extrapolate(session, step_ms, evaluation),
        "split_ms": split,
        "work": _shares(counted, session.place.precision, rates, step_ms),
        "memory": memory,
        "host_syncs_per_step": _count_syncs(step) if device.type == "cuda" else None,
    }


def _percentiles(times: tuple[float, ...]) -> dict[str, float]:
    return {f"p{share}": measure.percentile(times, share) for share in (50, 90, 99)}


def _extrapolate(session: Session, step_ms: float, evaluation: float) -> dict[str, Any]:
    """An epoch and a run of CIFAR-100, from the median step and the timed evaluation; nobody ran them."""
    steps = math.ceil(_PUBLISHED_IMAGES["train"] / session.config.batch_size)
    evaluation_seconds = evaluation * _PUBLISHED_IMAGES["test"] / len(session.place.watched_images)
    epoch = 1e-3 * steps * step_ms + evaluation_seconds
    return {
        "steps_per_epoch": steps,
        "evaluation_seconds": evaluation_seconds,
        "epoch_seconds": epoch,
        "epochs": EPOCHS,
        "run_seconds": EPOCHS * epoch,
    }


class _TimedStep(TrainingStep):
    """A training step whose phases are timed."""

    clock: PhaseClock

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with self.clock.phase("student_forward"):
            return super().forward(images)

    def losses(
        self, logits: Tensor, patches: Tensor | None, labels: Tensor, answer: Answer | None
    ) -> dict[str, Tensor]:
        with self.clock.phase("loss"):
            return super().losses(logits, patches, labels, answer)

    def backward(self, terms: Mapping[str, Tensor]) -> Tensor:
        with self.clock.phase("backward"):
            return super().backward(terms)

    def update(self, total: Tensor) -> Tensor:
        with self.clock.phase("clip_and_sgd"):
            return super().update(total)


def _split(session: Session, *, seconds: float) -> dict[str, float]:
    """Median milliseconds of each part of a step, in a run of its own with a clock around each part."""
    place, member = session.place, session.member
    timed = _TimedStep(
        member.student,
        member.step.optimizer,
        member.step.rule,
        steps_per_epoch=place.num_steps,
        device=place.device,
    )
    timed.clock = clock = PhaseClock(place.device)
    views, answers = session.start_epoch(EPOCH)
    timed.start_epoch(EPOCH)
    position = 0

    def take() -> None:
        nonlocal position
        index = position % place.num_steps
        position += 1
        part = session.part(views, index)
        with clock.phase("augment"):
            images = place.store.inputs(part)
        with clock.phase("teacher"):
            # One that runs ahead would do it in the steps of others.
            answer = answers(index, part, images) if session.teacher_mode == "cache" else session.inline(images)
        timed(index, images, place.labels[part.index], answer)

    take()
    clock.clear()
    measure.time_steps(take, seconds=seconds, device=place.device)
    return clock.medians_ms()


def _count(session: Session) -> work.Work:
    views, _ = session.start_epoch(EPOCH)
    images = session.place.store.inputs(session.part(views, 0))
    member = session.member
    ask = None if session.teacher_mode == "cache" else lambda: session.inline(images)
    return work.count(ask, lambda: member.step.forward(images), member.student)


def _shares(counted: work.Work, precision: str, rates: Mapping[str, float], step_ms: float) -> dict[str, float]:
    """The counted work, and how much of a step it would fill at the measured ceilings."""
    teacher_kind = ceiling.teacher_precision(precision)

    def share(kind: str) -> float:
        teacher_rate, student_rate = rates[f"{kind}_{teacher_kind}_tflops"], rates[f"{kind}_{precision}_tflops"]
        seconds = 1e-12 * (counted.teacher_flop / teacher_rate + counted.student_flop / student_rate)
        return 1e3 * seconds / step_ms

    return {
        "teacher_gflop": counted.teacher_flop / 1e9,
        "student_gflop": counted.student_flop / 1e9,
        "least_gb": counted.least_bytes / 1e9,
        "share_of_matmul_ceiling": share("matmul"),
        "share_of_conv3x3_ceiling": share("conv3x3"),
        "share_of_copy_ceiling": counted.least_bytes / (1e9 * rates["copy_gb_per_second"]) * 1e3 / step_ms,
    }


def _peak_memory(device: torch.device) -> dict[str, float]:
    """Bytes: of the device in the timed window, or of the whole process so far."""
    if device.type == "cuda":
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    if sys.platform == "win32":
        return {}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_resident_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def _count_syncs(step: Stepper) -> float:
    """How often a step made the host wait for the device, as torch warns of it."""
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(_SYNC_STEPS):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(item.message) for item in caught) / _SYNC_STEPS
