"""A run is what its inputs are: which state it takes up, where it finds it, and what a kill between two steps costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from test_device_loop import ByPosition, by_position, planned_train, taught
from test_engine import SMALL, history, weights
from test_together import planned, together
from torch import nn

import icdctl as library
from icdctl import data, files
from icdctl.config.run_config import RunConfig
from icdctl.engine import device_loop, shared_data, student_run
from icdctl.engine import run as engine
from icdctl.engine import teacher as teachers
from icdctl.engine.checkpoint import PREVIOUS_FILE, STATE_FILE, CheckpointWriter
from icdctl.engine.observer import SilentObserver
from icdctl.engine.run_state import checkpoints_folder, state_folder_of
from icdctl.errors import ArtifactError, UsageError

__all__ = ["by_position", "taught"]
LONG: dict[str, Any] = {**SMALL, "model": "res8", "epochs": 4}


class Listener(SilentObserver):
    """Keeps what is said; interrupts the training after a number of steps of all students together."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.said: list[str] = []
        self._left = stop_after

    def advance(self, images: int) -> None:
        if self._left is not None and images:
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt

    def message(self, text: str) -> None:
        self.said.append(text)


def trained(out: Path | str, *, stop_after: int | None = None, **changes: Any) -> list[str]:
    """Train a small model; what was said. `stop_after` steps it is interrupted."""
    listener = Listener(stop_after)
    given = {**LONG, **changes, "out": str(out)}
    if stop_after is None:
        library.train(**given, observer=listener)
    else:
        with pytest.raises(engine.Interrupted):
            library.train(**given, observer=listener)
    return listener.said


# --- which state is taken up -----------------------------------------------------------------------------------------


def test_without_resume_a_run_whose_folder_is_gone_is_trained_again(tmp_path: Path) -> None:
    trained("run", epochs=2)
    first = json.loads(Path("run/metrics.json").read_text())["seconds"]
    before = weights(Path("run"))
    shutil.rmtree("run")
    said = trained("run", epochs=2)
    assert said == ["the state of an earlier, finished run in `run` is discarded: `--resume` is not given"]
    assert json.loads(Path("run/metrics.json").read_text())["seconds"] != first
    assert weights(Path("run")) == before


def test_an_unfinished_state_that_is_not_taken_up_is_kept_for_a_run_folder_that_was_moved() -> None:
    trained("run", stop_after=9)
    Path("run").rename("elsewhere")
    (said,) = trained("run", epochs=2)
    assert said.startswith("the state of an earlier, unfinished run in `run` is not taken up: `--resume` is not given")
    said_later = trained("elsewhere", resume=True)
    assert said_later == ["continuing after epoch 2 of 4"]
    shutil.rmtree("run")
    trained("run")
    assert weights(Path("run")) == weights(Path("elsewhere"))


def test_with_resume_the_state_of_a_folder_that_is_gone_is_taken_up_and_that_is_said() -> None:
    trained("run", stop_after=9)
    shutil.rmtree("run")
    assert trained("run", resume=True) == [
        "`run` is gone, its state is not: it is taken up (epoch 2 of 4)",
        "continuing after epoch 2 of 4",
    ]
    shutil.rmtree("run")
    assert trained("run", resume=True) == ["`run` is gone, its state is not: it is taken up (finished)"]
    shutil.rmtree("run")
    (said,) = trained("run", resume=True, lr=0.01)
    assert said == "the state of an earlier, finished run in `run` is discarded: lr 0.1 -> 0.01"


def painted(folder: Path, number: int, count: int) -> None:
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = np.random.default_rng(number + index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number + index}.png")


def test_images_that_changed_make_another_run() -> None:
    painted(Path("photos/train"), 0, 4)
    painted(Path("photos/val"), 50, 2)
    given: dict[str, Any] = {
        "model": "res8",
        "dataset": "imagefolder:photos",
        "epochs": 2,
        "device": "cpu",
        "image_size": 32,
    }
    library.train(**given, out="run")
    painted(Path("photos/train"), 90, 1)
    with pytest.raises(ArtifactError, match=r"the images of `imagefolder:.*photos` have changed since this run began"):
        library.train(**given, out="run", resume=True)
    shutil.rmtree("run")
    listener = Listener()
    library.train(**given, out="run", resume=True, observer=listener)
    assert listener.said[-1].endswith("is discarded: the images have changed")
    assert json.loads(Path("run/metrics.json").read_text())["train_images"] == 10


def net(seed: int, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 100)]
    return nn.Sequential(nn.Conv2d(3, width, 3, 4), nn.BatchNorm2d(width), *head)


def test_a_custom_module_takes_up_its_own_state_alone() -> None:
    given: dict[str, Any] = {**SMALL, "epochs": 4, "out": "run"}

    def numbers(module: nn.Module) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    first = net(0)
    with pytest.raises(engine.Interrupted):
        library.train(model=first, **given, observer=Listener(6))
    for other in (net(1), net(0, width=5)):
        with pytest.raises(UsageError, match="of another module: its architecture or its first weights differ"):
            library.train(model=other, **given, resume=True)
    again = net(0)
    library.train(model=again, **given, resume=True)
    shutil.rmtree("run")
    whole, other = net(0), net(1)
    library.train(model=whole, **given)
    assert torch.equal(numbers(whole), numbers(again))
    shutil.rmtree("run")
    library.train(model=other, **given)
    assert not torch.equal(numbers(whole), numbers(other))


def test_a_notebook_goes_on_with_the_module_that_it_has() -> None:
    module = net(0)
    library.train(model=module, **SMALL, out="run", time_limit="0.001s")
    assert library.train(model=module, **SMALL, out="run", resume=True).finished


def test_more_epochs_for_a_finished_run_start_from_its_weights() -> None:
    trained("run", epochs=1)
    with pytest.raises(UsageError, match="epochs 1 -> 2") as caught:
        trained("run", epochs=2, resume=True)
    assert caught.value.hint == (
        "train on from its weights in another folder: `--init-weights run/student.safetensors --out run-more`"
    )
    trained("run-more", epochs=2, init_weights="run/student.safetensors")


def test_a_finished_run_whose_state_was_deleted_is_finished() -> None:
    trained("run", epochs=1)
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    shutil.rmtree(checkpoints_folder())
    result = library.train(**{**LONG, "epochs": 1}, out="run", resume=True)
    assert result.top1 == json.loads(before["metrics.json"])["final_top1"]
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


@pytest.mark.parametrize("file", ["metrics.json", "history.csv", "student.safetensors"])
def test_a_result_without_its_state_is_taken_only_as_it_was_written(file: str) -> None:
    trained("run", epochs=1)
    shutil.rmtree(checkpoints_folder())
    path = Path("run", file)
    content = path.read_bytes()
    if file == "metrics.json":
        metrics = json.loads(content)
        path.write_text(json.dumps({**metrics, "final_top5": metrics["final_top5"] / 2 + 1}))
    elif file == "history.csv":
        path.write_bytes(content.replace(b"\n1,0.", b"\n1,1."))
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert path.read_bytes() != content
    with pytest.raises(ArtifactError, match=r"has changed since (its|the) run wrote it") as caught:
        trained("run", epochs=1, resume=True)
    assert caught.value.hint == "delete `run` and start again"


# --- where the state is found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", ["run folder", "project", "state folder", "current folder"])
def test_a_run_finds_its_state_after_a_move(move: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICDCTL_HOME", raising=False)
    project = tmp_path / "project"
    (project / "registry").mkdir(parents=True)
    monkeypatch.chdir(project)
    trained("runs/a", stop_after=9)
    run = Path("runs/a")
    if move == "run folder":
        run = Path("runs/b")
        Path("runs/a").rename(run)
    elif move == "project":
        project.rename(tmp_path / "renamed")
        monkeypatch.chdir(tmp_path / "renamed")
    elif move == "state folder":
        Path(".icdctl").rename(tmp_path / "state")
        monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    else:
        monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "another"))
        monkeypatch.chdir(tmp_path)
        run = Path("project/runs/a")
    assert trained(run, resume=True) == ["continuing after epoch 2 of 4"]


def test_a_state_that_is_lost_is_said_and_the_history_stays() -> None:
    trained("run", stop_after=9)
    before = Path("run/history.csv").read_bytes()
    shutil.rmtree(checkpoints_folder())
    with pytest.raises(ArtifactError, match="the state of the run in `run` is lost: it stopped after epoch 2"):
        trained("run", resume=True)
    assert Path("run/history.csv").read_bytes() == before


def test_the_identity_of_a_run_holds_no_path(tmp_path: Path) -> None:
    painted(tmp_path / "photos/train", 0, 4)
    painted(tmp_path / "photos/val", 50, 2)
    given: dict[str, Any] = {"model": "res8", "dataset": f"imagefolder:{tmp_path}/photos", "epochs": 1, "device": "cpu"}
    config = library.train(**given, image_size=32, out=str(tmp_path / "run")).config
    assert str(tmp_path) not in json.dumps(config.identity)


# --- what is kept is what was written --------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    """Change the last bit but some of a file: it lies in a tensor."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)


def test_a_damaged_state_falls_back_to_the_one_before() -> None:
    trained("run", stop_after=9)
    folder = state_folder_of(Path("run"))
    flip_a_bit(folder / STATE_FILE)
    said = trained("run", resume=True)
    assert said[0].startswith(f"warning: checkpoint `{folder / STATE_FILE}` is broken: it was changed after it was ")
    assert said[0].endswith("the state before it is taken")
    assert said[1] == "continuing after epoch 1 of 4"
    trained("whole")
    assert weights(Path("run")) == weights(Path("whole"))
    assert not (folder / PREVIOUS_FILE).exists(), "a finished run needs no second state"


def test_two_damaged_states_are_refused_with_what_to_do() -> None:
    trained("run", stop_after=9)
    for name in (STATE_FILE, PREVIOUS_FILE):
        flip_a_bit(state_folder_of(Path("run")) / name)
    with pytest.raises(ArtifactError, match="is broken: it was changed after it was written") as caught:
        trained("run", resume=True)
    assert caught.value.hint == "delete it and the run folder, and start the run again"


def test_a_state_is_written_in_the_background_as_it_was(tmp_path: Path) -> None:
    config = planned_train(tmp_path)
    shared = shared_data.make_shared_data(config, data.load(config.images), torch.device("cpu"), "fp32")
    student = student_run.StudentRun(config, shared, None, None)
    before = CheckpointWriter(shared.device, in_background=False)
    before.save(tmp_path / "before", student.step, student.progress)
    writer = CheckpointWriter(shared.device, in_background=True)
    writer.save(tmp_path / "meanwhile", student.step, student.progress)
    with torch.no_grad():
        for parameter in student.step.student.parameters():
            parameter.zero_()
    writer.wait()
    held = []
    for name in ("before", "meanwhile"):  # the bytes may differ: the order of the metadata is drawn at random
        with safe_open(tmp_path / name, framework="pt") as stored:
            held.append(stored.metadata())
    assert held[0] == held[1], "the hash of all tensors is in it"
    (tmp_path / "file").touch()
    writer.save(tmp_path / "file" / "state", student.step, student.progress)
    with pytest.raises(ArtifactError, match="can't be written"):
        writer.wait()
    writer.wait()


def test_the_environment_names_all_that_a_run_was_trained_in(monkeypatch: pytest.MonkeyPatch) -> None:
    trained("run", stop_after=9)
    torch.set_num_threads(2)
    try:
        said = trained("run", resume=True)
    finally:
        torch.set_num_threads(1)
    assert said[0] == "note: `run` began with threads 1 (now 2): the last digits may differ"
    stated = json.loads(Path("run/environment.json").read_text())
    assert stated["device"]["threads"] == 2
    assert [each["device"]["threads"] for each in stated["earlier"]] == [1]
    trained("run", resume=True)
    assert json.loads(Path("run/environment.json").read_text())["device"]["threads"] == 2, "nothing was trained"


# --- within an epoch -------------------------------------------------------------------------------------------------

TOGETHER: list[dict[str, Any]] = [
    {"method": "cd_sdd_dkd", "ema_decay": 0.9, "on_nonfinite": "skip"},
    {"method": "fitnet", "student": "res14", "optimizer": "adamw"},
]


@pytest.mark.parametrize(
    ("mode", "device_driven", "stops"), [("inline", False, (1, 3)), ("ahead", False, (6,)), ("ahead", True, (7,))]
)
def test_a_run_goes_on_within_an_epoch_to_the_same_bytes(
    taught: Path,
    tmp_path: Path,
    by_position: ByPosition,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    device_driven: bool,
    stops: tuple[int, ...],
) -> None:
    monkeypatch.setattr(teachers, "_STEPS_AHEAD", 3)
    monkeypatch.setattr(device_loop, "_REHEARSALS", 1)
    if device_driven:
        by_position()

    def configs(name: str) -> list[RunConfig]:
        shared = {"teacher_mode": mode, "crop_padding": 1, "flip": True, "checkpoint_every": "1"}
        outs = [tmp_path / name / str(number) for number in range(len(TOGETHER))]
        return [planned(taught, out, **shared, **change) for out, change in zip(outs, TOGETHER, strict=True)]

    whole = together(configs("whole"), taught)
    for stop_after in stops:  # four steps an epoch
        name = f"cut after {stop_after}"
        with pytest.raises(engine.Interrupted, match="is saved" if stop_after > 1 else "no epoch was finished"):
            together(configs(name), taught, observer=Listener(stop_after))
        for one, other in zip(whole, together(configs(name), taught, resume=True), strict=True):
            assert weights(one.out) == weights(other.out)
            assert history(one.out) == history(other.out)


def test_by_default_less_than_a_minute_of_work_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow(Listener):
        """Twenty seconds a step."""

        def advance(self, images: int) -> None:
            clock[0] += 20.0
            super().advance(images)

    with pytest.raises(engine.Interrupted, match=r"the state after epoch 1 of 4, step 3 of the next is saved"):
        library.train(**LONG, out="run", observer=Slow(8))


@pytest.mark.parametrize("given", ["soon", "0", "-5s", ""])
def test_an_interval_that_is_none_is_wrong_usage(given: str) -> None:
    with pytest.raises(UsageError, match="`checkpoint_every` is"):
        trained("run", checkpoint_every=given)
    assert not os.path.exists("run")


_TAKE = """
import pathlib, sys
from icdctl import files
with files.locked(pathlib.Path(sys.argv[1]), busy="in use", hint="wait"):
    pass
"""


def test_the_second_process_is_told_who_holds_a_run(tmp_path: Path) -> None:
    with files.locked(tmp_path / "lock", busy="in use", hint="wait"):
        done = subprocess.run(
            [sys.executable, "-c", _TAKE, str(tmp_path / "lock")],
            capture_output=True,
            text=True,
            check=False,
        )
    assert f"in use: process {os.getpid()}, `" in done.stderr
