"""One training step of one student: pixels and the teacher's answer in, new weights and numbers on the device out.

No names, paths or printing, and nothing that waits for the device: that is what makes it capturable, testable in
float64 and shareable by many students. Shapes: B images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icdctl import methods
from icdctl.engine.compiled import Compiler
from icdctl.engine.teacher import Answer
from icdctl.methods import METHODS, Settings
from icdctl.models import MODELS, Classifier

_AVERAGE_WARMUP = 10
"""The average's decay is at most (1 + n) / (10 + n) after n steps, so that it soon forgets the first weights."""


@dataclass(frozen=True)
class StepRule:
    """What is minimised, and how weights follow."""

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
    skip_nonfinite: bool = False
    """Leave weights and statistics as they are where a loss or gradient is not finite, and count that."""
    ema_decay: float = 0.0
    """Of an exponential moving average of the weights; 0 for none."""

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
        compiler: Compiler | None = None,
    ) -> None:
        self.student = student
        self.optimizer = optimizer
        self.rule = rule
        self.average = copy.deepcopy(student).eval().requires_grad_(False) if rule.ema_decay else None
        """The moving average of the student, or None."""
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._needs_patches = METHODS[rule.method].needs_patches
        self._device = device
        dtype = self._parameters[0].dtype
        # A column a term, then the gradient's norm before clipping.
        self.log = torch.zeros((steps_per_epoch, len(rule.term_names) + 1), dtype=dtype, device=device)
        self.num_right = torch.zeros((), dtype=torch.int64, device=device)
        self.num_averaged = torch.zeros((), dtype=torch.float32, device=device)
        """Steps that the average has seen."""
        self._epoch = torch.ones((), dtype=torch.float64, device=device)
        self.compiler = compiler
        """Of the forward pass and the losses, or None."""
        self._compiled = None if compiler is None else compiler.compiled(self.outcome)
        norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d) and module.momentum]
        # Those of the models here run once a pass; of others nobody knows.
        self._norms = norms if student.name in MODELS else []
        self._buffers = _by_type(student.buffers()) if rule.skip_nonfinite else []
        self._kept_buffers = [_joined(buffers) for buffers in self._buffers]

    def start_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 1, which the distillation warm-up reads, and clear the log."""
        self._epoch.fill_(epoch)
        self.log.zero_()
        self.num_right.zero_()

    @property
    def state(self) -> list[Tensor]:
        """All that a step changes, gradients aside; as far as the optimiser has made its state yet."""
        held = [*self.student.parameters(), *self.student.buffers(), self.log, self.num_right, self.num_averaged]
        if self.average is not None:
            held += [*self.average.parameters(), *self.average.buffers()]
        for values in self.optimizer.state.values():
            held += [value for value in values.values() if isinstance(value, Tensor)]
        return held

    def __call__(self, index: int | Tensor, images: Tensor, labels: Tensor, answer: Answer | None) -> None:
        """Forward, backward, clip, update.

        Args:
            index: of the step in its epoch, from 0; a zero-dimensional tensor on the device is not looked at.
            images: [B, 3, H, W].
            labels: [B] int64; -1 for an image that has none.
            answer: the teacher's, for methods that have one.
        """
        self._kept_buffers = [_joined(buffers) for buffers in self._buffers]
        self.optimizer.zero_grad(set_to_none=True)
        with self.norms_counted():
            logits, terms = (self._compiled or self.outcome)(images, labels, answer)
        total = self.backward(terms)
        gradient_norm = self.update(total)
        with torch.no_grad():
            row = torch.stack([*terms.values(), gradient_norm]).detach()
            if isinstance(index, Tensor):
                # Not `log[index]`: that would read the index, and wait for it.
                self.log.index_copy_(0, index.reshape(1), row[None].to(self.log.dtype))
            else:
                self.log[index] = row
            self.num_right += (logits.argmax(dim=1) == labels).sum()
            if self.average is not None:
                self._update_average(self.average)

    def outcome(self, images: Tensor, labels: Tensor, answer: Answer | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits [B, K] and the loss terms."""
        logits, patches = self.forward(images)
        return logits, self.losses(logits, patches, labels, answer)

    @contextmanager
    def norms_counted(self) -> Iterator[None]:
        """Around a forward pass: batch norms count it all at once, not each in a kernel of its own.

        Nothing else goes by their counters: those with a momentum do not read them.
        """
        counters = [(norm, norm.num_batches_tracked) for norm in self._norms if norm.training]
        for norm, _ in counters:
            norm.num_batches_tracked = None
        try:
            yield
        finally:
            for norm, counter in counters:
                norm.num_batches_tracked = counter
        counted = [counter for _, counter in counters if counter is not None]
        if counted:
            torch._foreach_add_(counted, 1)

    # The phases of a step are methods of their own so that `bench` can time each.

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The student's logits [B, K] and, for methods that read them, patch logits [B, K, P]."""
        with torch.autocast(self._device.type, dtype=torch.bfloat16) if self.rule.autocast else nullcontext():
            outputs = self.student.outputs(images)
            patches = None
            if self._needs_patches:
                patches = methods.patch_logits(outputs.feature_map, self.student.head, self.rule.scales)
        return _at_least_float32(outputs.logits), None if patches is None else _at_least_float32(patches)

    def losses(
        self, logits: Tensor, patches: Tensor | None, labels: Tensor, answer: Answer | None
    ) -> dict[str, Tensor]:
        """The weighted loss terms, scalars."""
        return methods.distillation_terms(
            self.rule.method,
            student_logits=logits,
            student_patches=patches,
            teacher_logits=None if answer is None else answer.logits,
            teacher_patches=self._teacher_patches(answer),
            labels=labels,
            scales=self.rule.scales,
            epoch=self._epoch,
            settings=self.rule.settings,
            label_smoothing=self.rule.label_smoothing,
            class_weights=self.rule.class_weights,
            has_unlabeled=self.rule.has_unlabeled,
        )

    def backward(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Gradients of the sum of the terms, which is returned."""
        total = torch.stack(list(terms.values())).sum()
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return total

    def update(self, total: Tensor) -> Tensor:
        """Clip the gradient and move the weights; the gradient's norm before clipping, a scalar."""
        gradient_norm: Tensor = nn.utils.clip_grad_norm_(self._parameters, self.rule.clip_norm)
        if self.rule.skip_nonfinite:
            self._guard(total, gradient_norm)
        self.optimizer.step()
        return gradient_norm

    @torch.no_grad()
    def _guard(self, total: Tensor, gradient_norm: Tensor) -> None:
        """Have the update left out where a number is not finite, and the statistics put back, without looking."""
        bad = ~(torch.isfinite(total) & torch.isfinite(gradient_norm))
        # What a gradient scaler would set: the fused optimisers leave everything as it is where it is 1.
        self.optimizer.found_inf = bad.to(torch.float32)  # type: ignore[attr-defined]  # torch declares it nowhere
        for kept, buffers in zip(self._kept_buffers, self._buffers, strict=True):
            sizes = [buffer.numel() for buffer in buffers]
            parts = torch.where(bad, kept, _joined(buffers)).split_with_sizes(sizes)
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])

    def _update_average(self, average: Classifier) -> None:
        steps = self.num_averaged
        share = 1 - torch.clamp((1 + steps) / (_AVERAGE_WARMUP + steps), max=self.rule.ema_decay)
        for old, new in zip(_numbers(average), _numbers(self.student), strict=True):
            if old[0].is_floating_point():
                change = torch._foreach_sub(new, old)
                torch._foreach_mul_(change, share.to(old[0].dtype))
                torch._foreach_add_(old, change)
            else:
                torch._foreach_copy_(old, new)
        steps += 1

    def _teacher_patches(self, answer: Answer | None) -> Tensor | None:
        """[B, K, P] of this student's scales."""
        if answer is None or answer.cells is None or not self._needs_patches:
            return None
        return methods.pool_cells(answer.cells, self.rule.scales)


def _numbers(model: nn.Module) -> list[list[Tensor]]:
    """Weights and statistics, by type."""
    return _by_type([*model.parameters(), *model.buffers()])


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors of each type, which can be changed in one go."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def _joined(tensors: list[Tensor]) -> Tensor:
    """All their numbers, one after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
