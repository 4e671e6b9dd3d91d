"""All feature methods at once: properties of their losses, then training, resuming and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from test_device_loop import by_position, taught
from test_engine import SMALL, Stop, history, weights
from torch import Tensor

import icdctl as library
from icdctl import methods, models
from icdctl.engine import run as engine
from icdctl.errors import UsageError
from icdctl.methods import FEATURE_METHODS, METHODS, ModelProbe, Objective, Supervision, check_settings
from icdctl.methods import feature_losses as losses
from icdctl.methods.connectors import Factors, Predictions
from icdctl.methods.contrastive import Banks, Negatives, contrastive_loss, hashed
from icdctl.methods.feature_method import FeatureObjective
from icdctl.models import Classifier

__all__ = ["by_position", "taught"]

ZERO_AT_EQUALITY = {"at", "nst", "sp", "pkt", "rkd", "fsp", "kdsvd"}
ORDER_MATTERS = {"cc", "crd"}
"""CC compares neighbours in the batch, and CRD draws by the place in the batch."""
SIZE = (32, 32)


def images(count: int) -> Tensor:
    return torch.randn((count, 3, *SIZE), generator=torch.Generator().manual_seed(3))


def models_of(num_classes: int = 10) -> tuple[Classifier, Classifier]:
    """Student and teacher, of equal width, so that every method can be used."""
    torch.manual_seed(0)
    return models.create("res8", num_classes), models.create("res14", num_classes).eval()


def objective_of(method: str, student: Classifier, teacher: Classifier, **settings: object) -> Objective:
    small = {"nce_k": 8} if method == "crd" else {}
    torch.manual_seed(1)
    return METHODS[method].build(
        ModelProbe(student, SIZE),
        ModelProbe(teacher, SIZE),
        check_settings(method, {**small, **settings}),
        scales=(),
        supervision=Supervision(train_labels=torch.arange(20) % 2),
    )


def tensors_of(method: str, model: Classifier, pixels: Tensor, *, student: bool) -> dict[str, Tensor]:
    row, settings = METHODS[method], check_settings(method, {})
    names = row.student_reads(settings) if student else row.teacher_reads(settings)
    outputs: Any = model.outputs(pixels)
    read = methods.read(outputs, model.head, names - {methods.IMAGE_NUMBERS})
    return read | ({methods.IMAGE_NUMBERS: torch.arange(len(pixels))} if methods.IMAGE_NUMBERS in names else {})


def terms_of(method: str, count: int = 6, num_classes: int = 10) -> tuple[dict[str, Tensor], Objective, Classifier]:
    student, teacher = models_of(num_classes)
    objective = objective_of(method, student, teacher).train()
    with torch.no_grad():
        answer = tensors_of(method, teacher, images(count), student=False)
    read = tensors_of(method, student.train(), images(count), student=True)
    return objective(read, answer, torch.arange(count) % 2, 1), objective, student


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_the_gradient_reaches_the_student_and_the_connectors(method: str) -> None:
    terms, objective, student = terms_of(method)
    assert tuple(terms) == objective.term_names
    assert all(term.shape == () and torch.isfinite(term) for term in terms.values())
    torch.autograd.backward(torch.stack([term for name, term in terms.items() if name != "ce"]).sum())
    reached = [parameter.grad is not None for name, parameter in student.named_parameters() if "fc" not in name]
    assert any(reached)
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    found = bool(list(objective.parameters()))
    assert found == METHODS[method].has_parameters or method == "ab", "which has none between equal shapes"
    untrained = [name for name, parameter in objective.named_parameters() if not parameter.requires_grad]
    assert len(untrained) == (3 if method == "vid" else 0)


@pytest.mark.parametrize("method", sorted(ZERO_AT_EQUALITY))
def test_a_relation_is_zero_where_both_models_agree(method: str) -> None:
    _, teacher = models_of()
    objective = objective_of(method, teacher, teacher)
    answer = tensors_of(method, teacher, images(6), student=False)
    same = tensors_of(method, teacher, images(6), student=True)
    assert objective(same, answer, torch.arange(6), 1)["feature"].item() == pytest.approx(0, abs=2e-5)


@pytest.mark.parametrize("method", sorted(FEATURE_METHODS.keys() - ORDER_MATTERS))
def test_the_order_of_a_batch_does_not_matter(method: str) -> None:
    student, teacher = models_of()
    objective = objective_of(method, student, teacher).train()
    order = torch.tensor([4, 2, 5, 0, 1, 3])
    with torch.no_grad():
        read = tensors_of(method, student.eval(), images(6), student=True)
        answer = tensors_of(method, teacher, images(6), student=False)
        first = objective(read, answer, torch.arange(6), 1)
        turned = ({name: tensor[order] for name, tensor in side.items()} for side in (read, answer))
        second = objective(*turned, torch.arange(6)[order], 1)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_batches_of_one_or_two_images_of_two_classes_are_finite(method: str, count: int) -> None:
    if method == "reviewkd" and count == 1:
        pytest.skip("its batch norm of pooled features needs two images; the engine leaves a last batch of one out")
    terms, _, student = terms_of(method, count, num_classes=2)
    torch.autograd.backward(torch.stack(list(terms.values())).sum())
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(parameter.grad is None or torch.isfinite(parameter.grad).all() for parameter in student.parameters())


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_bfloat16_and_extreme_maps_give_finite_float32(method: str, scale: float) -> None:
    student, teacher = models_of()
    objective = objective_of(method, student, teacher).train()
    with torch.no_grad():
        read = tensors_of(method, student, images(4), student=True)
        answer = tensors_of(method, teacher, images(4), student=False)
    read = {
        name: tensor if name == methods.IMAGE_NUMBERS else (scale * tensor).bfloat16().requires_grad_()
        for name, tensor in read.items()
    }
    terms = objective(read, {name: scale * tensor for name, tensor in answer.items()}, torch.arange(4), 1)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    torch.autograd.backward(torch.stack(list(terms.values())).sum())
    assert all(torch.isfinite(term) for term in terms.values())
    assert all(tensor.grad is None or torch.isfinite(tensor.grad).all() for tensor in read.values())


# Values worked by hand.


def test_attention_by_hand() -> None:
    # One channel of two places: powers (9, 16) -> unit length by sqrt(337), against (1, 0).
    student, teacher = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[2.0, 0.0]]]])
    length = math.sqrt(337)
    expected = ((9 / length - 1) ** 2 + (16 / length) ** 2) / 2
    assert losses.attention_loss(student, teacher, power=2).item() == pytest.approx(expected)


def test_selectivity_by_hand() -> None:
    # Patterns (1, 0) and (0, 1) against (1, 0): kernels 1/2, 1 and 1/2, so 1/2 + 1 - 2 x 1/2.
    student, teacher = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]), torch.tensor([[[[5.0, 0.0]]]])
    assert losses.neuron_selectivity_loss(student, teacher).item() == pytest.approx(0.5)


def test_relations_by_hand() -> None:
    # Distances 1, 1, 2 over their mean 4/3 against 1, 1, 1; all pairs twice, and the diagonal: 9 in the mean.
    student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.eye(3)
    distance, angle = losses.relational_losses(student, teacher)
    assert distance.item() == pytest.approx((4 * 0.25**2 / 2 + 2 * 0.5**2 / 2) / 9)
    # Cosines of the student at its images: 1, -1, 1; of the equilateral triangle 1/2. Both orders, 27 in the mean.
    assert angle.item() == pytest.approx((2 * (0.5**2 / 2 + (1.5 - 0.5) + 0.5**2 / 2)) / 27)
    alone = losses.relational_losses(student[:1], teacher[:1])
    assert [value.item() for value in alone] == [0.0, 0.0]


def test_flow_boundaries_margins_and_correlations_by_hand() -> None:
    ones, twos = torch.ones(1, 1, 2, 2), 2 * torch.ones(1, 1, 2, 2)
    assert losses.flow_loss([ones, twos], [ones, ones]).item() == pytest.approx(1.0)  # flows 2 and 1
    teacher = torch.tensor([1.0, 1.0, -1.0, -3.0])[None, :, None, None]
    student = torch.tensor([0.5, 2.0, -2.0, 0.0])[None, :, None, None]
    # Short of the margin 1 by 0.5; beyond; beyond; short of -1 by 1.
    assert losses.boundary_loss(student, teacher, margin=1.0).item() == pytest.approx(0.25 + 1)
    # Towards 1 by 0.5; towards 1 by 1; below -1 costs nothing; towards the margin -2 by 2.
    assert losses.margin_loss(student, teacher, torch.full((4,), -2.0)).item() == pytest.approx(0.25 + 1 + 4)
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    assert losses.correlation_loss(rows, torch.zeros(3, 1)).item() == pytest.approx((1 * 2 + 2 * 3) / 2)


def test_margins_have_their_limits() -> None:
    mean, deviation = torch.tensor([0.0, 100.0, 2.0, -2.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    wanted = [-math.sqrt(2 / math.pi), -3.0, 0.0, -2.0]
    assert losses.negative_means(mean, deviation).tolist() == pytest.approx(wanted)


def test_variational_and_context_losses_by_hand() -> None:
    teacher = torch.zeros(1, 1, 8, 8)
    log_scale = torch.full((1,), math.log(math.expm1(2.0)))  # a variance of 2
    found = losses.variational_loss(teacher + 1, teacher, log_scale, epsilon=0.0)
    assert found.item() == pytest.approx((1 / 2 + math.log(2)) / 2)
    # A single bright row of 8: errors 1/8 of the map, 1/16 of 4 x 4, 1/32 of 2 x 2, 1/64 of 1 x 1.
    student = teacher.clone()
    student[:, :, 0] = 1.0
    expected = (1 / 8 + 1 / 16 / 2 + 1 / 32 / 4 + 1 / 64 / 8) / (1 + 1 / 2 + 1 / 4 + 1 / 8)
    assert losses.hierarchical_context_loss(student, teacher).item() == pytest.approx(expected)


def test_singular_vectors_do_not_depend_on_signs_and_have_a_gradient_where_values_are_equal() -> None:
    maps = [torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    value = losses.singular_vectors_loss(maps[:2], maps[2:], num_vectors=2)
    turned = losses.singular_vectors_loss(maps[:2], [-maps[2], maps[3]], num_vectors=2)
    torch.testing.assert_close(value, turned)
    equal = torch.eye(4).expand(2, 3, 4, 4).clone().requires_grad_()
    torch.autograd.backward(losses.singular_vectors_loss([equal, maps[1]], maps[2:], num_vectors=1))
    assert equal.grad is not None
    assert torch.isfinite(equal.grad).all()
    leaf = maps[0].double().requires_grad_()
    others = [each.double() for each in maps[1:]]
    assert torch.autograd.gradcheck(
        lambda tensor: losses.singular_vectors_loss([tensor, others[0]], others[1:], num_vectors=1), (leaf,)
    )


def test_vid_trains_its_variances_where_it_is_corrected() -> None:
    shapes = [(4, 8, 8)]
    published, corrected = (
        Predictions(shapes, shapes, initial_variance=5.0, learn_variance=learn) for learn in (False, True)
    )
    assert published.log_scales[0].tolist() == pytest.approx([4.9932291827] * 4)
    assert [module.log_scales[0].requires_grad for module in (published, corrected)] == [False, True]


def test_the_paraphraser_learns_from_its_own_error_alone() -> None:
    module = Factors([(4, 8, 8)], [(6, 8, 8)], ratio=0.5, power=2, distance_power=1)
    distance, error = module([torch.randn(2, 4, 8, 8)], [torch.randn(2, 6, 8, 8)])
    distance.backward()
    assert all(parameter.grad is None for parameter in module.paraphraser.parameters())
    error.backward()
    assert all(parameter.grad is not None for parameter in module.paraphraser.parameters())


# CRD.


def test_negatives_are_images_of_other_classes_all_equally_likely() -> None:
    labels = torch.tensor([2, 0, -1, 1, 0, 2, -1, 2])
    torch.manual_seed(0)
    draw = Negatives(labels, 4000)
    rows = torch.tensor([0, 1, 2, 3])
    drawn = draw(rows)
    for row, allowed in enumerate([[1, 3, 4], [0, 3, 5, 7], [0, 1, 3, 4, 5, 6, 7], [0, 1, 4, 5, 7]]):
        counts = torch.bincount(drawn[row], minlength=8)
        assert counts.nonzero().flatten().tolist() == allowed
        share = counts[allowed] / 4000
        assert (share - 1 / len(allowed)).abs().max() < 4 * math.sqrt(1 / len(allowed) / 4000)
    assert not torch.equal(draw(rows), drawn), "every step draws others"
    state = draw.state_dict()
    assert sorted(state) == ["num_drawn", "seed"]
    again = Negatives(labels, 4000)
    again.load_state_dict({**state, "num_drawn": torch.tensor(0)})
    assert torch.equal(again(rows), drawn), "a resumed run draws the same"
    assert not torch.equal(Negatives(labels, 4000)(rows), drawn), "another seed draws others"


def test_the_hash_is_the_published_one() -> None:
    # The first output of SplitMix64 from the seed 0 is e220a8397b1dcdaf.
    assert int(hashed(torch.tensor(0))) % 2**64 == 0xE220A8397B1DCDAF


def test_images_of_one_class_have_no_negatives() -> None:
    with pytest.raises(UsageError, match="the training images are of one class"):
        Negatives(torch.tensor([3, 3, -1]), 4)
    assert set(Negatives(torch.tensor([-1, -1, -1]), 50)(torch.tensor([1])).flatten().tolist()) == {0, 2}


def test_contrast_by_hand_and_far_outside_float32() -> None:
    # q = 1 and 3 with S P = 1 / 2: -log(1 / 1.5) - log(0.5 / 3.5), but for the epsilon.
    logits = torch.tensor([[0.0, math.log(3)]])
    assert contrastive_loss(logits, num_images=2).item() == pytest.approx(math.log(1.5) + math.log(7), abs=1e-6)
    assert contrastive_loss(torch.tensor([[-500.0, 500.0]]), num_images=2).item() == pytest.approx(1000, rel=1e-2)


def test_an_image_that_is_twice_in_a_batch_follows_its_first_row() -> None:
    torch.manual_seed(0)
    banks = Banks(4, 2, temperature=0.07, momentum=0.0)
    before = banks.memory_v1.clone()
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    banks(student, student.flip(1), torch.tensor([[2, 0], [2, 0], [1, 3]]))
    torch.testing.assert_close(banks.memory_v1[[2, 1]], student[[0, 2]])
    torch.testing.assert_close(banks.memory_v2[[2, 1]], student.flip(1)[[0, 2]])
    assert torch.equal(banks.memory_v1[[0, 3]], before[[0, 3]])


# What is refused, and how stages are paired.


def test_stages_are_paired_from_the_deepest_on() -> None:
    vgg, resnet = models.create("vgg8", 10), models.create("res8x4", 10)
    objective = objective_of("at", vgg, resnet)
    assert isinstance(objective, FeatureObjective)
    assert objective._student_names == ("stages.2", "stages.3", "stages.4")
    assert objective._teacher_names == ("stages.1", "stages.2", "stages.3")


@pytest.mark.parametrize(
    ("method", "student", "teacher", "message"),
    [
        ("fsp", "vgg8", "res8x4", "the last 4 stages of the student have 128, 256, 512, 512 channels, those of the"),
        ("kdsvd", "mv2", "res8x4", "8, 4, 2 wide in 3 stages of the student, 32, 16, 8 in those of the teacher"),
        ("ab", "mv2", "res8x4", "the student's stage is 8 x 8 and the teacher's 32 x 32: no connector"),
        ("ofd", "res8", "shuv1", "of 3 stages, and the teacher `shuv1` has 0 such norms"),
    ],
)
def test_models_that_do_not_fit_are_refused(method: str, student: str, teacher: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        objective_of(method, models.create(student, 10), models.create(teacher, 10))


def test_values_that_no_method_can_have_are_refused() -> None:
    student, teacher = models_of()
    with pytest.raises(UsageError, match="kernel_size is 2, expected an odd number"):
        objective_of("ofd", student, teacher, kernel_size=2)
    with pytest.raises(UsageError, match="nce_k` is 0, expected a whole number from 1"):
        check_settings("crd", {"nce_k": 0})
    with pytest.raises(UsageError, match="`crd` needs the labels of the training images"):
        METHODS["crd"].build(
            ModelProbe(student, SIZE),
            ModelProbe(teacher, SIZE),
            check_settings("crd", {}),
            scales=(),
            supervision=Supervision(),
        )


# Training.

TINY: dict[str, Any] = {
    **SMALL,
    "train_images": 96,
    "test_images": 20,
    "epochs": 1,
    "student": "res8",
    "batch_size": 32,
}


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_every_method_trains(taught: Path, tmp_path: Path, method: str) -> None:
    result = library.distill(method=method, teacher=str(taught), **TINY, out=str(tmp_path / "run"))
    assert result.metrics["params"] == models.MODELS["res8"].num_params
    assert result.config.teacher_mode == "inline" or method in ("pkt", "rkd", "cc", "crd")
    assert math.isfinite(history(result.out)[0]["feature"])


RESUMED: list[tuple[str, dict[str, Any]]] = [
    ("crd", {"settings": {"nce_k": 64}, "ema_decay": 0.9}),
    ("vid", {"settings": {"variant": "corrected"}}),
    ("reviewkd", {"on_nonfinite": "skip"}),
    ("ofd", {}),
]


@pytest.mark.parametrize(("method", "changes"), RESUMED, ids=[method for method, _ in RESUMED])
def test_a_stopped_run_resumes_to_the_same_bytes_and_so_does_the_form_of_a_graph(
    taught: Path,
    tmp_path: Path,
    by_position: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    changes: dict[str, Any],
) -> None:
    given = {**TINY, "epochs": 3, "method": method, "teacher": str(taught), **changes}
    library.distill(**given, out=str(tmp_path / "whole"))
    for stop in (Stop(after_epoch=1), Stop(after_epoch=2, images_later=32)):
        with pytest.raises(engine.Interrupted):
            library.distill(**given, out=str(tmp_path / "parts"), resume=True, observer=stop)
    library.distill(**given, out=str(tmp_path / "parts"), resume=True)
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    by_position()
    library.distill(**given, out=str(tmp_path / "static"))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole") == weights(tmp_path / "static")
    assert history(tmp_path / "parts") == history(tmp_path / "whole") == history(tmp_path / "static")


def test_the_cache_serves_what_reads_pooled_features_and_refuses_maps(
    icdctl: CommandLine, taught: Path, tmp_path: Path
) -> None:
    given = ["distill", "--teacher", taught, "--student", "res8", "--dataset", "digits100", "--epochs", "1"]
    given += ["--train-images", "96", "--test-images", "20", "--device", "cpu", "--teacher-mode", "cache"]
    for method in ("crd", "rkd"):
        assert icdctl(*given, "--method", method, "--out", tmp_path / method)[0] == 0
    code, _, err = icdctl(*given, "--method", "reviewkd", "--out", tmp_path / "maps")
    assert code == 2
    assert "the method also reads `preactivations.1` (16 x 32 x 32" in err
    code, _, err = icdctl(*given, "--method", "ofd", "--out", tmp_path / "ofd")
    assert code == 2
    assert "whose teacher normalises with the statistics of the student's batch" in err
    code, _, err = icdctl(*given, "--method", "ofd", "--set", "variant=corrected", "--out", tmp_path / "ofd")
    assert "the teacher cache keeps" in err
