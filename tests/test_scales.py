"""Scales of patches beyond those of the papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_engine import history
from torch import nn
from torch.testing import assert_close

import icdctl as library
from icdctl import methods, models
from icdctl.engine.teacher import InlineTeacher
from icdctl.errors import UsageError
from icdctl.methods import check_settings, distillation_terms, num_patches, patch_logits
from icdctl.methods.patch import cluster_loss, pooled_in_order, scale_weight, textbook_cluster_loss

SMALL: dict[str, Any] = {"dataset": "digits100", "train_images": 200, "test_images": 100, "device": "cpu", "epochs": 1}


@pytest.mark.parametrize("scale", [3, 5, 7, 8])
@pytest.mark.parametrize("size", [(8, 8), (7, 14), (2, 2)])
def test_any_scale_is_the_head_on_the_mean_of_each_region(scale: int, size: tuple[int, int]) -> None:
    feature_map, head = torch.randn(2, 5, *size, dtype=torch.float64), nn.Linear(5, 3).double()
    found = patch_logits(feature_map, head, (1, scale))
    assert found.shape == (2, 3, num_patches((1, scale)))
    pooled = F.adaptive_avg_pool2d(feature_map, scale)
    expected = head(pooled.permute(0, 2, 3, 1).reshape(-1, 5)).reshape(2, scale * scale, 3).transpose(1, 2)
    assert_close(found[:, :, 1:], expected)
    assert_close(pooled_in_order(feature_map, (scale, scale)), pooled)


def test_scales_weigh_by_the_rule_of_the_published_three() -> None:
    assert [scale_weight(scale) for scale in (1, 2, 4, 8)] == [1, 2, 3, 4]
    assert 2 < scale_weight(3) < 3
    patches = torch.randn(2, 3, 4, num_patches((2, 3, 5)), dtype=torch.float64)
    for corrected in (True, False):
        found = cluster_loss(patches[0], patches[1], scales=(2, 3, 5), corrected=corrected)
        assert_close(found, textbook_cluster_loss(patches[0], patches[1], scales=(2, 3, 5), corrected=corrected))


def test_terms_of_other_scales_from_a_pass_are_those_of_pooled_patches() -> None:
    student, teacher = models.create("res8", 10).eval(), models.create("res14", 10).eval()
    images = torch.rand(4, 3, 32, 32)
    scales = (1, 3, 4, 7)
    row, settings = methods.get("cd_sdd_rld"), check_settings("cd_sdd_rld", {})
    reads = row.student_reads(settings) | row.reads_of_scales(scales)
    assert reads == {"logits", "regions", "regions.3", "regions.7"}
    passes = [InlineTeacher(model, reads=reads, device=torch.device("cpu"))(images) for model in (student, teacher)]
    objective = row.build(
        methods.ModelProbe(student, (32, 32)),
        methods.ModelProbe(teacher, (32, 32)),
        settings,
        scales=scales,
        supervision=methods.Supervision(),
    )
    found = objective(*passes, torch.arange(4), 1)
    with torch.no_grad():
        patches = [patch_logits(model.outputs(images).feature_map, model.head, scales) for model in (student, teacher)]
    expected = distillation_terms(
        "cd_sdd_rld",
        student_logits=passes[0]["logits"],
        teacher_logits=passes[1]["logits"],
        student_patches=patches[0],
        teacher_patches=patches[1],
        labels=torch.arange(4),
        scales=scales,
    )
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_with_other_scales_trains_and_too_fine_ones_are_refused(tmp_path: Path) -> None:
    library.train(model="res8", **SMALL, out=str(tmp_path / "teacher"))
    given = {**SMALL, "method": "cd_sdd_kd", "teacher": str(tmp_path / "teacher"), "max_steps": 3}
    result = library.distill(**given, student="res8", scales="1,3,8", out=str(tmp_path / "run"))
    assert result.config.scales == (1, 3, 8)
    assert float(history(result.out)[-1]["cluster"]) > 0
    with pytest.raises(UsageError, match="scale 3 is finer than the 2 x 2 feature map of `mv2`"):
        library.distill(**given, student="mv2", scales="1,3", out=str(tmp_path / "refused"))
