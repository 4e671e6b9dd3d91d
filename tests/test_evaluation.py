"""Evaluation: no number where there is no sample, in results, commands and reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from test_imagefolder import in_parts

import icdctl as library
from icdctl import evaluation
from icdctl.errors import IcdctlError
from icdctl.evaluation import Bin, Evaluation, batch_size_on
from icdctl.reporting.pictures import _together


def logits_of(*probabilities: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_a_class_without_images_has_no_accuracy() -> None:
    # The second of three classes has no image; the third has one right and one wrong.
    logits = logits_of((0.7, 0.2, 0.1), (0.2, 0.2, 0.6), (0.6, 0.2, 0.2))
    found = evaluation.evaluate_logits(logits, torch.tensor([0, 2, 2]))
    assert found.per_class == (100.0, None, 50.0)
    assert (found.worst_class, found.untested) == (2, (1,))
    assert found.top1 == pytest.approx(200 / 3)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["per_class"] == [100.0, None, 50.0]
    assert Evaluation.from_json(json.loads(json.dumps(found.as_json()))) == found


@pytest.mark.parametrize(
    "change",
    [
        {"top1": True},
        {"loss": "nan"},
        {"ece": None},
        {"ece": 10**400},
        {"per_class": ["x"]},
        {"per_class": 3},
        {"reliability": []},
        {"reliability": [[1, 50.0, 50.0]] * 14 + [""]},
        {"reliability": [[1, 50.0, 50.0]] * 14 + [[1, 50.0]]},
        {"reliability": [[1, 50.0, 50.0]] * 14 + [[None, 50.0, 50.0]]},
        {"reliability": [[1, 50.0, 50.0]] * 14 + [3]},
    ],
)
def test_what_is_no_evaluation_is_refused(change: dict[str, Any]) -> None:
    found = evaluation.evaluate_logits(logits_of((0.7, 0.3)), torch.tensor([0]))
    with pytest.raises((TypeError, ValueError, KeyError)):
        Evaluation.from_json({**found.as_json(), **change})


def test_a_bin_without_images_has_neither_confidence_nor_accuracy() -> None:
    found = evaluation.evaluate_logits(logits_of((0.7, 0.3), (0.71, 0.29)), torch.tensor([0, 1]))
    held = [each for each in found.reliability if each.images]
    assert [(each.images, each.accuracy) for each in held] == [(2, 50.0)]
    assert held[0].confidence == pytest.approx(70.5)
    assert found.ece == pytest.approx(20.5)
    empty = [each for each in found.reliability if not each.images]
    assert empty == [Bin(0, None, None)] * 14
    assert {each.gap for each in empty} == {0.0}


def test_bins_of_several_models_are_empty_where_all_are() -> None:
    one, other = (
        Evaluation(0, 0, 0, 0, (), (Bin(0, None, None), Bin(images, 80.0, accuracy), Bin(0, None, None)))
        for images, accuracy in ((1, 100.0), (3, 20.0))
    )
    third = Evaluation(0, 0, 0, 0, (), (Bin(0, None, None), Bin(0, None, None), Bin(2, 60.0, 50.0)))
    assert _together([one, other, third]) == (Bin(0, None, None), Bin(4, 80.0, 40.0), Bin(2, 60.0, 50.0))


def test_no_images_are_an_error_and_no_number() -> None:
    nothing = torch.zeros(0, 3)
    for measure in (
        lambda: evaluation.evaluate_logits(nothing, torch.zeros(0, dtype=torch.int64)),
        lambda: evaluation.agreement(nothing, nothing),
        lambda: evaluation.fidelity(nothing, nothing),
    ):
        with pytest.raises(IcdctlError, match="there are no images to measure on"):
            measure()


def test_eval_and_report_name_the_classes_that_were_not_tested(icdctl: CommandLine, tmp_path: Path) -> None:
    folder = in_parts(tmp_path / "pets", "train", "val")
    shutil.rmtree(folder / "val" / "dog")
    run = tmp_path / "runs" / "run"
    options: dict[str, Any] = {"epochs": 1, "batch_size": 8, "device": "cpu"}
    teacher = library.train(model="res8", dataset=f"imagefolder:{folder}", out=str(tmp_path / "teacher"), **options)
    for method in ("kd", "dkd"):
        given = {"method": method, "teacher": str(teacher.out), "student": "res8", "dataset": f"imagefolder:{folder}"}
        library.distill(given, out=str(run.with_name(method)), **options)
    code, out, err = icdctl("eval", teacher.out)
    assert code == 0, err
    assert "untested    1 of 3 classes have no test image: dog" in out
    assert "worst class dog" not in out
    found = json.loads(icdctl("eval", teacher.out, "--json")[1])
    assert found["per_class"][2] is None
    assert all(isinstance(share, float) for share in found["per_class"][:2])
    assert [0, None, None] in found["reliability"]
    code, _, err = icdctl("report", tmp_path / "runs", "--out", tmp_path / "report", "--no-latency")
    assert code == 0, err
    notes = json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=pytest.fail)["notes"]
    assert "1 of 3 classes of `imagefolder:pets` have no test image, so nothing is measured for them: dog" in notes


def test_evaluation_takes_large_batches_of_small_images_on_cuda_alone() -> None:
    small, large = torch.empty((1, 32, 32, 3)), torch.empty((1, 224, 224, 3))
    on = {name: torch.device(name) for name in ("cpu", "cuda")}
    assert [batch_size_on(on["cuda"], small), batch_size_on(on["cuda"], large)] == [2000, 500]
    assert [batch_size_on(on["cpu"], small), batch_size_on(on["cpu"], large)] == [500, 500]
