"""The contract of executors: each test holds all of them to `icdctl/grid/executors/protocol.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from executor_driver import EXECUTORS, Recorder
from grid_support import PLAIN, TRAIN, epochs_of, goes_on, process_at, started, wait_until, write_params

import icdctl as library
from icdctl.api import planning
from icdctl.errors import UsageError
from icdctl.grid import Grid, GridCell, GridRun, Pack, read_grid, run_statuses, train_grid
from icdctl.grid.executors.protocol import Conditions, Executor, TimeLeft, Trained
from icdctl.grid.executors.subprocesses import Subprocesses
from icdctl.grid.grid_observer import PackObserver
from icdctl.grid.pack_folder import PackFolder
from icdctl.grid.packs import left_behind, not_begun

QUICK: dict[str, Any] = {**TRAIN, "train_images": 100, "epochs": 1}
OTHER: dict[str, Any] = {**PLAIN, "batch_size": 32}
"""Its runs share no process with those of `PLAIN`."""
DRIVER = (str(Path(__file__).with_name("executor_driver.py")),)


@pytest.fixture(params=EXECUTORS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def executor(name: str) -> Executor:
    return EXECUTORS[name]()


def packs_of(grid: Grid) -> list[Pack]:
    """A pack a run."""
    return [Pack((run,), epochs=1) for run in grid.runs]


def conditions(*, replace: bool = False, seconds: float | None = None) -> Conditions:
    return Conditions(Path.cwd() / "runs", replace, TimeLeft(seconds))


def states() -> dict[str, str]:
    """The state of each run of the grid, by the run folders."""
    statuses = run_statuses(read_grid(Path.cwd()).runs, planning.Planner())
    return {each.run.label: each.state for each in statuses}


def test_all_packs_are_trained_reported_and_the_same_as_one_run_alone(executor: Executor) -> None:
    write_params({"a": PLAIN, "b": OTHER}, train=QUICK, seeds=[0, 1])
    recorder = Recorder()
    result = train_grid(read_grid(Path.cwd()), executor=executor, observer=recorder)
    assert sorted(each.label for each in result.outcomes) == ["a/s0", "a/s1", "b/s0", "b/s1"]
    assert {each.state for each in result.outcomes} == {"done"}
    for outcome in result.outcomes:
        metrics = json.loads(Path("runs", outcome.label, "metrics.json").read_text())
        assert (outcome.top1, outcome.seconds) == (metrics["final_top1"], metrics["seconds"])
    assert recorder.plan is not None
    assert [pack.label for pack in recorder.plan.packs] == ["a/s0 and 1 more", "b/s0 and 1 more"]
    for pack in recorder.plan.packs:
        of_pack = [event for event, label in recorder.events if label == pack.label]
        assert (of_pack[0], of_pack[-1], set(of_pack[1:-1])) == ("begun", "ended", {"doing"})
    assert recorder.events[-1] == ("stop", "")
    library.train(model="res8", **QUICK, seed=1, out="alone")
    assert Path("alone/student.safetensors").read_bytes() == Path("runs/a/s1/student.safetensors").read_bytes()
    again = train_grid(read_grid(Path.cwd()), executor=executor)
    assert (again.outcomes, again.num_before) == ((), 4)


def test_a_run_that_fails_stops_no_other(executor: Executor) -> None:
    write_params({"a": PLAIN, "wild": {**PLAIN, "lr": 1e30}, "taken": PLAIN, "z": OTHER}, train=QUICK)
    Path("runs/taken/s0").mkdir(parents=True)
    Path("runs/taken/s0/notes.txt").write_text("mine")
    recorder = Recorder()
    result = train_grid(read_grid(Path.cwd()), executor=executor, observer=recorder)
    found = {each.label: each for each in result.outcomes}
    assert {label: each.state for label, each in found.items()} == {
        "a/s0": "done",
        "wild/s0": "failed",
        "taken/s0": "failed",
        "z/s0": "done",
    }
    assert "training is no longer finite" in found["wild/s0"].message
    assert "is not empty and holds no run" in found["taken/s0"].message
    assert found["wild/s0"].hint
    assert "they are trained one by one" in "\n".join(recorder.messages)
    assert {each.label for each in result.failed} == {"wild/s0", "taken/s0"}


def test_a_process_that_dies_is_reported_and_what_it_had_done_is_recognised(name: str) -> None:
    # The folder of `b_taken` is refused, so that the runs of its pack are trained one by one, the brief one first.
    cells = {"a_other": {**OTHER, "epochs": 1}, "b_taken": PLAIN, "c_brief": {**PLAIN, "epochs": 1}, "d_long": PLAIN}
    write_params(cells, train={**TRAIN, "epochs": 1000})
    Path("runs/b_taken/s0").mkdir(parents=True)
    Path("runs/b_taken/s0/notes.txt").write_text("mine")
    with started(name, program=DRIVER) as driver:
        wait_until(lambda: epochs_of("d_long/s0"), what="an epoch of the last run")
        wait_until(lambda: states()["a_other/s0"] == "done", what="the other pack")
        victim = process_at("d_long/s0")
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        code = driver.wait()
    assert states() == {"a_other/s0": "done", "b_taken/s0": "missing", "c_brief/s0": "done", "d_long/s0": "begun"}
    if victim == driver.process.pid:
        assert code == -signal.SIGKILL
        return
    assert code == 0
    found = {each["label"]: each for each in json.loads(driver.out)}
    assert {label: each["state"] for label, each in found.items()} == {
        "a_other/s0": "done",
        "b_taken/s0": "failed",
        "c_brief/s0": "done",
        "d_long/s0": "failed",
    }
    assert "killed" in found["d_long/s0"]["message"]
    assert found["d_long/s0"]["hint"]
    assert found["c_brief/s0"]["top1"] == json.loads(Path("runs/c_brief/s0/metrics.json").read_text())["final_top1"]


def test_a_time_limit_stops_packs_and_lets_none_begin(executor: Executor) -> None:
    write_params({"a": PLAIN, "b": OTHER}, train={**TRAIN, "epochs": 100_000})
    recorder = Recorder()
    result = train_grid(read_grid(Path.cwd()), executor=executor, time_limit="0.001s", observer=recorder)
    assert {(each.state, each.message) for each in result.outcomes} == {("stopped", "the time limit came first")}
    assert [event for event, _ in recorder.events] == ["ended", "ended", "stop"]
    result = train_grid(read_grid(Path.cwd()), executor=executor, time_limit=1.0)
    assert [(each.label, each.state) for each in sorted(result.outcomes, key=lambda each: each.label)] == [
        ("a/s0", "stopped"),
        ("b/s0", "stopped"),
    ]
    assert (result.is_stopped, result.failed) == (True, [])
    assert epochs_of("a/s0")


def test_interrupting_saves_the_states_and_the_same_call_goes_on(name: str, executor: Executor) -> None:
    write_params({"a": PLAIN}, train={**TRAIN, "epochs": 100_000})
    with started(name, program=DRIVER) as driver:
        wait_until(lambda: epochs_of("a/s0"), what="an epoch")
        driver.send(signal.SIGINT)
        assert driver.wait() == 130
    assert process_at("a/s0") is None
    before = epochs_of("a/s0")
    last = json.loads(Path("runs/grid.jsonl").read_text().splitlines()[-1])
    assert (last["label"], last["state"], last["message"]) == ("a/s0", "stopped", "interrupted")
    recorder = Recorder()
    result = train_grid(read_grid(Path.cwd()), executor=executor, time_limit=0.5, observer=recorder)
    assert [each.state for each in result.outcomes] == ["stopped"]
    assert goes_on("\n".join(recorder.messages), len(before))
    assert len(epochs_of("a/s0")) > len(before)
    assert epochs_of("a/s0")[: len(before)] == before


def test_closing_ends_what_is_at_work(executor: Executor) -> None:
    write_params({"a": {**PLAIN, "epochs": 1}, "b": PLAIN}, train={**TRAIN, "epochs": 100_000})
    trained = executor.train(packs_of(read_grid(Path.cwd())), conditions(), Recorder())
    pack, (outcome,) = next(trained)
    assert (pack.label, outcome.state) == ("a/s0", "done")
    trained.close()
    assert process_at("b/s0") is None
    assert states()["b/s0"] in ("missing", "begun")


def test_stale_runs_are_moved_where_they_are_to_be_replaced(executor: Executor) -> None:
    write_params({"a": PLAIN}, train=QUICK)
    train_grid(read_grid(Path.cwd()))
    old = Path("runs/a/s0/student.safetensors").read_bytes()
    write_params({"a": {**PLAIN, "lr": 0.05}}, train=QUICK)
    grid = read_grid(Path.cwd())
    (refused,) = train_grid(grid, executor=executor).outcomes
    assert (refused.state, "lr 0.1 -> 0.05" in refused.message) == ("failed", True)
    recorder = Recorder()
    ((_, (outcome,)),) = executor.train(packs_of(grid), conditions(replace=True), recorder)
    assert outcome.state == "done"
    assert Path("runs/.replaced/a/s0-1/student.safetensors").read_bytes() == old
    assert "a/s0: the run of other settings is now" in "\n".join(recorder.messages)


class CustomExecutor:
    """An example: each pack in a process of its own, one after another, as a queue of one slot would."""

    num_slots = 1

    def train(self, packs: Sequence[Pack], conditions: Conditions, observer: PackObserver) -> Trained:
        """See `Executor`."""
        for pack in packs:
            if conditions.time.is_over:
                yield pack, not_begun(pack)
                continue
            observer.begun(pack, "the queue")
            with tempfile.TemporaryDirectory() as name:
                folder = PackFolder(Path(name))
                folder.write_pack(pack, conditions)
                code = subprocess.run([sys.executable, "-m", "icdctl.grid.worker", name], check=False).returncode
                yield pack, folder.read_outcomes(pack) or left_behind(pack, f"exit code {code}", "see its messages")


def test_a_custom_executor_is_a_few_lines() -> None:
    write_params({"a": PLAIN}, train=QUICK)
    recorder = Recorder()
    result = train_grid(read_grid(Path.cwd()), executor=CustomExecutor(), observer=recorder)
    assert [(each.label, each.state) for each in result.outcomes] == [("a/s0", "done")]
    assert [event for event, _ in recorder.events] == ["begun", "ended", "stop"]


def test_what_json_does_not_know_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    run = GridRun(GridCell("a", {**QUICK, **PLAIN, "student": object()}, "ce"), 0, tmp_path / "runs/a/s0")
    with pytest.raises(UsageError, match="can't be trained in another process"):
        list(Subprocesses().train([Pack((run,), 1)], conditions(), Recorder()))


def test_a_pack_comes_out_of_its_folder_as_it_went_in(tmp_path: Path) -> None:
    cell = GridCell("a", {"student": "res8", "data_dir": "there", "scales": [1, 2], "lr": 0.1}, "ce")
    pack = Pack((GridRun(cell, 3, Path("runs/a/s3")),), 8)
    folder = PackFolder(tmp_path)
    folder.write_pack(pack, conditions(replace=True, seconds=60))
    found, given = folder.read_pack()
    assert (found, given.root, given.replace) == (pack, Path.cwd() / "runs", True)
    assert given.time.seconds is not None
    assert 59 < given.time.seconds <= 60
    assert folder.read_outcomes(pack) is None
