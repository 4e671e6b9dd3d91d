"""Distillation methods: `METHODS` is the table of them, `get` finds those and the ones made of them, `kd+ls`.

`distillation_terms` computes the loss terms of a logit method from logits alone, without an engine.
Shapes: B images, K classes, P patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from icdctl.errors import UsageError
from icdctl.methods.algebra import MODIFIERS, builds_on, get, resolve
from icdctl.methods.audit import DIFFERENCES, Difference, differences_of
from icdctl.methods.feature import FEATURE_METHODS
from icdctl.methods.logit_methods import LOGIT_METHODS, PATCHES, LogitMethod
from icdctl.methods.method import Method, Objective, Supervision
from icdctl.methods.method_settings import DECLARED, VARIANT, VARIANTS, MethodSetting, Settings, check_values
from icdctl.methods.papers import PUBLISHED_AT
from icdctl.methods.patch import (
    LARGEST_SCALE,
    SCALES,
    check_scales,
    cluster_loss,
    gram_matrix,
    num_patches,
    parse_scales,
    patch_logits,
    pool_regions,
    region_logits,
    scale_decoupled_loss,
)
from icdctl.methods.reads import IMAGE_NUMBERS, LOGITS, REGIONS, SMALL_READS, ModelProbe, read
from icdctl.methods.table import METHODS

__all__ = [
    "DECLARED",
    "DIFFERENCES",
    "FEATURE_METHODS",
    "IMAGE_NUMBERS",
    "LOGITS",
    "LOGIT_METHODS",
    "METHODS",
    "MODIFIERS",
    "PUBLISHED_AT",
    "REGIONS",
    "SCALES",
    "SMALL_READS",
    "VARIANT",
    "VARIANTS",
    "Difference",
    "LogitMethod",
    "Method",
    "MethodSetting",
    "ModelProbe",
    "Objective",
    "Settings",
    "Supervision",
    "builds_on",
    "check_scales",
    "check_settings",
    "cluster_loss",
    "differences_of",
    "distillation_terms",
    "get",
    "gram_matrix",
    "num_patches",
    "parse_scales",
    "patch_logits",
    "pool_regions",
    "read",
    "region_logits",
    "resolve",
    "scale_decoupled_loss",
]


def check_settings(method: str, given: Mapping[str, object]) -> dict[str, float | str]:
    """A method's settings with the given ones in place of the defaults, and `variant` among them.

    Raises:
        UsageError: no such method, a key that it does not have, a value that is not a number, not finite or out of
            range, or parts of a sum that can't have one teacher.
    """
    found = get(method)
    settings = check_values(method, found.defaults, given)
    found.has_eval_mode_teacher(settings)
    return settings


def distillation_terms(
    method: str,
    *,
    student_logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    student_patches: Tensor | None = None,
    teacher_patches: Tensor | None = None,
    scales: Sequence[int] = SCALES,
    epoch: int | Tensor = 1,
    settings: Settings | None = None,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    has_unlabeled: bool = False,
) -> dict[str, Tensor]:
    """The weighted loss terms of one batch; their sum is what training minimises.

    Args:
        method: a name or an expression, e.g. `kd+ls`, of a method that reads logits and patch logits alone.
        student_logits: [B, K].
        labels: [B] int64.
        teacher_logits: [B, K]; no gradient reaches it. Not read by `ce`.
        student_patches: [B, K, P], read by the `sdd_` and `cd_` methods.
        teacher_patches: [B, K, P]; no gradient reaches it.
        scales: the scales that make up P, ascending.
        epoch: counted from 1; with `warmup_epochs` W above 0 the `kd` term is multiplied by min(epoch / W, 1). A
            zero-dimensional tensor lets the factor change inside a captured graph.
        settings: some of the method's settings (see `check_settings`); the rest take their defaults.
        label_smoothing: label smoothing of the `ce` term.
        class_weights: [K], weights of the classes in the `ce` term and its mean.
        has_unlabeled: whether labels may be -1, for images that have none. Those are left out of the `ce` term, and
            the other terms take the teacher's own choice for their class.

    Returns:
        `ce`, then the method's own terms, e.g. `kd` and `cluster`: scalars, in the type of the logits.

    Raises:
        UsageError: unknown method, setting or scales; an input that the method needs is missing; P and the scales
            disagree; the method reads more than logits.
    """
    name = resolve(method)
    row = get(name)
    values = check_settings(name, settings or {})
    if not row.student_reads(values) <= {LOGITS, REGIONS}:
        raise UsageError(
            f"method `{name}` reads more than logits",
            hint="train with `icdctl.distill`, or build its objective with `methods.get(name).build`",
        )
    student, teacher = {LOGITS: student_logits}, {}
    if row.needs_teacher:
        if teacher_logits is None:
            raise UsageError(f"method `{name}` needs the teacher's logits", hint="pass `teacher_logits`")
        teacher[LOGITS] = teacher_logits.detach()
    if row.needs_patches:
        student[PATCHES], teacher[PATCHES] = _check_patches(name, student_patches, teacher_patches, scales)
    no_model = _GivenLogits(nn.Identity(), (1, 1))
    objective = row.build(
        no_model,
        no_model,
        values,
        scales=tuple(scales),
        supervision=Supervision(label_smoothing, class_weights, has_unlabeled),
    )
    ce = objective.labels_term(student_logits, labels)
    return {"ce": ce, **objective.distillation_terms(student, teacher, labels, epoch)}


class _GivenLogits(ModelProbe):
    """In the place of models whose logits are given: patches are pooled already, so no map is too small for them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """See `ModelProbe`."""
        return 1, LARGEST_SCALE, LARGEST_SCALE


def _check_patches(
    method: str, student_patches: Tensor | None, teacher_patches: Tensor | None, scales: Sequence[int]
) -> tuple[Tensor, Tensor]:
    if student_patches is None or teacher_patches is None:
        raise UsageError(
            f"method `{method}` needs patch logits of both models",
            hint="pass `student_patches` and `teacher_patches`, e.g. from `methods.patch_logits`",
        )
    expected = num_patches(check_scales(scales))
    if student_patches.shape != teacher_patches.shape or student_patches.shape[-1] != expected:
        raise UsageError(
            f"patch logits are {list(student_patches.shape)} (student) and {list(teacher_patches.shape)} (teacher), "
            f"expected [B, K, {expected}] for scales {','.join(map(str, scales))}",
            hint="pool both models with the same scales and the same number of classes",
        )
    return student_patches, teacher_patches.detach()
