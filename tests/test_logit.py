"""Losses on logits: values worked by hand, and properties that any rewrite must keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from icdctl.methods.logit import (
    dkd_loss,
    kd_loss,
    kl_divergence,
    nkd_loss,
    textbook_dkd_loss,
    textbook_kd_loss,
    textbook_nkd_loss,
)

LABELS = torch.tensor([0, 2, 1])


def kd(student: Tensor, teacher: Tensor) -> Tensor:
    return kd_loss(student, teacher, temperature=4.0)


def dkd(student: Tensor, teacher: Tensor) -> Tensor:
    return dkd_loss(student, teacher, LABELS, alpha=1.0, beta=8.0, temperature=4.0)


def nkd(student: Tensor, teacher: Tensor) -> Tensor:
    return nkd_loss(student, teacher, LABELS, gamma=1.5, temperature=2.0, drop_target=True)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kd": kd, "dkd": dkd, "nkd": nkd}
DIVERGENCES = {"kd": kd, "dkd": dkd}


def logits(seed: int, *, scale: float = 3.0, num_classes: int = 5) -> Tensor:
    return scale * torch.randn((3, num_classes), generator=torch.Generator().manual_seed(seed))


TEXTBOOK: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]] = {
    "kd": (kd_loss, textbook_kd_loss, {"temperature": 4.0}),
    "dkd": (dkd_loss, textbook_dkd_loss, {"labels": LABELS, "alpha": 1.5, "beta": 8.0, "temperature": 4.0}),
    "nkd dropped": (
        nkd_loss,
        textbook_nkd_loss,
        {"labels": LABELS, "gamma": 1.5, "temperature": 2.0, "drop_target": True},
    ),
    "nkd": (nkd_loss, textbook_nkd_loss, {"labels": LABELS, "gamma": 1.5, "temperature": 2.0, "drop_target": False}),
}
"""Name -> the fast form, the textbook's form, and what both take."""


@pytest.mark.parametrize("name", TEXTBOOK)
@pytest.mark.parametrize("num_classes", [3, 100])
def test_the_fast_form_has_the_value_and_the_gradient_of_the_textbook(name: str, num_classes: int) -> None:
    fast, textbook, given = TEXTBOOK[name]
    teacher = logits(1, num_classes=num_classes).double()
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = []
    for loss in (fast, textbook):
        student = logits(0, num_classes=num_classes).double().requires_grad_()
        value = loss(student, teacher, **given)
        found.append((value.detach(), torch.autograd.grad(value @ upstream, student)[0]))
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_kd_loss_matches_two_classes_worked_by_hand() -> None:
    # T = 2: teacher softmax(0, 2 ln 3 / 2) = (1/4, 3/4), student (1/2, 1/2).
    teacher = torch.tensor([[0.0, 2 * math.log(3)]])
    expected = 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert_close(kd_loss(torch.zeros(1, 2), teacher, temperature=2.0), torch.tensor([expected]))


def test_dkd_loss_matches_three_classes_worked_by_hand() -> None:
    # T = 1. Student uniform; teacher (1/2, 3/8, 1/8); the target is class 0.
    student = torch.zeros(1, 3)
    teacher = torch.tensor([[1 / 2, 3 / 8, 1 / 8]]).log()
    target_term = 0.5 * math.log(0.5 / (1 / 3)) + 0.5 * math.log(0.5 / (2 / 3))
    other_term = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    found = dkd_loss(student, teacher, torch.tensor([0]), alpha=2.0, beta=3.0, temperature=1.0)
    assert_close(found, torch.tensor([2 * target_term + 3 * other_term]))


@pytest.mark.parametrize("drop_target", [True, False])
def test_nkd_loss_matches_three_classes_worked_by_hand(drop_target: bool) -> None:
    # T = 1 throughout. Student (1/4, 1/4, 1/2), teacher (1/2, 3/8, 1/8); the target is class 0.
    student = torch.tensor([[1 / 4, 1 / 4, 1 / 2]]).log()
    teacher = torch.tensor([[1 / 2, 3 / 8, 1 / 8]]).log()
    if drop_target:
        rest = -(0.75 * math.log(1 / 3) + 0.25 * math.log(2 / 3))
    else:
        rest = -(0.5 * math.log(1 / 4) + 0.375 * math.log(1 / 4) + 0.125 * math.log(1 / 2))
    expected = -0.5 * math.log(1 / 4) + 1.5 * rest
    found = nkd_loss(student, teacher, torch.tensor([0]), gamma=1.5, temperature=1.0, drop_target=drop_target)
    assert_close(found, torch.tensor([expected]))


def test_nkd_loss_multiplies_the_second_part_alone_by_the_squared_temperature() -> None:
    student, teacher = torch.zeros(1, 3), torch.zeros(1, 3)
    found = nkd_loss(student, teacher, torch.tensor([1]), gamma=2.0, temperature=3.0, drop_target=False)
    assert_close(found, torch.tensor([math.log(3) / 3 + 2 * 9 * math.log(3)]))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_zero_for_equal_logits_and_above_zero_otherwise(name: str) -> None:
    student, teacher = logits(0), logits(1)
    assert_close(DIVERGENCES[name](student, student), torch.zeros(3))
    assert (DIVERGENCES[name](student, teacher) > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_added_to_all_logits_changes_nothing(name: str) -> None:
    student, teacher = logits(0), logits(1)
    assert_close(LOSSES[name](student + 7, teacher - 5), LOSSES[name](student, teacher), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_each_row_has_its_own_value(name: str) -> None:
    student, teacher = logits(0), logits(1)
    changed = student.clone()
    changed[1] += torch.tensor([1.0, 0.0, -2.0, 0.5, 0.0])
    before, after = LOSSES[name](student, teacher), LOSSES[name](changed, teacher)
    assert before.shape == (3,)
    assert (before != after).tolist() == [False, True, False]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_derivative(name: str) -> None:
    student, teacher = logits(0).double().requires_grad_(), logits(1).double()
    assert torch.autograd.gradcheck(lambda given: LOSSES[name](given, teacher), (student,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 100.0, 1000.0])
def test_float32_reaches_the_float64_value_however_confident_the_logits(name: str, scale: float) -> None:
    student, teacher = logits(2, scale=scale), logits(3, scale=scale)
    exact = LOSSES[name](student.double(), teacher.double())
    found = LOSSES[name](student, teacher)
    assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_float32_reaches_the_float64_value_where_student_and_teacher_nearly_agree(name: str, scale: float) -> None:
    teacher = logits(4, scale=scale)
    student = teacher + 1e-3 * logits(5)
    exact = DIVERGENCES[name](student.double(), teacher.double())
    assert_close(DIVERGENCES[name](student, teacher).double(), exact, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 100.0, 1000.0])
def test_float32_reaches_the_float64_gradient_however_confident_the_logits(name: str, scale: float) -> None:
    def gradient(student: Tensor, teacher: Tensor) -> Tensor:
        given = student.clone().requires_grad_()
        (found,) = torch.autograd.grad(LOSSES[name](given, teacher).sum(), given)
        return found

    student, teacher = logits(2, scale=scale), logits(3, scale=scale)
    assert_close(
        gradient(student, teacher).double(), gradient(student.double(), teacher.double()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    torch.autograd.backward(LOSSES[name](student, teacher).sum())
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_saturated_agreement_has_a_finite_loss_and_gradient(name: str) -> None:
    # The reference takes log(0) here and zeroes the loss: the gap of 500 underflows at T = 4.
    student = torch.tensor([[500.0, 0.0, 0.0, 0.0, 0.0]]).repeat(3, 1).requires_grad_()
    loss = LOSSES[name](student, student.detach()).sum()
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_logit_that_is_not_finite_is_never_hidden(name: str, value: float, side: str) -> None:
    student, teacher = logits(0), logits(1)
    (student if side == "student" else teacher)[1, 0] = value
    assert not torch.isfinite(LOSSES[name](student, teacher)[1])


def test_two_classes_leave_nothing_among_the_others() -> None:
    student, teacher, labels = logits(0, num_classes=2), logits(1, num_classes=2), torch.tensor([0, 1, 1])
    one = dkd_loss(student, teacher, labels, alpha=1.0, beta=1.0, temperature=2.0)
    other = dkd_loss(student, teacher, labels, alpha=1.0, beta=99.0, temperature=2.0)
    assert_close(one, other)
    assert_close(one, kd_loss(student, teacher, temperature=2.0))


def test_kl_divergence_equals_the_textbook_sum() -> None:
    student, teacher = logits(6).double().log_softmax(1), logits(7).double().log_softmax(1)
    expected = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    assert_close(kl_divergence(student, teacher)[0], expected)


def test_the_gradient_of_a_divergence_keeps_its_digits_where_the_two_nearly_agree() -> None:
    teacher = logits(7).log_softmax(1)
    for scale, dtype, rtol in ((1e-4, torch.float32, 1e-5), (1.0, torch.float64, 1e-9), (5.0, torch.float64, 1e-9)):
        student = (teacher + scale * logits(6)).to(dtype)
        exact = student.double().exp() - teacher.double().exp()
        assert_close(kl_divergence(student, teacher.to(dtype))[1].double(), exact, rtol=rtol, atol=0.0)
    _, gap = kl_divergence(torch.tensor([-0.1, -2.0, -torch.inf]), torch.tensor([-1.0, -0.5, -torch.inf]))
    assert gap[2] == 0.0
    certain, even = torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log()
    value, gap = kl_divergence(even, certain)
    assert_close(value, torch.tensor(math.log(2)))
    assert_close(gap, torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize("lead", [-14.0, -4.0, 0.0, 4.0, 14.0, 20.0])
def test_the_gradient_of_the_target_term_keeps_its_digits_where_both_are_certain(lead: float) -> None:
    def gradient(student: Tensor, teacher: Tensor) -> Tensor:
        given = student.clone().requires_grad_()
        loss = dkd_loss(given, teacher, LABELS, alpha=1.0, beta=0.0, temperature=4.0)
        (found,) = torch.autograd.grad(loss.sum(), given)
        return found

    student, teacher = logits(2, num_classes=100), logits(3, num_classes=100)
    for each in (student, teacher):
        each[torch.arange(3), LABELS] += 4 * lead
    exact = gradient(student.double(), teacher.double())
    gap = torch.linalg.vector_norm(gradient(student, teacher).double() - exact)
    assert gap < 1e-5 * torch.linalg.vector_norm(exact)
