"""Distillation methods: a per-row loss, with or without scale decoupling, with or without the cluster term.

`METHODS` is the one table of them; `distillation_terms` turns a row of it, logits and settings into loss terms.
Shapes: B images, K classes, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from icdctl.errors import UsageError, unknown_name
from icdctl.methods.logit import UNLABELED, cross_entropy_loss, dkd_loss, kd_loss, nkd_loss
from icdctl.methods.patch import (
    SCALES,
    cell_logits,
    check_scales,
    cluster_loss,
    gram_matrix,
    num_patches,
    parse_scales,
    patch_logits,
    pool_cells,
    scale_decoupled_loss,
)

__all__ = [
    "METHODS",
    "SCALES",
    "VARIANTS",
    "Method",
    "Settings",
    "cell_logits",
    "check_scales",
    "check_settings",
    "distillation_terms",
    "gram_matrix",
    "num_patches",
    "parse_scales",
    "patch_logits",
    "pool_cells",
    "resolve",
]

Settings = Mapping[str, float | str]
"""A method's own numbers, and its `variant`."""

VARIANTS = ("published", "corrected")
"""`published` has the reference code's numbers, quirks included; docs/methods.md says what `corrected` changes."""

_KD = {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9, "warmup_epochs": 0.0}
_DKD = {"temperature": 4.0, "alpha": 1.0, "beta": 2.0, "ce_weight": 1.0, "kd_weight": 1.0, "warmup_epochs": 20.0}
_NKD = {"temperature": 1.0, "beta": 1.5, "ce_weight": 1.0, "kd_weight": 1.0, "warmup_epochs": 20.0}
_SDD_NKD = {**_NKD, "temperature": 4.0, "beta": 2.0}
_CLUSTER = {"gamma": 2.0}


@dataclass(frozen=True)
class Method:
    """A row of `icdctl list methods`."""

    loss: Literal["ce", "kd", "dkd", "nkd"]
    """What every row of logits is compared by."""
    defaults: Mapping[str, float]
    """Settings and the values of the reference code's configuration."""
    source: str
    """Paper of the part that the method adds."""
    patches: bool = False
    """Apply the loss to every patch, complementary ones twice, rather than to the global logits (SDD)."""
    cluster: bool = False
    """Add gamma times the Gram-matrix divergence of the patches (CD)."""

    @property
    def needs_teacher(self) -> bool:
        """Whether teacher logits are read at all."""
        return self.loss != "ce"

    @property
    def needs_patches(self) -> bool:
        """Whether patch logits are read."""
        return self.patches or self.cluster


_HINTON = "https://arxiv.org/abs/1503.02531"
_DKD_PAPER = "https://arxiv.org/abs/2203.08679"
_NKD_PAPER = "https://arxiv.org/abs/2303.13005"
_SDD_PAPER = "https://arxiv.org/abs/2403.13512"
_ICD_PAPER = "https://arxiv.org/abs/2509.12553"

METHODS: dict[str, Method] = {
    "ce": Method("ce", {"ce_weight": 1.0}, "cross-entropy with the labels, no teacher"),
    "kd": Method("kd", _KD, _HINTON),
    "dkd": Method("dkd", _DKD, _DKD_PAPER),
    "nkd": Method("nkd", _NKD, _NKD_PAPER),
    "sdd_kd": Method("kd", _KD, _SDD_PAPER, patches=True),
    "sdd_dkd": Method("dkd", _DKD, _SDD_PAPER, patches=True),
    "sdd_nkd": Method("nkd", _SDD_NKD, _SDD_PAPER, patches=True),
    "cd_sdd_kd": Method("kd", {**_KD, **_CLUSTER}, _ICD_PAPER, patches=True, cluster=True),
    "cd_sdd_dkd": Method("dkd", {**_DKD, **_CLUSTER}, _ICD_PAPER, patches=True, cluster=True),
    "cd_sdd_nkd": Method("nkd", {**_SDD_NKD, **_CLUSTER}, _ICD_PAPER, patches=True, cluster=True),
}


def resolve(name: str) -> str:
    """The name in `METHODS`; upper case and dashes are forgiven.

    Raises:
        UsageError: no such method.
    """
    folded = name.strip().lower().replace("-", "_")
    if folded not in METHODS:
        raise unknown_name("method", name, METHODS, listing="icdctl list methods")
    return folded


def check_settings(method: str, given: Mapping[str, object]) -> dict[str, float | str]:
    """A method's settings with the given ones in place of the defaults, and `variant` among them.

    Raises:
        UsageError: a key that the method does not have, a value that is no number, not finite or out of range.
    """
    defaults = METHODS[method].defaults
    settings: dict[str, float | str] = {**defaults, "variant": VARIANTS[0]}
    for key, value in given.items():
        if key not in settings:
            raise unknown_name(f"setting of `{method}`", key, settings, listing="icdctl list methods")
        settings[key] = _check_variant(value) if key == "variant" else _check_number(key, value)
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
        method: a name in `METHODS`.
        student_logits: [B, K].
        labels: [B] int64.
        teacher_logits: [B, K]; no gradient reaches it. Not read by `ce`.
        student_patches: [B, K, P], read by the `sdd_` and `cd_` methods.
        teacher_patches: [B, K, P]; no gradient reaches it.
        scales: what makes up P, ascending.
        epoch: counted from 1; with `warmup_epochs` W above 0 the `kd` term is multiplied by min(epoch / W, 1). A
            zero-dimensional tensor lets the factor change inside a captured graph.
        settings: some of the method's settings (see `check_settings`); the rest take their defaults.
        label_smoothing: of the `ce` term.
        class_weights: [K], of the `ce` term, whose mean they then weight.
        has_unlabeled: whether labels may be -1, for images that have none. Those are left out of the `ce` term, and
            the other terms take the teacher's own choice for their class.

    Returns:
        `ce`, then `kd` and `cluster` where the method has them: scalars, in the type of the logits.

    Raises:
        UsageError: unknown method, setting or scales; an input that the method needs is missing; P and the scales
            disagree.
    """
    name = resolve(method)
    row = METHODS[name]
    values = check_settings(name, settings or {})
    corrected = values["variant"] == "corrected"
    ce = cross_entropy_loss(student_logits, labels, label_smoothing=label_smoothing, class_weights=class_weights)
    terms = {"ce": float(values["ce_weight"]) * _label_mean(ce, labels, class_weights, has_unlabeled)}
    if not row.needs_teacher:
        return terms
    if teacher_logits is None:
        raise UsageError(f"method `{name}` needs the teacher's logits", hint="pass `teacher_logits`")
    teacher_logits = teacher_logits.detach()
    if has_unlabeled:
        labels = torch.where(labels == UNLABELED, teacher_logits.argmax(dim=1), labels)

    kd_factor = float(values["kd_weight"]) * _warmup_factor(epoch, float(values["warmup_epochs"]))
    if not row.needs_patches:
        terms["kd"] = kd_factor * _row_loss(row.loss, student_logits, teacher_logits, labels, values).mean()
        return terms

    student_patches, teacher_patches = _check_patches(name, student_patches, teacher_patches, scales)
    if tuple(scales) == (1,):  # as in the reference, logits are compared where the whole image is the only patch
        kd = _row_loss(row.loss, student_logits, teacher_logits, labels, values)
    else:
        # Without the 1x1 patch the whole image's prediction comes from the logits themselves.
        global_logits = teacher_patches[:, :, 0] if scales[0] == 1 else teacher_logits
        kd = scale_decoupled_loss(
            lambda student, teacher, rows: _row_loss(row.loss, student, teacher, rows, values),
            student_patches,
            teacher_patches,
            labels,
            global_logits.argmax(dim=1),
        )
    terms["kd"] = kd_factor * kd.mean()
    if row.cluster:
        cluster = cluster_loss(student_patches, teacher_patches, scales=scales, corrected=corrected)
        terms["cluster"] = float(values["gamma"]) * cluster.mean()
    return terms


def _label_mean(ce: Tensor, labels: Tensor, class_weights: Tensor | None, has_unlabeled: bool) -> Tensor:
    """The mean over labelled images, weighted like the loss itself; 0 where a batch has none: [B] -> scalar."""
    if class_weights is None and not has_unlabeled:
        return ce.mean()
    has_label = labels != UNLABELED
    weights = has_label.to(ce.dtype)
    if class_weights is not None:
        weights = class_weights[labels.clamp(min=0)] * weights
    return ce.sum() / weights.sum().clamp(min=torch.finfo(ce.dtype).tiny)


def _row_loss(loss: str, student: Tensor, teacher: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """[N, K], [N, K], [N] -> [N] by the named loss."""
    temperature = float(settings["temperature"])
    if loss == "kd":
        return kd_loss(student, teacher, temperature=temperature)
    beta = float(settings["beta"])
    if loss == "dkd":
        alpha = float(settings["alpha"])
        return dkd_loss(student, teacher, labels, alpha=alpha, beta=beta, temperature=temperature)
    drop_target = settings["variant"] == "corrected"
    return nkd_loss(student, teacher, labels, gamma=beta, temperature=temperature, drop_target=drop_target)


def _warmup_factor(epoch: int | Tensor, warmup_epochs: float) -> float | Tensor:
    """min(epoch / W, 1), and 1 for W = 0."""
    if warmup_epochs == 0:
        return 1.0
    if isinstance(epoch, Tensor):
        return torch.clamp(epoch / warmup_epochs, max=1.0)
    return min(epoch / warmup_epochs, 1.0)


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


def _check_variant(value: object) -> str:
    if value not in VARIANTS:
        raise UsageError(f"variant is `{value}`", hint=f"choose {' or '.join(f'`{variant}`' for variant in VARIANTS)}")
    return str(value)


def _check_number(key: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError as error:
        raise UsageError(f"setting `{key}` is `{value}`, expected a number", hint=f"e.g. `--set {key}=2`") from error
    lowest_allowed = number > 0 if key == "temperature" else number >= 0
    if not math.isfinite(number) or not lowest_allowed:
        bound = "above 0" if key == "temperature" else "0 or above"
        raise UsageError(f"setting `{key}` is {value}, expected a finite number {bound}", hint=f"e.g. `--set {key}=2`")
    return number
