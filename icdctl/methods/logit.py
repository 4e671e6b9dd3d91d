"""Losses on logits, one value per row. Shapes: B rows, K classes.

Each loss stands here twice. The `textbook_` form is the formula in a few lines of torch, for reading and for copying.
The form that training runs has the same value and gradient, and two things more:

- It reaches its float64 value in float32 over the whole range of logits: nothing takes the logarithm of probabilities
  that may have underflowed, and small divergences are not the difference of large sums.
- It brings its gradient in closed form, which shares most of its parts with the value: left to autograd, the backward
  pass is a hundred small kernels.

Pure functions: no device, epoch, configuration or reduction inside, and no rescue of NaN: a value that is not finite
reaches the caller, which stops the run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def textbook_kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of softened logits; arguments and source as for `kd_loss`."""
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True).sum(dim=1) * temperature**2


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Softened cross-model divergence, T^2 * KL(teacher || student).

    The factor T^2 keeps gradients of the same order when T changes, so that a weight tuned at one temperature holds at
    another.

    Gradient: with p = softmax(teacher / T) and q = softmax(student / T), KL = sum_k p_k (log p_k - log q_k). The log of
    a softmax has d log q_k / d z_j = (1[k = j] - q_j) / T for student logits z, and p sums to 1, so
    d KL / d z_j = (q_j - p_j) / T. Times T^2 that is T (q - p).

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        temperature: T, above 0.

    Returns:
        [B], in nats, not negative.

    Source: Hinton et al. 2015, section 2, https://arxiv.org/abs/1503.02531
    """
    log_probs = F.log_softmax(_both(student_logits, teacher_logits) / temperature, dim=2)
    divergence, gap = kl_divergence(*log_probs)
    return with_gradient(student_logits, divergence * temperature**2, gap * temperature)


def textbook_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """T^2 * (alpha * TCKD + beta * NCKD); arguments and source as for `dkd_loss`."""
    target = F.one_hot(labels, student_logits.shape[1]).bool()
    student, teacher = student_logits / temperature, teacher_logits / temperature

    def divergence(teacher_probs: Tensor, student_probs: Tensor) -> Tensor:
        return (teacher_probs * (teacher_probs.log() - student_probs.log())).sum(dim=1)

    def split(logits: Tensor) -> Tensor:  # [B, 2]: the target, and all other classes together
        probs = logits.softmax(dim=1)
        return torch.stack((probs[target], probs.masked_fill(target, 0).sum(dim=1)), dim=1)

    def others(logits: Tensor) -> Tensor:  # [B, K - 1]: among the other classes
        return logits[~target].reshape(len(logits), -1).softmax(dim=1)

    tckd, nckd = divergence(split(teacher), split(student)), divergence(others(teacher), others(student))
    return (alpha * tckd + beta * nckd) * temperature**2


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

    Gradient: let b = (q_t, 1 - q_t) be the student's two-way split, c = (p_t, 1 - p_t) the teacher's, and r the
    student's softmax among the others. As a softmax of two logits, b has log-odds v = z_t / T - logsumexp of the
    others' z / T, and d TCKD / d v = b_1 - c_1. d v / d z is 1 / T at the target and -r_k / T at the others, which is
    `to_target` / T. NCKD is a divergence among the others alone: its gradient is (r - teacher's r) / T there, 0 at the
    target. Both times T^2. b_1 - c_1 is also c_2 - b_2; the one of the two that is computed from the smaller
    probability has kept its digits.

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
    target = is_target(labels, student_logits.shape[1])
    both = _both(student_logits, teacher_logits) / temperature
    of_others = F.log_softmax(both.masked_fill(target, -torch.inf), dim=2)
    split = _target_split(F.log_softmax(both, dim=2), of_others, labels)
    target_term, gaps = kl_divergence(*split)
    target_gap, rest_gap = gaps[:, :1], gaps[:, 1:]
    other_term, other_gap = kl_divergence(*of_others)
    # The two gaps are opposite, and the one of the less likely side has kept its digits.
    target_gap = torch.where(split[1, :, :1] > split[1, :, 1:], -rest_gap, target_gap)
    # What goes to the target is taken from the others, from each by its share.
    to_target = target.to(both.dtype) - of_others[0].exp()
    return with_gradient(
        student_logits,
        (alpha * target_term + beta * other_term) * temperature**2,
        (alpha * target_gap * to_target + beta * other_gap) * temperature,
    )


def textbook_nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float,
    temperature: float,
    drop_target: bool,
) -> Tensor:
    """The target by the teacher's confidence, then gamma * T^2 * cross-entropy; see `nkd_loss`."""
    target = F.one_hot(labels, student_logits.shape[1]).bool()
    target_term = -teacher_logits.softmax(dim=1)[target] * F.log_softmax(student_logits, dim=1)[target]
    student, teacher = student_logits / temperature, teacher_logits / temperature
    if drop_target:
        student, teacher = (logits[~target].reshape(len(logits), -1) for logits in (student, teacher))
    other_term = -(teacher.softmax(dim=1) * F.log_softmax(student, dim=1)).sum(dim=1)
    return target_term + gamma * temperature**2 * other_term


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

    Gradient: the first part is a cross-entropy weighted by the confidence p_t, a constant, so it gives
    -p_t (1[target] - softmax(z)). The second is a cross-entropy with the teacher's softened distribution, whose entropy
    does not depend on the student, so it has the gradient of the divergence: gamma T (q - p), see `kd_loss`.

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
    target = is_target(labels, student_logits.shape[1])
    both = _both(student_logits, teacher_logits)
    log_probs = F.log_softmax(both, dim=2)
    log_target = log_probs.gather(2, _places(labels))  # [2, B, 1]
    confidence = log_target[1].exp()

    softened = both / temperature
    soft_log_probs = F.log_softmax(softened.masked_fill(target, -torch.inf) if drop_target else softened, dim=2)
    soft_probs = soft_log_probs.exp()
    other_term = -(soft_probs[1] * soft_log_probs[0]).masked_fill(soft_log_probs[1] == -torch.inf, 0.0)
    return with_gradient(
        student_logits,
        (gamma * temperature**2 * other_term).sum(dim=1) - (confidence * log_target[0]).squeeze(1),
        gamma * temperature * (soft_probs[0] - soft_probs[1])
        - confidence * (target.to(both.dtype) - log_probs[0].exp()),
    )


def kl_divergence(student_log_probs: Tensor, teacher_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) over the last dimension, and its gradient.

    With d = log q - log p it is the sum of p * (exp(d) - 1 - d), since p * exp(d) = q and both sides sum to 1. Every
    part is positive and of the size of the result, where the textbook sum of -p * d cancels: in float32 that costs up
    to 1e-6 T^2 when student and teacher nearly agree. Places where both sides are -inf add nothing.

    Args:
        student_log_probs: [..., K], log q.
        teacher_log_probs: [..., K], log p.

    Returns:
        [...], in nats, not negative; and [..., K], the gradient with respect to the logits that log q comes from by
        `log_softmax`: q - p. No gradient flows through either.
    """
    student_log_probs, teacher_log_probs = student_log_probs.detach(), teacher_log_probs.detach()
    teacher_probs = teacher_log_probs.exp()
    difference = student_log_probs - teacher_log_probs
    gap = torch.where(  # where both sides are -inf the difference is NaN, and the second form is 0
        difference < 1.0,
        teacher_probs * torch.expm1(difference),
        student_log_probs.exp() - teacher_probs,
    )
    product = (teacher_probs * difference).masked_fill(teacher_log_probs == -torch.inf, 0.0)
    return (gap - product).sum(dim=-1), gap


def with_gradient(inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """Give autograd a value whose gradient is known; it can be differentiated once.

    Args:
        inputs: [B, ...], what the value was computed from, elsewhere.
        value: [B], each entry depending on its own row alone; no gradient flows through it.
        gradient: [B, ...], of the value with respect to the inputs.

    Returns:
        [B], the value.
    """
    found: Tensor = _WithGradient.apply(inputs, value, gradient)
    return found


class _WithGradient(torch.autograd.Function):
    """See `with_gradient`."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        context.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(context: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return upstream.reshape(-1, *[1] * (gradient.dim() - 1)) * gradient, None, None


def _both(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """[B, K] twice -> [2, B, K], outside of autograd: what is done to both is done at once."""
    return torch.stack((student_logits.detach(), teacher_logits.detach()))


def is_target(labels: Tensor, num_classes: int) -> Tensor:
    """[B] -> [B, K] bool; unlike `one_hot`, it never looks at the values, so the host never waits for a device."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)


def _places(labels: Tensor) -> Tensor:
    """[B] -> [2, B, 1], for `gather`."""
    return labels[None, :, None].expand(2, -1, 1)


def _target_split(log_probs: Tensor, log_probs_of_others: Tensor, labels: Tensor) -> Tensor:
    """log(p, 1 - p), p the target's probability: [2, B, K] twice, among all classes and the others -> [2, B, 2].

    The two differ by log(1 - p) at every other class; at the likeliest of them, neither is large.
    """
    likeliest = log_probs_of_others.argmax(dim=2, keepdim=True)
    log_others = log_probs.gather(2, likeliest) - log_probs_of_others.gather(2, likeliest)
    return torch.cat((log_probs.gather(2, _places(labels)), log_others), dim=2)
