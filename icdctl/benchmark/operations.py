"""How much a training step has to compute and to move, counted rather than timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_STUDENT_PASSES = 3
"""Forward, and a backward pass of twice its work."""


@dataclass(frozen=True)
class Work:
    """Of one training step."""

    teacher_flop: float
    """Of the teacher's forward pass; 0 where its answers are looked up."""
    student_flop: float
    """Three times the forward pass."""
    least_bytes: float
    """What convolutions and linear layers read and write if everything else rides along; the student's three times."""


def count(teacher: Callable[[], Any] | None, student: Callable[[], Any], student_model: nn.Module) -> Work:
    """Count one forward pass of each. The counter's own backward pass is not used: it overlooks groups.

    Args:
        teacher: runs the teacher on a batch; None where it does not run in a step.
        student: runs the student on a batch.
        student_model: its batch norms are put back as they were.
    """
    held = {key: tensor.clone() for key, tensor in student_model.state_dict().items()}
    teacher_flop, teacher_bytes = _forward(teacher) if teacher is not None else (0.0, 0.0)
    student_flop, student_bytes = _forward(student)
    student_model.load_state_dict(held)
    return Work(teacher_flop, _STUDENT_PASSES * student_flop, teacher_bytes + _STUDENT_PASSES * student_bytes)


def _forward(run: Callable[[], Any]) -> tuple[float, float]:
    counter = FlopCounterMode(display=False)
    moved: list[int] = []
    with torch.no_grad(), counter, _traffic(moved):
        run()
    return float(counter.get_total_flops()), float(sum(moved))


@contextmanager
def _traffic(moved: list[int]) -> Iterator[None]:
    """Add the bytes of input, weights and output of every convolution and linear layer that runs."""

    def see(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            tensors = [*inputs, output, *layer.parameters(recurse=False)]
            moved.append(sum(item.numel() * item.element_size() for item in tensors if isinstance(item, Tensor)))

    handle = nn.modules.module.register_module_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()
