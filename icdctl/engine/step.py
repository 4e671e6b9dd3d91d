"""One training step of one student: pixels and the teacher's answer in, new weights and numbers on the device out.

No names, paths or printing, and nothing that waits for the device: that is what makes it capturable, testable in
float64 and shareable by many students. Shapes: B images.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icdctl import methods
from icdctl.engine.teacher import Answer
from icdctl.methods import METHODS, Settings
from icdctl.models import Classifier


@dataclass(frozen=True)
class StepRule:
    """What is minimised, and how gradients are bounded."""

    method: str
    settings: Settings
    scales: tuple[int, ...]
    clip_norm: float
    autocast: bool = False
    """Run the student's forward pass in bfloat16."""
    label_smoothing: float = 0.0
    """Of the cross-entropy with the labels."""
    class_weights: Tensor | None = None
    """[K] on the device, of the same; None for none."""
    has_unlabeled: bool = False
    """Some images have no label (-1)."""

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the loss terms, in order."""
        row = METHODS[self.method]
        return ("ce", *(("kd",) if row.needs_teacher else ()), *(("cluster",) if row.cluster else ()))


class TrainingStep:
    """A student with its optimiser, and a log of the current epoch that stays on the device."""

    def __init__(
        self,
        student: Classifier,
        optimizer: torch.optim.Optimizer,
        rule: StepRule,
        *,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        self.student = student
        self.optimizer = optimizer
        self.rule = rule
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._needs_patches = METHODS[rule.method].needs_patches
        self._device = device
        dtype = self._parameters[0].dtype
        # A column a term, then the gradient's norm before clipping.
        self.log = torch.zeros((steps_per_epoch, len(rule.term_names) + 1), dtype=dtype, device=device)
        self.num_right = torch.zeros((), dtype=torch.int64, device=device)
        self._epoch = torch.ones((), dtype=torch.float64, device=device)

    def start_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 1, which the distillation warm-up reads, and clear the log."""
        self._epoch.fill_(epoch)
        self.log.zero_()
        self.num_right.zero_()

    def __call__(self, index: int, images: Tensor, labels: Tensor, answer: Answer | None) -> None:
        """Forward, backward, clip, update.

        Args:
            index: of the step in its epoch, from 0.
            images: [B, 3, H, W].
            labels: [B] int64; -1 for an image that has none.
            answer: the teacher's, for methods that have one.
        """
        self.optimizer.zero_grad(set_to_none=True)
        terms, logits = self._terms(images, labels, answer)
        total = torch.stack(list(terms.values())).sum()
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradient_norm = nn.utils.clip_grad_norm_(self._parameters, self.rule.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.log[index] = torch.stack([*terms.values(), gradient_norm]).detach()
            self.num_right += (logits.argmax(dim=1) == labels).sum()

    def _terms(self, images: Tensor, labels: Tensor, answer: Answer | None) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted loss terms and the logits [B, K]."""
        with torch.autocast(self._device.type, dtype=torch.bfloat16) if self.rule.autocast else nullcontext():
            outputs = self.student.outputs(images)
            patches = None
            if self._needs_patches:
                patches = methods.patch_logits(outputs.feature_map, self.student.head, self.rule.scales)
        logits = _at_least_float32(outputs.logits)
        terms = methods.distillation_terms(
            self.rule.method,
            student_logits=logits,
            student_patches=None if patches is None else _at_least_float32(patches),
            teacher_logits=None if answer is None else _at_least_float32(answer.logits),
            teacher_patches=None if answer is None or answer.patches is None else _at_least_float32(answer.patches),
            labels=labels,
            scales=self.rule.scales,
            epoch=self._epoch,
            settings=self.rule.settings,
            label_smoothing=self.rule.label_smoothing,
            class_weights=self.rule.class_weights,
            has_unlabeled=self.rule.has_unlabeled,
        )
        return terms, logits


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
