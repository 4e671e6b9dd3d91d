"""Counts of the arithmetic and the memory traffic that a training step needs at least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_STUDENT_PASSES = 3
"""A student's step is a forward pass, and a backward pass of twice its work."""


@dataclass(frozen=True)
class Work:
    """The least work of one training step."""

    teacher_flop: float
    """Floating point operations of the teacher's forward pass; 0 where its logits are looked up."""
    student_flop: float
    """Floating point operations of the student: three times its forward pass."""
    least_bytes: float
    """Bytes that convolutions and linear layers read and write if all else is fused into them; the student's count
    three times."""


def count(teacher: Callable[[], object] | None, student: Callable[[], object], student_model: nn.Module) -> Work:
    """Count one forward pass of each model. Backward passes are not counted by torch's counter: it ignores groups.

    Args:
        teacher: runs the teacher on a batch; None where it does not run in a step.
        student: runs the student on a batch.
        student_model: the student; its batch norms are restored afterwards.
    """
    held = {key: tensor.clone() for key, tensor in student_model.state_dict().items()}
    teacher_flop, teacher_bytes = _forward(teacher) if teacher is not None else (0.0, 0.0)
    student_flop, student_bytes = _forward(student)
    student_model.load_state_dict(held)
    return Work(teacher_flop, _STUDENT_PASSES * student_flop, teacher_bytes + _STUDENT_PASSES * student_bytes)


def _forward(run: Callable[[], object]) -> tuple[float, float]:
    counter = FlopCounterMode(display=False)
    moved: list[int] = []
    with torch.no_grad(), counter, _traffic(moved):
        run()
    return float(counter.get_total_flops()), float(sum(moved))


@contextmanager
def _traffic(moved: list[int]) -> Iterator[None]:
    """Append to `moved` the bytes of input, weights and output of every convolution and linear layer in the block."""

    def see(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            tensors = [*inputs, output, *layer.parameters(recurse=False)]
            moved.append(sum(item.numel() * item.element_size() for item in tensors if isinstance(item, Tensor)))

    handle = nn.modules.module.register_module_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()
