"""Patch logits, scale decoupling, the cluster term, and the table of methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from icdctl import methods
from icdctl.errors import UsageError
from icdctl.methods import LOGIT_METHODS, check_settings, distillation_terms, num_patches, parse_scales, patch_logits
from icdctl.methods.logit import textbook_dkd_loss
from icdctl.methods.patch import (
    cluster_loss,
    complementary_weights,
    scale_decoupled_loss,
    textbook_cluster_loss,
    textbook_scale_decoupled_loss,
)

ALL_SCALES = [(1,), (2,), (4,), (1, 2), (1, 4), (2, 4), (1, 2, 4)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(scales: tuple[int, ...] = (1, 2, 4), *, num_classes: int = 7, batch: int = 6) -> dict[str, Any]:
    patches = num_patches(scales)
    return {
        "student_logits": 2 * random(batch, num_classes, seed=1),
        "teacher_logits": 3 * random(batch, num_classes, seed=2),
        "student_patches": 2 * random(batch, num_classes, patches, seed=3),
        "teacher_patches": 3 * random(batch, num_classes, patches, seed=4),
        "labels": torch.arange(batch) % num_classes,
        "scales": scales,
    }


def head(channels: int, num_classes: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(channels, num_classes).requires_grad_(False)


@pytest.mark.parametrize("side", [4, 8, 16, 28])
def test_patches_are_the_heads_answer_to_each_regions_mean(side: int) -> None:
    feature_map, classifier = random(2, 5, side, side), head(5, 3)
    found = patch_logits(feature_map, classifier, (1, 2, 4))
    assert found.shape == (2, 3, 21)
    first = 0
    for scale in (1, 2, 4):
        regions = F.avg_pool2d(feature_map, side // scale).flatten(2)  # [B, C, scale * scale]
        for place in range(scale * scale):
            assert_close(found[:, :, first + place], classifier(regions[:, :, place]), rtol=1e-4, atol=1e-5)
        first += scale * scale


def test_patches_are_ordered_row_by_row() -> None:
    feature_map = torch.zeros(1, 1, 4, 4)
    feature_map[0, 0, 0, 3] = 16.0  # top right
    classifier = nn.Linear(1, 1, bias=False)
    nn.init.ones_(classifier.weight)
    found = patch_logits(feature_map, classifier, (1, 2, 4))[0, 0]
    assert found.detach().nonzero().flatten().tolist() == [0, 2, 5 + 3]
    assert_close(found[[0, 2, 8]].detach(), torch.tensor([1.0, 4.0, 16.0]))


def test_a_two_by_two_map_gives_each_of_its_cells_four_times() -> None:
    fine = patch_logits(random(2, 5, 2, 2), head(5, 3), (4,)).reshape(2, 3, 4, 4)
    for row in range(4):
        for column in range(4):
            assert_close(fine[:, :, row, column], fine[:, :, row // 2 * 2, column // 2 * 2])


def test_on_overlapping_windows_the_whole_image_is_the_mean_of_the_cells() -> None:
    feature_map, classifier = random(2, 5, 7, 7), head(5, 3)
    whole = patch_logits(feature_map, classifier, (1,))[:, :, 0]
    cells = F.adaptive_avg_pool2d(feature_map, 4).mean(dim=(2, 3))
    assert_close(whole, classifier(cells))
    assert not torch.allclose(whole, classifier(feature_map.mean(dim=(2, 3))), atol=1e-3)


@pytest.mark.parametrize(("text", "expected"), [("1,2,4", (1, 2, 4)), ("4, 1", (1, 4)), ("[1,2]", (1, 2)), ("2", (2,))])
def test_scales_are_read_in_any_order(text: str, expected: tuple[int, ...]) -> None:
    assert parse_scales(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1.5", "9", "0", "-1", "16", "1,1", "1;2"])
def test_impossible_scales_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_scales(text)


def test_complementary_patches_weigh_double() -> None:
    # Image 0: the whole is right. Image 1: the whole is wrong. Patches: right, wrong.
    patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    labels = torch.tensor([0, 0])
    weights = complementary_weights(patches, labels, global_prediction=torch.tensor([0, 1]))
    assert weights.tolist() == [[1.0, 2.0], [2.0, 1.0]]


def test_the_scale_decoupled_loss_is_the_weighted_mean_over_patches() -> None:
    given = inputs()
    prediction = given["teacher_patches"][:, :, 0].argmax(dim=1)
    weights = complementary_weights(given["teacher_patches"], given["labels"], prediction)

    def row_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return (student - teacher).square().sum(dim=1) + labels

    found = scale_decoupled_loss(
        row_loss, given["student_patches"], given["teacher_patches"], given["labels"], prediction
    )
    plain = (given["student_patches"] - given["teacher_patches"]).square().sum(dim=1) + given["labels"][:, None]
    assert_close(found, (plain * weights).mean(dim=1))


def test_cluster_loss_matches_a_two_by_two_grid_worked_by_hand() -> None:
    # Teacher: four orthogonal patches, so its Gram matrix is the identity; student: four equal ones, so all ones.
    teacher = torch.eye(4).unsqueeze(0)
    student = torch.zeros(1, 4, 4)
    student[0, 0] = 3.0
    same, other = math.exp(0.5), 1.0
    share_same, share_other = same / (same + 3 * other), other / (same + 3 * other)
    row = share_same * math.log(share_same / 0.25) + 3 * share_other * math.log(share_other / 0.25)
    assert_close(cluster_loss(student, teacher, scales=(2,), corrected=False), torch.tensor([4 * row]))
    assert_close(cluster_loss(student, teacher, scales=(2,), corrected=True), torch.tensor([4 * 4 * row]))


@pytest.mark.parametrize(
    ("scales", "published", "corrected"),
    [
        ((1, 2), (2 / 3,), (4.0,)),
        ((1, 4), (3 / 4,), (4.0,)),
        ((1, 2, 4), (2 / 6, 3 / 6), (4 * 2 / 5, 4 * 3 / 5)),
        ((2, 4), (2 / 5, 3 / 5), (4 * 2 / 5, 4 * 3 / 5)),
    ],
)
def test_scales_weigh_as_published_or_as_corrected(
    scales: tuple[int, ...], published: tuple[float, ...], corrected: tuple[float, ...]
) -> None:
    given = inputs(scales)
    student, teacher = given["student_patches"], given["teacher_patches"]
    live = [scale for scale in scales if scale > 1]
    for weights, variant in ((published, False), (corrected, True)):
        expected, first = torch.zeros(6), 1 if 1 in scales else 0
        for scale, weight in zip(live, weights, strict=True):
            part = slice(first, first + scale * scale)
            first = part.stop
            expected += weight * cluster_loss(
                student[:, :, part], teacher[:, :, part], scales=(scale,), corrected=False
            )
        assert_close(cluster_loss(student, teacher, scales=scales, corrected=variant), expected)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("scales", [(1, 2, 4), (2,), (1, 4)])
def test_the_gradient_of_the_cluster_loss_is_its_derivative(scales: tuple[int, ...], corrected: bool) -> None:
    given = inputs(scales)
    student = given["student_patches"].detach().double().requires_grad_()
    teacher = given["teacher_patches"].double()
    assert torch.autograd.gradcheck(
        lambda patches: cluster_loss(patches, teacher, scales=scales, corrected=corrected), (student,)
    )


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("scales", [(2,), (4,), (1, 2), (2, 4), (1, 2, 4)])
def test_the_cluster_loss_has_the_value_and_the_gradient_of_the_textbook(
    scales: tuple[int, ...], corrected: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 7, num_patches(scales))
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = []
    for loss in (cluster_loss, textbook_cluster_loss):
        student = start.clone().requires_grad_()
        value = loss(student, teacher, scales=scales, corrected=corrected)
        found.append((value.detach(), torch.autograd.grad(value.sum(), student)[0]))
    assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_the_scale_decoupled_loss_has_the_value_and_the_gradient_of_the_textbook() -> None:
    def rows(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return textbook_dkd_loss(student, teacher, labels, alpha=1.0, beta=2.0, temperature=4.0)

    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn((4, 5, 21), generator=generator, dtype=torch.float64)
    start = torch.randn((4, 5, 21), generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    prediction = teacher[:, :, 0].argmax(dim=1)
    found = []
    for loss in (scale_decoupled_loss, textbook_scale_decoupled_loss):
        student = start.clone().requires_grad_()
        value = loss(rows, student, teacher, labels, prediction)
        found.append((value.detach(), torch.autograd.grad(value.sum(), student)[0]))
    assert len(torch.unique(complementary_weights(teacher, labels, prediction))) == 2
    assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_a_small_map_gives_what_pooling_before_the_classifier_gives() -> None:
    for side in (1, 2, 3, 4, 7):
        feature_map, classifier = random(2, 5, side, side), head(5, 3)
        pooled = F.adaptive_avg_pool2d(feature_map, 4)
        expected = classifier(pooled.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert_close(methods.region_logits(feature_map, classifier), expected)


def test_the_whole_image_adds_nothing_to_the_cluster_loss() -> None:
    given = inputs((1,))
    zero = cluster_loss(given["student_patches"], given["teacher_patches"], scales=(1,), corrected=False)
    assert zero.tolist() == [0.0] * 6


def test_cluster_loss_sees_directions_alone_and_is_finite_for_huge_and_zero_patches() -> None:
    given = inputs()
    student, teacher = given["student_patches"], given["teacher_patches"]
    usual = cluster_loss(student, teacher, scales=(1, 2, 4), corrected=False)
    scaled = cluster_loss(student * 1e30, teacher * 1e25, scales=(1, 2, 4), corrected=False)
    assert_close(scaled, usual, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(cluster_loss(student * 0, teacher, scales=(1, 2, 4), corrected=False)).all()


@pytest.mark.parametrize("scales", ALL_SCALES)
@pytest.mark.parametrize("variant", methods.VARIANTS)
@pytest.mark.parametrize("method", LOGIT_METHODS)
def test_every_method_gives_finite_terms_and_a_gradient_to_the_student_alone(
    method: str, variant: str, scales: tuple[int, ...]
) -> None:
    given = inputs(scales)
    tensors = [value.requires_grad_() for key, value in given.items() if key not in ("labels", "scales")]
    terms = distillation_terms(method, **given, epoch=3, settings={"variant": variant})
    total = torch.stack(list(terms.values())).sum()
    torch.autograd.backward(total)
    assert all(term.dim() == 0 and torch.isfinite(term) for term in terms.values())
    assert given["student_logits"].grad is not None
    assert given["teacher_logits"].grad is None
    assert given["teacher_patches"].grad is None
    assert len(tensors) == 4
    if LOGIT_METHODS[method].needs_patches and scales != (1,):
        assert given["student_patches"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd"])
def test_the_cluster_term_is_all_that_cd_adds(name: str) -> None:
    given = inputs()
    without = distillation_terms(f"sdd_{name}", **given, epoch=5)
    with_term = distillation_terms(f"cd_sdd_{name}", **given, epoch=5)
    cluster = with_term.pop("cluster")
    assert_close(without, with_term)
    expected = (
        2.0 * cluster_loss(given["student_patches"], given["teacher_patches"], scales=(1, 2, 4), corrected=False).mean()
    )
    assert_close(cluster, expected)


@pytest.mark.parametrize("method", ["dkd", "nkd", "sdd_dkd", "sdd_nkd", "cd_sdd_dkd", "cd_sdd_nkd"])
def test_warm_up_scales_the_kd_term_alone(method: str) -> None:
    given = inputs()
    late, early = distillation_terms(method, **given, epoch=20), distillation_terms(method, **given, epoch=5)
    assert_close(early["kd"], late["kd"] / 4)
    assert {key: value for key, value in early.items() if key != "kd"} == {
        key: value for key, value in late.items() if key != "kd"
    }
    assert_close(distillation_terms(method, **given, epoch=1, settings={"warmup_epochs": 0})["kd"], late["kd"])
    assert_close(distillation_terms(method, **given, epoch=torch.tensor(5.0))["kd"], early["kd"])


@pytest.mark.parametrize("method", ["kd", "sdd_kd", "cd_sdd_kd"])
def test_the_kd_family_has_no_warm_up_unless_asked(method: str) -> None:
    given = inputs()
    first = distillation_terms(method, **given, epoch=1)["kd"]
    assert_close(first, distillation_terms(method, **given, epoch=50)["kd"])
    warm = distillation_terms(method, **given, epoch=1, settings={"warmup_epochs": 10})["kd"]
    assert_close(warm, first / 10)


def test_without_scale_one_the_whole_images_prediction_comes_from_the_logits() -> None:
    given = inputs((2,))
    swapped = given["teacher_patches"][:, :, [1, 0, 2, 3]]
    student = given["student_patches"][:, :, [1, 0, 2, 3]]
    usual = distillation_terms("sdd_kd", **given)["kd"]
    moved = distillation_terms("sdd_kd", **{**given, "teacher_patches": swapped, "student_patches": student})["kd"]
    assert_close(usual, moved)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gama": 2}, ("gama", "did you mean `gamma`")),
        ({"gamma": "eight"}, ("gamma", "expected a number")),
        ({"gamma": math.nan}, ("gamma", "nan, expected a number from 0 to 1,000,000")),
        ({"gamma": -1}, ("gamma", "number from 0 ")),
        ({"gamma": 1e39}, ("gamma", "to 1,000,000")),
        ({"temperature": 0}, ("temperature", "from 0.001 to 10,000")),
        ({"temperature": 1e300}, ("temperature", "from 0.001 to 10,000")),
        ({"variant": "fixed"}, ("variant", "corrected")),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], words: tuple[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        check_settings("cd_sdd_dkd", settings)
    assert all(word in f"{caught.value.message} {caught.value.hint}" for word in words)


@pytest.mark.parametrize("key", methods.DECLARED)
def test_every_setting_has_finite_bounds(key: str) -> None:
    bounds = methods.DECLARED[key]
    assert all(bounds.accepts(value) for value in (bounds.least, bounds.most))
    beyond = (bounds.most * 1.01, bounds.least - 1e-6, 1e39, 1e300, math.inf, math.nan)
    assert not any(bounds.accepts(value) for value in beyond)


@pytest.mark.parametrize("method", LOGIT_METHODS)
def test_losses_and_gradients_are_finite_at_the_bounds_of_the_settings(method: str) -> None:
    for key in check_settings(method, {}):
        if key == methods.VARIANT:
            continue
        for value in (methods.DECLARED[key].least, methods.DECLARED[key].most):
            given = {name: each.float() if "_" in name else each for name, each in inputs().items()}  # not labels
            student = given["student_logits"].requires_grad_()
            loss = sum(distillation_terms(method, **given, settings={key: value}).values())
            assert isinstance(loss, torch.Tensor)
            (gradient,) = torch.autograd.grad(loss, student)
            assert torch.isfinite(loss), (key, value)
            assert torch.isfinite(gradient).all(), (key, value)


def test_patches_that_do_not_fit_the_scales_are_refused() -> None:
    with pytest.raises(UsageError, match="expected \\[B, K, 5\\]"):
        distillation_terms("sdd_kd", **{**inputs((1, 2, 4)), "scales": (1, 2)})


MIXED = torch.tensor([0, -1, 2, -1, 4, 5])


@pytest.mark.parametrize("method", LOGIT_METHODS)
@pytest.mark.parametrize("variant", methods.VARIANTS)
def test_an_image_without_a_label_has_the_teachers_class_in_the_distillation_terms_and_no_part_in_ce(
    method: str, variant: str
) -> None:
    given = inputs()
    settings = {"variant": variant}
    found = distillation_terms(method, **{**given, "labels": MIXED}, settings=settings, has_unlabeled=True)
    filled = torch.where(MIXED == -1, given["teacher_logits"].argmax(dim=1), MIXED)
    expected = distillation_terms(method, **{**given, "labels": filled}, settings=settings)
    labelled = MIXED != -1
    ce = F.cross_entropy(given["student_logits"][labelled], MIXED[labelled])
    expected["ce"] = float(check_settings(method, {})["ce_weight"]) * ce
    assert_close(found, expected)


@pytest.mark.parametrize("method", LOGIT_METHODS)
def test_a_batch_without_any_label_gives_no_cross_entropy_and_a_finite_gradient(method: str) -> None:
    given = {**inputs(), "labels": torch.full((6,), -1)}
    given["student_logits"].requires_grad_()
    weights = torch.linspace(0.5, 2, 7)
    terms = distillation_terms(method, **given, label_smoothing=0.1, class_weights=weights, has_unlabeled=True)
    assert terms["ce"].item() == 0
    torch.autograd.backward(torch.stack(list(terms.values())).sum())
    gradient = given["student_logits"].grad
    assert torch.isfinite(gradient).all()
    assert gradient.any() == (LOGIT_METHODS[method].needs_teacher and not LOGIT_METHODS[method].needs_patches)


@pytest.mark.parametrize("method", LOGIT_METHODS)
def test_a_run_with_images_without_labels_counts_the_others_as_ever(method: str) -> None:
    given = inputs()
    assert_close(distillation_terms(method, **given, has_unlabeled=True), distillation_terms(method, **given))


@pytest.mark.parametrize("labels", [MIXED, torch.arange(6)], ids=["some unlabelled", "all labelled"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_smoothing_and_class_weights_are_those_of_torch(labels: Tensor, smoothing: float, weighted: bool) -> None:
    logits = inputs()["student_logits"]
    weights = torch.linspace(0.5, 2, 7) if weighted else None
    found = distillation_terms(
        "ce",
        student_logits=logits,
        labels=labels,
        label_smoothing=smoothing,
        class_weights=weights,
        has_unlabeled=bool((labels == -1).any()),
    )
    expected = F.cross_entropy(logits, labels, weight=weights, ignore_index=-1, label_smoothing=smoothing)
    assert_close(found, {"ce": expected})


@pytest.mark.parametrize("method", [name for name, row in LOGIT_METHODS.items() if row.needs_teacher])
def test_smoothing_and_class_weights_change_the_cross_entropy_alone(method: str) -> None:
    given = inputs()
    plain = distillation_terms(method, **given)
    changed = distillation_terms(method, **given, label_smoothing=0.2, class_weights=torch.linspace(0.5, 2, 7))
    assert changed.pop("ce") != plain.pop("ce")
    assert_close(changed, plain, rtol=0, atol=0)
