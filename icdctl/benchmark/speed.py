"""The speed of icdctl alone: steps and their parts, work, memory."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from icdctl.benchmark import ceilings as ceiling
from icdctl.benchmark import clocks, operations
from icdctl.benchmark.clocks import PhaseClock
from icdctl.benchmark.workload import (
    EPOCH,
    ModelPair,
    Plan,
    Session,
    Stepper,
    build_config,
    fresh_model,
    random_dataset,
    teacher_precision,
)
from icdctl.data import Views
from icdctl.engine.device import backend_settings, resolve_device, resolve_precision
from icdctl.engine.device_loop import DeviceLoop
from icdctl.engine.feed import Feed
from icdctl.engine.step import TrainingStep
from icdctl.engine.teacher import Answer, Answers, DeviceDrivenAnswers, Teacher
from icdctl.files import JsonObject

_METHOD = "cd_sdd_dkd"
EPOCHS = 240
"""Epochs of the run to which times are extrapolated."""
_PUBLISHED_IMAGES = {"train": 50_000, "test": 10_000}
"""Number of images in CIFAR-100."""
_TRAIN_IMAGES = 50_000
_TEST_IMAGES = {"cpu": 500, "cuda": 10_000}
_WARMUP_SHARE, _SPLIT_SHARE, _CEILING_SHARE, _LONGEST_CEILING = 0.15, 0.25, 0.05, 1.0
_SYNC_STEPS, _KERNEL_STEPS = 20, 4
"""Steps to count over; `_SYNC_STEPS` are enough for a teacher that runs ahead to compute its next batch."""
_PARTS = ("augment", "student_forward", "loss", "backward", "clip_and_sgd")
"""The parts of a step, without the teacher's."""

Tell = Callable[[str], None]


def measure_pairs(plan: Plan, pairs: list[ModelPair], *, seconds: float, tell: Tell) -> JsonObject:
    """Time training steps of each pair.

    Args:
        plan: the options that all pairs share.
        pairs: teachers and students.
        seconds: time of the timed steps of each pair.
        tell: called with a line of text about each step of the work.

    Returns:
        `device`, `versions`, `ceilings` and, under `pairs`, by label: times in milliseconds or seconds as their names
        say, rates in images per second.

    Raises:
        UsageError: an option is wrong.
        IcdctlError: the device does not exist, or a loss or gradient is not finite.
    """
    configs = [build_config(replace(plan, method=plan.method or _METHOD), pair) for pair in pairs]
    device = resolve_device(plan.device)
    precision = resolve_precision(configs[0].precision, device)
    with clocks.threads(plan.threads), backend_settings(device, precision, deterministic=False):
        described = clocks.describe(device, precision)
        tell("measuring the device: matmul, copy")
        each = min(_LONGEST_CEILING, _CEILING_SHARE * seconds)
        kinds = (ceiling.teacher_kind(precision, teacher_precision(configs[0])), precision)
        rates = ceiling.measure_ceilings(device, kinds, seconds=each, seed=plan.seed)
        found = {}
        for pair, config in zip(pairs, configs, strict=True):
            tell(f"{pair.label}: making models and images")
            batch_size = config.batch_size
            # Only full batches, of about as many images as CIFAR-100 has.
            num_train = max(1, _TRAIN_IMAGES // batch_size) * batch_size
            dataset = random_dataset(num_train, _TEST_IMAGES[device.type], seed=plan.seed)
            teacher = fresh_model(pair.teacher, dataset, seed=plan.seed, is_teacher=True)
            student = fresh_model(pair.student, dataset, seed=plan.seed + 1, is_teacher=False)
            session = Session(
                config,
                dataset,
                teacher,
                student,
                device=device,
                precision=precision,
                message=partial(_tell_of, pair, tell),
            )
            found[pair.label] = _measure(session, pair, rates, seconds=seconds, tell=tell)
    described["load_after"] = clocks.load()
    return {"device": described, "versions": clocks.package_versions(), "ceilings": rates, "pairs": found}


def _tell_of(pair: ModelPair, tell: Tell, text: str) -> None:
    tell(f"{pair.label}: {text}")


def _measure(
    session: Session, pair: ModelPair, rates: Mapping[str, float], *, seconds: float, tell: Tell
) -> JsonObject:
    """The numbers of one pair, a row of the result's `pairs`."""
    device, config = session.shared.device, session.config
    is_cuda = device.type == "cuda"
    if is_cuda:  # memory that the ceilings used does not belong to a step
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = Stepper(session)
    first_step = _wall_seconds(step, device)
    tell(f"{pair.label}: timing steps for {seconds:g} s, after {_WARMUP_SHARE * seconds:g} s of warm-up")
    clocks.time_steps(step, seconds=_WARMUP_SHARE * seconds, device=device)
    timing = clocks.time_steps(step, seconds=seconds, device=device)
    step.check_finite()
    memory = _peak_memory(device)
    tell(f"{pair.label}: what comes between epochs, parts of a step, work")
    between = {
        "start_seconds": clocks.repeat(step.start_epoch, seconds=0.0, device=device),
        "evaluation_seconds": clocks.repeat(session.evaluate, seconds=0.0, device=device, fewest=1),
        "checkpoint_seconds": _checkpoint_seconds(session),
    }
    syncs = _count_syncs(step) if is_cuda else None
    kernels = _count_kernels(step) if is_cuda else None
    is_captured = step.captures
    split_seconds = _SPLIT_SHARE * seconds
    split = _split_graph(session, split_seconds) if is_captured else _split(session, seconds=split_seconds)
    step_ms = clocks.percentile(timing.step_ms, 50)
    counted = _count(session)
    return {
        "teacher": pair.teacher,
        "student": pair.student,
        "method": config.method,
        "batch_size": config.batch_size,
        "precision": session.shared.precision,
        "teacher_mode": session.teacher_mode,
        "teacher_precision": session.inline.precision,
        "cuda_graph": is_captured,
        "compiled": session.run.is_compiled,
        "first_step_seconds": first_step,
        "num_steps": len(timing.step_ms),
        "step_ms": _percentiles(timing.step_ms),
        "wall_step_ms": _percentiles(timing.wall_ms),
        "images_per_second": 1e3 * config.batch_size / step_ms,
        "wall_images_per_second": 1e3 * config.batch_size / clocks.percentile(timing.wall_ms, 50),
        "evaluation": {"images": len(session.shared.watched_images), "seconds": between["evaluation_seconds"]},
        "extrapolated": _extrapolate(session, step_ms, between),
        "split_ms": split,
        "work": _shares(counted, session, rates, step_ms),
        "memory": memory,
        "host_syncs_per_step": syncs,
        "kernels_per_step": kernels,
    }


def _percentiles(times: tuple[float, ...]) -> dict[str, float]:
    return {f"p{share}": clocks.percentile(times, share) for share in (50, 90, 99)}


def _wall_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Wall seconds of the first step, in which libraries choose their algorithms and graphs are captured."""
    before = time.perf_counter()
    step()
    clocks.synchronize(device)
    return time.perf_counter() - before


def _checkpoint_seconds(session: Session) -> float:
    """Wall seconds until a checkpoint is on disk; on CUDA a run continues training meanwhile."""
    run = session.run
    with tempfile.TemporaryDirectory(prefix="icdctl-bench-") as folder:
        before = time.perf_counter()
        run.output.writer.save(Path(folder) / "state", run.step, run.progress)
        run.output.writer.wait()
        return time.perf_counter() - before


def _extrapolate(session: Session, step_ms: float, between: Mapping[str, float]) -> JsonObject:
    """Estimated seconds of an epoch and of a run on CIFAR-100, from the median step and the work between epochs."""
    steps = math.ceil(_PUBLISHED_IMAGES["train"] / session.config.batch_size)
    per_image = between["evaluation_seconds"] / len(session.shared.watched_images)
    between = {**between, "evaluation_seconds": per_image * _PUBLISHED_IMAGES["test"]}
    epoch = 1e-3 * steps * step_ms + sum(between.values())
    return {
        "steps_per_epoch": steps,
        **between,
        "epoch_seconds": epoch,
        "epochs": EPOCHS,
        "run_seconds": EPOCHS * epoch,
    }


class _TimedStep(TrainingStep):
    """A training step whose phases are timed."""

    clock: PhaseClock

    def forward(self, images: Tensor, numbers: Tensor | None = None) -> dict[str, Tensor]:
        with self.clock.phase("student_forward"):
            return super().forward(images, numbers)

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, answer: Answer | None) -> dict[str, Tensor]:
        with self.clock.phase("loss"):
            return super().losses(outputs, labels, answer)

    def backward(self, terms: Mapping[str, Tensor]) -> Tensor:
        with self.clock.phase("backward"):
            return super().backward(terms)

    def update(self, total: Tensor) -> Tensor:
        with self.clock.phase("clip_and_sgd"):
            return super().update(total)


def _split(session: Session, *, seconds: float) -> dict[str, float]:
    """Median milliseconds of each part of a step, in a separate run with a clock around each part."""
    shared, run = session.shared, session.run
    timed = _TimedStep.like(run.step)
    timed.clock = clock = PhaseClock(shared.device)
    views, answers = session.start_epoch(EPOCH)
    timed.start_epoch(EPOCH)
    position = 0

    def take() -> None:
        nonlocal position
        index = position % shared.num_steps
        position += 1
        part = session.part(views, index)
        with clock.phase("augment"):
            images = shared.store.inputs(part)
        with clock.phase("teacher"):
            # Inline, because a teacher that runs ahead would compute this batch's answer in an earlier step.
            answer = answers(index, part, images) if session.teacher_mode == "cache" else session.inline(images)
        timed(index, images, shared.labels[part.index], answer, part.index)

    take()
    clock.clear()
    clocks.time_steps(take, seconds=seconds, device=shared.device)
    return clock.medians_ms()


class _Beginning(TrainingStep):
    """A training step that ends after `num_parts` of its parts."""

    num_parts: int

    def __call__(
        self,
        index: int | Tensor,
        images: Tensor,
        labels: Tensor,
        answer: Answer | None,
        numbers: Tensor | None = None,
    ) -> None:
        if self.num_parts == 0:
            return
        self.optimizer.zero_grad(set_to_none=True)
        with self.norms_counted():
            outputs = self.forward(images, numbers)
        if self.num_parts == 1:
            return
        terms = self.losses(outputs, labels, answer)
        if self.num_parts == 2:
            return
        total = self.backward(terms)
        if self.num_parts == 3:
            return
        self.update(total)


class _Known:
    """A teacher whose answer to every batch is known already, so that its time is not measured."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def epoch(self, views: Views, batch_size: int) -> Answers:
        """See `Teacher`."""
        return lambda index, part, images: self._answer

    def device_driven(self, feed: Feed) -> DeviceDrivenAnswers:
        """See `Teacher`."""
        return self

    def prepare(self, index: int) -> None:
        """See `DeviceDrivenAnswers`."""

    def __call__(self, views: Views, images: Tensor) -> Answer:
        """See `DeviceDrivenAnswers`."""
        return self._answer


def _split_graph(session: Session, seconds: float) -> dict[str, float]:
    """Milliseconds of each part of a step inside a CUDA graph, by difference.

    A part's time is that of a graph that ends after the part, less that of a graph that ends before it. Clocks around
    the parts would time launches, which a graph avoids. The teacher's time is measured without a student; in a run, a
    teacher that runs ahead works beside the students.
    """
    shared, run = session.shared, session.run
    first = session.part(session.draw(EPOCH), 0).to(shared.device)
    known = _Known(session.inline(shared.store.inputs(first)))

    def spent(num_parts: int, teacher: Teacher) -> float:
        beginning = _Beginning.like(run.step)
        beginning.num_parts = num_parts
        loop = DeviceLoop(shared.store, shared.labels, session.batch_size, teacher, session.message)
        indices = itertools.cycle(range(shared.num_steps))

        def take() -> None:
            index = next(indices)
            if index == 0:
                loop.start_epoch(session.draw(EPOCH))
            loop.step(index, [beginning], session.batch_size)

        take()
        timing = clocks.time_steps(take, seconds=seconds / (len(_PARTS) + 1), device=shared.device)
        # A mean, because a teacher that runs ahead works in only a few of the steps.
        return statistics.fmean(timing.step_ms)

    lengths = [spent(num_parts, known) for num_parts in range(len(_PARTS))]
    parts = {name: after - before for name, before, after in zip(_PARTS[1:], lengths, lengths[1:], strict=False)}
    return {_PARTS[0]: lengths[0], "teacher": spent(0, session.teacher) - lengths[0], **parts}


def _count(session: Session) -> operations.Work:
    views, _ = session.start_epoch(EPOCH)
    images = session.shared.store.inputs(session.part(views, 0))
    run = session.run
    ask = None if session.teacher_mode == "cache" else lambda: session.inline(images)
    return operations.count(ask, lambda: run.step.forward(images), run.student)


def _shares(counted: operations.Work, session: Session, rates: Mapping[str, float], step_ms: float) -> dict[str, float]:
    """The counted work, and the share of a step's time that it would take at the measured ceilings."""
    precision = session.shared.precision
    kind_of_teacher = ceiling.teacher_kind(precision, session.inline.precision)

    def share(kind: str) -> float:
        teacher_rate, student_rate = rates[f"{kind}_{kind_of_teacher}_tflops"], rates[f"{kind}_{precision}_tflops"]
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
    """Peak memory in bytes: on CUDA of the device since it was reset, on a CPU of the whole process so far."""
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
    """How often per step the host waited for the device, counted by torch's warnings."""
    step.start_epoch()
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(_SYNC_STEPS):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # torch also warns once about the debug mode itself, which is not counted.
    return sum("called a synchronizing" in str(item.message) for item in caught) / _SYNC_STEPS


def _count_kernels(step: Stepper) -> float | None:
    """Number of kernels that the device runs per step, copies and fills included; in a graph, the number of its nodes.

    The first step of an epoch, in which a teacher that runs ahead works, is not counted. None where torch's profiler
    sees nothing of the device, as in containers that may not read its counters.
    """
    device = step.session.shared.device
    step.start_epoch()
    step()
    clocks.synchronize(device)
    with torch.profiler.profile(acc_events=True) as profile:  # without `acc_events`, torch before 2.15 warns
        for _ in range(_KERNEL_STEPS):
            step()
        clocks.synchronize(device)
    seen = sum(event.device_type.name == "CUDA" for event in profile.events() or [])
    return seen / _KERNEL_STEPS if seen else None
