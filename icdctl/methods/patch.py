"""Scale decoupling (SDD) and implicit clustering (CD): everything that reads patch logits.

Shapes: B images, K classes, P patches, C channels. Patches are ordered by scale: 1x1, then 2x2 row by row, and so on.
Scales other than 1, 2 and 4 are pooled from the feature map, each by itself.
Patch logits are the classifier applied to a region's mean feature, so one call on the 4x4 grid gives all of them: the
classifier is linear, and a coarser patch's logits are the mean of its regions'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from icdctl.errors import UsageError
from icdctl.methods.logit import kl_divergence, with_gradient

SCALES = (1, 2, 4)
"""The scales of the papers; 4 x 4 is the finest grid, and the others are averages of it."""
LARGEST_SCALE = 8
"""Scales from 1 to this can be chosen."""

_CLUSTER_SOFTNESS = 2.0
FINEST = max(SCALES)
"""Regions along each side of an image."""
_SHORTEST = 1e-12
_LONGEST_SHOWN = 80


def parse_scales(text: str) -> tuple[int, ...]:
    """`1,2,4` (or the reference's `[1,2,4]`) as an ascending tuple.

    Raises:
        UsageError: empty, repeated, or not whole numbers from 1 to 8.
    """
    parts = [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if not all(re.fullmatch(r"-?[0-9]{1,9}", part) for part in parts):
        raise UsageError(
            f"scales `{text[:_LONGEST_SHOWN]}` are not whole numbers with commas between them",
            hint="e.g. `--scales 1,2,4`",
        )
    return check_scales([int(part) for part in parts])


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """The scales in ascending order.

    Raises:
        UsageError: none given, one given twice, or one that is not from 1 to 8.
    """
    given = ",".join(map(str, scales))
    hint = f"choose whole numbers from 1 to {LARGEST_SCALE}, e.g. `--scales 1,2,4`"
    if not scales:
        raise UsageError("no scale is given", hint=hint)
    for scale in scales:
        if not 1 <= scale <= LARGEST_SCALE:
            raise UsageError(f"scale {scale} of `{given}` is not a number from 1 to {LARGEST_SCALE}", hint=hint)
    if len(set(scales)) != len(scales):
        raise UsageError(f"scales `{given}` name one twice", hint=hint)
    return tuple(sorted(scales))


def num_patches(scales: Sequence[int]) -> int:
    """P, the sum of the squares: 21 for 1, 2, 4."""
    return sum(scale * scale for scale in scales)


def patch_logits(feature_map: Tensor, head: Callable[[Tensor], Tensor], scales: Sequence[int] = SCALES) -> Tensor:
    """Logits of every region of every scale.

    For the scales 1, 2 and 4 the map is pooled to 4 x 4 first, as the reference does. On maps whose side is a multiple
    of 4 that is plain average pooling; on 2 x 2 maps each place stands four times; on 7 x 7 and 14 x 14 maps the
    pooling windows overlap, and the 1 x 1 patch is near, but not equal to, the model's own logits.

    Args:
        feature_map: [B, C, H, W], what the model's head reads after global average pooling.
        head: the classifier, [N, C] -> [N, K]; it must be affine.
        scales: ascending.

    Returns:
        [B, K, P].

    Source: Luo et al. 2024 (SDD), section 3.2, https://arxiv.org/abs/2403.13512
    """
    finer = {scale: region_logits(feature_map, head, scale) for scale in scales if scale not in SCALES}
    return pool_regions(region_logits(feature_map, head), scales, finer)


def region_logits(feature_map: Tensor, head: Callable[[Tensor], Tensor], side: int = FINEST) -> Tensor:
    """Logits of the regions of a grid; those of 4 x 4 are also averaged for the scales 1 and 2.

    Args:
        feature_map: as for `patch_logits`.
        head: as for `patch_logits`.
        side: regions along each side, S.

    Returns:
        [B, K, S, S].
    """
    if feature_map.shape[2] * feature_map.shape[3] < side**2:  # then it is less work to pool what the head says
        return average_pool(_at_each_place(feature_map, head), (side, side))
    return _at_each_place(average_pool(feature_map, (side, side)), head)


def _at_each_place(feature_map: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, C, H, W] -> [B, K, H, W], the classes side by side in memory."""
    batch, channels, height, width = feature_map.shape
    logits = head(feature_map.permute(0, 2, 3, 1).reshape(-1, channels))  # [B * H * W, K]
    return logits.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def average_pool(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    """`adaptive_avg_pool2d`: [B, C, H, W] -> [B, C, *size]."""
    # torch's own pooling adds up its gradient in no fixed order on CUDA, and fails where determinism is required.
    is_ordered = feature_map.is_cuda and torch.are_deterministic_algorithms_enabled()
    return pooled_in_order(feature_map, size) if is_ordered else F.adaptive_avg_pool2d(feature_map, size)


def pooled_in_order(feature_map: Tensor, size: tuple[int, int] = (FINEST, FINEST)) -> Tensor:
    """`adaptive_avg_pool2d` as two matrix products: [B, C, H, W] -> [B, C, *size]."""
    down, across = (
        _windows(side, count, like=feature_map) for side, count in zip(feature_map.shape[2:], size, strict=True)
    )
    return down @ feature_map @ across.T


def _windows(side: int, count: int, *, like: Tensor) -> Tensor:
    """[count, side]: the share of each row of a map in each row of regions; made where it is needed, not copied."""
    region = torch.arange(count, device=like.device)[:, None]
    row = torch.arange(side, device=like.device)
    inside = (row >= region * side // count) & (row * count < (region + 1) * side)
    return (inside / inside.sum(dim=1, keepdim=True)).to(like.dtype)


def pool_regions(regions: Tensor, scales: Sequence[int], finer: Mapping[int, Tensor] | None = None) -> Tensor:
    """Patch logits of some scales from the regions, the classes side by side in memory.

    Args:
        regions: [B, K, 4, 4].
        scales: ascending.
        finer: scale S -> [B, K, S, S], for scales other than 1, 2 and 4.

    Returns:
        [B, K, P].
    """
    grids = [_grid(regions, scale) if scale in SCALES else (finer or {})[scale] for scale in scales]
    return torch.cat([grid.permute(0, 2, 3, 1).flatten(1, 2) for grid in grids], dim=1).transpose(1, 2)


def _grid(regions: Tensor, scale: int) -> Tensor:
    return regions if scale == FINEST else F.avg_pool2d(regions, FINEST // scale)


def scale_weight(scale: int) -> float:
    """How much a scale weighs in the cluster loss, before the weights are shared: 1, 2, 3 for 1, 2, 4, and between
    them, and beyond, by the same rule 1 + log2(scale)."""
    return 1.0 + math.log2(scale)


def textbook_scale_decoupled_loss(
    row_loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    student_patches: Tensor,
    teacher_patches: Tensor,
    labels: Tensor,
    global_prediction: Tensor,
) -> Tensor:
    """The mean over the patches, one patch after the other; arguments and source as for `scale_decoupled_loss`."""
    losses = []
    for patch in range(student_patches.shape[2]):
        student, teacher = student_patches[:, :, patch], teacher_patches[:, :, patch]
        disagrees = (teacher.argmax(dim=1) == labels) != (global_prediction == labels)
        losses.append(row_loss(student, teacher, labels) * torch.where(disagrees, 2.0, 1.0))
    return torch.stack(losses).mean(dim=0)


def scale_decoupled_loss(
    row_loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    student_patches: Tensor,
    teacher_patches: Tensor,
    labels: Tensor,
    global_prediction: Tensor,
    *,
    shared_weight: bool = False,
) -> Tensor:
    """A row loss over every patch, complementary patches twice.

    Args:
        row_loss: (student [N, K], teacher [N, K], labels [N]) -> [N].
        student_patches: [B, K, P].
        teacher_patches: [B, K, P], without gradient.
        labels: [B] int64.
        global_prediction: [B] int64, the teacher's class for the whole image.
        shared_weight: give every patch of the batch the mean weight, as published code of DSKD does with DKD.

    Returns:
        [B], the weighted mean over the patches. The weights are not normalised, so the scale of the loss follows the
        teacher: its mean weight lies between 1 and 2.

    Source: Luo et al. 2024 (SDD), section 3.3, https://arxiv.org/abs/2403.13512
    """
    batch, num_classes, patches = student_patches.shape
    losses = row_loss(
        student_patches.transpose(1, 2).reshape(-1, num_classes),
        teacher_patches.transpose(1, 2).reshape(-1, num_classes),
        labels.repeat_interleave(patches),
    )
    weights = complementary_weights(teacher_patches, labels, global_prediction)
    if shared_weight:
        weights = weights.mean()
    return (losses.reshape(batch, patches) * weights).mean(dim=1)


def complementary_weights(teacher_patches: Tensor, labels: Tensor, global_prediction: Tensor) -> Tensor:
    """2 where a patch and the whole image disagree on being right, 1 where both are right or both are wrong.

    Args:
        teacher_patches: [B, K, P].
        labels: [B] int64.
        global_prediction: [B] int64.

    Returns:
        [B, P], of the patches' type.
    """
    patch_is_right = teacher_patches.argmax(dim=1) == labels.unsqueeze(1)
    image_is_right = (global_prediction == labels).unsqueeze(1)
    return 1.0 + (patch_is_right ^ image_is_right).to(teacher_patches.dtype)


def textbook_cluster_loss(
    student_patches: Tensor, teacher_patches: Tensor, *, scales: Sequence[int], corrected: bool
) -> Tensor:
    """The divergence of softened Gram matrices, scale by scale; arguments and source as for `cluster_loss`."""
    sizes = [scale * scale for scale in scales]
    pairs = zip(torch.split(student_patches, sizes, 2), torch.split(teacher_patches, sizes, 2), strict=True)
    counted = [scale for scale in scales if scale > 1 or not corrected]
    loss = student_patches.new_zeros(len(student_patches))
    for scale, (student, teacher) in zip(scales, pairs, strict=True):
        student_rows, teacher_rows = (
            F.log_softmax(gram_matrix(patches) / _CLUSTER_SOFTNESS, dim=2) for patches in (student, teacher)
        )
        divergence = F.kl_div(student_rows, teacher_rows, reduction="none", log_target=True).sum(dim=(1, 2))
        loss = loss + scale_weight(scale) / sum(scale_weight(each) for each in counted or [1]) * divergence
    return loss * (_CLUSTER_SOFTNESS**2 if corrected else 1.0)


def cluster_loss(
    student_patches: Tensor,
    teacher_patches: Tensor,
    *,
    scales: Sequence[int],
    corrected: bool,
) -> Tensor:
    """Divergence of the patches' similarity rows, scale by scale: what iCD adds to SDD.

    Patch logits are scaled to unit length over the classes; the P x P Gram matrix of a scale, softened by 2, is a
    distribution in each row; the loss is KL(teacher || student), summed over the rows.

    As published, scale s weighs 1, 2, 3 for s = 1, 2, 4 over the sum of those present, and there is no factor T^2. The
    1 x 1 scale has a Gram matrix of one element, so its part is exactly 0, yet it keeps its share of the weights. Other
    scales follow the rule of those three, 1 + log2(s).
    `corrected` shares the weights among the scales that have more than one patch, and multiplies by 2^2.

    Gradient: let U be the student's unit vectors of a scale [N, K], G = U U^T, and D the gradient of the divergence
    with respect to G / 2, which is softmax(G / 2) of the student less that of the teacher. G has every product of two
    rows twice, so d / d U = (D + D^T) U / 2. A vector x = |x| u passes on what is across it: d / d x = (g - u (u . g))
    / |x| for the gradient g with respect to u, since a longer vector of the same direction has the same u.

    Args:
        student_patches: [B, K, P].
        teacher_patches: [B, K, P], without gradient.
        scales: the scales that make up P, ascending.
        corrected: use the corrected weights and factor.

    Returns:
        [B], in nats, not negative; exactly 0 when 1 is the only scale.

    Source: iCD, https://arxiv.org/abs/2509.12553; weights as in its published code.
    """
    unit, length = _unit_length(torch.stack((student_patches.detach(), teacher_patches.detach())).transpose(2, 3))
    live = [scale for scale in scales if scale > 1]
    total_weight = sum(scale_weight(scale) for scale in (live if corrected else scales))
    factor = _CLUSTER_SOFTNESS**2 if corrected else 1.0

    loss = student_patches.new_zeros(student_patches.shape[0])
    unit_gradients = []
    first = 0
    for scale in scales:
        group = unit[:, :, first : first + scale * scale]  # [2, B, N, K]
        first += scale * scale
        if scale == 1:
            unit_gradients.append(torch.zeros_like(group[0]))
            continue
        weight = factor * scale_weight(scale) / total_weight
        divergence, gap = kl_divergence(*F.log_softmax(_gram(group) / _CLUSTER_SOFTNESS, dim=3))
        loss = loss + weight * divergence.sum(dim=1)
        unit_gradients.append((gap + gap.transpose(1, 2)) @ group[0] * (weight / _CLUSTER_SOFTNESS))
    unit_gradient, student_unit = torch.cat(unit_gradients, dim=1), unit[0]  # [B, P, K]
    # A longer vector of the same direction has the same unit vector.
    across = unit_gradient - student_unit * (student_unit * unit_gradient).sum(dim=2, keepdim=True)
    return with_gradient(student_patches, loss, (across / length[0]).transpose(1, 2))


def gram_matrix(patches: Tensor) -> Tensor:
    """How alike the patches of one scale are: the cosine of their logits, before the cluster term softens it.

    Args:
        patches: [B, K, N], patch logits of that scale alone.

    Returns:
        [B, N, N] in [-1, 1].

    Source: iCD, https://arxiv.org/abs/2509.12553
    """
    return _gram(_unit_length(patches.transpose(1, 2))[0])


def _gram(unit: Tensor) -> Tensor:
    """[..., N, K] -> [..., N, N]."""
    return unit @ unit.transpose(-2, -1)


def _unit_length(patches: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] with unit length over the classes, and the lengths [..., 1]; all-zero patches stay zero.

    Large values are scaled down first, so that their squares can't overflow.
    """
    size = patches.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
    scaled = patches / size
    length = torch.maximum(torch.linalg.vector_norm(scaled, dim=-1, keepdim=True), _SHORTEST / size)
    return scaled / length, size * length
