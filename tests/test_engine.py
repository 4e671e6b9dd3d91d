"""Runs: bytes that repeat, resume, interruption, what is refused, and what is left on disk."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import icdctl as library
from icdctl import files, models
from icdctl.api import planning
from icdctl.config import resolving, run_config, sources
from icdctl.engine import run as engine
from icdctl.engine.device import backend_settings, resolve_device, resolve_precision
from icdctl.engine.observer import SilentObserver
from icdctl.engine.run_folder import lock_path
from icdctl.engine.schedule import learning_rate
from icdctl.errors import ArtifactError, IcdctlError, UsageError

SMALL: dict[str, Any] = {
    "dataset": "digits100",
    "train_images": 104,
    "test_images": 100,
    "batch_size": 32,
    "epochs": 2,
    "device": "cpu",
}
"""Less than half a second of training: 4 steps an epoch, the last of 8 images."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    library.train(model="res8", **SMALL, out=str(out))
    return out


def weights(out: Path) -> bytes:
    return (out / "student.safetensors").read_bytes()


def history(out: Path) -> list[dict[str, float]]:
    """The rows without their timing."""
    with (out / "history.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_run_leaves_what_the_contract_says(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = library.distill(
        method="cd_sdd_dkd", teacher=teacher, student="res8", scales="1,2,4", **SMALL, out=str(out)
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "environment.json",
        "history.csv",
        "metrics.json",
        "student.safetensors",
    ]
    stated = json.loads((out / "config.json").read_text())
    assert stated["method"] == "cd_sdd_dkd"
    assert (stated["teacher"], stated["student"], stated["scales"], stated["seed"]) == ("res8", "res8", [1, 2, 4], 0)
    assert stated["teacher_sha256"] == files.sha256_file(teacher / "student.safetensors")
    assert stated["settings"]["variant"] == "published"
    rows = history(out)
    assert list(rows[0]) == ["epoch", "lr", "ce", "kd", "cluster", "train_top1", "test_top1", "test_top5", "test_loss"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["final_top1"] == rows[-1]["test_top1"] == result.top1
    assert metrics["best_top1"] == max(row["test_top1"] for row in rows)
    assert metrics["variant"] == "published"
    assert metrics["params"] == 83_892
    with safe_open(out / "student.safetensors", framework="pt") as stored:
        assert list(stored.metadata()) == ["icdctl"]
        assert json.loads(stored.metadata()["icdctl"])["model"] == "res8"


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(teacher: Path, tmp_path: Path) -> None:
    def trained(name: str, seed: int) -> Path:
        out = tmp_path / name
        library.distill(method="sdd_dkd", teacher=str(teacher), student="res8", seed=seed, **SMALL, out=str(out))
        return out

    first, again, other = trained("a", 3), trained("b", 3), trained("c", 4)
    assert weights(first) == weights(again)
    assert history(first) == history(again)
    assert weights(first) != weights(other)


class Stop(SilentObserver):
    """Interrupts a run as Ctrl-C does, at the end of an epoch or inside one."""

    def __init__(self, *, after_epoch: int, images_later: int = 0) -> None:
        self.after_epoch, self.images_later, self.armed = after_epoch, images_later, after_epoch == 0

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        self.armed = row["epoch"] == self.after_epoch
        if self.armed and not self.images_later:
            raise KeyboardInterrupt

    def advance(self, images: int) -> None:
        if self.armed and self.images_later:
            self.images_later -= images
            if self.images_later <= 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path, optimizer: str) -> None:
    given = {**SMALL, "epochs": 3, "model": "res8", "optimizer": optimizer, "lr": 0.01}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    library.train(**given, out=str(whole))
    for stop in (Stop(after_epoch=1), Stop(after_epoch=2, images_later=50)):
        with pytest.raises(engine.Interrupted, match="is saved") as caught:
            library.train(**given, out=str(parts), resume=True, observer=stop)
        assert caught.value.exit_code == 130
        assert "--resume" in caught.value.hint
    library.train(**given, out=str(parts), resume=True)
    assert weights(whole) == weights(parts)
    assert history(whole) == history(parts)


def test_a_run_interrupted_before_its_first_epoch_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(engine.Interrupted, match="no epoch was finished"):
        library.train(model="res8", **SMALL, out=str(out), observer=Stop(after_epoch=0, images_later=70))
    assert not out.exists()


def test_resume_starts_goes_on_and_finishes_at_once(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = library.train(model="res8", **SMALL, out=str(out), resume=True)
    before = weights(out)
    (out / "student.safetensors").unlink()  # as DVC does with the outputs of a stage that it runs again
    (out / "metrics.json").unlink()
    again = library.train(model="res8", **SMALL, out=str(out), resume=True)
    assert weights(out) == before
    assert again.metrics == first.metrics


def test_a_run_folder_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    library.train(model="res8", **SMALL, out=str(out))
    before = weights(out)
    with pytest.raises(ArtifactError, match="exists") as caught:
        library.train(model="res8", **SMALL, out=str(out))
    assert "--resume" in caught.value.hint
    with pytest.raises(UsageError, match=r"lr 0\.1 -> 0\.2"):
        library.train(model="res8", **SMALL, lr=0.2, out=str(out), resume=True)
    assert weights(out) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("dear to someone")
    with pytest.raises(ArtifactError, match=r"thesis\.tex"):
        library.train(model="res8", **SMALL, out=str(other), resume=True)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_a_run_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with files.locked(lock_path(out), busy="", hint=""):
        out.mkdir()
        (out / "config.json").write_text("of the run that is under way")
        for resume in (False, True):
            with pytest.raises(ArtifactError, match="in use by another process"):
                library.train(model="res8", **SMALL, out=str(out), resume=resume)
        assert (out / "config.json").read_text() == "of the run that is under way"


def test_an_interrupted_run_is_left_alone_by_one_with_other_settings(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(engine.Interrupted):
        library.train(model="res8", **SMALL, out=str(out), observer=Stop(after_epoch=1))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for resume in (False, True):
        with pytest.raises(IcdctlError):
            library.train(model="res8", **SMALL, lr=0.5, out=str(out), resume=resume)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_stop_by_steps_or_time_saves_and_goes_on(tmp_path: Path) -> None:
    short = library.train(model="res8", **SMALL, max_steps=3, out=str(tmp_path / "steps"))
    assert short.finished
    assert short.metrics["steps"] == 3
    out = tmp_path / "time"
    stopped = library.train(model="res8", **SMALL, time_limit="0.001s", out=str(out))
    assert not stopped.finished
    assert not (out / "metrics.json").exists()
    assert library.train(model="res8", **SMALL, out=str(out), resume=True).finished


class Poisoned(models.Classifier):
    """A student whose output is not a number for one image."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = models.create("res8", 100)
        self.calls = 0

    @property
    def head(self) -> nn.Linear:
        return self.inner.head

    def features(self, images: Tensor) -> Any:
        features = self.inner.features(images)
        self.calls += self.training
        poison = torch.nan if self.training and self.calls == 3 else 1.0
        return features._replace(feature_map=features.feature_map * poison)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_term_and_images(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(IcdctlError, match=r"`ce` is nan in epoch 1, step 3 of 4; training images of that batch: \d+, "):
        library.train(model=Poisoned(), **SMALL, out=str(out))
    assert not out.exists()


def test_too_high_a_rate_is_reported_rather_than_zeroed(teacher: Path, tmp_path: Path) -> None:
    given = {**SMALL, "epochs": 6, "lr": 1e12, "out": str(tmp_path / "run")}
    with pytest.raises(IcdctlError, match="no longer finite"):
        library.distill(method="dkd", teacher=str(teacher), student="res8", **given)


@pytest.mark.parametrize(
    "method", [*(prefix + loss for loss in ("kd", "dkd", "nkd") for prefix in ("", "sdd_", "cd_sdd_")), "cat"]
)
def test_every_method_trains_from_a_cached_and_an_inline_teacher_alike(
    method: str, teacher: Path, tmp_path: Path
) -> None:
    given = {**SMALL, "epochs": 1, "train_images": 128, "method": method, "teacher": str(teacher), "student": "res8"}
    inline = library.distill(**given, teacher_mode="inline", out=str(tmp_path / "inline"))
    cached = library.distill(**given, teacher_mode="cache", out=str(tmp_path / "cache"))
    rows = history(inline.out) + history(cached.out)
    for key in set(rows[0]) & {"ce", "kd", "cluster", "map"}:
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4)


@pytest.mark.parametrize("method", ["kd", "cd_sdd_dkd"])
def test_a_teacher_that_is_asked_ahead_or_once_for_every_view_says_the_same(
    teacher: Path, tmp_path: Path, method: str
) -> None:
    given = {**SMALL, "method": method, "teacher": str(teacher), "student": "res8", "crop_padding": 1, "flip": True}
    given |= {"train_images": 600, "epochs": 1}
    rows = {}
    for mode in ("inline", "ahead", "cache"):
        out = tmp_path / mode
        result = library.distill(**given, teacher_mode=mode, out=str(out))
        assert json.loads((out / "config.json").read_text())["teacher_mode"] == mode
        assert result.config.teacher_precision == "fp32"
        rows[mode] = history(out)[0]
    for key in set(rows["inline"]) & {"ce", "kd", "cluster"}:
        assert rows["ahead"][key] == pytest.approx(rows["inline"][key], rel=1e-3)
        assert rows["cache"][key] == pytest.approx(rows["inline"][key], rel=1e-3)


def test_views_that_can_not_be_counted_can_not_be_cached(teacher: Path, tmp_path: Path) -> None:
    given = {**SMALL, "method": "kd", "teacher": str(teacher), "student": "res8", "crop_scale": "0.5,1"}
    with pytest.raises(UsageError, match="views that can be counted"):
        library.distill(**given, teacher_mode="cache", out=str(tmp_path / "run"))
    assert library.distill(**given, out=str(tmp_path / "run")).config.teacher_mode == "inline"


def test_teacher_and_student_may_be_modules_of_their_own(tmp_path: Path) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.classify = nn.Linear(8, 100)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.classify(self.body(images).mean(dim=(2, 3)))
            return logits

    student = Tiny()
    before = student.classify.weight.detach().clone()
    result = library.distill(
        method="cd_sdd_kd", teacher=models.create("res8", 100), student=student, **SMALL, out=str(tmp_path / "run")
    )
    assert result.finished
    assert not torch.equal(before, student.classify.weight)
    measured = library.evaluate(student, dataset="digits100", test_images=100, device="cpu")
    assert measured.numbers.top1 == result.top1
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3072, 100))
    with pytest.raises(UsageError, match="no feature map"):
        library.distill(method="sdd_kd", teacher=Tiny(), student=flat, **SMALL, out=str(tmp_path / "flat"))
    assert library.distill(method="kd", teacher=Tiny(), student=flat, **SMALL, out=str(tmp_path / "flat")).finished
    with pytest.raises(UsageError, match="10 logits, the data set has 100 classes"):
        library.train(model=models.create("res8", 10), **SMALL, out=str(tmp_path / "ten"))


def test_evaluation_repeats_the_runs_own_number(teacher: Path) -> None:
    found = library.evaluate(teacher, teacher=teacher, test_images=100, device="cpu")
    assert found.numbers.top1 == json.loads((teacher / "metrics.json").read_text())["final_top1"]
    assert (found.agreement, found.fidelity) == (100.0, 0.0)


def test_bf16_trains_too(tmp_path: Path) -> None:
    assert library.train(model="res8", **SMALL, precision="bf16", out=str(tmp_path / "run")).finished


def configuration(**given: Any) -> run_config.RunConfig:
    return resolving.make_config("train", sources.collect({"student": "res8", **given}))


def test_the_step_schedule_falls_in_the_epoch_after_each_stage() -> None:
    held = configuration(dataset="cifar100")
    rates = {
        epoch: learning_rate(held, epoch=epoch, step=0, total_steps=1) for epoch in (1, 150, 151, 180, 181, 211, 240)
    }
    assert rates == pytest.approx({1: 0.05, 150: 0.05, 151: 5e-3, 180: 5e-3, 181: 5e-4, 211: 5e-5, 240: 5e-5})


def test_the_cosine_schedule_rises_then_falls_to_nothing() -> None:
    held = configuration(dataset="digits100", lr=0.2)
    rates = [learning_rate(held, epoch=1, step=step, total_steps=1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.2 / 150)
    assert max(rates) == pytest.approx(0.2)
    assert rates.index(max(rates)) in (149, 150)
    assert rates[575] == pytest.approx(0.1)
    assert 0 < rates[-1] < 1e-6


def test_two_steps_follow_sgd_and_clipping_worked_by_hand(tmp_path: Path) -> None:
    # One weight w, loss 10 w^2 on every image: gradient 20 w. Clip at 5; momentum 0.9; decay 0.1; rate 0.1.
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)
    expected, velocity = 1.0, 0.0
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward((10 * weight.square()).sum())
        nn.utils.clip_grad_norm_([weight], 5.0)
        optimizer.step()
        gradient = min(20 * expected, 5.0) + 0.1 * expected
        velocity = 0.9 * velocity + gradient
        expected -= 0.1 * velocity
    assert weight.item() == pytest.approx(expected, rel=1e-5)


def test_a_killed_process_resumes_and_a_terminated_one_says_143(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "icdctl", "train", "--model", "res8", "--dataset", "digits100"]
    command += [
        "--train-images",
        "200",
        "--test-images",
        "100",
        "--epochs",
        "90",
        "--device",
        "cpu",
        "--resume",
        "--out",
        str(out),
    ]
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        rows = len(history(out)) if (out / "history.csv").exists() else 0
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        deadline = time.monotonic() + 120
        while not ((out / "history.csv").exists() and len(history(out)) > rows + 1):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        error = process.communicate()[1]
        assert process.returncode == code
        if code == 143:
            assert "error: interrupted; the state after epoch" in error
            assert "hint: continue" in error
    assert len(history(out)) >= 4


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_names_what_to_make_smaller(error: RuntimeError) -> None:
    with (
        pytest.raises(IcdctlError, match="`cpu` ran out of memory") as caught,
        backend_settings(torch.device("cpu"), "fp32", deterministic=False),
    ):
        raise error
    assert "--batch-size" in caught.value.hint
    assert "--teacher-mode inline" in caught.value.hint


def test_deterministic_runs_fill_no_memory_that_is_written_anyway() -> None:
    held: Any = torch.utils.deterministic  # torch leaves it untyped
    assert held.fill_uninitialized_memory
    with backend_settings(torch.device("cpu"), "fp32", deterministic=True):
        assert not held.fill_uninitialized_memory
    assert held.fill_uninitialized_memory


def test_cublas_that_was_set_otherwise_is_an_error_with_a_hint() -> None:
    with (
        pytest.raises(IcdctlError, match="`--deterministic` can't be kept on `cpu`") as caught,
        backend_settings(torch.device("cpu"), "fp32", deterministic=True),
    ):
        # What torch says, shortened.
        raise RuntimeError("you must set an environment variable: CUBLAS_WORKSPACE_CONFIG=:4096:8")
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in caught.value.hint


def test_an_absent_device_is_an_error_with_a_hint() -> None:
    with pytest.raises(IcdctlError, match=r"`cuda:99` is not there") as caught:
        resolve_device("cuda:99")
    assert "--device cpu" in caught.value.hint
    with pytest.raises(UsageError, match="unknown device `gpu`"):
        resolve_device("gpu")
    with pytest.raises(UsageError, match="tf32"):
        resolve_precision("tf32", torch.device("cpu"))


def test_a_resolved_configuration_can_be_run_and_changed(teacher: Path, tmp_path: Path) -> None:
    given = {"method": "kd", "teacher": str(teacher), "student": "res8", **SMALL, "out": str(tmp_path / "run")}
    planned = planning.plan("distill", given)
    assert not (tmp_path / "run").exists()
    first = library.distill(planned)
    decided = {"teacher_mode": "cache", "teacher_precision": "fp32"}
    assert first.config == planned.model_copy(update=decided)
    assert first.config.identity == planned.identity
    second = library.distill(planned, seed=1, out=str(tmp_path / "other"))
    assert second.config == planned.model_copy(update={**decided, "seed": 1, "out": str(tmp_path / "other")})


def test_a_teacher_of_another_data_set_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="was trained on `digits100`, but this run uses `cifar100`"):
        library.distill(method="kd", teacher=str(teacher), student="res8", dataset="cifar100")


def test_a_teacher_and_scales_that_are_not_read_are_mentioned(teacher: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Listener(SilentObserver):
        def message(self, text: str) -> None:
            said.append(text)

    given: dict[str, Any] = {"method": "ce", "teacher": str(teacher), "student": "res8", "scales": "1,2"}
    result = library.distill(**given, **SMALL, out=str(tmp_path / "run"), observer=Listener())
    assert result.config.scales == ()
    assert said == [
        "warning: method `ce` reads no patches, `--scales` is ignored",
        "warning: method `ce` reads no teacher, `--teacher` is ignored",
    ]
