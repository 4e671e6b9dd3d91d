"""Losses on logits, one value per row. Shapes: B rows, K classes.

Pure functions: no device, epoch, configuration or reduction inside, and no rescue of NaN: a value that is not finite
reaches the caller, which stops the run. Each reaches its float64 value in float32 over the whole range of logits:
nothing takes the logarithm of probabilities that may have underflowed, and small divergences are not the difference
of large sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UNLABELED = -1
"""The label of an image that has none."""


def cross_entropy_loss(
    student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """-log softmax(student)[label].

    Args:
        student_logits: [B, K].
        labels: [B] int64; `UNLABELED` gives 0.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: [K], by which images of a class are multiplied.

    Returns:
        [B], in nats.
    """
    return F.cross_entropy(
        student_logits,
        labels,
        weight=class_weights,
        ignore_index=UNLABELED,
        reduction="none",
        label_smoothing=label_smoothing,
    )


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Softened cross-model divergence, T^2 * KL(teacher || student).

    The factor T^2 keeps gradients of the same order when T changes, so that a weight tuned at one temperature holds at
    another.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        temperature: T, above 0.

    Returns:
        [B], in nats, not negative.

    Source: Hinton et al. 2015, section 2, https://arxiv.org/abs/1503.02531
    """
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=1)
    return kl_divergence(student_log_probs, teacher_log_probs) * temperature**2


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Decoupled distillation, T^2 * (alpha * TCKD + beta * NCKD).

    TCKD is the divergence of the two-way split "target class or any other"; NCKD is the divergence among the other
    classes, each side renormalised without the target. The reference takes the logarithm of summed probabilities, which
    gives NaN for confident logits even where student and teacher agree; here the split is computed from log
    probabilities, and the target is dropped rather than lowered by 1000.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        labels: [B] int64.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T, above 0.

    Returns:
        [B], in nats, not negative. With two classes NCKD is 0.

    Source: Zhao et al. 2022, equations 5 to 7, https://arxiv.org/abs/2203.08679
    """
    target = _is_target(labels, student_logits.shape[1])
    student, teacher = student_logits / temperature, teacher_logits / temperature

    target_term = kl_divergence(_target_split(student, target), _target_split(teacher, target))
    other_term = kl_divergence(_log_probs_of_others(student, target), _log_probs_of_others(teacher, target))
    return (alpha * target_term + beta * other_term) * temperature**2


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float,
    temperature: float,
    drop_target: bool,
) -> Tensor:
    """Normalised distillation: the target by the teacher's confidence, then gamma * T^2 * cross-entropy of the rest.

    -p_teacher[target] * log p_student[target] - gamma * T^2 * sum_k softmax(teacher / T)_k log softmax(student / T)_k

    The paper sums over the classes but the target, each side renormalised (`drop_target=True`). The code behind all
    published numbers builds its mask wrongly and sums over all classes (`drop_target=False`).

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        labels: [B] int64.
        gamma: weight of the second part.
        temperature: T of the second part, above 0; the first part always has T = 1.
        drop_target: leave the target out of the second part, as the paper says.

    Returns:
        [B], in nats. It is a cross-entropy: its least value is above 0.

    Source: Yang et al. 2023, equation 8, https://arxiv.org/abs/2303.13005
    """
    target = _is_target(labels, student_logits.shape[1])
    index = labels.unsqueeze(1)
    student_target = F.log_softmax(student_logits, dim=1).gather(1, index).squeeze(1)
    teacher_target = F.softmax(teacher_logits, dim=1).gather(1, index).squeeze(1)

    student, teacher = student_logits / temperature, teacher_logits / temperature
    log_probs = _log_probs_of_others if drop_target else _log_probs_of_all
    student_log_probs, teacher_log_probs = log_probs(student, target), log_probs(teacher, target)
    other_term = -(teacher_log_probs.exp() * student_log_probs).masked_fill(teacher_log_probs == -torch.inf, 0.0)
    return -teacher_target * student_target + gamma * temperature**2 * other_term.sum(dim=1)


def kl_divergence(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """KL(teacher || student) over the last dimension: [..., K] twice -> [...], in nats, not negative.

    With d = log q - log p it is the sum of p * (exp(d) - 1 - d), since both sides sum to 1. Every part is positive and
    of the size of the result, where the textbook sum of -p * d cancels: in float32 that costs up to 1e-6 T^2 when
    student and teacher nearly agree. Places where both sides are -inf add nothing.
    """
    teacher_probs = teacher_log_probs.exp()
    excluded = teacher_log_probs == -torch.inf
    difference = (student_log_probs - teacher_log_probs).masked_fill(excluded, 0.0)
    near = difference.clamp(max=1.0)
    part = torch.where(
        difference < 1.0,
        teacher_probs * (torch.expm1(near) - near),
        student_log_probs.exp() - teacher_probs - teacher_probs * difference,
    )
    return part.sum(dim=-1)


def _is_target(labels: Tensor, num_classes: int) -> Tensor:
    """[B] -> [B, K] bool; unlike `one_hot`, it never looks at the values, so no device has to be waited for."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)


def _log_probs_of_all(logits: Tensor, target: Tensor) -> Tensor:
    """Log probabilities among all classes: [B, K]; `target` is not read."""
    return F.log_softmax(logits, dim=1)


def _log_probs_of_others(logits: Tensor, target: Tensor) -> Tensor:
    """Log probabilities among the classes but the target, -inf at the target: [B, K]."""
    return F.log_softmax(logits.masked_fill(target, -torch.inf), dim=1)


def _target_split(logits: Tensor, target: Tensor) -> Tensor:
    """log(p, 1 - p) with p the target's probability: [B, K] -> [B, 2]; 1 - p is a sum, never a difference."""
    log_probs = F.log_softmax(logits, dim=1)
    log_target = log_probs.masked_fill(~target, 0.0).sum(dim=1)
    log_others = log_probs.masked_fill(target, -torch.inf).logsumexp(dim=1)
    return torch.stack((log_target, log_others), dim=1)
