"""CONTRIBUTING's promises, by example: what a new thing takes, and that the rest of icdctl then knows it.

A setting of a run is added in `test_settings.py`, and an executor in `test_executors.py`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import CommandLine
from onnx import version_converter
from safetensors import safe_open
from torch import Tensor, nn

from icdctl import methods, models
from icdctl.engine.checkpoint import STATE_FILE
from icdctl.engine.run_state import state_folder_of
from icdctl.exporting import verify_file
from icdctl.exporting.package import onnx_bytes
from icdctl.methods import METHODS, Method, ModelProbe, Objective, Settings, Supervision, logit_methods
from icdctl.methods.logit_methods import LogitLoss
from icdctl.methods.method_settings import DECLARED, MethodSetting
from icdctl.methods.reads import LOGITS, POOLED
from icdctl.models import MODELS, Classifier
from icdctl.models.outputs import Features
from icdctl.registry import trained

ROOT = Path(__file__).resolve().parent.parent

TINY = ("--dataset", "digits100", "--train-images", "200", "--test-images", "100", "--epochs", "1", "--device", "cpu")


@pytest.fixture
def teacher(icdctl: CommandLine, tmp_path: Path) -> Path:
    assert icdctl("train", "--model", "res8", *TINY, "--out", tmp_path / "teacher")[0] == 0
    return tmp_path / "teacher"


def test_a_logit_method_is_a_loss_and_a_row(
    icdctl: CommandLine, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A loss per row with a setting of its own; SDD and the cluster term come with it.
    def rows(settings: Settings) -> logit_methods.RowLoss:
        power = float(settings["power"])
        return lambda student, teacher, labels: (student - teacher).abs().pow(power).mean(dim=1)

    monkeypatch.setitem(DECLARED, "power", MethodSetting("Power of the distance.", least=0.5))
    loss = LogitLoss(
        "logits", {"power": 2.0, "ce_weight": 1.0, "kd_weight": 0.5, "warmup_epochs": 0.0}, rows, "Ba and Caruana 2014"
    )
    for name, row in logit_methods.variants(loss, {}).items():
        monkeypatch.setitem(METHODS, name, row)

    listed = json.loads(icdctl("list", "methods", "--json")[1])["methods"]
    assert {"logits", "sdd_logits", "cd_sdd_logits"} < {row["name"] for row in listed}
    student, answer = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    terms = methods.distillation_terms(
        "logits", student_logits=student, teacher_logits=answer, labels=torch.tensor([0]), settings={"power": 1}
    )
    assert terms["kd"].item() == pytest.approx(0.5 * 1.5)
    given = ("distill", "--teacher", teacher, "--student", "res8", *TINY)
    assert icdctl(*given, "--method", "cd_sdd_logits", "--set", "power=1", "--out", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["power"] == 1
    code, _, err = icdctl(*given, "--method", "logits", "--set", "power=0", "--out", tmp_path / "wrong")
    assert (code, "setting `power` is 0, expected a number from 0.5 to 1,000,000" in err) == (2, True)


@dataclass(frozen=True, kw_only=True)
class PooledHint(Method):
    """The student's pooled features, through a linear layer, imitate the teacher's."""

    def teacher_reads(self, settings: Settings) -> frozenset[str]:
        return frozenset({POOLED})

    def build(
        self,
        student: ModelProbe,
        teacher: ModelProbe | None,
        settings: Settings,
        *,
        scales: tuple[int, ...],
        supervision: Supervision,
    ) -> Objective:
        assert teacher is not None
        return PooledHintObjective(student.shape(POOLED)[0], teacher.shape(POOLED)[0], settings, supervision)


class PooledHintObjective(Objective):
    term_names = ("ce", "hint")

    def __init__(self, student_width: int, teacher_width: int, settings: Settings, supervision: Supervision) -> None:
        super().__init__(settings, supervision)
        self.connector = nn.Linear(student_width, teacher_width)

    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        return {"hint": F.mse_loss(self.connector(student[POOLED]), teacher[POOLED])}


def test_a_method_with_parameters_is_two_classes_and_a_row(
    icdctl: CommandLine, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = PooledHint(defaults={"ce_weight": 1.0}, source="this test", family="pooled_hint")
    assert row.student_reads({}) == {LOGITS, POOLED}
    monkeypatch.setitem(METHODS, "pooled_hint", row)
    given = ("distill", "--method", "pooled_hint", "--teacher", teacher, "--student", "res8x4", *TINY)
    code, out, _ = icdctl(*given, "--teacher-mode", "cache", "--out", tmp_path / "run", "--json")
    assert code == 0
    assert (tmp_path / "run" / "history.csv").read_text().startswith("epoch,lr,ce,hint,")
    with safe_open(state_folder_of(tmp_path / "run") / STATE_FILE, framework="pt") as stored:
        assert stored.get_slice("objective.connector.weight").get_shape() == [64, 256]
        assert "optimizer.0.momentum_buffer" in stored.keys()  # noqa: SIM118 (it is no dictionary)
    assert json.loads(out)["params"] == MODELS["res8x4"].num_params


class TinyNet(Classifier):
    """Two convolutions and a linear head."""

    def __init__(self, num_classes: int, *, large_images: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=4 if large_images else 2, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, num_classes)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def features(self, images: Tensor) -> Features:
        stem = F.relu(self.bn1(self.conv1(images)))
        before = self.bn2(self.conv2(stem))
        stage = F.relu(before)
        return Features((stem, stage), (stem, before), stage)


def test_a_backbone_is_a_class_and_a_row(
    icdctl: CommandLine, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_params = sum(parameter.numel() for parameter in TinyNet(100).parameters())
    monkeypatch.setitem(MODELS, "tiny", models.Model(TinyNet, "tiny", num_params, ("TinyNet",)))
    given = ("distill", "--teacher", teacher, "--student", "TinyNet", *TINY, "--out", tmp_path / "run")
    assert icdctl(*given, "--method", "cd_sdd_dkd")[0] == 0
    assert trained.resolve(str(tmp_path / "run")).model == "tiny"
    assert icdctl("export", tmp_path / "run", "--out", tmp_path / "onnx")[0] == 0
    assert icdctl("verify", tmp_path / "onnx")[0] == 0


def test_an_export_format_is_a_conversion_that_verification_holds_to_the_weights(teacher: Path, tmp_path: Path) -> None:
    model = trained.resolve(str(teacher))
    plain = onnx.load_model_from_string(onnx_bytes(model))
    converted, wrong = version_converter.convert_version(plain, 21), onnx.ModelProto()
    onnx.save(converted, tmp_path / "converted.onnx")
    assert verify_file(tmp_path / "converted.onnx", model).passed
    wrong.CopyFrom(converted)
    largest = max(wrong.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(largest) * 1.001
    largest.CopyFrom(onnx.numpy_helper.from_array(values.astype("float32"), largest.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    report = verify_file(tmp_path / "wrong.onnx", model)
    assert [check.name for check in report.failures] == ["values"]


def test_no_file_holds_the_marks_of_an_unfinished_merge() -> None:
    marks = tuple(mark * 7 for mark in "<>")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = [name for name in listed.split("\0") if name.endswith((".py", ".md", ".toml", ".yaml", ".txt", ".dvc"))]
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in names if (ROOT / name).is_file()}
    assert [name for name, text in texts.items() if any(line.startswith(marks) for line in text.splitlines())] == []
