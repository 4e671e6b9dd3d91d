"""`icdctl bench`: real measurements of tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_support import TINY, small_sizes
from conftest import CommandLine
from torch import Tensor

from icdctl import models
from icdctl.benchmark import against, ceilings, clocks, operations, speed, workload
from icdctl.engine import device_loop, shared_data, teacher
from icdctl.engine.teacher import InlineTeacher
from icdctl.errors import IcdctlError

__all__ = ["small_sizes"]


def test_a_measurement_has_every_part(icdctl: CommandLine) -> None:
    threads = torch.get_num_threads()
    given = ("--teacher", "resnet8", "--student", "res8", "--method", "cd_sdd_dkd", "--seconds", "0.5")
    code, out, err = icdctl("bench", *given, *TINY, "--json")
    assert code == 0
    assert "timing steps" in err
    found = json.loads(out)
    assert set(found) == {"device", "versions", "ceilings", "pairs"}
    assert found["device"]["clock"] == "CPU seconds of the process"
    assert found["device"]["threads"] == 1
    assert found["versions"]["torch"]
    assert set(found["ceilings"]) == {"matmul_fp32_tflops", "conv3x3_fp32_tflops", "copy_gb_per_second"}
    row = found["pairs"]["resnet8:res8"]
    assert 0 < row["step_ms"]["p50"] <= row["step_ms"]["p90"] <= row["step_ms"]["p99"]
    assert row["images_per_second"] == pytest.approx(8000 / row["step_ms"]["p50"])
    parts = ["augment", "teacher", "student_forward", "loss", "backward", "clip_and_sgd"]
    assert list(row["split_ms"]) == parts
    assert all(spent > 0 for spent in row["split_ms"].values())
    extra = row["extrapolated"]
    assert extra["steps_per_epoch"] == 6250
    between = [extra[f"{what}_seconds"] for what in ("start", "evaluation", "checkpoint")]
    assert all(spent > 0 for spent in between)
    assert extra["epoch_seconds"] == pytest.approx(6.25 * row["step_ms"]["p50"] + sum(between))
    assert extra["run_seconds"] == pytest.approx(240 * extra["epoch_seconds"])
    assert row["work"]["student_gflop"] == pytest.approx(3 * row["work"]["teacher_gflop"], rel=0.01)
    assert row["memory"]["peak_resident_bytes"] > 1e8
    assert (row["host_syncs_per_step"], row["kernels_per_step"], row["cuda_graph"]) == (None, None, False)
    assert (row["teacher_mode"], row["teacher_precision"]) == ("inline", "fp32")
    assert torch.get_num_threads() == threads


def test_what_is_printed_says_what_was_extrapolated(icdctl: CommandLine) -> None:
    given = ("--pairs", "res8:res8", "--method", "kd", "--recipe", "digits100", "--teacher-mode", "cache")
    code, out, _ = icdctl("bench", *given, "--batch-size", "64", "--device", "cpu", "--seconds", "0.1")
    assert code == 0
    named = {line.split(" ")[0]: line for line in out.splitlines()}
    assert "teacher cache" in named["pair"]
    assert "extrapolated" in named["epoch"]
    assert "teacher 0.0 GFLOP" in named["work"]
    assert "host" not in named


def test_each_type_of_number_has_its_own_ceiling(icdctl: CommandLine) -> None:
    given = ("--pairs", "res8:res8", "--teacher-precision", "bf16", "--seconds", "0.1")
    code, out, _ = icdctl("bench", *given, *TINY, "--json")
    assert code == 0
    found = json.loads(out)
    rates, row = found["ceilings"], found["pairs"]["res8:res8"]
    assert row["teacher_precision"] == "bf16"
    work = row["work"]
    seconds = 1e-3 * (
        work["teacher_gflop"] / rates["matmul_bf16_tflops"] + work["student_gflop"] / rates["matmul_fp32_tflops"]
    )
    assert work["share_of_matmul_ceiling"] == pytest.approx(1e3 * seconds / row["step_ms"]["p50"])
    kinds = [ceilings.teacher_kind(*pair) for pair in (("tf32", "fp32"), ("tf32", "fp16"), ("bf16", "fp32"))]
    assert kinds == ["tf32", "fp16", "fp32"]


@pytest.fixture
def by_position(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, steps go as on CUDA; in place of a graph's replay stands the function itself."""

    def switch() -> None:
        monkeypatch.setattr(shared_data, "is_device_driven", lambda device: True)
        monkeypatch.setattr(device_loop, "is_device_driven", lambda device: True)
        monkeypatch.setattr(device_loop, "record", lambda step, stream, pool: step)

    return switch


def a_session(**changes: Any) -> workload.Session:
    """Five steps an epoch."""
    plan = workload.Plan(**{"method": "cd_sdd_dkd", "device": "cpu", "batch_size": 8, **changes})
    (pair,) = workload.parse_pairs("res8:res8")
    dataset = workload.random_dataset(40, 8, seed=0)
    models_of_both = [workload.fresh_model("resnet8", dataset, seed=n, is_teacher=n == 0) for n in range(2)]
    config = workload.build_config(plan, pair)
    place: dict[str, Any] = {"device": torch.device("cpu"), "precision": "fp32"}
    return workload.Session(config, dataset, *models_of_both, **place, message=pytest.fail)


@pytest.mark.parametrize("mode", ["inline", "ahead", "cache"])
def test_what_is_timed_on_cuda_learns_what_is_timed_on_a_cpu(
    by_position: Callable[[], None], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(teacher, "_STEPS_AHEAD", 2)
    # A table of every crop and flip is not for a benchmark.
    changes = {"teacher_mode": mode, **({"recipe": "digits100"} if mode == "cache" else {})}

    def learned() -> tuple[bool, dict[str, Tensor], Tensor]:
        stepper = workload.Stepper(a_session(**changes))
        for _ in range(13):  # into a third epoch
            stepper()
        stepper.check_finite()
        step = stepper.session.run.step
        return stepper.captures, step.student.state_dict(), step.log

    with clocks.threads(1):
        is_captured, weights, log = learned()
        by_position()
        is_captured_now, weights_now, log_now = learned()
    assert (is_captured, is_captured_now) == (False, True)
    assert all(torch.equal(weights[key], tensor) for key, tensor in weights_now.items())
    assert torch.equal(log, log_now)


def test_no_speed_is_told_of_steps_that_are_not_finite(by_position: Callable[[], None]) -> None:
    by_position()
    stepper = workload.Stepper(a_session())
    stepper()
    stepper.session.run.step.log[0, 0] = torch.nan
    for _ in range(4):
        stepper()
    with pytest.raises(IcdctlError, match="no speed is reported"):
        stepper()


@pytest.mark.parametrize("mode", ["inline", "ahead"])
def test_a_graph_is_split_by_graphs_that_end_earlier(
    icdctl: CommandLine, by_position: Callable[[], None], mode: str
) -> None:
    by_position()
    given = ("--pairs", "resnet8:res8", "--method", "cd_sdd_dkd", "--teacher-mode", mode, "--seconds", "0.5")
    code, out, err = icdctl("bench", *given, *TINY, "--json")
    assert (code, "without a CUDA graph" in err) == (0, False)
    row = json.loads(out)["pairs"]["resnet8:res8"]
    assert row["cuda_graph"]
    assert row["first_step_seconds"] > 0
    split = row["split_ms"]
    assert set(split) == {"augment", "teacher", "student_forward", "loss", "backward", "clip_and_sgd"}
    assert 0 < split["augment"] < sum(split.values())


def test_where_nothing_can_be_captured_the_bench_says_so_once(
    icdctl: CommandLine, by_position: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("not while a test is looking")

    by_position()
    monkeypatch.setattr(device_loop, "record", refuse)
    code, out, err = icdctl("bench", "--pairs", "res8:res8", "--seconds", "0.1", *TINY, "--json")
    row = json.loads(out)["pairs"]["res8:res8"]
    assert (code, row["cuda_graph"]) == (0, False)
    assert err.count("res8:res8: warning: steps run without a CUDA graph") == 1
    assert all(spent > 0 for spent in row["split_ms"].values())


def test_kernels_that_nobody_sees_are_not_counted() -> None:
    stepper = workload.Stepper(a_session())
    assert speed._count_kernels(stepper) is None
    assert bool(torch.isfinite(stepper.session.run.step.log).all())


def test_the_beginning_of_a_step_does_what_the_step_does_so_far() -> None:
    session = a_session()
    step = session.run.step
    part = session.part(session.draw(1), 0)
    images, labels = session.shared.store.inputs(part), session.shared.labels[part.index]
    before = [parameter.detach().clone() for parameter in step.student.parameters()]
    for num_parts, has_gradients, has_moved in (
        (0, False, False),
        (2, False, False),
        (3, True, False),
        (4, True, True),
    ):
        beginning = speed._Beginning.like(step)
        beginning.num_parts = num_parts
        beginning(0, images, labels, session.inline(images))
        parameters = list(step.student.parameters())
        assert all((parameter.grad is not None) == has_gradients for parameter in parameters)
        moved = [not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]
        assert any(moved) == has_moved


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (("--against", "nowhere"), 1, "`nowhere` is not a folder", "pass a checkout of iCD"),
        (("--against", "."), 1, "`.` holds no package `mdistiller`", "pass a checkout of iCD"),
        (("--pairs", "res8"), 2, "pair `res8` is not TEACHER:STUDENT", "e.g. `--pairs res32x4:mv2"),
        (("--pairs", "res8:res9"), 2, "unknown model `res9`", "did you mean `res8`?"),
        (("--pairs", "res8:res8,res8:res8"), 2, "pair `res8:res8` is named twice", "name it once"),
        (("--pairs", "res8:res8", "--teacher", "res8"), 2, "`--pairs` and `--teacher`", "name all models"),
        (("--require", "1.3"), 2, "`--require` needs `--against`", "name a checkout"),
        (("--reference-variants", "workers"), 2, "`--reference-variants` needs `--against`", "name a checkout"),
        (
            ("--against", ".", "--reference-variants", "worker"),
            2,
            "unknown reference variant `worker`",
            "choose some of published, workers, autocast",
        ),
        (("--method", "ce"), 2, "method `ce` has no teacher", "choose another `--method`"),
        (("--method", "kdd"), 2, "unknown method `kdd`", "did you mean"),
        (("--device", "cuda:99"), 1, "device `cuda:99` is not there", "use `--device cpu`"),
        (("--precision", "tf32", "--device", "cpu"), 2, "precision `tf32` needs a CUDA device", "use `fp32`"),
        (
            ("--teacher-mode", "cache", "--device", "cpu", "--teacher", "res8"),
            2,
            "longer to fill than a benchmark",
            "inline",
        ),
    ],
)
def test_what_can_be_wrong_is_told_with_a_hint(
    icdctl: CommandLine, arguments: tuple[str, ...], code: int, message: str, hint: str
) -> None:
    found, out, err = icdctl("bench", *arguments, "--seconds", "0.1")
    assert (found, out) == (code, "")
    error, hints = err.split("\n\n")
    assert message in error
    assert hint in hints


def test_percentiles_and_ratios_are_those_of_the_definition() -> None:
    assert [clocks.percentile(range(1, 101), share) for share in (50, 90, 99)] == [50, 90, 99]
    assert [clocks.percentile([3.0, 1.0, 2.0], share) for share in (50, 90, 99)] == [2, 3, 3]
    blocks = [({"cpu_seconds": a, "wall_seconds": 2 * a}, {"cpu_seconds": 1.0, "wall_seconds": 4.0}) for a in (3, 1, 2)]
    numbers = against._summary(blocks, 64, on_cpu=True)
    assert (numbers["ratio"], numbers["ratio_min"], numbers["ratio_max"]) == (2, 1, 3)
    assert (numbers["reference_ms"], numbers["icdctl_ms"], numbers["icdctl_images_per_second"]) == (2000, 1000, 64)
    assert (numbers["wall_ratio"], numbers["icdctl_wall_ms"]) == (1, 4000)


def test_work_is_counted_as_by_hand() -> None:
    dataset = workload.random_dataset(256, 1, seed=0)
    student = workload.fresh_model("res8", dataset, seed=0, is_teacher=False)
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    images = dataset.preprocessing.normalise(dataset.train_images[:2])
    counted = operations.count(None, lambda: student.train()(images), student)
    # Products per image: the stem, three stages of two convolutions, two shortcuts, the head.
    stages = (16 * 16 * 9 * 2) * 32**2 + (16 * 32 + 32 * 32) * 9 * 16**2 + (32 * 64 + 64 * 64) * 9 * 8**2
    products = 3 * 16 * 9 * 32**2 + stages + 16 * 32 * 16**2 + 32 * 64 * 8**2 + 64 * 100
    assert counted.student_flop == 3 * 2 * 2 * products
    assert counted.teacher_flop == 0
    assert all(torch.equal(before[key], tensor) for key, tensor in student.state_dict().items())


def test_fresh_models_behave_like_trained_ones() -> None:
    dataset = workload.random_dataset(256, 1, seed=0)
    assert dataset.train_images.float().mean() == pytest.approx(127.5, abs=1)
    teacher = workload.fresh_model("res8", dataset, seed=0, is_teacher=True)
    images = dataset.preprocessing.normalise(dataset.train_images[:64])
    with torch.no_grad():
        assert float(teacher.eval()(images).std()) == pytest.approx(3.0, rel=1e-4)
        folded = InlineTeacher(teacher, reads={"logits"}, device=torch.device("cpu"))(images)["logits"]
        torch.testing.assert_close(folded, teacher(images), rtol=1e-3, atol=1e-4)
    again = workload.fresh_model("res8", dataset, seed=0, is_teacher=True)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), again.parameters(), strict=True))
    assert models.MODELS["res8"].num_params == sum(parameter.numel() for parameter in teacher.parameters())
