"""The training step never waits for its device: it runs on one that holds no values at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_support import make_step, teacher_for
from torch.utils._python_dispatch import TorchDispatchMode

from icdctl import data, models
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
        ),
    )
    preprocessing = data.describe(data.request("cifar100")).preprocessing
    cut = Augmentation(crop_scale=(0.35, 1.0), flip=True) if weighted else Augmentation(crop_padding=4, flip=True)
    store = ImageStore(pixels, preprocessing, cut, device=META)
    ask = teacher_for(method, teacher, META)
    views = store.epoch(seed=0, epoch=1).to(META)

    step.start_epoch(1)
    for index in range(2):
        part = views[index * 10 : (index + 1) * 10]
        images = store.inputs(part)
        step(index, images, labels[part.index], ask(images))

    assert step.log.shape == (2, len(step.objective.term_names) + 1)
    with pytest.raises(RuntimeError, match="meta"):
        step.num_right.item()


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Those that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_what_is_done_to_many_tensors_alike_is_one_operation_each() -> None:
    # On CUDA every other way is a kernel for each tensor: as many as all the convolutions.
    def operations(name: str, **changes: Any) -> list[str]:
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
        with Operations() as watched:
            step(0, torch.randn(2, 3, 32, 32), torch.tensor([1, 7]), None)
        counters = {int(value) for key, value in student.named_buffers() if key.endswith("num_batches_tracked")}
        assert counters == {1}
        return [name for name in watched.names if name != "view.default"]  # which is no work

    plain, larger = operations("res8"), operations("res14")
    assert plain.count("_foreach_add_.Scalar") == 1  # all norms
    assert plain.count("add_.Tensor") == 3 + 1  # the residuals; images that are right
    extra = {"skip_nonfinite": True, "ema_decay": 0.9}
    assert len(operations("res8", **extra)) - len(plain) == len(operations("res14", **extra)) - len(larger) < 40
