"""Newer losses on logits and on batches: values worked by hand, and what ties them to each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from icdctl.methods.batch import cat_loss, dist_losses, skd_direction_loss, skd_mask_shares
from icdctl.methods.logit import dkd_loss, kd_loss
from icdctl.methods.newer_logit import (
    abkd_loss,
    divergence,
    entropy_weights,
    gdkd_loss,
    ldrld_loss,
    normkd_loss,
    rld_loss,
    standardise,
    textbook_abkd_loss,
    ttm_loss,
    two_way_divergence,
)
from icdctl.methods.patch import patch_logits

B, K = 5, 9
LABELS = torch.tensor([0, 8, 3, 3, 7])


def logits(seed: int, *, scale: float = 3.0, rows: int = B, num_classes: int = K) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn((rows, num_classes), generator=generator, dtype=torch.float64)


def right_teacher() -> Tensor:
    """Logits whose largest is the label's."""
    teacher = logits(1)
    return teacher.scatter(1, LABELS[:, None], teacher.amax(dim=1, keepdim=True) + 1)


def rld(student: Tensor, teacher: Tensor) -> Tensor:
    labels = LABELS.clamp(max=student.shape[1] - 1)[: len(student)]
    return rld_loss(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0, confidence_temperature=1.0)


def gdkd(student: Tensor, teacher: Tensor) -> Tensor:
    return gdkd_loss(student, teacher, num_top=3, split_weight=1.0, top_weight=2.0, rest_weight=8.0, temperature=4.0)


def ldrld(student: Tensor, teacher: Tensor) -> Tensor:
    return ldrld_loss(student, teacher, num_top=4, alpha=10.5, beta=7.0, temperature=4.0, corrected=False)


def ttm(student: Tensor, teacher: Tensor) -> Tensor:
    return ttm_loss(student, teacher, power=0.1, weighted=False)


def wttm(student: Tensor, teacher: Tensor) -> Tensor:
    return ttm_loss(student, teacher, power=0.1, weighted=True)


def abkd(student: Tensor, teacher: Tensor) -> Tensor:
    return abkd_loss(student, teacher, alpha=0.8, beta=0.3, temperature=1.0, corrected=True)


def normkd(student: Tensor, teacher: Tensor) -> Tensor:
    return normkd_loss(student, teacher, temperature=2.0)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    loss.__name__: loss for loss in (rld, gdkd, ldrld, ttm, wttm, abkd, normkd)
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_derivative(name: str) -> None:
    teacher = logits(1)
    student = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: LOSSES[name](given, teacher), (student,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 300.0])
def test_float32_reaches_the_float64_value_however_confident_the_logits(name: str, scale: float) -> None:
    pair = logits(2, scale=scale).float(), logits(3, scale=scale).float()
    exact = LOSSES[name](pair[0].double(), pair[1].double())
    assert_close(LOSSES[name](*pair).double(), exact, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_classes", [2, 9])
def test_a_loss_is_zero_where_both_agree_and_each_row_has_its_own_value(name: str, num_classes: int) -> None:
    loss, student, teacher = LOSSES[name], logits(0, num_classes=num_classes), right_teacher()[:, :num_classes]
    if name not in ("ttm", "wttm", "rld"):  # the first two temper the teacher alone, the third looks at the label
        assert_close(loss(student, student), torch.zeros(B, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (loss(student, teacher) >= 0).all()
    assert_close(torch.cat([loss(student[:1], teacher[:1])]), loss(student, teacher)[:1])


def test_the_gap_of_two_coins_keeps_its_digits() -> None:
    student = torch.tensor([30.0, -30.0, 30.0, -30.0], requires_grad=True)
    teacher = torch.tensor([29.0, -29.0, -30.0, 30.0])
    torch.autograd.backward(two_way_divergence(student, teacher).sum())
    exact = torch.sigmoid(student.detach().double().neg()) - torch.sigmoid(teacher.double().neg())
    assert student.grad is not None
    assert_close(student.grad[:1].double(), -exact[:1], rtol=1e-5, atol=0)
    assert_close(student.grad[1:2].double(), exact[:1], rtol=1e-5, atol=0)
    assert_close(student.grad[2:], torch.tensor([1.0, -1.0]))


def test_rld_of_a_teacher_that_is_right_is_dkd() -> None:
    student, teacher = logits(0), right_teacher()
    for temperature in (1.0, 2.0, 4.0):
        found = rld_loss(
            student,
            teacher,
            LABELS,
            alpha=1.5,
            beta=8.0,
            temperature=temperature,
            confidence_temperature=temperature,
        )
        assert_close(found, dkd_loss(student, teacher, LABELS, alpha=1.5, beta=8.0, temperature=temperature))


def test_rld_worked_by_hand_and_ties_go_with_the_label() -> None:
    # The teacher's choice is class 0; class 2 ties with the label 1; only class 3 ranks below, so MCD is 0.
    teacher = torch.tensor([[1 / 2, 1 / 5, 1 / 5, 1 / 10]]).log()
    student = torch.tensor([[1 / 4, 1 / 4, 1 / 4, 1 / 4]]).log()
    confidence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = rld_loss(
        student, teacher, torch.tensor([1]), alpha=2.0, beta=3.0, temperature=1.0, confidence_temperature=1.0
    )
    assert_close(found, torch.tensor([2 * confidence]))
    # The label is the teacher's lowest: no class is left, and MCD has neither value nor gradient.
    student = logits(0, rows=1, num_classes=4).requires_grad_()
    lowest = rld_loss(
        student,
        teacher.double(),
        torch.tensor([3]),
        alpha=0.0,
        beta=3.0,
        temperature=1.0,
        confidence_temperature=1.0,
    )
    (gradient,) = torch.autograd.grad(lowest.sum(), student)
    assert (lowest.item(), gradient.abs().max().item()) == (0, 0)


def test_gdkd_with_one_class_is_dkd_and_its_parts_add_up_to_kd() -> None:
    student, teacher, temperature = logits(0), right_teacher(), 2.0

    def parts(split: float, top: float, rest: float, count: int) -> Tensor:
        return gdkd_loss(
            student,
            teacher,
            num_top=count,
            split_weight=split,
            top_weight=top,
            rest_weight=rest,
            temperature=temperature,
        )

    expected = dkd_loss(student, teacher, LABELS, alpha=1.5, beta=8.0, temperature=temperature)
    assert_close(parts(1.5, 3.0, 8.0, 1), expected)
    mass = (teacher / temperature).softmax(dim=1).topk(4, dim=1).values.sum(dim=1)
    whole = parts(1, 0, 0, 4) + mass * parts(0, 1, 0, 4) + (1 - mass) * parts(0, 0, 1, 4)
    assert_close(whole, kd_loss(student, teacher, temperature=temperature))
    assert_close(parts(5.0, 1.0, 5.0, K), kd_loss(student, teacher, temperature=temperature))


def test_ttm_and_wttm_with_power_one_are_kd_and_weights_are_large_where_the_teacher_is_unsure() -> None:
    student, teacher = logits(0), logits(1)
    plain = kd_loss(student, teacher, temperature=1.0)
    assert_close(ttm_loss(student, teacher, power=1.0, weighted=False), plain)
    assert_close(ttm_loss(student, teacher, power=1.0, weighted=True), plain)
    unsure = torch.zeros(1, K, dtype=torch.float64)
    student = student[:1]
    ratio = ttm_loss(student, unsure, power=0.2, weighted=True) / ttm_loss(student, unsure, power=0.2, weighted=False)
    assert_close(ratio, torch.tensor([K**0.8], dtype=torch.float64))


@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.3), (1.0, 1.0), (0.5, 0.5), (1.3, -0.3), (-0.2, 1.1), (2.0, -0.5)])
def test_abkd_has_the_value_and_the_gradient_of_the_textbook(alpha: float, beta: float) -> None:
    teacher, found = logits(1), []
    for stable in (True, False):
        student = logits(0).requires_grad_()
        if stable:
            value = abkd_loss(student, teacher, alpha=alpha, beta=beta, temperature=2.0, corrected=True)
        else:
            value = textbook_abkd_loss(student, teacher, alpha=alpha, beta=beta, temperature=2.0)
        found.append((value.detach(), torch.autograd.grad(value.sum(), student)[0]))
    assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.0), (0.0, 0.6), (0.5, -0.5), (0.0, 0.0)])
@pytest.mark.parametrize("corrected", [True, False])
def test_limits_of_abkd_are_those_of_the_general_form_but_for_the_published_factor(
    alpha: float, beta: float, corrected: bool
) -> None:
    student, teacher = logits(0, scale=1.0), logits(1, scale=1.0)
    near = textbook_abkd_loss(student, teacher, alpha=alpha + 1e-5, beta=beta + 2e-5, temperature=2.0)
    found = abkd_loss(student, teacher, alpha=alpha, beta=beta, temperature=2.0, corrected=corrected)
    factor = 1.0 if corrected or alpha == beta == 0 else alpha or beta
    assert_close(found / factor, near, rtol=2e-3, atol=1e-4)


def test_well_known_members_of_abkd() -> None:
    student, teacher = logits(0), logits(1)
    p, q = teacher.softmax(dim=1), student.softmax(dim=1)
    known = {
        (1.0, 0.0): (p * (p / q).log()).sum(dim=1),
        (0.0, 1.0): (q * (q / p).log()).sum(dim=1),
        (1.0, 1.0): (p - q).square().sum(dim=1) / 2,
        (0.5, 0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(dim=1),
        (0.0, 0.0): (p.log() - q.log()).square().sum(dim=1) / 2,
    }
    for (alpha, beta), expected in known.items():
        for corrected in (True, False):
            found = abkd_loss(student, teacher, alpha=alpha, beta=beta, temperature=1.0, corrected=corrected)
            assert_close(found, expected)


def test_standardised_logits_do_not_depend_on_scale_and_shift() -> None:
    student, teacher = logits(0), logits(1)
    moved = student * torch.linspace(0.2, 5, B, dtype=torch.float64)[:, None] - 7
    for corrected, rtol in ((True, 1e-10), (False, 1e-6)):
        found = [
            kd_loss(standardise(given, corrected=corrected), standardise(teacher, corrected=corrected), temperature=2.0)
            for given in (student, moved)
        ]
        assert_close(found[0], found[1], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("corrected", [True, False])
def test_two_standardised_classes_have_nothing_but_their_order(corrected: bool) -> None:
    student = torch.tensor([[1.0, 4.0], [3.0, -9.0]])
    teacher = torch.tensor([[0.0, 0.1], [5.0, 1.0]])
    loss = kd_loss(
        standardise(student, corrected=corrected), standardise(teacher, corrected=corrected), temperature=2.0
    )
    assert_close(loss, torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, 37.5])
def test_a_constant_row_has_a_small_gradient_where_the_published_form_has_a_huge_one(value: float) -> None:
    teacher = logits(1, rows=1).float()
    sizes = {}
    for corrected in (True, False):
        student = torch.full((1, K), value, requires_grad=True)
        pair = [standardise(values, corrected=corrected) for values in (student, teacher)]
        torch.autograd.backward(kd_loss(pair[0], pair[1], temperature=2.0).sum())
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()
        sizes[corrected] = student.grad.abs().max().item()
    assert sizes[True] < 10
    assert sizes[False] > 1e5


def test_normkd_is_the_standardised_loss_times_the_teachers_variance() -> None:
    student, teacher = logits(0), logits(1)
    pair = (standardise(given, corrected=False) for given in (student, teacher))
    expected = teacher.std(dim=1).square() * kd_loss(*pair, temperature=2.0)
    assert_close(normkd_loss(student, teacher, temperature=2.0), expected, rtol=1e-6, atol=1e-9)
    constant = torch.ones(1, K, requires_grad=True)
    torch.autograd.backward(normkd_loss(constant, teacher[:1].float(), temperature=2.0).sum())
    assert constant.grad is not None
    assert torch.isfinite(constant.grad).all()


def test_entropy_weights_of_the_unsure_and_the_certain() -> None:
    unsure, certain = torch.zeros(1, K), torch.eye(K)[:1] * 1e4
    weigh = partial(entropy_weights, temperature=3.0, largest_entropy=None, added=0.0)
    assert weigh(unsure, unsure).item() == pytest.approx(math.log(K))
    assert weigh(unsure, certain).item() == 0
    found = entropy_weights(unsure, unsure, temperature=3.0, largest_entropy=100.0, added=1e-10).item()
    assert found == pytest.approx(math.log(K) * (1 + math.log(K) / 100) / 2)


@pytest.mark.parametrize("corrected", [True, False])
def test_the_rest_of_ldrld_is_kd_where_all_classes_are_ranked_and_the_paper_has_none(corrected: bool) -> None:
    student, teacher = logits(0), logits(1)
    rest = ldrld_loss(student, teacher, num_top=K, alpha=0.0, beta=1.0, temperature=2.0, corrected=corrected)
    expected = torch.zeros(B, dtype=torch.float64) if corrected else kd_loss(student, teacher, temperature=2.0)
    assert_close(rest, expected)


def test_ldrld_pair_by_pair() -> None:
    student, teacher = logits(0), logits(1)
    top = student.topk(3, dim=1).indices
    s, t = student.gather(1, top), teacher.gather(1, top)
    total = divergence(s, t)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pair = divergence(s[:, [first, second]], t[:, [first, second]])
        total = total + 2 * math.exp(-0.05 * (first + second + 2)) / (1.5 + second - first) * pair
    found = {
        corrected: ldrld_loss(student, teacher, num_top=3, alpha=1.0, beta=0.0, temperature=1.0, corrected=corrected)
        for corrected in (True, False)
    }
    assert_close(found[True], total)
    assert_close(found[False], total / 4)


# Losses of a batch


def test_dist_is_zero_for_shifted_rows_but_for_the_published_eps() -> None:
    teacher = logits(1)
    student = teacher + logits(2, num_classes=1)
    for value in dist_losses(student, teacher, temperature=4.0, corrected=True):
        assert abs(value.item()) < 1e-12
    assert dist_losses(student, teacher, temperature=4.0, corrected=False)[1].item() > 1e-7


@pytest.mark.parametrize("corrected", [True, False])
def test_dist_of_one_image_has_no_relation_between_images(corrected: bool) -> None:
    student, teacher = logits(0, rows=1).requires_grad_(), logits(1, rows=1)
    _, intra = dist_losses(student, teacher, temperature=4.0, corrected=corrected)
    (gradient,) = torch.autograd.grad(intra, student)
    assert (intra.item(), gradient.abs().max().item()) == (16, 0)


def test_dist_is_one_less_the_correlation() -> None:
    student, teacher = logits(0), logits(1)
    probs = [given.softmax(dim=1) for given in (student, teacher)]
    rows = [torch.corrcoef(torch.stack((a, b)))[0, 1] for a, b in zip(*probs, strict=True)]
    columns = [torch.corrcoef(torch.stack((a, b)))[0, 1] for a, b in zip(probs[0].T, probs[1].T, strict=True)]
    found = dist_losses(student, teacher, temperature=1.0, corrected=True)
    assert_close(found, (1 - torch.stack(rows).mean(), 1 - torch.stack(columns).mean()))


def test_dist_in_float32_does_not_lose_rare_classes() -> None:
    student, teacher = (logits(seed, scale=20.0).float() for seed in (0, 1))
    exact = dist_losses(student.double(), teacher.double(), temperature=1.0, corrected=True)
    found = dist_losses(student, teacher, temperature=1.0, corrected=True)
    assert_close([value.double() for value in found], list(exact), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("corrected", [True, False])
def test_skd_is_the_textbooks_mahalanobis_distance(corrected: bool) -> None:
    student, teacher = logits(0), logits(1)
    grams = [F.normalize(given, dim=1) @ F.normalize(given, dim=1).T for given in (student, teacher)]
    difference = (grams[0] - grams[1]) / (1 if corrected else K)
    inverse = torch.linalg.inv(torch.cov(difference.T) + 0.1 * torch.eye(B, dtype=torch.float64))
    expected = torch.einsum("bi,ij,bj->b", difference, inverse, difference).sqrt().mean()
    assert_close(skd_direction_loss(student, teacher, regularisation=0.1, corrected=corrected), expected)


@pytest.mark.parametrize("rows", [1, B])
def test_skd_is_zero_with_a_finite_gradient_where_directions_agree(rows: int) -> None:
    teacher = logits(1, rows=rows)
    student = (teacher * torch.linspace(0.5, 2, rows, dtype=torch.float64)[:, None]).requires_grad_()
    value = skd_direction_loss(student, teacher, regularisation=0.1, corrected=True)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() < 1e-12
    assert torch.isfinite(gradient).all()


def test_the_published_masks_of_skd_are_two_numbers() -> None:
    teacher = torch.tensor([[4.0, 0, 0], [2.0, 0, 0], [0, 1.0, 0]])
    rows, classes = skd_mask_shares(teacher)
    assert rows.item() == pytest.approx(2 / 3)
    assert classes.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("resolution", [1, 2, 4])
def test_cat_is_the_error_of_patch_logits_less_the_bias(resolution: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(3, 6, 8, 8, generator=generator) for _ in range(2)]
    heads = [torch.nn.Linear(6, K) for _ in range(2)]
    maps = [torch.einsum("bdhw,kd->bkhw", feature, head.weight) for feature, head in zip(features, heads, strict=True)]
    patches = [
        patch_logits(feature, head, scales=(resolution,)) - head.bias[:, None]
        for feature, head in zip(features, heads, strict=True)
    ]
    expected = (patches[0] - patches[1]).square().mean(dim=(1, 2))
    assert_close(cat_loss(*maps, resolution=resolution, normalised=False), expected, rtol=1e-4, atol=1e-6)


def test_normalised_maps_of_one_place_are_signs() -> None:
    student = torch.tensor([[[[3.0]], [[-2.0]]]], requires_grad=True)
    teacher = torch.tensor([[[[-0.5]], [[-7.0]]]])
    loss = cat_loss(student, teacher, resolution=1, normalised=True)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.item() == pytest.approx(4 * 0.5)
    assert gradient.abs().max().item() < 1e-6
