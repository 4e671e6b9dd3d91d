"""Losses on logits that compare images of a batch with each other, so they have one value per batch, not per row.

Shapes: B images, K classes, H rows and W columns of a map. Pure functions, as in `icdctl.methods.logit`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icdctl.methods.patch import average_pool

_PUBLISHED_EPS = 1e-8
"""What DIST's published code adds to the product of two norms."""
_ROUNDING = 4
"""Centred values, the largest of which was 1, are rounding where their mean length is below so many steps at 1."""
_SHORTEST = 1e-12


def dist_losses(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, corrected: bool
) -> tuple[Tensor, Tensor]:
    """Relations instead of values: how far rows and columns of the probabilities are from being correlated.

    `inter` is 1 less the mean Pearson correlation of the rows (the classes of an image), `intra` the same of the
    columns (the images of a class), both times T^2. The published code adds 1e-8 to the product of the norms, which
    removes rare classes from `intra`; `corrected` does not, and takes 0 where a norm is 0.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        temperature: T of both softmaxes, above 0.
        corrected: the correlation without the published eps.

    Returns:
        `inter` and `intra`, scalars from 0 to 2 T^2.

    Source: Huang et al. 2022, section 3.2, https://arxiv.org/abs/2205.10536
    """
    student, teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    inter, intra = (
        temperature**2 * (1 - _correlation(student, teacher, dim=dim, corrected=corrected).mean()) for dim in (1, 0)
    )
    return inter, intra


def _correlation(student_log_probs: Tensor, teacher_log_probs: Tensor, *, dim: int, corrected: bool) -> Tensor:
    """Pearson correlation of probabilities along a dimension."""
    if corrected:  # a correlation does not depend on the scale, and rare classes would underflow
        student, teacher = (
            (log_probs - log_probs.detach().amax(dim=dim, keepdim=True)).exp()
            for log_probs in (student_log_probs, teacher_log_probs)
        )
    else:
        student, teacher = student_log_probs.exp(), teacher_log_probs.exp()
    pair = [values - values.mean(dim=dim, keepdim=True) for values in (student, teacher)]
    lengths = [torch.linalg.vector_norm(centred, dim=dim) for centred in pair]
    product = (pair[0] * pair[1]).sum(dim=dim)
    norms: Tensor = lengths[0] * lengths[1]
    if not corrected:
        return product / (norms + _PUBLISHED_EPS)
    # Values that are all the same leave rounding, which is correlated with nothing.
    room = _ROUNDING * torch.finfo(product.dtype).eps * student.shape[dim] ** 0.5
    is_flat = (lengths[0].detach() <= room) | (lengths[1].detach() <= room)
    return torch.where(is_flat, 0.0, product) / torch.where(is_flat, 1.0, norms)


def skd_direction_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, regularisation: float, corrected: bool
) -> Tensor:
    """How much the images' similarities differ, measured in the deviations of that difference (Mahalanobis distance).

    G holds the cosines of all pairs of images' logits, D = G_student - G_teacher, S = covariance of D's rows +
    regularisation * identity; the loss is the mean over the rows d of sqrt(d S^-1 d^T), which is the length of L^-1 d
    for S = L L^T. The published code divides G by the number of classes, which leaves nothing but the regularisation in
    S; `corrected` does not.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K], without gradient.
        regularisation: added to the diagonal of the covariance, above 0.
        corrected: cosines that are not divided by K.

    Returns:
        A scalar, not negative; 0 for a single image.

    Source: https://github.com/HyunJunSik/StreamLined
    """
    student, teacher = (_cosines(logits) for logits in (student_logits, teacher_logits))
    difference = student - teacher if corrected else (student - teacher) / student_logits.shape[1]
    batch = len(difference)
    centred = difference - difference.mean(dim=0)
    covariance = centred.T @ centred / max(batch - 1, 1)
    identity = torch.eye(batch, dtype=covariance.dtype, device=covariance.device)
    # The checked form waits for the device; with the regularisation, the matrix is positive.
    root, _ = torch.linalg.cholesky_ex(covariance + regularisation * identity)
    whitened = torch.linalg.solve_triangular(root, difference.T, upper=False)
    distances: Tensor = torch.linalg.vector_norm(whitened, dim=0)
    return distances.mean()


def _cosines(logits: Tensor) -> Tensor:
    """[B, K] -> [B, B]."""
    unit = F.normalize(logits, dim=1, eps=_SHORTEST)
    return unit @ unit.T


def skd_mask_shares(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The factors by which SKD's published code multiplies its divergence and its direction term.

    They are the shares of rows whose largest probability, and of classes whose mean probability, is not above the
    median. The masks were meant to choose rows, but meet a loss that has already been averaged.

    Args:
        teacher_logits: [B, K].

    Returns:
        Two scalars, about 1 / 2.
    """
    probs = F.softmax(teacher_logits, dim=1)
    confidence, mass = probs.amax(dim=1), probs.sum(dim=0)
    of_rows, of_classes = ((values <= values.quantile(0.5)).to(probs.dtype).mean() for values in (confidence, mass))
    return of_rows, of_classes


def cat_loss(student_maps: Tensor, teacher_maps: Tensor, *, resolution: int, normalised: bool) -> Tensor:
    """The mean squared error of class activation maps, averaged to a coarse grid.

    A class activation map is the classifier without its bias, applied to every place of the feature map. As the
    classifier is linear, the averaged map is the logits of the grid's regions less the bias.

    Args:
        student_maps: [B, K, H, W].
        teacher_maps: [B, K, H, W], without gradient; it may have another height and width.
        resolution: rows and columns of the grid.
        normalised: scale each map to unit length over the grid first, so that only its shape counts.

    Returns:
        [B], not negative.

    Source: Guo et al. 2023, section 3.2, CVPR 2023, "Class Attention Transfer Based Knowledge Distillation"
    """
    student, teacher = (
        average_pool(maps, (resolution, resolution)).flatten(2) for maps in (student_maps, teacher_maps)
    )
    if normalised:
        student, teacher = (F.normalize(maps, dim=2, eps=_SHORTEST) for maps in (student, teacher))
    return (student - teacher).square().mean(dim=(1, 2))
