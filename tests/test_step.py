"""The training step never waits for its device: it runs on one that holds no values at all."""

from __future__ import annotations

import pytest
import torch

from icdctl import data, models
from icdctl.data import Augmentation, ImageStore
from icdctl.engine.step import StepRule, TrainingStep
from icdctl.engine.teacher import InlineTeacher
from icdctl.methods import METHODS, check_settings

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
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, foreach=True)
    rule = StepRule(
        method,
        check_settings(method, {"variant": variant}),
        (1, 2, 4),
        clip_norm=40.0,
        label_smoothing=0.1 if weighted else 0.0,
        class_weights=torch.empty(100, device=META) if weighted else None,
        has_unlabeled=has_unlabeled,
    )
    step = TrainingStep(student, optimizer, rule, steps_per_epoch=2, device=META)
    preprocessing = data.describe(data.request("cifar100")).preprocessing
    cut = Augmentation(crop_scale=(0.35, 1.0), flip=True) if weighted else Augmentation(crop_padding=4, flip=True)
    store = ImageStore(pixels, preprocessing, cut, device=META)
    ask = InlineTeacher(teacher, needs_cells=True, device=META)
    views = store.epoch(seed=0, epoch=1).to(META)

    step.start_epoch(1)
    for index in range(2):
        part = views[index * 10 : (index + 1) * 10]
        images = store.inputs(part)
        step(index, images, labels[part.index], ask(images))

    assert step.log.shape == (2, len(rule.term_names) + 1)
    with pytest.raises(RuntimeError, match="meta"):
        step.num_right.item()
