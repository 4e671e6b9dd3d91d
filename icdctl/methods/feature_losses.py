"""Losses on feature maps and pooled features. Shapes: B images, C channels, H rows, W columns, N stages.

The student's tensor comes first, and the teacher's has no gradient. A loss is a scalar: one that looks at images one by
one is their mean, and one of the relations between images says so. Maps of two models may have any sizes; where a loss
needs equal ones, the larger map is pooled to the size of the smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from icdctl.methods.patch import average_pool

_PKT_EPSILON = 1e-7
_RKD_EPSILON = 1e-12
"""Least squared distance of two images."""
_SPARE_VECTORS = 3
"""Singular vectors of the student from which KDSVD chooses the partners of the teacher's, beyond as many."""


def to_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C, H, W] each -> the same with the smaller height and the smaller width of both."""
    height, width = (min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
    pooled = [
        tensor if tensor.shape[2:] == (height, width) else average_pool(tensor, (height, width))
        for tensor in (student, teacher)
    ]
    return pooled[0], pooled[1]


def attention_loss(student: Tensor, teacher: Tensor, *, power: float) -> Tensor:
    """AT: the mean squared difference of attention maps of unit length.

    A map is the mean over the channels of |activation|^power. Its scale cancels, so activations are divided by their
    largest one first, and no power overflows.

    Args:
        student: [B, C, H, W].
        teacher: [B, C', H', W'].
        power: 1 or more.

    Source: Zagoruyko and Komodakis 2017, section 3.1, https://arxiv.org/abs/1612.03928
    """
    maps = [_unit_map(_scaled(tensor).abs().pow(power)) for tensor in to_one_size(student, teacher)]
    return (maps[0] - maps[1]).square().mean()


def _scaled(feature_map: Tensor) -> Tensor:
    """[B, C, H, W], the largest magnitude of each image 1: for what does not depend on the scale, so that its gradient
    need not know it.
    """
    size = feature_map.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
    return feature_map / size.clamp(min=torch.finfo(size.dtype).tiny)


def _unit_map(feature_map: Tensor) -> Tensor:
    """[B, C, H, W] -> the mean over the channels, [B, H * W], of unit length."""
    return F.normalize(feature_map.mean(dim=1).flatten(1), dim=1)


def neuron_selectivity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """NST: the squared maximum mean discrepancy of the channels' activation patterns, with the kernel (x . y)^2.

    Each channel's pattern over the image has unit length. Equal sets of patterns give 0 but for rounding.

    Args:
        student: [B, C, H, W].
        teacher: [B, C', H', W'].

    Source: Huang and Wang 2017, section 4, https://arxiv.org/abs/1707.01219
    """
    ours, theirs = (F.normalize(tensor.flatten(2), dim=2) for tensor in to_one_size(student, teacher))

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        if one.shape[2] >= min(one.shape[1], other.shape[1]):
            return (one @ other.transpose(1, 2)).square().mean()
        # The same sum over pairs of places, where these are fewer than channels.
        grams = [patterns.transpose(1, 2) @ patterns for patterns in (one, other)]
        return (grams[0] * grams[1]).sum() / (len(one) * one.shape[1] * other.shape[1])

    return kernel(theirs, theirs) + kernel(ours, ours) - 2 * kernel(ours, theirs)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """SP: the mean squared difference of the two matrices of similarities between images, over the B x B pairs.

    A similarity is a product of flattened maps; each row of the matrix has unit length.

    Args:
        student: [B, ...].
        teacher: [B, ...].

    Source: Tung and Mori 2019, section 3.1, https://arxiv.org/abs/1907.09682
    """
    matrices = [F.normalize(rows @ rows.T, dim=1) for rows in (student.flatten(1), teacher.flatten(1))]
    return (matrices[0] - matrices[1]).square().mean()


def probabilistic_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """PKT: the divergence of distributions over the images of a batch that similarity to an image gives, in nats.

    The similarity (1 + cosine) / 2 of an image to all, itself among them, is divided by its sum. As in the reference
    code, the mean is over the B x B pairs, where a sum over each row would be the KL divergence.

    Both sides add up to 1 in each row, so their difference may be subtracted: its sum is 0, and every term is then of
    second order in it, as the loss is. Without that, float32 loses all digits where the models nearly agree.

    Args:
        student: [B, C].
        teacher: [B, C'].

    Source: Passalis and Tefas 2018, section 3, https://arxiv.org/abs/1803.10837
    """
    ours, theirs = (_neighbours(tensor) for tensor in (student, teacher))
    difference = theirs - ours
    return (theirs * torch.log1p(difference / (ours + _PKT_EPSILON)) - difference).mean()


def _neighbours(features: Tensor) -> Tensor:
    """[B, C] -> [B, B], rows that add up to 1."""
    # torch's norm has the gradient 0 at 0, so that an image without any feature gives no NaN.
    unit = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _PKT_EPSILON)
    similarity: Tensor = (unit @ unit.T + 1) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)


def relational_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """RKD: smooth L1 distances of the distances between two images, and of the angles among three.

    Distances are divided by their mean over the pairs of the batch. Both are 0 for a batch of one image. Differences of
    images are taken before they are squared, so that close images keep their digits in float32.

    Args:
        student: [B, C].
        teacher: [B, C'].

    Returns:
        The mean over the B^2 pairs, and the mean over the B^3 triples: scalars.

    Source: Park et al. 2019, section 3, https://arxiv.org/abs/1904.05068
    """
    ours, theirs = (tensor[None] - tensor[:, None] for tensor in (student, teacher))  # [B, B, C]
    distance = F.smooth_l1_loss(_distances(ours), _distances(theirs))
    return distance, F.smooth_l1_loss(_cosines(ours), _cosines(theirs))


def _distances(differences: Tensor) -> Tensor:
    """[B, B, C] -> [B, B], with a mean of 1 over the pairs of different images."""
    batch = differences.shape[0]
    lengths = differences.square().sum(dim=2).clamp(min=_RKD_EPSILON).sqrt()
    lengths = lengths * (1 - torch.eye(batch, dtype=lengths.dtype, device=lengths.device))
    mean = lengths.sum() / max(batch * (batch - 1), 1)
    return lengths / mean.clamp(min=torch.finfo(mean.dtype).tiny)


def _cosines(differences: Tensor) -> Tensor:
    """[B, B, C] -> [B, B, B], of the angles at the first image."""
    unit = F.normalize(differences, dim=2)
    return unit @ unit.transpose(1, 2)


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """CC, as RepDistiller has it: products of the distances |student - teacher| of an image and of the next one.

    The order of the images therefore matters. The paper compares kernel matrices of the batch instead. One image
    gives 0.

    Args:
        student: [B, D], embedded.
        teacher: [B, D], embedded.

    Returns:
        The sum over D, averaged over the B - 1 neighbours: a scalar.

    Source: Peng et al. 2019, https://arxiv.org/abs/1904.01802
    """
    distance = (student - teacher).abs()
    return (distance[:-1] * distance[1:]).sum() / max(len(distance) - 1, 1)


def flow_loss(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """FSP: mean squared differences of the flows between consecutive stages, summed over the N - 1 pairs of stages.

    A flow is the matrix of the products of two stages' channels, averaged over the image: [C, C'].

    Args:
        students: N of [B, C, H, W], shallow to deep.
        teachers: as many, with as many channels.

    Source: Yim et al. 2017, section 3.2, CVPR 2017
    """
    flows = [[_flow(shallow, deep) for shallow, deep in pairwise(maps)] for maps in (students, teachers)]
    return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in zip(*flows, strict=True)]).sum()


def _flow(shallow: Tensor, deep: Tensor) -> Tensor:
    """[B, C, H, W], [B, C', H', W'] -> [B, C, C']."""
    one, other = (tensor.flatten(2) for tensor in to_one_size(shallow, deep))
    return one @ other.transpose(1, 2) / one.shape[2]


def singular_vectors_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], *, num_vectors: int) -> Tensor:
    """KDSVD: what a radial basis function says of the singular vectors of consecutive stages, compared by squares.

    As in mdistiller, an image's map is a matrix of C * H rows and W columns, and its first right singular vectors are
    used. Each one of the teacher's gets the student's vector of the largest absolute cosine for a partner, of equal
    sign, and both have the weight of its singular value. The vectors' own sign is arbitrary, and stages are compared
    with each other, so it matters: here the teacher's largest entry is positive, where the reference takes the sign
    that its linear algebra library happens to give.

    Args:
        students: N of [B, C, H, W], shallow to deep.
        teachers: as many, with equal widths.
        num_vectors: of the teacher, of each map.

    Returns:
        The sum over the N - 1 pairs of stages, averaged over the images: a scalar.

    Source: Lee et al. 2018, section 3, https://arxiv.org/abs/1807.06819
    """
    losses = []
    before: tuple[Tensor, Tensor] | None = None
    for student, teacher in zip(students, teachers, strict=True):
        theirs, values = _right_singular_vectors(teacher, num_vectors)
        theirs = theirs * _sign_of_largest(theirs)
        ours, _ = _right_singular_vectors(student, num_vectors + _SPARE_VECTORS)
        weights = F.normalize(values, dim=1)[:, None]
        weighted = (_partners(ours, theirs) * weights, theirs * weights)
        if before is not None:
            kernels = [_radial_basis(*stages) for stages in zip(weighted, before, strict=True)]
            losses.append((kernels[0] - kernels[1]).square().sum() / len(student))
        before = weighted
    return torch.stack(losses).sum()


def _right_singular_vectors(feature_map: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[B, C, H, W] -> [B, W, count] and singular values [B, count], largest first; W of them where W is smaller.

    They are eigenvectors of a W x W matrix, which is less work than the decomposition of C * H rows. The gradient is
    that of first order perturbation, with gaps between eigenvalues kept away from 0: a map with equal singular values,
    or an empty one, has a gradient that is finite, where that of a decomposition is not.
    """
    rows = feature_map.flatten(1, 2)
    size = rows.detach().abs().amax(dim=(1, 2), keepdim=True)
    rows = rows / size.clamp(min=torch.finfo(size.dtype).tiny)
    gram = rows.transpose(1, 2) @ rows
    values, vectors = torch.linalg.eigh(gram.detach())
    gaps = values[:, None] - values[:, :, None]
    least = 1e-6 * values[:, -1:, None]
    shares = gaps / (gaps.square() + least.square()).clamp(min=torch.finfo(gaps.dtype).tiny)
    turned = vectors.transpose(1, 2) @ (gram - gram.detach()) @ vectors  # zero, with a gradient
    vectors = vectors + vectors @ (shares * turned)
    lengths = values.clamp(min=0).sqrt() * size.squeeze(1)
    return vectors.flip(2)[:, :, :count], lengths.flip(1)[:, :count]


def _sign_of_largest(vectors: Tensor) -> Tensor:
    """[B, W, k] -> [B, 1, k]."""
    return torch.sign(torch.take_along_dim(vectors, vectors.abs().argmax(dim=1, keepdim=True), dim=1))


def _partners(vectors: Tensor, wanted: Tensor) -> Tensor:
    """[B, W, m], [B, W, k] -> [B, W, k]: of the first ones, with its sign, the one most like each of the others."""
    cosines = vectors.detach().transpose(1, 2) @ wanted
    choice = cosines.abs().argmax(dim=1, keepdim=True)
    is_chosen = torch.arange(vectors.shape[2], device=vectors.device)[:, None] == choice
    return vectors @ (is_chosen * torch.sign(cosines))


def _radial_basis(vectors: Tensor, before: Tensor) -> Tensor:
    """[B, W, k], [B, W', k] -> [B, W, W', k]."""
    return torch.exp(-(vectors[:, :, None] - before[:, None]).square() / 8)


def boundary_loss(student: Tensor, teacher: Tensor, *, margin: float) -> Tensor:
    """AB: squared distances of the student's pre-activations to the teacher's side of zero, with a margin.

    Args:
        student: [B, C, H, W], through a connector.
        teacher: [B, C, H, W]; above 0 is active.
        margin: how far beyond 0 costs nothing.

    Returns:
        The sum over a map, averaged over the images.

    Source: Heo et al. 2019, section 3, https://arxiv.org/abs/1811.03233
    """
    short = torch.where(teacher > 0, margin - student, margin + student)
    return F.relu(short).square().sum() / len(student)


def margin_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """OFD: squared distances to the teacher's pre-activations, of which negative ones count only from above.

    Args:
        student: [B, C, H, W], through a connector.
        teacher: [B, C, H, W]; raised to the margin where it is below.
        margin: [C], not above 0, from `negative_means`.

    Returns:
        The sum over a map, averaged over the images.

    Source: Heo et al. 2019, section 3, https://arxiv.org/abs/1904.01866
    """
    target = torch.maximum(teacher, margin[:, None, None])
    counts = (student > target) | (target > 0)
    return torch.where(counts, student - target, 0.0).square().sum() / len(student)


def negative_means(mean: Tensor, deviation: Tensor) -> Tensor:
    """The mean of a normal distribution's negative part, by which OFD chooses the margin of each channel.

    As in the reference code, -3 deviations where less than a thousandth is negative; min(mean, 0) without deviation,
    where the reference divides by zero.

    Args:
        mean: [C], biases of a batch norm.
        deviation: [C], absolute weights of it.

    Returns:
        [C], not above 0.
    """
    mean, deviation = mean.double(), deviation.double()
    ratio = mean / torch.where(deviation > 0, deviation, 1.0)
    share = torch.special.ndtr(-ratio)  # of the distribution that is negative
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    margin = torch.where(share > 0.001, mean - deviation * density / share.clamp(min=0.001), -3 * deviation)
    return torch.where(deviation > 0, margin, mean.clamp(max=0.0))


def variational_loss(predicted: Tensor, teacher: Tensor, log_scale: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """VID: minus the log-density of the teacher's map, normal around the prediction, up to a constant.

    Args:
        predicted: [B, C, H, W], the means.
        teacher: [B, C, H, W].
        log_scale: [C]; the variance of a channel is softplus(log_scale) + epsilon.
        epsilon: least variance.

    Returns:
        The mean over all numbers of a map.

    Source: Ahn et al. 2019, section 3, https://arxiv.org/abs/1904.05835
    """
    variance = (F.softplus(log_scale) + epsilon)[:, None, None]
    return ((predicted - teacher).square() / variance + variance.log()).mean() / 2


def factor_loss(student: Tensor, teacher: Tensor, *, power: int, distance_power: int) -> Tensor:
    """FT: the mean |difference|^distance_power of factor maps of unit length.

    A factor map is the mean over the channels of activation^power.

    Args:
        student: [B, C, H, W], factors of the translator.
        teacher: [B, C, H', W'], factors of the paraphraser.
        power: 1 or more; RepDistiller takes 2.
        distance_power: 1 or more.

    Source: Kim et al. 2018, section 3, https://arxiv.org/abs/1802.04977
    """
    maps = [_unit_map(_scaled(tensor).pow(power)) for tensor in to_one_size(student, teacher)]
    return (maps[0] - maps[1]).abs().pow(distance_power).mean()


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """ReviewKD: mean squared errors of the maps and of both pooled to 4 x 4, 2 x 2 and 1 x 1, each of half the weight
    of the one before. Sizes that a map does not have are left out; the weights add up to 1.

    Args:
        student: [B, C, H, W].
        teacher: [B, C, H, W].

    Source: Chen et al. 2021, section 3.3, https://arxiv.org/abs/2104.09044
    """
    levels = [side for side in (4, 2, 1) if side < student.shape[2]]
    errors = [F.mse_loss(student, teacher)]
    errors += [F.mse_loss(average_pool(student, (side, side)), average_pool(teacher, (side, side))) for side in levels]
    weights = [0.5**level for level in range(len(errors))]
    return torch.stack([weight * error for weight, error in zip(weights, errors, strict=True)]).sum() / sum(weights)
