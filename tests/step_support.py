"""A training step of a method, built as a run builds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from icdctl import methods
from icdctl.engine.step import StepRule, TrainingStep, trained_parameters
from icdctl.engine.teacher import InlineTeacher
from icdctl.methods import LOGITS, REGIONS, ModelProbe, Supervision, check_settings
from icdctl.models import Classifier

READS = (LOGITS, REGIONS)
"""What the methods on logits and patches read of a teacher."""

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def make_step(
    method: str,
    student: Classifier,
    teacher: Classifier | None,
    optimizer: MakeOptimizer,
    *,
    steps_per_epoch: int,
    device: torch.device,
    scales: tuple[int, ...] = (1, 2, 4),
    settings: Mapping[str, Any] | None = None,
    supervision: Supervision | None = None,
    clip_norm: float = 40.0,
    **rule: Any,
) -> TrainingStep:
    """The step that a run of this method would have; `rule` takes the other fields of `StepRule`."""
    values = check_settings(method, settings or {})
    size = (32, 32)
    row = methods.get(method)
    objective = row.build(
        ModelProbe(student, size),
        None if teacher is None else ModelProbe(teacher, size),
        values,
        scales=scales,
        supervision=supervision or Supervision(train_labels=torch.arange(20) % 10),
    ).to(device)
    return TrainingStep(
        student,
        objective,
        row.student_reads(values) | row.reads_of_scales(scales),
        optimizer(trained_parameters(student, objective)),
        StepRule(clip_norm, **rule),
        steps_per_epoch=steps_per_epoch,
        device=device,
    )


def teacher_for(method: str, model: Classifier, device: torch.device) -> InlineTeacher:
    """A teacher that answers what the method reads, with its default settings."""
    return InlineTeacher(model, reads=methods.get(method).teacher_reads(check_settings(method, {})), device=device)
