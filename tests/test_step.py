"""The training step never waits for its device: it runs on one that holds no values at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step_support import make_step, teacher_for
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from icdctl import data, models
from icdctl.config.dataset_request import dataset_request
from icdctl.data import Augmentation, ImageStore
from icdctl.methods import METHODS, Supervision

META = torch.device("meta")


@pytest.mark.parametrize("has_unlabeled", [False, True], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("variant", ["published", "corrected"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_looks_at_no_value(method: str, variant: str, weighted: bool, has_unlabeled: bool) -> None:
    # On `meta` anything that needs a value (`.item()`, a branch on a tensor, a boolean mask) raises. On CUDA the same
    # would stall the step until the device is done.
    with META:
        student, teacher = models.create("res8", 100), models.create("res8", 100)
        pixels = torch.empty((20, 32, 32, 3), dtype=torch.uint8)
        labels = torch.empty(20, dtype=torch.int64)
    step = make_step(
        method,
        student,
        teacher,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True),
        steps_per_epoch=2,
        device=META,
        settings={"variant": variant},
        supervision=Supervision(
            label_smoothing=0.1 if weighted else 0.0,
            class_weights=torch.empty(100, device=META) if weighted else None,
            has_unlabeled=has_unlabeled,
            train_labels=torch.arange(20) % 10,
        ),
    )
    preprocessing = data.describe(dataset_request("cifar100")).preprocessing
    cut = Augmentation(crop_scale=(0.35, 1.0), flip=True) if weighted else Augmentation(crop_padding=4, flip=True)
    store = ImageStore(pixels, preprocessing, cut, device=META)
    ask = teacher_for(method, teacher, META)
    views = store.epoch(seed=0, epoch=1).to(META)

    step.start_epoch(1)
    for index in range(2):
        part = views[index * 10 : (index + 1) * 10]
        images = store.inputs(part)
        step(index, images, labels[part.index], ask(images), part.index)

    assert step.log.shape == (2, len(step.objective.term_names) + 1)
    with pytest.raises(RuntimeError, match="meta"):
        step.num_right.item()


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the operations that torch is asked for; views, which are no work, are left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.count = 0

    def __torch_dispatch__(
        self, func: OpOverload[..., object], types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        returned = [value.alias_info for value in func._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in returned)
        return func(*args, **(kwargs or {}))


IMAGES, LABELS = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(0)), torch.tensor([1, 7])


def a_student(name: str) -> tuple[models.Classifier, torch.optim.Optimizer]:
    student = models.create(name, 100).train()
    return student, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, fused=True)


def operations_of_a_step(name: str, **changes: Any) -> int:
    student = models.create(name, 100).train()
    step = make_step(
        "ce",
        student,
        None,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
        steps_per_epoch=1,
        device=torch.device("cpu"),
        **changes,
    )
    watched = Operations()
    with watched:
        step(0, IMAGES, LABELS, None)
    counters = {int(value) for key, value in student.named_buffers() if key.endswith("num_batches_tracked")}
    assert counters == {1}
    return watched.count


def operations_of_the_textbook(name: str) -> tuple[int, int]:
    """The same step as anybody would write it, and how many of its operations count the passes of a batch norm."""
    student, optimizer = a_student(name)
    log, num_right = torch.zeros((1, 2)), torch.tensor(0)
    watched = Operations()
    with watched:
        optimizer.zero_grad()
        logits = student(IMAGES)
        terms = [1.0 * F.cross_entropy(logits, LABELS, reduction="none").mean()]
        total = torch.stack(terms).sum()
        torch.autograd.backward(total)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 40.0)
        optimizer.step()
        with torch.no_grad():
            log[0] = torch.stack([*terms, norm])
            num_right += (logits.argmax(dim=1) == LABELS).sum()
    return watched.count, sum(isinstance(module, torch.nn.BatchNorm2d) for module in student.modules())


@pytest.mark.parametrize("name", ["res8", "res14"])
def test_a_step_asks_for_nothing_beyond_the_textbook(name: str) -> None:
    # Both are counted in the torch at hand, whose own versions ask for more or fewer. All batch norms are counted by
    # one operation, not by one each: on CUDA those would be as many kernels as all the convolutions.
    textbook, num_norms = operations_of_the_textbook(name)
    assert operations_of_a_step(name) <= textbook - num_norms + 1


def test_guard_and_average_take_one_operation_for_all_tensors_of_a_type() -> None:
    extra = {"skip_nonfinite": True, "ema_decay": 0.9}
    more, more_of_the_larger = (
        operations_of_a_step(name, **extra) - operations_of_a_step(name) for name in ("res8", "res14")
    )
    assert more == more_of_the_larger < 40
