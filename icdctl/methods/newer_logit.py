"""Newer losses on logits, one value per row, and what is done to logits or rows before and after any loss.

Shapes: B rows, K classes. Each loss stands here once: the form is the formula's, written with two divergences that
bring their own gradient and reach their float64 value in float32, `divergence` of two softmaxes and
`two_way_divergence` of two coins. Autograd does the rest. Pure functions, as in `icdctl.methods.logit`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from icdctl.methods.logit import is_target, kl_divergence, with_gradient

_PUBLISHED_EPS = 1e-7
"""What the published standardisation adds to a row's deviation."""
_FLAT = 1e-6
"""A row is constant where its deviation is below this share of its largest entry: the rest is rounding."""
_NEARLY_ZERO = 1e-4
"""Exponents of the alpha-beta divergence below this take the limit at 0: the general form divides by them."""


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    confidence_temperature: float,
) -> Tensor:
    """Refined distillation, alpha * SCD + beta * MCD.

    SCD compares two coins at temperature A: how likely the teacher finds its own choice, and how likely the student
    finds the label; times A^2. MCD is the divergence at temperature T among the classes that the teacher ranks below
    the label, each side renormalised; times T^2. Where no class ranks below the label, MCD is 0. With a teacher that is
    right and A = T, this is DKD.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        labels: [B] int64.
        alpha: weight of SCD.
        beta: weight of MCD.
        temperature: T, above 0.
        confidence_temperature: A, above 0.

    Returns:
        [B], in nats, not negative.

    Source: Sun et al. 2024, section 3, https://arxiv.org/abs/2408.07703
    """
    num_classes = student_logits.shape[1]
    own_choice = is_target(teacher_logits.argmax(dim=1), num_classes)
    confidence = two_way_divergence(
        _odds(student_logits / confidence_temperature, is_target(labels, num_classes)),
        _odds(teacher_logits / confidence_temperature, own_choice),
    )
    is_below = teacher_logits < teacher_logits.gather(1, labels[:, None])
    below = _divergence_among(is_below, student_logits / temperature, teacher_logits / temperature)
    return alpha * confidence_temperature**2 * confidence + beta * temperature**2 * below


def gdkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    num_top: int,
    split_weight: float,
    top_weight: float,
    rest_weight: float,
    temperature: float,
) -> Tensor:
    """Generalised decoupled distillation: the teacher's top classes, the rest, and the split between the two.

    T^2 times the weighted sum of three divergences: of the two-way split "one of the teacher's k likeliest classes or
    any other", among those k, and among the others, each side renormalised. With k = 1 and a teacher that is right, it
    is DKD. With k = K the rest is empty, and its terms are 0.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        num_top: k, at least 1; no more than K are taken.
        split_weight: weight of the split.
        top_weight: weight among the k.
        rest_weight: weight among the others.
        temperature: T, above 0.

    Returns:
        [B], in nats, not negative.

    Source: https://arxiv.org/abs/2512.04625
    """
    num_classes = student_logits.shape[1]
    student, teacher = student_logits / temperature, teacher_logits / temperature
    if num_top >= num_classes:
        return temperature**2 * top_weight * divergence(student, teacher)
    is_top = _top(teacher_logits, num_top)
    total = split_weight * two_way_divergence(_odds(student, is_top), _odds(teacher, is_top))
    total = total + top_weight * _divergence_among(is_top, student, teacher)
    return temperature**2 * (total + rest_weight * _divergence_among(~is_top, student, teacher))


def ldrld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    num_top: int,
    alpha: float,
    beta: float,
    temperature: float,
    corrected: bool,
) -> Tensor:
    """Local dense relations: every pair of the student's likeliest classes, and the divergence among the rest.

    T^2 * (alpha * local + beta * rest). For ranks r < s of the student's k likeliest classes, counted from 1, a pair is
    the divergence of the two-way choice between both classes, with the weight 2 exp(-0.05 (r + s)) / (1.5 + s - r); one
    more part is the divergence among all k, with weight 1, or that of a pair where k = 2. `local` is the sum of these
    parts (`corrected`), or their mean as published. With k = K the published code takes all classes for the rest, where
    `corrected` has none.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        num_top: k, at least 2; no more than K are taken.
        alpha: weight of the local part.
        beta: weight of the rest.
        temperature: T, above 0.
        corrected: the paper's sum in place of the published mean, see above.

    Returns:
        [B], in nats, not negative.

    Source: https://arxiv.org/abs/2507.15911
    """
    num_classes = student_logits.shape[1]
    top = min(num_top, num_classes)
    student, teacher = student_logits / temperature, teacher_logits / temperature
    places = student_logits.detach().topk(top, dim=1).indices
    student_top, teacher_top = student.gather(1, places), teacher.gather(1, places)
    ranks = torch.arange(1.0, top + 1, dtype=student.dtype, device=student.device)
    apart = ranks[None, :] - ranks[:, None]
    pair_weights = torch.triu(2 * torch.exp(-0.05 * (ranks[:, None] + ranks)) / (1.5 + apart.abs()), diagonal=1)
    student_odds, teacher_odds = (logits[:, :, None] - logits[:, None, :] for logits in (student_top, teacher_top))
    pairs = two_way_divergence(student_odds.flatten(), teacher_odds.flatten()).reshape(-1, top, top)
    together = divergence(student_top, teacher_top)
    if top == 2:
        together = together * pair_weights[0, 1]
    local = (pairs * pair_weights).sum(dim=(1, 2)) + together
    if not corrected:
        local = local / (top * (top - 1) // 2 + 1)
    if top < num_classes:
        is_rest = torch.ones_like(student_logits, dtype=torch.bool).scatter(1, places, value=False)
        rest = _divergence_among(is_rest, student, teacher)
    else:
        rest = torch.zeros_like(local) if corrected else divergence(student, teacher)
    return temperature**2 * (alpha * local + beta * rest)


def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, power: float, weighted: bool) -> Tensor:
    """Transformed teacher matching: KL(q || student), where q is the teacher's distribution to a power, renormalised.

    The student has no temperature, and there is no factor T^2. The power p^g of the probabilities is the softmax of g
    times the logits, which is how it is computed. `weighted` (WTTM) multiplies each row by sum_k p_k^g of the teacher,
    which is large where the teacher is unsure: 1 for a certain teacher, K^(1 - g) for a uniform one.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        power: g, above 0, usually below 1.
        weighted: weigh the rows.

    Returns:
        [B], in nats, not negative.

    Source: Zheng and Yang 2024, https://arxiv.org/abs/2402.11148
    """
    loss = divergence(student_logits, power * teacher_logits)
    if not weighted:
        return loss
    return (power * F.log_softmax(teacher_logits, dim=1)).logsumexp(dim=1).exp() * loss


def textbook_abkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """The formula of `abkd_loss`, where neither a, b nor a + b is 0."""
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (teacher_logits, student_logits))
    total = alpha + beta
    parts = p**alpha * q**beta - alpha / total * p**total - beta / total * q**total
    return -parts.sum(dim=1) / (alpha * beta)


def abkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    corrected: bool,
) -> Tensor:
    """The alpha-beta divergence of softened logits, without a factor T^2.

    With p = softmax(teacher / T), q = softmax(student / T), a = alpha and b = beta:

    D = -1 / (a b) * sum_k [p^a q^b - a / (a + b) * p^(a + b) - b / (a + b) * q^(a + b)]

    (1, 0) is KL(p || q), (0, 1) is KL(q || p), (1, 1) half the squared distance. Where a, b or a + b is 0 the limit is
    taken; the published code has it times a, or times b where a = 0, so both agree where that is 1.

    Derivation: with d = log q - log p, every part of the sum is p^(a + b) times a function of d, or q^(a + b) times the
    same function of -d with a and b exchanged. Each class takes the larger of p and q as its anchor, so exponents are
    negative and nothing overflows for positive a and b; `expm1` keeps the digits where p and q nearly agree. The
    gradient with respect to log q_k is g_k = (q^(a + b) - p^a q^b) / a, and with respect to the logits
    (g - q * sum(g)) / T.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        alpha: a.
        beta: b.
        temperature: T, above 0.
        corrected: the limits as mathematics has them, see above.

    Returns:
        [B], not negative.

    Source: Wang et al. 2025, section 3, https://arxiv.org/abs/2505.04560; limits as in Cichocki et al. 2011
    """
    alpha, beta = (0.0 if abs(exponent) < _NEARLY_ZERO else exponent for exponent in (alpha, beta))
    total = 0.0 if abs(alpha + beta) < _NEARLY_ZERO else alpha + beta
    log_q = F.log_softmax(student_logits.detach() / temperature, dim=1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=1)
    gap = log_q - log_p
    is_over = gap > 0  # the student finds the class likelier, so q is the anchor
    anchor = torch.exp(total * torch.where(is_over, log_q, log_p))
    distance = -gap.abs()
    over = _alpha_beta_part(distance, beta, alpha, total)
    under = _alpha_beta_part(distance, alpha, beta, total)
    value = (anchor * torch.where(is_over, over, under)).sum(dim=1)
    # (q^(a + b) - p^a q^b) / a, from q^(a + b) or from p^a q^b, whichever is a product with a small number.
    slope = torch.where(
        is_over,
        -torch.exp(total * log_q) * _expm1_over(distance, alpha),
        torch.exp(alpha * log_p + beta * log_q) * _expm1_over(distance, alpha),
    )
    gradient = slope - log_q.exp() * slope.sum(dim=1, keepdim=True)
    # The gradient sums to 0. At the likeliest class it is the difference of large numbers, so the others give it.
    is_likeliest = is_target(log_q.argmax(dim=1), log_q.shape[1])
    others = gradient.masked_fill(is_likeliest, 0.0)
    gradient = torch.where(is_likeliest, -others.sum(dim=1, keepdim=True), others) / temperature
    factor = 1.0
    if not corrected and (alpha == 0) != (beta == 0):
        factor = alpha + beta
    elif not corrected and total == 0 and alpha != 0:
        factor = alpha
    return with_gradient(student_logits, factor * value, factor * gradient)


def _alpha_beta_part(distance: Tensor, near: float, far: float, total: float) -> Tensor:
    """A class's part of D over anchor^(a + b).

    Args:
        distance: log of the other side over the anchor, not above 0.
        near: the anchor's exponent, a where the teacher is the anchor.
        far: the other side's exponent.
        total: their sum.
    """
    if far == 0 and near == 0:
        return distance.square() / 2
    if far == 0:
        return (torch.expm1(near * distance) - near * distance) / near**2
    if near == 0:
        # expm1(-x) + x times exp(x) would overflow; this is the same.
        return (far * distance * torch.exp(far * distance) - torch.expm1(far * distance)) / far**2
    if total == 0:
        return (torch.expm1(far * distance) - far * distance) / far**2
    return (far / total * torch.expm1(total * distance) - torch.expm1(far * distance)) / (near * far)


def _expm1_over(distance: Tensor, exponent: float) -> Tensor:
    """(exp(x d) - 1) / x, and its limit d at x = 0."""
    return distance if exponent == 0 else torch.expm1(exponent * distance) / exponent


def normkd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(teacher || student), each row of each model softened by its own deviation, times the teacher's temperature^2.

    The temperatures of a row are T times the standard deviation (1 / (K - 1)) of its logits. So this is T^2 * KL of the
    standardised logits times the teacher's variance. A constant row, by whose deviation the published code divides, is
    a uniform distribution here.

    Args:
        student_logits: [B, K]; the gradient runs through its deviation too.
        teacher_logits: [B, K], without gradient.
        temperature: T, above 0.

    Returns:
        [B], in nats, not negative.

    Source: Chi et al. 2023, https://arxiv.org/abs/2308.00520
    """
    student, _ = _unit_deviation(student_logits, correction=1)
    teacher, deviation = _unit_deviation(teacher_logits, correction=1)
    return (temperature * deviation.squeeze(1)) ** 2 * divergence(student / temperature, teacher / temperature)


def standardise(logits: Tensor, *, corrected: bool) -> Tensor:
    """Logits less their mean, over their standard deviation, row by row: only their order and relative gaps remain.

    The paper's deviation has 1 / K. The published one has 1 / (K - 1) and adds 1e-7, which makes the gradient of a
    constant row 10^7 times as large; `corrected` leaves such a row at 0 and its gradient as it is.

    Args:
        logits: [B, K].
        corrected: the paper's deviation.

    Returns:
        [B, K].

    Source: Sun et al. 2024, algorithm 1, https://arxiv.org/abs/2403.01427
    """
    if corrected:
        return _unit_deviation(logits, correction=0)[0]
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (logits.std(dim=1, keepdim=True) + _PUBLISHED_EPS)


def entropy_weights(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    largest_entropy: float | None,
    added: float,
) -> Tensor:
    """The weight of each row by how unsure both models are: H_t (1 + H_s / H_max) / 2.

    Args:
        student_logits: [B, K]; no gradient reaches it.
        teacher_logits: [B, K].
        temperature: temperature of the softmaxes whose entropies H_s and H_t are taken, above 0.
        largest_entropy: H_max, in nats; None for ln K. The published code has 100 on CIFAR-100.
        added: what is added to probabilities inside of the logarithm; the published code for KD has 1e-10.

    Returns:
        [B], without gradient, 0 for a certain teacher, and not negative but for what `added` changes.

    Source: Su et al. 2025, https://arxiv.org/abs/2311.13621
    """
    student, teacher = (_entropy(logits.detach() / temperature, added) for logits in (student_logits, teacher_logits))
    largest = math.log(student_logits.shape[1]) if largest_entropy is None else largest_entropy
    return teacher * (1 + student / largest) / 2


def _entropy(logits: Tensor, added: float) -> Tensor:
    log_probs = F.log_softmax(logits, dim=1)
    probs = log_probs.exp()
    return -(probs * ((probs + added).log() if added else log_probs)).sum(dim=1)


def divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) row by row: [B, K] twice -> [B], in nats.

    A class that is -inf on both sides is left out; every row has one that is not. Its gradient is q - p.
    """
    return with_gradient(
        student_logits,
        *kl_divergence(F.log_softmax(student_logits.detach(), dim=1), F.log_softmax(teacher_logits, dim=1)),
    )


def two_way_divergence(student_odds: Tensor, teacher_odds: Tensor) -> Tensor:
    """The divergence of two coins from their log-odds: [N] twice -> [N], in nats.

    Its gradient is the gap of the probabilities, from whichever of both sides has kept its digits: the less likely one.
    """
    log_probs = [F.logsigmoid(torch.stack((odds, -odds), dim=1)) for odds in (student_odds.detach(), teacher_odds)]
    value, gaps = kl_divergence(*log_probs)
    return with_gradient(student_odds, value, torch.where(teacher_odds > 0, -gaps[:, 1], gaps[:, 0]))


def _odds(logits: Tensor, is_inside: Tensor) -> Tensor:
    """[B, K], [B, K] bool -> [B], log-odds of the classes inside against the others; both have one or more."""
    return logits.masked_fill(~is_inside, -torch.inf).logsumexp(dim=1) - logits.masked_fill(
        is_inside, -torch.inf
    ).logsumexp(dim=1)


def _divergence_among(is_inside: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The divergence among some classes, each side renormalised; 0 where there are none: [B, K] each -> [B]."""
    is_empty = ~is_inside.any(dim=1, keepdim=True)
    is_outside = ~(is_inside | is_empty)
    among = divergence(
        student_logits.masked_fill(is_outside, -torch.inf), teacher_logits.masked_fill(is_outside, -torch.inf)
    )
    return among.masked_fill(is_empty.squeeze(1), 0.0)


def _top(logits: Tensor, count: int) -> Tensor:
    """[B, K] -> [B, K] bool, the largest of each row."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(count, dim=1).indices, value=True)


def _unit_deviation(logits: Tensor, *, correction: int) -> tuple[Tensor, Tensor]:
    """[B, K] centred and over its deviation, and the deviation [B, 1]; constant rows stay 0 and are not divided."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    deviation = logits.std(dim=1, keepdim=True, correction=correction)
    is_flat = deviation.detach() <= _FLAT * logits.detach().abs().amax(dim=1, keepdim=True)
    return centred / torch.where(is_flat, 1.0, deviation), deviation
