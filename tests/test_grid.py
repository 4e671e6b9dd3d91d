"""Grids: what counts as done, sweeps, and training that is killed, run twice at once, stopped, or fails in part."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CommandLine
from fetch_support import cifar_members
from grid_support import (
    PLAIN,
    TRAIN,
    Process,
    epochs_of,
    goes_on,
    processes_naming,
    started,
    wait_until,
    write_params,
    write_run,
)

import icdctl as library
from icdctl.api import planning
from icdctl.errors import IcdctlError, UsageError
from icdctl.files import write_bytes
from icdctl.grid import Subprocesses, read_grid
from icdctl.grid.packs import make_packs

QUICK_ANY: dict[str, Any] = {"epochs": 1, "device": "cpu"}
QUICK: dict[str, Any] = {**TRAIN, "train_images": 100, "epochs": 1}
KD: dict[str, Any] = {"student": "res8", "method": "kd", "teacher": "teacher", "settings": {"temperature": 4}}


@pytest.fixture
def teacher() -> Path:
    """A run folder `teacher` in the current folder."""
    library.train(model="res8", **QUICK, out="teacher")
    return Path("teacher")


def cells_of(icdctl: CommandLine, *arguments: str) -> dict[str, Any]:
    code, out, err = icdctl("grid", *arguments, "--json")
    assert code == 0, err
    return {cell["name"]: cell for cell in json.loads(out)["cells"]}


def log_lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs/grid.jsonl").read_text().splitlines()]


def weights_of(run: str) -> bytes:
    return (Path("runs") / run / "student.safetensors").read_bytes()


def test_a_run_of_other_settings_is_stale_until_it_is_replaced(icdctl: CommandLine, teacher: Path) -> None:
    cells = {"kd": KD, "plain": PLAIN}
    write_params({"kd": KD}, train=QUICK)
    assert icdctl("grid", "run")[0] == 0
    old = weights_of("kd/s0")
    cells["kd"] = {**KD, "settings": {"temperature": 2}}
    write_params(cells, train=QUICK)
    found = cells_of(icdctl, "status")["kd"]
    assert (found["done"], found["stale"], found["top1"]) == (0, 1, [])
    assert "temperature 4.0 -> 2.0" in found["note"]
    code, out, err = icdctl("grid", "run")
    assert code == 1
    assert "error: `kd/s0`: the folder holds a run with other settings than the cell: temperature 4.0 -> 2.0" in err
    assert "temperature 4.0 -> 2.0" in err
    assert "--replace" in err
    assert re.search(r"plain/s0 +done", out)
    assert weights_of("kd/s0") == old
    code, _, err = icdctl("grid", "evaluate", "kd")
    assert (code, "temperature 4.0 -> 2.0" in err, Path("results/kd.json").exists()) == (1, True, False)
    assert icdctl("grid", "run", "--replace")[0] == 0
    assert (Path("runs/.replaced/kd/s0-1/student.safetensors").read_bytes(), weights_of("kd/s0") == old) == (old, False)
    assert cells_of(icdctl, "status")["kd"]["done"] == 1
    assert icdctl("grid", "evaluate", "kd")[0] == 0
    write_params(cells, train={**QUICK, "lr": 0.2})
    assert cells_of(icdctl, "status")["plain"]["note"] == "lr 0.1 -> 0.2"
    write_params({**cells, "plain": {**PLAIN, "lr": "fast"}}, train=QUICK)
    found = cells_of(icdctl, "status")
    assert (found["plain"]["stale"], found["kd"]["done"]) == (1, 1)
    assert "`lr` is `fast`" in found["plain"]["note"]


def test_a_teacher_that_is_not_here_is_the_one_that_the_run_states(icdctl: CommandLine, teacher: Path) -> None:
    write_params({"kd": KD}, train=QUICK)
    assert icdctl("grid", "run")[0] == 0
    shutil.move("teacher", "away")
    assert cells_of(icdctl, "status")["kd"]["done"] == 1
    write_params({"kd": {**KD, "settings": {"temperature": 2}}}, train=QUICK)
    assert cells_of(icdctl, "status")["kd"]["note"] == "temperature 4.0 -> 2.0"
    write_params({"kd": {**KD, "teacher": "res20"}}, train=QUICK)
    assert "teacher res8 -> res20" in cells_of(icdctl, "status")["kd"]["note"]
    library.train(model="res8", **{**QUICK, "epochs": 2}, out="teacher")
    write_params({"kd": KD}, train=QUICK)
    assert "teacher_sha256" in cells_of(icdctl, "status")["kd"]["note"]


def test_runs_that_can_not_be_told_are_not_taken_for_done(icdctl: CommandLine) -> None:
    write_params({"a": PLAIN, "b": PLAIN, "c": PLAIN}, train=QUICK)
    for name in "abc":
        write_run(Path("runs") / name / "s0", "train", {**QUICK, "student": "res8"}, {"final_top1": 50.0})
    Path("runs/a/s0/config.json").unlink()
    Path("runs/b/s0/config.json").write_text("{")
    Path("runs/c/s0/metrics.json").write_text('{"final_top1": "high"}')
    assert [cell["stale"] for cell in cells_of(icdctl, "status", "a", "b").values()] == [1, 1]
    assert "states no number `final_top1`" in cells_of(icdctl, "status")["c"]["note"]
    code, _, err = icdctl("grid", "evaluate", "c")
    assert (code, "states no number `final_top1`" in err) == (1, True)


def test_a_planner_looks_at_a_teacher_once(teacher: Path) -> None:
    planner, given = planning.Planner(), {**QUICK, **KD, "teacher": "./teacher"}
    first = planner.plan("distill", {**given, "seed": 0})
    shutil.rmtree(teacher)
    second = planner.plan("distill", {**given, "seed": 1})
    assert first.teacher_sha256 == second.teacher_sha256
    with pytest.raises(IcdctlError):
        planning.Planner().plan("distill", given)


def test_the_method_may_come_from_the_train_section(icdctl: CommandLine) -> None:
    cell = {"student": "res8", "teacher": "res20"}
    write_params({"a": cell}, train={**QUICK, "method": "kd"})
    (found,) = read_grid(Path.cwd()).cells
    assert (found.method, found.command) == ("kd", "distill")
    write_params({"a": cell}, train=QUICK)
    code, _, err = icdctl("grid", "status")
    assert (code, "has a teacher, and no method" in err) == (2, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cells: {a: {method: ce, settings: [gamma]}}", "is not a mapping of names"),
        ("cells: {a: {method: ce}}\nseeds: [1, 2, 1]", "names 1 twice"),
        ("cells: {a: {method: ce}}\nseeds: [3000000000]", "is not a list of whole numbers"),
        ("cells: {a: {method: ce}, a: {method: kd}}", "the key `a` appears twice, in line 1"),
        ("cells: {1: {method: ce}, '1': {method: kd}}", "two cells in"),
        ("cells: &c {a: *c}", "refers to itself"),
        ("cells: " + "[" * 3000, "nested too deep"),
        ("cells: {a: {method: ce, epochs: 2024-99-99}}", "month must be in 1..12"),
        ("cells: {a: {method: !!bool x}}", "is not what its tag says"),
        (f"cells: {{{'a' * 300}: {{method: ce}}}}", "can't be the name of a cell"),
        ("train: {epoch: 1}\ncells: {a: {method: ce}}", "unknown key"),
    ],
)
def test_what_params_yaml_can_not_be_is_told(icdctl: CommandLine, content: str, message: str) -> None:
    Path("params.yaml").write_text(content)
    code, _, err = icdctl("grid", "plan")
    assert (code, message in err) == (2, True), err


@pytest.mark.parametrize(
    "options",
    [
        {"method": ["kd"]},
        {"epochs": "many"},
        {"student": {"a": 1}},
        {"method": "kd", "settings": {"temperature": [1]}, "teacher": "res20"},
        {"method": "kd", "settings": {"temperature": -1}, "teacher": "res20"},
        {"method": "nothing"},
        {"dataset": "nothing"},
        {"train_images": 10**30},
    ],
)
def test_a_cell_that_can_not_be_trained_is_shown_and_does_not_stop_the_others(
    icdctl: CommandLine, options: dict[str, Any]
) -> None:
    write_params({"bad": {**PLAIN, **options}, "good": PLAIN}, train=QUICK)
    found = cells_of(icdctl, "plan")
    assert found["bad"]["note"]
    assert (found["good"]["note"], found["bad"]["hours_left"]) == ("", None)
    code, out, err = icdctl("grid", "run")
    assert (code, "error: `bad/s0`: " in err) == (1, True)
    assert re.search(r"good/s0 +done", out)


def test_a_sweep_takes_settings_and_options(icdctl: CommandLine, teacher: Path) -> None:
    cells = {"kd": KD, "cd": {**KD, "method": "cd_sdd_dkd", "settings": {"gamma": 1}}, "plain": PLAIN}
    write_params(cells, train=QUICK)
    sweep = ("--sweep", "gamma=2,4", "--sweep", "lr=0.1,0.05")
    names = {f"cd-gamma{gamma}-lr{lr}" for gamma in (2, 4) for lr in (0.1, 0.05)}
    assert cells_of(icdctl, "plan", *sweep).keys() == cells_of(icdctl, "status", *sweep).keys() == names
    code, out, err = icdctl("grid", "run", *sweep, "--json")
    assert code == 0, err
    assert "`kd` is left out of the sweep: `kd` has no `gamma`" in err
    assert {run["label"] for run in json.loads(out)["runs"]} == {f"{name}/s0" for name in names}
    held = json.loads(Path("runs/cd-gamma4-lr0.05/s0/config.json").read_text())
    assert (held["settings"]["gamma"], held["lr"]) == (4.0, 0.05)
    assert json.loads(Path("runs/cd-gamma4-lr0.05/s0/metrics.json").read_text())["students_at_once"] == 4
    assert [cell["done"] for cell in cells_of(icdctl, "status", *sweep).values()] == [1, 1, 1, 1]
    assert cells_of(icdctl, "plan", "--sweep", "scales=1,2;1,2,4").keys() == {"cd-scales1_2", "cd-scales1_2_4"}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["gamma"], "is not KEY=VALUES"),
        (["gamma=1,,2"], "is not KEY=VALUES"),
        (["gamma=1", "gamma=2"], "`gamma` is swept twice"),
        (["gamma=1,1.0"], "names a value twice"),
        (["gama=1"], "did you mean `gamma`"),
        (["gamma=1,high"], "swept cell `cd-gammahigh`"),
        (["lr=0.1,-1"], "swept cell `kd-lr1`"),
        (["method=kd"], "unknown setting or option to sweep `method`"),
        (["alpha=1", "gamma=1"], "no cell has all of"),
        (["lr=0.1"], "two cells `kd-lr0.1`"),
        (["temperature=1..4"], "sweep `temperature=1..4` is a range"),
        (["seed=1"], "unknown setting or option to sweep `seed`"),
        (["label_smoothing=0.1", "beta=1"], "their methods do not read it"),
    ],
)
def test_a_sweep_that_can_not_be_is_refused_before_anything_is_trained(
    icdctl: CommandLine, sweep: list[str], message: str
) -> None:
    cells = {"kd": KD, "cd": {**KD, "method": "cd_sdd_kd", "settings": {}}, "kd-lr0.1": KD}
    if "label" in sweep[0]:
        cells = {"kd": KD}
    if "lr=0.1,-1" in sweep:
        cells = {"kd": KD}
    if sweep[0].startswith("alpha"):
        cells = {"cd": cells["cd"], "dkd": {**KD, "method": "dkd", "settings": {}}}
    write_params(cells, train=QUICK)
    given = [part for item in sweep for part in ("--sweep", item)]
    for verb in ("plan", "run"):
        code, _, err = icdctl("grid", verb, *given)
        assert (code, message in err) == (2, True), err
    assert not Path("runs").exists()


def test_one_cause_is_told_once_for_all_its_runs(icdctl: CommandLine) -> None:
    lost = {**KD, "teacher": "runs/teacher"}
    write_params({"kd": lost, "other": lost}, train=QUICK, seeds=[0, 1])
    code, _, err = icdctl("grid", "run")
    assert code == 1
    assert "0 of 4 runs to train, 0 done before, 4 can't be trained" in err
    assert err.count("error: ") == 1
    assert "error: `kd/s0` and 3 more: teacher `runs/teacher` does not exist" in err
    assert "`icdctl train --model MODEL --dataset digits100 --out runs/teacher`" in err


def test_several_causes_of_one_failure_are_told_in_plain_lines(icdctl: CommandLine) -> None:
    write_params({"kd": {"teacher": "res32x4", "student": "res8", "method": "kd"}}, train={"dataset": "cifar100"})
    code, _, err = icdctl("grid", "run")
    assert (code, "\\x0a" in err) == (1, False)
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "teacher `res32x4` for `cifar100` is not there" in error
    assert "CIFAR-100 is missing" in error


def test_packs_fill_the_slots_and_are_of_one_size(teacher: Path) -> None:
    write_params({"kd": KD, "plain": PLAIN}, train=QUICK, seeds=list(range(9)))
    grid = read_grid(Path.cwd())
    sizes = {}
    for most, num_slots in ((8, 1), (8, 6), (4, 1), (8, 40)):
        packs, refused = make_packs(grid.runs, most=most, num_slots=num_slots, planner=planning.Planner())
        assert not refused
        assert sorted(run.label for pack in packs for run in pack.runs) == sorted(run.label for run in grid.runs)
        sizes[most, num_slots] = [len(pack.runs) for pack in packs]
    assert sizes == {(8, 1): [4, 5, 4, 5], (8, 6): [3] * 6, (4, 1): [3] * 6, (8, 40): [1] * 18}


def test_a_killed_grid_goes_on_to_the_same_bytes(icdctl: CommandLine) -> None:
    write_params({"a": PLAIN, "undisturbed": PLAIN})
    with started("grid", "run", "a") as first:
        wait_until(lambda: len(epochs_of("a/s0")) >= 3, what="three epochs")
        first.send(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    before = epochs_of("a/s0")
    assert len(before) < TRAIN["epochs"]
    found = cells_of(icdctl, "status", "a")["a"]
    assert (found["begun"], found["done"]) == (1, 0)
    with started("grid", "run", "--json") as again:
        assert again.wait() == 0
    assert goes_on(again.err, len(before))
    assert "at work on" not in again.err  # for terminals
    assert epochs_of("a/s0")[: len(before)] == before  # their seconds too: they were not trained again
    assert weights_of("a/s0") == weights_of("undisturbed/s0")
    states = [(line["label"], line["state"]) for line in log_lines()]
    assert states.count(("a/s0", "begun")) == 2
    assert states.count(("a/s0", "done")) == 1
    assert all({"time", "label", "state"} <= line.keys() for line in log_lines())
    (done,) = [line for line in log_lines() if (line["label"], line["state"]) == ("a/s0", "done")]
    assert {"top1", "seconds"} <= done.keys()


def test_two_grids_at_once_train_a_run_once(icdctl: CommandLine) -> None:
    write_params({"a": PLAIN})
    with started("grid", "run", "--json", name="first") as first:
        wait_until(lambda: len(epochs_of("a/s0")) >= 1, what="an epoch")
        first.send(signal.SIGSTOP)
        with started("grid", "run", "--json", name="second") as second:
            wait_until(lambda: "waiting: run folder" in second.err, what="the second to wait")
            first.send(signal.SIGCONT)
            assert (first.wait(), second.wait()) == (0, 0)
    (one,), (other,) = (json.loads(process.out)["runs"] for process in (first, second))
    assert (one["state"], other) == ("done", one)  # seconds too
    assert "continuing after" not in second.err


def test_a_run_is_taken_over_from_whoever_dies() -> None:
    write_params({"a": PLAIN})
    with started("grid", "run", name="first") as first:
        wait_until(lambda: len(epochs_of("a/s0")) >= 1, what="an epoch")
        first.send(signal.SIGSTOP)
        with started("grid", "run", name="second") as second:
            wait_until(lambda: "waiting: run folder" in second.err, what="the second to wait")
            first.send(signal.SIGKILL)
            first.wait()
            before = epochs_of("a/s0")
            assert second.wait() == 0
    assert goes_on(second.err, len(before))
    assert epochs_of("a/s0")[: len(before)] == before
    assert len(epochs_of("a/s0")) == 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_many_processes_leaves_none_behind(number: signal.Signals, code: int) -> None:
    write_params({"a": PLAIN, "b": PLAIN}, train={**TRAIN, "epochs": 60})
    with started("grid", "run", "--jobs", "2", name="first") as first:
        wait_until(lambda: epochs_of("a/s0") or epochs_of("b/s0"), what="an epoch")
        children = children_of(first)
        assert len(children) == 2
        first.send(number)
        assert first.wait() == code
    assert not [child for child in children if is_alive(child)]
    assert "error: interrupted" in first.err
    assert {line["message"] for line in log_lines() if line["state"] == "stopped"} == {"interrupted"}
    assert "hint: run the same command again" in first.err
    before = {name: epochs_of(f"{name}/s0") for name in "ab"}
    name = "a" if before["a"] else "b"
    with started("grid", "run", name, name="again") as again:
        wait_until(lambda: len(epochs_of(f"{name}/s0")) > len(before[name]), what="one more epoch")
        again.send(number)
        assert again.wait() == code
    assert goes_on(again.err, len(before[name]))
    assert epochs_of(f"{name}/s0")[: len(before[name])] == before[name]
    assert "hint: run the same command again" in again.err


def test_orphans_of_a_killed_grid_are_waited_for() -> None:
    write_params({"a": PLAIN, "b": PLAIN}, train={**TRAIN, "train_images": 200, "epochs": 12})
    with started("grid", "run", "--jobs", "2", name="first") as first:
        wait_until(lambda: epochs_of("a/s0") or epochs_of("b/s0"), what="an epoch")
        (busy,) = [
            number for number in children_of(first) if ("a/s0" in arguments_of(number)) == bool(epochs_of("a/s0"))
        ]
        os.kill(busy, signal.SIGSTOP)
        children = children_of(first)
        first.send(signal.SIGKILL)
        first.wait()
    name = "a" if "a/s0" in arguments_of(busy) else "b"
    with started("grid", "run", name, "--json", name="second") as second:
        wait_until(lambda: "waiting: run folder" in second.err, what="the second to wait")
        os.kill(busy, signal.SIGCONT)
        assert second.wait() == 0
    assert "continuing after" not in second.err
    assert [run["state"] for run in json.loads(second.out)["runs"]] == ["done"]
    wait_until(lambda: not any(map(is_alive, children)), what="the orphans to end")
    assert len(epochs_of("a/s0")) == len(epochs_of("b/s0")) == 12


def test_a_time_limit_stops_the_whole_grid_and_the_next_one_finishes(icdctl: CommandLine) -> None:
    write_params({"a": PLAIN, "b": {**PLAIN, "batch_size": 32}}, train={**TRAIN, "epochs": 100_000})
    code, out, err = icdctl("grid", "run", "--time-limit", "1s")
    assert code == 0, err
    assert re.search(r"a/s0 +stopped", out)
    assert re.search(r"b/s0 +stopped", out)
    assert epochs_of("a/s0")
    assert not epochs_of("b/s0")
    assert [line["state"] for line in log_lines() if line["label"] == "b/s0"] == ["stopped"]
    for jobs in ((), ("--jobs", "2")):
        code, out, _ = icdctl("grid", "run", "--time-limit", "0.001s", *jobs)
        assert (code, out.count("stopped")) == (0, 2)
    assert icdctl("grid", "run", "--time-limit", "soon")[0] == 2
    assert icdctl("grid", "run", "--device", "none")[0] == 2


def test_what_fails_does_not_stop_the_rest(icdctl: CommandLine) -> None:
    cells = {"a": PLAIN, "wild": {**PLAIN, "lr": 1e30}, "other": PLAIN, "poor": {**KD, "teacher": "nowhere/at/all"}}
    write_params(cells, train=QUICK)
    Path("runs/other/s0").mkdir(parents=True)
    Path("runs/other/s0/notes.txt").write_text("mine")
    code, out, err = icdctl("grid", "run")
    assert code == 1
    assert re.search(r"a/s0 +done", out)
    assert out.count("failed") == 3
    assert "`wild/s0`: training is no longer finite" in err
    assert "is not empty and holds no run (`notes.txt`)" in err
    assert "nowhere/at/all" in err
    assert err.index("a/s0: done") < err.index("error: ")
    failed = {line["label"] for line in log_lines() if line["state"] == "failed"}
    assert failed == {"wild/s0", "other/s0", "poor/s0"}
    assert Path("runs/other/s0/notes.txt").read_text() == "mine"


def test_a_killed_child_is_told_with_what_to_do(icdctl: CommandLine) -> None:
    write_params({"a": PLAIN, "b": PLAIN}, train={**TRAIN, "train_images": 200, "epochs": 16})
    with started("grid", "run", "--jobs", "2", name="first") as first:
        wait_until(lambda: epochs_of("a/s0") and epochs_of("b/s0"), what="an epoch of both")
        (victim,) = [child for child in children_of(first) if "a/s0" in arguments_of(child)]
        os.kill(victim, signal.SIGKILL)
        assert first.wait() == 1
    assert "error: `a/s0`: its process was killed (exit code -9)" in first.err
    assert "--together" in first.err
    assert re.search(r"b/s0 +done", first.out)


def test_a_run_whose_folder_is_taken_away_stops_and_the_next_goes_on() -> None:
    write_params({"a": PLAIN}, train={**TRAIN, "epochs": 60})
    with started("grid", "run", name="first") as first:
        wait_until(lambda: epochs_of("a/s0"), what="an epoch")
        first.send(signal.SIGSTOP)
        num_before = len(epochs_of("a/s0"))
        shutil.rmtree("runs/a")  # as a pipeline does before it runs a stage again
        with started("grid", "run", "--json", name="second") as second:
            wait_until(lambda: "waiting: run folder" in second.err, what="the second to wait")
            first.send(signal.SIGCONT)
            assert first.wait() == 1
            wait_until(lambda: len(epochs_of("a/s0")) > num_before, what="the second to continue")
            assert "continuing after epoch" in second.err
    assert "was removed during the run" in first.err


def test_the_table_of_progress_is_for_terminals() -> None:
    write_params({"a": PLAIN}, train={**TRAIN, "train_images": 100, "epochs": 20})
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "icdctl", "grid", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "xterm"}
    with subprocess.Popen(command, stderr=follower, stdout=subprocess.DEVNULL, env=environment) as process:
        os.close(follower)
        seen = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # nobody writes any more
                break
            if not part:
                break
            seen += part
    os.close(leader)
    assert process.returncode == 0
    text = seen.decode()
    assert "at work on" in text
    assert re.search(r"a/s0 .*\d+/20 +\d+\.\d\d", text)
    assert "1 of 1 runs to train, 0 done before; in 1 pack on 1 slot" in text


def children_of(running: Process) -> list[int]:
    """Ids of the processes that a grid has started (Linux)."""
    parent = running.process.pid
    return [number for number in processes_naming("icdctl.grid.worker") if parent_of(number) == parent]


def parent_of(number: int) -> int:
    try:
        return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def arguments_of(number: int) -> list[str]:
    return Path(f"/proc/{number}/cmdline").read_text().split("\0")


def is_alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_status_of_the_papers_grid_is_cheap(icdctl: CommandLine) -> None:
    root = Path(__file__).resolve().parent.parent
    for name in ("params.yaml", "cells.yaml"):
        shutil.copy(root / name, name)
    names = yaml.safe_load(Path("cells.yaml").read_text())["grid"]
    found = cells_of(icdctl, "plan")
    assert found.keys() == names.keys()
    assert {(cell["missing"], cell["note"]) for cell in found.values()} == {(5, "")}
    bench = {"pairs": {"res32x4:mv2": {"extrapolated": {"run_seconds": 3600.0}}}}
    Path("bench.json").write_text(json.dumps(bench))
    timed = cells_of(icdctl, "plan", "--bench", "bench.json")
    assert timed["cifar100-res32x4-mv2-kd"]["hours_left"] == 5.0
    assert timed["cifar100-mv2-ce"]["hours_left"] is None
    Path("bench.json").write_text("[]")
    assert icdctl("grid", "plan", "--bench", "bench.json")[0] == 1


def test_gpus_are_named() -> None:
    assert Subprocesses(None, "0,1").slots == ["0", "1"]
    assert Subprocesses(3, "0,1").slots == ["0", "1", "0"]
    assert Subprocesses(2, None).slots == [None, None]
    with pytest.raises(UsageError):
        Subprocesses(None, "0,,1")


def test_data_of_another_folder_are_for_cells_that_name_none(icdctl: CommandLine, tmp_path: Path) -> None:
    for place in ("shared", "own"):
        for name, content in cifar_members().items():
            write_bytes(tmp_path / place / name, content)
    plain = {**PLAIN, "dataset": "cifar100", "batch_size": 32}
    write_params({"a": plain, "b": {**plain, "data_dir": str(tmp_path / "own")}, "c": PLAIN}, train=QUICK_ANY)
    code, out, err = icdctl("grid", "plan", "--json")
    assert (code, list(json.loads(out)["missing_data"])) == (0, ["cifar100"])
    assert "`icdctl fetch-data cifar100` downloads it" in icdctl("grid", "plan")[2]
    code, _, err = icdctl("grid", "run")
    assert (code, "`a/s0` and 1 more: CIFAR-100 is missing" in err) == (1, True), err
    given = ("--data-dir", str(tmp_path / "shared"))
    code, out, err = icdctl("grid", "plan", *given, "--json")
    assert (code, json.loads(out)["missing_data"]) == (0, {})
    code, _, err = icdctl("grid", "run", *given, "--jobs", "2", "--sweep", "lr=0.1,0.2")
    assert code == 0, err
    held = {name: json.loads(Path(f"runs/{name}-lr0.2/s0/config.json").read_text())["data_dir"] for name in "abc"}
    assert held == {"a": str(tmp_path / "shared"), "b": str(tmp_path / "own"), "c": str(tmp_path / "shared")}
    assert icdctl("grid", "run", "a", *given)[0] == 0
    assert cells_of(icdctl, "status")["a"]["done"] == 1  # where data lie makes no other run
    assert icdctl("grid", "evaluate", "a")[0] == 1
    assert icdctl("grid", "evaluate", "a", *given)[0] == 0
