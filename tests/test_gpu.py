"""What only a CUDA device can show: `pytest -m gpu`. None of it has a word on speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from step_support import READS
from test_device_loop import OPTIMIZERS, Listener
from test_engine import SMALL, Stop, history, weights
from test_golden import CASES, TRAJECTORIES, check_loss, check_trajectory
from test_together import planned, together

import icdctl as library
from icdctl import data
from icdctl.config.dataset_request import dataset_request
from icdctl.data import ImageStore
from icdctl.engine import device_loop
from icdctl.engine import run as engine
from icdctl.engine.device import backend_settings
from icdctl.engine.precision import _agree
from icdctl.engine.teacher import InlineTeacher
from icdctl.registry import trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),  # said once
]
# Torch looks once, at the first product of the process, whichever test that is in.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
CUDA = torch.device("cuda")
ON_GPU: dict[str, Any] = {**SMALL, "device": "cuda", "precision": "fp32", "crop_padding": 1, "flip": True}
EXACT: dict[str, Any] = {**ON_GPU, "deterministic": True}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    library.train(model="res8", **EXACT, out=str(out))
    return out


@pytest.fixture
def told() -> Listener:
    return Listener()


@pytest.fixture
def plain_afterwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on nothing is captured."""

    def switch() -> None:
        def refuse(*arguments: Any) -> None:
            raise RuntimeError("not now")

        monkeypatch.setattr(device_loop, "record", refuse)

    return switch


@pytest.fixture
def strict_about_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Steps that are already captured must not make the host wait; how many were watched is told."""
    watched: list[int] = []
    plain = device_loop.DeviceLoop.step

    def step(loop: device_loop.DeviceLoop, index: int, students: Any, size: int) -> None:
        captured = (tuple(id(student) for student in students), size) in loop._steps
        torch.cuda.set_sync_debug_mode("error" if captured else "default")
        try:
            plain(loop, index, students, size)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if captured:
            watched.append(index)

    monkeypatch.setattr(device_loop.DeviceLoop, "step", step)
    yield watched
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["inline", "ahead", "cache"])
def test_steps_are_captured_and_never_wait(
    taught: Path, tmp_path: Path, told: Listener, strict_about_waiting: list[int], mode: str, optimizer: str
) -> None:
    given = {**ON_GPU, **OPTIMIZERS[optimizer], "method": "cd_sdd_dkd", "teacher": str(taught), "student": "res8"}
    given |= {"ema_decay": 0.9, "on_nonfinite": "skip", "epochs": 4}
    assert library.distill(**given, teacher_mode=mode, out=str(tmp_path / "run"), observer=told).finished
    assert told.said == []
    assert len(strict_about_waiting) == 4 * 4 - 2


def test_plain_steps_never_wait_either(
    taught: Path, tmp_path: Path, strict_about_waiting: list[int], plain_afterwards: Callable[[], None]
) -> None:
    plain_afterwards()
    given = {**ON_GPU, "method": "cd_sdd_dkd", "teacher": str(taught), "student": "res8"}
    assert library.distill(**given, out=str(tmp_path / "run")).finished
    assert strict_about_waiting


@pytest.mark.parametrize(
    ("method", "optimizer"), [("ce", "sgd"), ("kd", "nesterov"), ("cd_sdd_dkd", "sgd"), ("sdd_nkd", "adamw")]
)
def test_two_hundred_captured_steps_leave_the_bytes_of_plain_ones(
    taught: Path,
    tmp_path: Path,
    told: Listener,
    plain_afterwards: Callable[[], None],
    method: str,
    optimizer: str,
) -> None:
    given = {**EXACT, **OPTIMIZERS[optimizer], "method": method, "teacher": str(taught), "student": "res8"}
    given |= {"epochs": 50, "max_steps": 200, "lr": 2.0**-8}
    if method == "ce":
        del given["teacher"]
    library.distill(**given, out=str(tmp_path / "graph"), observer=told)
    assert told.said == []
    plain_afterwards()
    library.distill(**given, out=str(tmp_path / "plain"), observer=told)
    assert len(told.said) == 1
    assert weights(tmp_path / "graph") == weights(tmp_path / "plain")
    assert history(tmp_path / "graph") == history(tmp_path / "plain")


def test_the_teacher_says_the_same_inline_ahead_and_from_the_cache(taught: Path, tmp_path: Path) -> None:
    given = {**ON_GPU, "method": "cd_sdd_dkd", "teacher": str(taught), "student": "res8", "train_images": 1200}
    rows = {}
    for mode in ("inline", "ahead", "cache"):
        # A low rate: at the recipe's own, training amplifies rounding from step to step.
        library.distill(**given, lr=1e-3, teacher_mode=mode, teacher_precision="fp32", out=str(tmp_path / mode))
        rows[mode] = history(tmp_path / mode)[0]
    for mode in ("ahead", "cache"):
        for key in ("ce", "kd", "cluster"):
            assert rows[mode][key] == pytest.approx(rows["inline"][key], rel=1e-3)


@pytest.mark.parametrize("mode", ["inline", "ahead", "cache"])
def test_each_student_is_the_one_that_it_would_be_alone(
    taught: Path, tmp_path: Path, told: Listener, mode: str
) -> None:
    changes: list[dict[str, Any]] = [
        {"method": "kd"},
        {"method": "cd_sdd_dkd"},
        {"method": "sdd_nkd", "scales": "1,2", "ema_decay": 0.9},
        {"method": "kd", "seed": 1},
        {"method": "cd_sdd_kd", "student": "res14", "epochs": 3},
    ]
    shared = {**EXACT, "teacher_mode": mode, "student": "res8"}
    configs = [planned(taught, tmp_path / str(n), **{**shared, **change}) for n, change in enumerate(changes)]
    assert all(result.finished for result in together(configs, taught, observer=told))
    # Of the third epoch too, whose graph comes when those of the others are gone.
    assert told.said == []
    for number, change in enumerate(changes):
        alone = tmp_path / f"alone-{number}"
        library.distill(**{**shared, "teacher": str(taught), **change}, out=str(alone))
        assert weights(alone) == weights(tmp_path / str(number))
        assert history(alone) == history(tmp_path / str(number))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path, optimizer: str) -> None:
    given = {**EXACT, **OPTIMIZERS[optimizer], "epochs": 3, "model": "res8"}
    library.train(**given, out=str(tmp_path / "whole"))
    with pytest.raises(engine.Interrupted, match="the state after epoch 1 of 3 is saved"):
        library.train(**given, out=str(tmp_path / "parts"), observer=Stop(after_epoch=1))
    library.train(**given, out=str(tmp_path / "parts"), resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


def test_a_run_on_the_gpu_is_near_the_one_on_the_cpu(taught: Path, tmp_path: Path) -> None:
    rows = {}
    for device in ("cpu", "cuda"):
        given = {**ON_GPU, "device": device, "method": "cd_sdd_dkd", "teacher": str(taught), "student": "res8"}
        out = tmp_path / device
        library.distill(**given, lr=1e-3, teacher_mode="inline", teacher_precision="fp32", out=str(out))
        rows[device] = history(out)[0]
    for key in ("ce", "kd", "cluster"):
        assert rows["cuda"][key] == pytest.approx(rows["cpu"][key], rel=1e-2)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_teacher_in_half_precision_agrees(taught: Path, precision: Any) -> None:
    model = trained.resolve(str(taught)).load()
    dataset = data.load(dataset_request("digits100", train_images=256, test_images=2))
    store = ImageStore(dataset.train_images, dataset.preprocessing, data.Augmentation(), device=CUDA)
    images = store.inputs(store.epoch(seed=0, epoch=1).to(CUDA))
    with backend_settings(CUDA, "fp32", deterministic=True):
        exact = InlineTeacher(model, reads=READS, device=CUDA)(images)
        half = InlineTeacher(model, reads=READS, device=CUDA, precision=precision)(images)
    assert half["logits"].dtype == torch.float32
    largest = exact["logits"].abs().max()
    assert (half["logits"] - exact["logits"]).abs().max() <= (2.0**-8 if precision == "fp16" else 2.0**-5) * largest
    if precision == "fp16":
        assert _agree(exact["logits"], half["logits"])


@pytest.mark.parametrize("mode", ["inline", "ahead"])
def test_a_benchmark_times_graphs_that_never_wait(icdctl: CommandLine, mode: str) -> None:
    given = ("--pairs", "res8x4:res8", "--teacher-mode", mode, "--seconds", "1", "--device", "cuda", "--json")
    code, out, err = icdctl("bench", *given)
    assert (code, "warning" in err) == (0, False)
    row = json.loads(out)["pairs"]["res8x4:res8"]
    assert (row["cuda_graph"], row["host_syncs_per_step"]) == (True, 0)
    assert row["kernels_per_step"] is None or row["kernels_per_step"] > 50
    assert row["memory"]["peak_allocated_bytes"] > 0
    parts = ["augment", "teacher", "student_forward", "loss", "backward", "clip_and_sgd"]
    assert list(row["split_ms"]) == parts
    assert all(row["split_ms"][name] > 0 for name in ("augment", "student_forward", "backward"))


LOOKING = """
import json, sys, torch, icdctl
from icdctl.engine.observer import SilentObserver
from icdctl.engine.step import TrainingStep

class Listener(SilentObserver):
    def message(self, text):
        print(text)

def looking(step, total):
    if torch.cuda.is_current_stream_capturing():
        total.item()
    return update(step, total)

update, TrainingStep.update = TrainingStep.update, looking
icdctl.train(**json.loads(sys.argv[1]), observer=Listener())
"""
"""A run whose step waits for the device while it is captured: in its own process, for torch may not get over it."""


def test_a_capture_that_fails_leaves_the_bytes_of_one_that_does_not(tmp_path: Path) -> None:
    given = {**EXACT, "model": "res8"}
    library.train(**given, out=str(tmp_path / "graph"))
    command = [sys.executable, "-c", LOOKING, json.dumps({**given, "out": str(tmp_path / "plain")})]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, env=around, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout
    assert [line.rpartition(": ")[2] for line in said.splitlines()] == [
        "operation not permitted when stream is capturing"
    ]
    assert weights(tmp_path / "graph") == weights(tmp_path / "plain")
    assert history(tmp_path / "graph") == history(tmp_path / "plain")


@pytest.mark.filterwarnings("ignore")  # torch's compiler makes use of what other parts of torch warn of
def test_compiled_students_are_captured_too(taught: Path, tmp_path: Path, told: Listener) -> None:
    given = {**ON_GPU, "method": "cd_sdd_dkd", "teacher": str(taught), "student": "res8", "teacher_precision": "fp32"}
    rows = {}
    for is_compiled in (False, True):
        out = tmp_path / str(is_compiled)
        result = library.distill(**given, lr=1e-3, compile=is_compiled, out=str(out), observer=told)
        rows[is_compiled] = history(out)[0]
    assert (told.said, result.metrics["compiled"]) == ([], True)
    for key in ("ce", "kd", "cluster"):
        assert rows[True][key] == pytest.approx(rows[False][key], rel=1e-2)


def test_a_run_that_is_not_finite_stops_with_its_epoch_and_keeps_the_batch(taught: Path, tmp_path: Path) -> None:
    given = {**ON_GPU, "method": "cd_sdd_dkd", "teacher": str(taught), "student": "res8", "lr": 1e30}
    with pytest.raises(library.IcdctlError, match="the batch is kept in"):
        library.distill(**given, clip_norm=1e30, out=str(tmp_path / "run"))


def test_automatic_choices_are_kept_in_the_configuration(taught: Path, tmp_path: Path) -> None:
    given = {**SMALL, "device": "cuda", "method": "kd", "teacher": str(taught), "student": "res8"}
    result = library.distill(**given, out=str(tmp_path / "run"))
    stated = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stated["teacher_mode"] == result.config.teacher_mode != "auto"
    assert stated["teacher_precision"] == result.config.teacher_precision != "auto"


@pytest.mark.parametrize("trajectory_id", TRAJECTORIES)
def test_training_follows_the_trajectory_of_the_reference(trajectory_id: str) -> None:
    check_trajectory(trajectory_id, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case_id", CASES)
def test_loss_reaches_the_float64_value_of_the_reference(case_id: str, dtype: torch.dtype) -> None:
    check_loss(case_id, dtype, CUDA)
