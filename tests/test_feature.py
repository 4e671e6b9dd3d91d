"""Methods with connectors: FitNets by the reference's numbers, and end to end through everything that trains."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import golden_support as golden
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import CommandLine
from grid_support import started, wait_until
from safetensors import safe_open
from test_device_loop import by_position, taught
from test_engine import SMALL, Stop, history, weights
from test_together import planned, store_of, together
from torch import Tensor, nn

import icdctl as library
from icdctl import methods, models
from icdctl.data import Augmentation
from icdctl.engine import run as engine
from icdctl.engine.checkpoint import STATE_FILE
from icdctl.engine.run_state import state_folder_of
from icdctl.engine.teacher import InlineTeacher
from icdctl.errors import UsageError
from icdctl.methods import METHODS, Method, ModelProbe, Objective, Supervision, check_settings
from icdctl.methods.connectors import Connector
from icdctl.methods.feature import FitNetObjective
from icdctl.methods.reads import stage

__all__ = ["by_position", "taught"]

LOSSES = golden.read("losses.json")
ARRAYS = golden.read_arrays("losses.npz") if LOSSES else {}
CASES = {case["id"]: case for case in LOSSES.get("cases", []) if case["method"] == "FITNET"}


def arrays(case: dict[str, Any]) -> dict[str, Tensor]:
    inputs = LOSSES["input_sets"][case["input_set"]]["arrays"]
    return {name: torch.from_numpy(np.array(ARRAYS[item["key"]])) for name, item in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case_id", CASES)
def test_fitnet_computes_what_the_reference_computes(case_id: str, dtype: torch.dtype) -> None:
    case = CASES[case_id]
    inputs, numbers = arrays(case), case["hparams"]
    layer = numbers["hint_layer"]
    given = {"hint_stage": layer, "ce_weight": numbers["ce_weight"], "feature_weight": numbers["feat_weight"]}
    before_relu = inputs[f"s_preact_{layer}"].to(dtype).requires_grad_()
    student, teacher = before_relu.relu(), inputs[f"t_preact_{layer}"].to(dtype).relu()
    objective = FitNetObjective(
        tuple(student.shape[1:]), tuple(teacher.shape[1:]), check_settings("fitnet", given), Supervision()
    ).to(dtype)
    assert list(objective.connector.state_dict()) == list(case["params"])
    state = {key: torch.from_numpy(np.array(ARRAYS[item["npz"]])) for key, item in case["params"].items()}
    objective.connector.load_state_dict(state)

    read = {"logits": inputs["s_logits"].to(dtype), stage(layer): student}
    terms = objective(read, {stage(layer): teacher}, inputs["target"], 1)
    wanted = case["expected"]["float64"]
    assert tuple(terms) == objective.term_names == ("ce", "feature")
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-9, 1e-12)
    np.testing.assert_allclose(terms["ce"].item(), wanted["loss_ce"], rtol=rtol, atol=atol)
    np.testing.assert_allclose(terms["feature"].item(), wanted["loss_kd"], rtol=rtol, atol=atol)
    (gradient,) = torch.autograd.grad(terms["feature"], before_relu)
    checksum = case["grad_checksum"][f"s_preact_{layer}"]
    assert gradient.norm().item() == pytest.approx(checksum["l2"], rel=1e-5)
    assert gradient.sum().item() == pytest.approx(checksum["sum"], rel=1e-5, abs=1e-5 * checksum["l2"])
    assert gradient.flatten()[: len(checksum["first"])].tolist() == pytest.approx(
        checksum["first"], rel=1e-4, abs=1e-5 * checksum["l2"]
    )
    golden.record("feature", checked=1)


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        ((4, 16, 16), (6, 8, 8), "Conv2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))"),
        ((4, 8, 8), (6, 16, 16), "ConvTranspose2d(4, 6, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1))"),
        ((4, 8, 8), (6, 8, 8), "Conv2d(4, 6, kernel_size=(1, 1), stride=(1, 1))"),
        ((4, 9, 8), (6, 7, 8), "Conv2d(4, 6, kernel_size=(3, 1), stride=(1, 1))"),
    ],
)
def test_a_connector_leads_to_the_shape_of_the_teacher(
    student: tuple[int, ...], teacher: tuple[int, ...], kind: str
) -> None:
    connector = Connector(student, teacher)
    assert str(connector.conv) == kind
    assert connector(torch.randn(2, *student)).shape == (2, *teacher)


def test_a_stage_that_no_connector_reaches_is_refused(taught: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stage is 4 x 4 and the teacher's 16 x 16: no connector"):
        Connector((8, 4, 4), (8, 16, 16))
    given = {**SMALL, "method": "fitnet", "teacher": str(taught), "student": "mv2"}
    with pytest.raises(UsageError, match=r"`mv2` has no `stages\.9`: it has 5 stages"):
        library.distill(**given, settings={"hint_stage": 9}, out=str(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"hint_stage` is 1\.5, expected a whole number from 0 to 100"):
        library.distill(**given, settings={"hint_stage": 1.5}, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def fitnet(taught: Path, **changes: Any) -> dict[str, Any]:
    return {**SMALL, "method": "fitnet", "teacher": str(taught), "student": "res14", **changes}


def test_the_connector_learns_with_the_student_and_stays_behind(taught: Path, tmp_path: Path) -> None:
    result = library.distill(**fitnet(taught, epochs=3), out=str(tmp_path / "run"))
    rows = history(result.out)
    assert list(rows[0])[:4] == ["epoch", "lr", "ce", "feature"]
    assert float(rows[-1]["feature"]) < float(rows[0]["feature"])
    with safe_open(state_folder_of(result.out) / STATE_FILE, framework="pt") as stored:
        kept = [key for key in stored.keys() if key.startswith("objective.")]  # noqa: SIM118 (it is not a dictionary)
    assert "objective.connector.conv.weight" in kept
    with safe_open(tmp_path / "run" / "student.safetensors", framework="pt") as stored:
        assert set(stored.keys()) == set(models.create("res14", 100).state_dict())
    assert result.metrics["params"] == sum(each.numel() for each in models.create("res14", 100).parameters())


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9, "optimizer": "adamw", "on_nonfinite": "skip"}])
def test_a_run_with_a_connector_resumes_to_the_same_bytes(
    taught: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    given = fitnet(taught, epochs=3, **changes)
    library.distill(**given, out=str(tmp_path / "whole"))
    for stop in (Stop(after_epoch=1), Stop(after_epoch=2, images_later=50)):
        with pytest.raises(engine.Interrupted):
            library.distill(**given, out=str(tmp_path / "parts"), resume=True, observer=stop)
    library.distill(**given, out=str(tmp_path / "parts"), resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert history(tmp_path / "parts") == history(tmp_path / "whole")


def test_a_killed_run_with_a_connector_resumes_to_the_same_bytes(
    icdctl: CommandLine, taught: Path, tmp_path: Path
) -> None:
    given = ["distill", "--method", "fitnet", "--teacher", str(taught), "--student", "res8", "--dataset", "digits100"]
    given += ["--epochs", "3", "--train-images", "400", "--test-images", "100", "--device", "cpu", "--deterministic"]
    parts = tmp_path / "parts"
    with started(*given, "--out", str(parts)) as running:
        wait_until((parts / "history.csv").is_file, what="the first epoch")
        running.send(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    assert not (parts / "metrics.json").exists()
    assert icdctl(*given, "--out", parts, "--resume")[0] == 0
    assert icdctl(*given, "--out", tmp_path / "whole")[0] == 0
    assert weights(parts) == weights(tmp_path / "whole")


def test_students_with_and_without_connectors_share_a_teacher(taught: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"method": "fitnet"},
        {"method": "fitnet", "settings": {"hint_stage": 1}, "student": "res14"},
        {"method": "cd_sdd_dkd"},
        {"method": "fitnet", "seed": 1},
    ]
    configs = [planned(taught, tmp_path / str(n), **change) for n, change in enumerate(changes)]
    assert all(result.finished for result in together(configs, taught))
    for number, change in enumerate(changes):
        given = {**SMALL, "teacher": str(taught), "student": "res8", "deterministic": True, **change}
        library.distill(**given, out=str(tmp_path / f"alone-{number}"))
        assert weights(tmp_path / f"alone-{number}") == weights(tmp_path / str(number))


@pytest.mark.parametrize("mode", ["inline", "ahead"])
def test_the_form_that_a_graph_holds_leaves_the_same_bytes(
    taught: Path, tmp_path: Path, by_position: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    given = fitnet(taught, teacher_mode=mode, crop_padding=1, ema_decay=0.9)
    library.distill(**given, out=str(tmp_path / "plain"))
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    by_position()
    library.distill(**given, out=str(tmp_path / "static"))
    assert weights(tmp_path / "plain") == weights(tmp_path / "static")
    assert history(tmp_path / "plain") == history(tmp_path / "static")


def test_maps_are_not_cached_and_that_is_said(icdctl: CommandLine, taught: Path, tmp_path: Path) -> None:
    given = ["distill", "--method", "fitnet", "--teacher", taught, "--student", "res8", "--dataset", "digits100"]
    given += ["--train-images", "600", "--test-images", "100", "--epochs", "2", "--device", "cpu"]
    code, _, err = icdctl(*given, "--out", tmp_path / "cached", "--teacher-mode", "cache")
    assert code == 2
    assert (
        "the teacher cache keeps class_maps, logits, pooled, regions; the method also reads `stages.2` (32 x 16 x 16"
        in err
    )
    code, _, err = icdctl(*given, "--out", tmp_path / "run")
    assert code == 0
    assert "the teacher runs in every epoch: the teacher cache keeps" in err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["teacher_mode"] == "inline"


def test_the_export_has_the_student_alone(icdctl: CommandLine, taught: Path, tmp_path: Path) -> None:
    library.distill(**fitnet(taught, student="res8"), out=str(tmp_path / "run"))
    assert icdctl("export", tmp_path / "run", "--out", tmp_path / "onnx")[0] == 0
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    assert [output.name for output in graph.output] == ["logits"]
    assert not [tensor.name for tensor in graph.initializer if "connector" in tensor.name]
    assert icdctl("verify", tmp_path / "onnx")[0] == 0


class Foreign(nn.Module):
    """A module with a single stage."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 100)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(images).relu().mean(dim=(2, 3)))
        return logits


def test_a_custom_module_without_that_stage_is_refused_by_name(taught: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`Foreign` has no `stages\.2`: it has 1 stages"):
        library.distill(**fitnet(taught, student=Foreign()), out=str(tmp_path / "run"))


def test_a_probe_changes_nothing_of_a_model() -> None:
    model = models.create("res8", 100).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probe = ModelProbe(model, (32, 32))
    assert probe.shape("logits") == (100,)
    assert probe.shape("regions") == (100, 4, 4)
    assert probe.shape("pooled") == (64,)
    assert probe.shape("feature_map") == (64, 8, 8)
    assert probe.shape(stage(1)) == (16, 32, 32)
    assert probe.shape("preactivations.3") == (64, 8, 8)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_teacher_may_normalise_with_the_statistics_of_the_batch(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.create("res8", 100)
    images = torch.randn((8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    teacher = InlineTeacher(model, reads={"logits"}, device=torch.device("cpu"), in_eval_mode=False)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images)["logits"], model.train()(images), rtol=1e-4, atol=1e-4)

    monkeypatch.setitem(METHODS, "kd", replace(METHODS["kd"], teacher_in_eval_mode=False))
    given = {**SMALL, "method": "kd", "teacher": str(taught), "student": "res8"}
    result = library.distill(**given, out=str(tmp_path / "run"))
    assert (result.config.teacher_mode, result.config.teacher_precision) == ("inline", "fp32")
    with pytest.raises(UsageError, match="statistics of the student's batch"):
        library.distill(**given, teacher_mode="cache", out=str(tmp_path / "cached"))
    configs = [planned(taught, tmp_path / name, method=name) for name in ("kd", "dkd")]
    with pytest.raises(UsageError, match="want the teacher in different modes"):
        together(configs, taught)


@dataclass(frozen=True, kw_only=True)
class TwoViews(Method):
    """The cross-entropy on two views of each image, and the distance of their logits."""

    def teacher_reads(self, settings: methods.Settings) -> frozenset[str]:
        return frozenset({"logits"})

    def build(
        self,
        student: ModelProbe,
        teacher: ModelProbe | None,
        settings: methods.Settings,
        *,
        scales: tuple[int, ...],
        supervision: Supervision,
    ) -> Objective:
        return TwoViewsObjective(settings, supervision)


class TwoViewsObjective(Objective):
    term_names = ("ce", "views")

    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        first, second = student["logits"].chunk(2)
        assert torch.equal(*labels.chunk(2))
        assert not torch.equal(*teacher["logits"].chunk(2))
        return {"views": F.mse_loss(first, second)}


@pytest.mark.parametrize("mode", ["ahead", "cache"])
def test_a_method_may_see_several_views_of_an_image(
    taught: Path, tmp_path: Path, by_position: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    row = TwoViews(defaults={"ce_weight": 1.0}, source="this test", family="two_views", num_views=2)
    monkeypatch.setitem(METHODS, "two_views", row)
    changes: list[dict[str, Any]] = [{"method": "two_views"}, {"method": "kd"}]
    shared = {"crop_padding": 1, "teacher_mode": mode, "student": "res8", "epochs": 2}
    configs = [planned(taught, tmp_path / str(n), **shared, **change) for n, change in enumerate(changes)]
    both = together(configs, taught)
    assert [result.metrics["train_images"] for result in both] == [SMALL["train_images"]] * 2
    given: dict[str, Any] = {**SMALL, **shared, "teacher": str(taught), "deterministic": True}
    for number, change in enumerate(changes):
        library.distill(**given, **change, out=str(tmp_path / f"alone-{number}"))
        assert weights(tmp_path / f"alone-{number}") == weights(tmp_path / str(number))
    with pytest.raises(engine.Interrupted):
        library.distill(**given, **changes[0], out=str(tmp_path / "parts"), observer=Stop(after_epoch=1))
    library.distill(**given, **changes[0], out=str(tmp_path / "parts"), resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "0")
    assert float(history(tmp_path / "0")[-1]["views"]) > 0
    if mode == "ahead":
        monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
        monkeypatch.setattr(TwoViewsObjective, "distillation_terms", _without_looking)
        by_position()
        library.distill(**given, **changes[0], out=str(tmp_path / "static"))
        assert weights(tmp_path / "static") == weights(tmp_path / "0")


def _without_looking(
    self: Objective, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int
) -> dict[str, Tensor]:
    """The same term, without the assertions, which look at values."""
    first, second = student["logits"].chunk(2)
    return {"views": F.mse_loss(first, second)}


def test_several_views_come_batch_by_batch() -> None:
    store, _ = store_of(7, Augmentation(crop_padding=2, flip=True))
    first = store.epoch(seed=3, epoch=1)
    both = store.epoch_of_many(seed=3, epoch=1, num_views=2, batch_size=4)
    assert both.index.tolist() == [*first.index[:4].tolist() * 2, *first.index[4:].tolist() * 2]
    assert torch.equal(both.top[:4], first.top[:4])
    assert torch.equal(both.top[8:11], first.top[4:])
    assert not torch.equal(both.top[4:8], first.top[:4])
    assert torch.equal(store.epoch_of_many(seed=3, epoch=1, num_views=1, batch_size=4).top, first.top)


def test_terms_from_logits_alone_are_refused_for_a_method_that_reads_more() -> None:
    with pytest.raises(UsageError, match="`fitnet` reads more than logits"):
        methods.distillation_terms("fitnet", student_logits=torch.zeros(2, 3), labels=torch.zeros(2).long())
