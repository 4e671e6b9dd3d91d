"""Whether a frozen teacher may run in half precision: decided by measuring its speed and comparing its logits."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from icdctl.data import ImageStore
from icdctl.engine.device import wait_for
from icdctl.engine.teacher import InlineTeacher, TeacherPrecision
from icdctl.methods import LOGITS
from icdctl.models import Classifier

_BATCH = 64
_BATCHES = 4
"""Batches of views on which the logits are compared."""
_LEAST_SPEEDUP = 1.3
_LEAST_SAVED_SECONDS = 5.0
"""Least number of seconds to save: less is not worth different rounding."""
_MOST_DIVERGENCE = 1e-3
"""Mean KL(float32 || half) in nats, at temperature 1."""
_LEAST_AGREEMENT = 0.99
"""Share of images with the same top class; near ties may fall either way."""


def choose_teacher_precision(
    wanted: str,
    model: Classifier,
    store: ImageStore,
    *,
    num_images: int,
    deterministic: bool,
) -> TeacherPrecision:
    """`auto` is half precision where that saves seconds and its predictions agree, else float32.

    Args:
        wanted: `auto`, `fp32`, `bf16` or `fp16`.
        model: the teacher.
        store: the training images, some of which are used for the measurement.
        num_images: number of images that the teacher will see.
        deterministic: `auto` is then float32, because the decision depends on the clock.
    """
    if wanted == "bf16":
        return "bf16"
    if wanted == "fp16":
        return "fp16"
    if wanted == "fp32" or deterministic:
        return "fp32"
    half: TeacherPrecision = "fp16" if store.device.type == "cuda" else "bf16"
    if not _may_be_faster(store.device):
        return "fp32"
    views = store.epoch(seed=0, epoch=1)[: _BATCH * _BATCHES].to(store.device)
    batches = [store.inputs(views[first : first + _BATCH]) for first in range(0, len(views), _BATCH)]
    exact = InlineTeacher(model, reads={LOGITS}, device=store.device)
    seconds = _seconds_an_image(exact, batches)
    if seconds * (1 - 1 / _LEAST_SPEEDUP) * num_images < _LEAST_SAVED_SECONDS:
        return "fp32"
    rounded = InlineTeacher(model, reads={LOGITS}, device=store.device, precision=half)
    half_seconds = _seconds_an_image(rounded, batches)
    saved = (seconds - half_seconds) * num_images
    if half_seconds * _LEAST_SPEEDUP > seconds or saved < _LEAST_SAVED_SECONDS:
        return "fp32"
    logits = torch.cat([exact(batch)[LOGITS] for batch in batches])
    half_logits = torch.cat([rounded(batch)[LOGITS] for batch in batches])
    return half if _agree(logits, half_logits) else "fp32"


def _may_be_faster(device: torch.device) -> bool:
    """CPUs without bfloat16 instructions emulate them, slowly; so nothing is measured there."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _seconds_an_image(teacher: InlineTeacher, batches: list[torch.Tensor]) -> float:
    """The shortest time of all batches, after one that is not counted."""
    times = []
    for batch in [batches[0], *batches]:
        wait_for(batch.device)
        started = time.perf_counter()
        teacher(batch)
        wait_for(batch.device)
        times.append((time.perf_counter() - started) / len(batch))
    return min(times[1:])


def _agree(logits: torch.Tensor, half_logits: torch.Tensor) -> bool:
    """Whether two sets of logits [N, K] are close enough for training."""
    if not bool(torch.isfinite(half_logits).all()):
        return False
    log_probs, half_log_probs = F.log_softmax(logits.double(), dim=1), F.log_softmax(half_logits.double(), dim=1)
    divergence = F.kl_div(half_log_probs, log_probs, reduction="batchmean", log_target=True).item()
    agreement = (logits.argmax(dim=1) == half_logits.argmax(dim=1)).double().mean().item()
    return divergence <= _MOST_DIVERGENCE and agreement >= _LEAST_AGREEMENT
