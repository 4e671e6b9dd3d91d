"""One training step of one student: pixels and the teacher's answer in, new weights and numbers on the device out.

The objective trains with the student: its parameters and buffers are updated, averaged, guarded and captured alike.

No names, paths or printing, and nothing that waits for the device: that is what makes it capturable, testable in
float64 and shareable by many students. Shapes: B images.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from icdctl import methods
from icdctl.engine.compiled import Compiler
from icdctl.engine.optimizers import DistillationOriented
from icdctl.engine.teacher import Answer
from icdctl.methods import Objective
from icdctl.models import MODELS, Classifier

_AVERAGE_WARMUP = 10
"""The EMA's decay is at most (1 + n) / (10 + n) after n steps, so that it soon forgets the first weights."""


@dataclass(frozen=True)
class StepRule:
    """How weights follow the gradient of the objective."""

    clip_norm: float
    autocast: bool = False
    """Run the student's forward pass in bfloat16."""
    skip_nonfinite: bool = False
    """Leave weights and statistics as they are where a loss or gradient is not finite, and count that."""
    ema_decay: float = 0.0
    """Decay of the EMA of the weights; 0 disables it."""


class TrainingStep:
    """A student with its optimiser, and a log of the current epoch that stays on the device."""

    def __init__(
        self,
        student: Classifier,
        objective: Objective,
        reads: Collection[str],
        optimizer: torch.optim.Optimizer,
        rule: StepRule,
        *,
        steps_per_epoch: int,
        device: torch.device,
        compiler: Compiler | None = None,
    ) -> None:
        """
        Args:
            student: the model to train.
            objective: what is minimised.
            reads: names of the tensors of the student's pass that the objective reads.
            optimizer: the optimiser of the student's parameters, then of the objective's.
            rule: how weights follow the gradient.
            steps_per_epoch: number of rows of the log.
            device: the device of all of them.
            compiler: compiles the forward pass and the losses; None to run them as they are.
        """
        self.student = student
        self.objective = objective
        self.optimizer = optimizer
        self.rule = rule
        self._reads = frozenset(reads)
        self._reads_numbers = methods.IMAGE_NUMBERS in reads
        self.average = copy.deepcopy(student).eval().requires_grad_(False) if rule.ema_decay else None
        """The EMA of the student, or None."""
        self.objective_average = copy.deepcopy(objective).requires_grad_(False) if rule.ema_decay else None
        """The EMA of what the objective trains."""
        self._parameters = trained_parameters(student, objective)
        self._device = device
        dtype = self._parameters[0].dtype
        # One column per term, then the gradient's norm before clipping.
        self.log = torch.zeros((steps_per_epoch, len(objective.term_names) + 1), dtype=dtype, device=device)
        self.num_right = torch.zeros((), dtype=torch.int64, device=device)
        self.num_averaged = torch.zeros((), dtype=torch.float32, device=device)
        """Steps that the EMA has seen."""
        self._epoch = torch.ones((), dtype=torch.float64, device=device)
        self.compiler = compiler
        self._compiled = None if compiler is None else compiler.compiled(self.outcome)
        norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d) and module.momentum]
        # The icdctl models run each batch norm once per pass; for other modules that is not known.
        self._norms = norms if student.name in MODELS else []
        guarded = [*student.buffers(), *objective.buffers()]
        self._buffers = _by_type(guarded) if rule.skip_nonfinite else []
        self._kept_buffers = [_joined(buffers) for buffers in self._buffers]

    @classmethod
    def like(cls, other: TrainingStep) -> Self:
        """Another step of the same student, objective and optimiser, uncompiled, with its own log and EMA."""
        return cls(
            other.student,
            other.objective,
            other._reads,
            other.optimizer,
            other.rule,
            steps_per_epoch=len(other.log),
            device=other._device,
        )

    def start_epoch(self, epoch: int, *, first_step: int = 0) -> None:
        """Set the epoch, which the distillation warm-up reads, and clear the log.

        Args:
            epoch: counted from 1.
            first_step: number of the step that is due; the log of those before it stays, where an epoch is continued.
        """
        self._epoch.fill_(epoch)
        self.log[first_step:].zero_()
        if first_step == 0:
            self.num_right.zero_()

    @property
    def state(self) -> list[Tensor]:
        """All tensors that a step changes, except gradients; of the optimiser's state, what exists so far."""
        held = [self.log, self.num_right, self.num_averaged]
        for module in (self.student, self.objective, self.average, self.objective_average):
            if module is not None:
                held += [*module.parameters(), *module.buffers()]
        for values in self.optimizer.state.values():
            held += [value for value in values.values() if isinstance(value, Tensor)]
        return held

    def __call__(
        self,
        index: int | Tensor,
        images: Tensor,
        labels: Tensor,
        answer: Answer | None,
        numbers: Tensor | None = None,
    ) -> None:
        """Forward, backward, clip, update.

        Args:
            index: number of the step in its epoch, from 0; a zero-dimensional tensor on the device is never read by
                the host.
            images: [B, 3, H, W].
            labels: [B] int64; -1 for an image that has none.
            answer: the teacher's answer, for methods that have a teacher.
            numbers: [B] int64, which training images they are, for methods that read `image_numbers`.
        """
        self._kept_buffers = [_joined(buffers) for buffers in self._buffers]
        self.optimizer.zero_grad(set_to_none=True)
        with self.norms_counted():
            logits, terms = (self._compiled or self.outcome)(
                images, labels, answer, numbers if self._reads_numbers else None
            )
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
            if self.average is not None and self.objective_average is not None:
                self._update_averages([self.average, self.objective_average])

    def outcome(
        self, images: Tensor, labels: Tensor, answer: Answer | None, numbers: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits [B, K] and the loss terms; arguments as for a call."""
        outputs = self.forward(images, numbers)
        return outputs[methods.LOGITS], self.losses(outputs, labels, answer)

    @contextmanager
    def norms_counted(self) -> Iterator[None]:
        """Count a forward pass in all batch norms at once, rather than in one kernel for each.

        Nothing reads the counters of batch norms with a momentum.
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

    # The phases of a step are separate methods, so that `bench` can time each.

    def forward(self, images: Tensor, numbers: Tensor | None = None) -> dict[str, Tensor]:
        """What the objective reads of the student's pass, in the precision of that pass; arguments as for a call."""
        with torch.autocast(self._device.type, dtype=torch.bfloat16) if self.rule.autocast else nullcontext():
            read = methods.read(self.student.outputs(images), self.student.head, self._reads - {methods.IMAGE_NUMBERS})
        if numbers is not None and self._reads_numbers:
            read[methods.IMAGE_NUMBERS] = numbers
        return read

    def losses(self, outputs: Mapping[str, Tensor], labels: Tensor, answer: Answer | None) -> dict[str, Tensor]:
        """The weighted loss terms, scalars."""
        terms: dict[str, Tensor] = self.objective(outputs, {} if answer is None else answer, labels, self._epoch)
        return terms

    def backward(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Gradients of the sum of the terms, which is returned."""
        total = torch.stack(list(terms.values())).sum()
        if isinstance(self.optimizer, DistillationOriented):
            ce, *others = terms.values()
            self.optimizer.backward(ce, torch.stack(others).sum())
        else:
            torch.autograd.backward(total)
        return total

    def update(self, total: Tensor) -> Tensor:
        """Clip the gradient and move the weights; the gradient's norm before clipping, a scalar."""
        gradient_norm: Tensor = nn.utils.clip_grad_norm_(self._parameters, self.rule.clip_norm)
        if isinstance(self.optimizer, DistillationOriented):
            # The factor by which torch has scaled the sum.
            self.optimizer.scale_gradients(torch.clamp(self.rule.clip_norm / (gradient_norm + 1e-6), max=1.0))
        if self.rule.skip_nonfinite:
            self._guard(total, gradient_norm)
        self.optimizer.step()
        return gradient_norm

    @torch.no_grad()
    def _guard(self, total: Tensor, gradient_norm: Tensor) -> None:
        """Skip the update and restore the statistics where a number is not finite, without reading a value."""
        bad = ~(torch.isfinite(total) & torch.isfinite(gradient_norm))
        # A gradient scaler would set this: the fused optimisers leave everything unchanged where it is 1.
        self.optimizer.found_inf = bad.to(torch.float32)  # type: ignore[attr-defined]  # torch declares it nowhere
        for kept, buffers in zip(self._kept_buffers, self._buffers, strict=True):
            sizes = [buffer.numel() for buffer in buffers]
            parts = torch.where(bad, kept, _joined(buffers)).split_with_sizes(sizes)
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])

    def _update_averages(self, averages: list[nn.Module]) -> None:
        steps = self.num_averaged
        share = 1 - torch.clamp((1 + steps) / (_AVERAGE_WARMUP + steps), max=self.rule.ema_decay)
        for old, new in zip(_numbers(averages), _numbers([self.student, self.objective]), strict=True):
            if old[0].is_floating_point():
                change = torch._foreach_sub(new, old)
                torch._foreach_mul_(change, share.to(old[0].dtype))
                torch._foreach_add_(old, change)
            else:
                torch._foreach_copy_(old, new)
        steps += 1


def trained_parameters(student: nn.Module, objective: nn.Module) -> list[nn.Parameter]:
    """The parameters that a step updates: the student's, then the objective's."""
    return [each for module in (student, objective) for each in module.parameters() if each.requires_grad]


def _numbers(models: Iterable[nn.Module]) -> list[list[Tensor]]:
    """Weights and statistics, by type."""
    return _by_type(tensor for model in models for tensor in (*model.parameters(), *model.buffers()))


def _by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors of each type, which can be changed in one go."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return list(found.values())


def _joined(tensors: list[Tensor]) -> Tensor:
    """All their numbers, one after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
