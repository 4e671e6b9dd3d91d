"""What methods on feature maps share: which tensors of two models are paired, and the term that compares them.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icdctl.methods.connectors import Factors, Shapes
from icdctl.methods.method import Method, Objective, Supervision, at_least_float32, warmup_factor
from icdctl.methods.method_settings import Settings
from icdctl.methods.reads import ModelProbe

Compare = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""The student's tensors and as many of the teacher's, shallow to deep -> a scalar."""


@dataclass(frozen=True)
class Pairs:
    """Tensors of two models that are compared, one by one, and their shapes without the batch."""

    students: Shapes
    teachers: Shapes
    teacher: ModelProbe
    student_label: str
    """The student's name, for messages."""


@dataclass(frozen=True, kw_only=True)
class FeatureMethod(Method):
    """One term, `feature`: some tensors of the student are compared with as many of the teacher.

    Where models have different numbers of stages, stages are paired from the deepest one on, and the shallowest ones
    of the deeper model have no partner. The reference code then fails, or pairs stages of different depths.

    As in the reference code, and unlike some papers, what is compared is no training stage of its own: the term is
    added to the cross-entropy in every epoch.
    """

    reads: tuple[str, ...]
    """Names of what is compared, shallow to deep, the same of both models."""
    comparison: Callable[[Pairs, Settings], nn.Module]
    """Makes a module that is called like a `Compare`."""

    def compared(self, settings: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of what is compared, shallow to deep: of the student, of the teacher."""
        return self.reads, self.reads

    def student_reads(self, settings: Settings) -> frozenset[str]:
        """See `Method`."""
        return super().student_reads(settings) | frozenset(self.compared(settings)[0])

    def teacher_reads(self, settings: Settings) -> frozenset[str]:
        """See `Method`."""
        return frozenset(self.compared(settings)[1])

    def build(
        self,
        student: ModelProbe,
        teacher: ModelProbe | None,
        settings: Settings,
        *,
        scales: tuple[int, ...],
        supervision: Supervision,
    ) -> FeatureObjective:
        """See `Method`."""
        assert teacher is not None
        ours, theirs = (
            probe.names(names) for probe, names in zip((student, teacher), self.compared(settings), strict=True)
        )
        count = min(len(ours), len(theirs))
        ours, theirs = ours[-count:], theirs[-count:]
        pairs = Pairs(
            [student.shape(name) for name in ours], [teacher.shape(name) for name in theirs], teacher, student.label
        )
        return FeatureObjective(ours, theirs, self.comparison(pairs, settings), settings, supervision)


class FeatureObjective(Objective):
    """See `FeatureMethod`. A comparison that gives a second scalar has it as the term `paraphraser`."""

    def __init__(
        self,
        student_names: Sequence[str],
        teacher_names: Sequence[str],
        comparison: nn.Module,
        settings: Settings,
        supervision: Supervision,
    ) -> None:
        """
        Args:
            student_names: of what is compared, shallow to deep, without `stages.*`.
            teacher_names: as many.
            comparison: a module that is called like a `Compare`.
            settings: from `check_settings`.
            supervision: how labels are used.
        """
        super().__init__(settings, supervision)
        self.comparison = comparison
        self.term_names = ("ce", "feature", "paraphraser") if isinstance(comparison, Factors) else ("ce", "feature")
        self._student_names, self._teacher_names = tuple(student_names), tuple(teacher_names)
        self._weight = float(settings["feature_weight"])
        self._warmup_epochs = float(settings.get("warmup_epochs", 0.0))

    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        found = self.comparison(
            [at_least_float32(student[name]) for name in self._student_names],
            [teacher[name] for name in self._teacher_names],
        )
        values = found if isinstance(found, tuple) else (found,)
        factors = (self._weight * warmup_factor(epoch, self._warmup_epochs), 1.0)
        return {name: factor * value for name, factor, value in zip(self.term_names[1:], factors, values, strict=False)}


class Untrained(nn.Module):
    """A comparison without parameters."""

    def __init__(self, compare: Compare) -> None:
        super().__init__()
        self._compare = compare

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """See `Compare`."""
        return self._compare(students, teachers)


def summed(loss: Callable[[Tensor, Tensor], Tensor]) -> Compare:
    """A loss of two tensors, summed over the pairs."""

    def compare(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        return torch.stack([loss(ours, theirs) for ours, theirs in zip(students, teachers, strict=True)]).sum()

    return compare
