"""What a distillation method is: a `Method` declares what it reads and its settings, and builds an `Objective`.

The engine knows methods by these two classes alone. Shapes: B images, V views of each, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icdctl.methods.logit import UNLABELED, cross_entropy_loss
from icdctl.methods.method_settings import Settings
from icdctl.methods.reads import LOGITS, ModelProbe, regions_of


@dataclass(frozen=True)
class Supervision:
    """The labels, and how the cross-entropy with them is computed; the run decides it, not the method."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    class_weights: Tensor | None = None
    """[K] on the device, weights of the images of each class; None for no weights."""
    has_unlabeled: bool = False
    """Whether labels may be -1, for images that have none: those are left out of the cross-entropy."""
    train_labels: Tensor | None = None
    """[N] int64, the labels of all training images, for methods that read `image_numbers`."""


class Objective(nn.Module, ABC):
    """The loss terms of a batch. Its parameters and buffers are trained, averaged, saved and captured with the student.

    A method adds its own terms in `distillation_terms`; all methods share the cross-entropy with the labels.
    """

    term_names: tuple[str, ...] = ("ce",)
    """Names of the terms, in order."""

    def __init__(self, settings: Settings, supervision: Supervision) -> None:
        super().__init__()
        self._ce_weight = float(settings["ce_weight"])
        self._supervision = supervision

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        """The weighted terms: scalars whose sum is minimised. Nothing here may wait for the device.

        Args:
            student: what `Method.student_reads` names, with gradient, in the precision of the forward pass.
            teacher: what `Method.teacher_reads` names, without gradient; empty without a teacher.
            labels: [B] int64; -1 for an image that has none.
            epoch: counted from 1; a zero-dimensional tensor where the step is captured in a graph.
        """
        student = {**student, LOGITS: at_least_float32(student[LOGITS])}
        ce = self.labels_term(student[LOGITS], labels)
        return {"ce": ce, **self.distillation_terms(student, teacher, labels, epoch)}

    @abstractmethod
    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        """The terms besides `ce`; arguments as for `forward`, the student's logits in float32 or float64."""

    def labels_term(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The weighted cross-entropy: the mean over labelled images, 0 where a batch has none.

        Args:
            logits: [B, K] of the student.
            labels: [B] int64.
        """
        smoothing, weights = self._supervision.label_smoothing, self._supervision.class_weights
        losses = cross_entropy_loss(logits, labels, label_smoothing=smoothing, class_weights=weights)
        return self._ce_weight * self._mean(losses, labels, weights)

    def _mean(self, losses: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor:
        """[B] -> scalar, weighted like the losses themselves."""
        if class_weights is None and not self._supervision.has_unlabeled:
            return losses.mean()
        has_label = labels != UNLABELED
        weights = has_label.to(losses.dtype)
        if class_weights is not None:
            weights = class_weights[labels.clamp(min=0)] * weights
        return losses.sum() / weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)

    def with_teacher_labels(self, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        """[B]: the labels, and the teacher's own choice for images that have none."""
        if not self._supervision.has_unlabeled:
            return labels
        return torch.where(labels == UNLABELED, teacher_logits.argmax(dim=1), labels)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A row of `METHODS`."""

    defaults: Mapping[str, float]
    """Settings (`icdctl.methods.method_settings` declares them) with the values of the reference configuration."""
    source: str
    """Paper of the part that the method adds."""
    family: str
    """Methods of one family differ by what is added to one loss: `dkd`, `sdd_dkd` and `cd_sdd_dkd` are of `dkd`."""
    patches: bool = False
    """Whether the loss is applied to every patch, complementary ones twice, rather than to the global logits (SDD)."""
    cluster: bool = False
    """Whether gamma times the Gram-matrix divergence of the patches is added (CD)."""
    has_parameters: bool = False
    """Whether its objective has parameters, which are trained with the student."""
    num_views: int = 1
    """V, differently cropped and flipped views of each image in a batch. Every tensor that is read then has V * B rows:
    those of all first views, then of all second ones, and so on; labels too."""
    teacher_in_eval_mode: bool = True
    """False for a teacher that normalises with the statistics of the batch, which then runs on each batch itself."""

    def has_eval_mode_teacher(self, settings: Settings) -> bool:
        """`teacher_in_eval_mode`, unless settings decide it."""
        return self.teacher_in_eval_mode

    @property
    def needs_teacher(self) -> bool:
        """Whether anything of a teacher is read."""
        return True

    @property
    def needs_patches(self) -> bool:
        """Whether patch logits are read, so that `scales` matter."""
        return self.patches or self.cluster

    def student_reads(self, settings: Settings) -> frozenset[str]:
        """Names of the tensors of the student's pass that the objective reads, see `icdctl.methods.reads`."""
        return frozenset({LOGITS}) | (self.teacher_reads(settings) if self.needs_teacher else frozenset())

    def reads_of_scales(self, scales: Sequence[int]) -> frozenset[str]:
        """Names of the tensors of both models' passes that these scales of patches need."""
        return frozenset(map(regions_of, scales)) if self.needs_patches else frozenset()

    @abstractmethod
    def teacher_reads(self, settings: Settings) -> frozenset[str]:
        """Names of the tensors of the teacher's pass that the objective reads."""

    @abstractmethod
    def build(
        self,
        student: ModelProbe,
        teacher: ModelProbe | None,
        settings: Settings,
        *,
        scales: tuple[int, ...],
        supervision: Supervision,
    ) -> Objective:
        """The objective for a student and a teacher; what it draws at random comes from torch's default generator.

        Args:
            student: the model to train.
            teacher: the frozen model; None for a method without one.
            settings: from `check_settings`.
            scales: the scales of the patches; empty for a method that reads none.
            supervision: how labels are used.

        Raises:
            UsageError: the method can't be used for these models.
        """


def warmup_factor(epoch: int | Tensor, warmup_epochs: float) -> float | Tensor:
    """min(epoch / W, 1), and 1 for W = 0."""
    if warmup_epochs == 0:
        return 1.0
    if isinstance(epoch, Tensor):
        return torch.clamp(epoch / warmup_epochs, max=1.0)
    return min(epoch / warmup_epochs, 1.0)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
