"""The grid of params.yaml, the tables of `reproduce`, and the DVC pipeline that runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CommandLine
from grid_support import epochs_of, processes_naming, wait_until, write_run

from icdctl.grid import cells_file, dvc_pipeline, expansion
from icdctl.grid.cells import GridCell
from icdctl.methods import METHODS
from icdctl.papers.table_runs import grid_cell, name_of
from icdctl.science import experiments, tables

ROOT = Path(__file__).resolve().parent.parent
PARAMS: dict[str, Any] = {
    "train": {"dataset": "digits100", "train_images": 100, "test_images": 50, "epochs": 1},
    "seeds": [0, 1],
    "teachers": {"digits100-res14": {"dataset": "digits100", "model": "res14", "source": "train"}},
    "deployed": {"cell": "cd", "seed": 1},
    "cells": {
        "kd": {
            "after": "teachers/digits100-res14",
            "teacher": "teachers/digits100-res14",
            "student": "res8",
            "method": "kd",
        },
        "cd": {
            "after": "teachers/digits100-res14",
            "teacher": "teachers/digits100-res14",
            "student": "res8",
            "method": "cd_sdd_dkd",
            "settings": {"gamma": 4},
        },
    },
}


def write_params(folder: Path, **changes: Any) -> None:
    """params.yaml, and the cells.yaml that it stands for."""
    (folder / "params.yaml").write_text(yaml.safe_dump({**PARAMS, **changes}), encoding="utf-8")
    dvc_pipeline.expand(folder)


def cells_of(icdctl: CommandLine, *arguments: str) -> dict[str, Any]:
    code, out, err = icdctl("grid", *arguments, "--json")
    assert code == 0, err
    return {cell["name"]: cell for cell in json.loads(out)["cells"]}


def test_a_grid_is_planned_trained_once_and_evaluated(icdctl: CommandLine) -> None:
    here = Path.cwd()
    (here / "registry").mkdir()
    bad = {"teacher": "res20", "student": "res8", "method": "kd"}
    write_params(here, cells={**PARAMS["cells"], "bad": bad, "plain": {"student": "res8", "method": "ce"}})
    assert cells_of(icdctl, "plan")["kd"]["missing"] == 2
    assert icdctl("grid", "teacher", "digits100-res14")[0] == 0
    code, out, err = icdctl("grid", "run")
    assert (code, "bad/s0" in err, "teacher `res20`" in err) == (1, True, True)
    assert out.count("done") == 6
    found = cells_of(icdctl, "status")
    assert [found[name]["done"] for name in ("kd", "cd", "plain", "bad")] == [2, 2, 2, 0]
    metrics = json.loads((here / "runs/cd/s0/metrics.json").read_text())
    assert metrics["students_at_once"] == 4
    lines = [json.loads(line) for line in (here / "runs/grid.jsonl").read_text().splitlines()]
    assert sum(line["state"] == "done" for line in lines) == 6
    code, out, _ = icdctl("grid", "run", "kd", "cd", "--json")
    assert (code, json.loads(out)) == (0, {"runs": [], "already_done": 4})
    assert cells_of(icdctl, "plan", "kd")["kd"]["hours_left"] == 0.0
    code, out, err = icdctl("grid", "run", "cd", "--sweep", "gamma=1,2", "--seeds", "3", "--jobs", "2", "--json")
    assert code == 0, err
    assert {run["label"] for run in json.loads(out)["runs"]} == {"cd-gamma1/s3", "cd-gamma2/s3"}
    assert icdctl("grid", "evaluate", "cd")[0] == 0
    held = json.loads((here / "results/cd.json").read_text())
    assert held["seeds"]["0"]["final_top1"] == metrics["final_top1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cells: {}", "names no cells"),
        ("cells: {a: 1}", "is not a mapping of options"),
        ("cells: {a/b: {method: kd}}", "can't be the name of a cell"),
        ("cells: {a: {seed: 1}}", "has `seed`"),
        ("cells: {a: {epoch: 1}}", "unknown option of cell `a` `epoch`"),
        ("cells: {a: {method: kd}}\nseeds: [x]", "is not a list of whole numbers"),
        ("[", "can't be read"),
        ("- a", "does not hold a mapping"),
    ],
)
def test_what_a_grid_can_not_be_is_told(icdctl: CommandLine, content: str, message: str) -> None:
    Path("params.yaml").write_text(content)
    code, _, err = icdctl("grid", "status")
    assert code in (1, 2)
    assert message in err


def test_a_published_table_is_judged_and_written(icdctl: CommandLine, tmp_path: Path) -> None:
    code, out, _ = icdctl("reproduce", "--list", "--json")
    assert (code, len(json.loads(out)["tables"])) == (0, 10)
    name = "cub200-res32x4-shuv1-cd_sdd_kd-gamma1"
    for seed, top1 in enumerate((65.6, 65.7, 65.8, 65.7, 65.7)):
        options = {"dataset": "cub200", "teacher": "res32x4", "student": "shuv1", "method": "cd_sdd_kd", "seed": seed}
        metrics = {"final_top1": top1 - 0.3, "best_top1": top1}
        write_run(Path("runs") / name / f"s{seed}", "distill", {**options, "settings": {"gamma": 1}}, metrics)
    given = ("reproduce", "icd-gamma", "--no-train", "--out", tmp_path / "tables")
    code, out, err = icdctl(*given)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if "kd-gamma1" in line and "65.7" in line][:1]
    assert "reproduced" in line
    names = {"cells.csv", "claims.csv", "table.json", "table.md", "table.tex"}
    before = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    assert before.keys() == names
    assert icdctl(*given)[0] == 0
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    config = Path("runs") / name / "s0/config.json"
    config.write_text(config.read_text().replace('"gamma":1.0', '"gamma":2.0'))
    code, out, err = icdctl(*given, "--json")
    assert code == 0, err
    assert f"warning: {name}/s0 is left out, it was trained with other settings: gamma 2.0 -> 1.0" in err
    for wrong, message in (
        (("icd-gama",), "unknown table"),
        (("icd-gamma", "--cells", "nothing"), "no cell of `icd-gamma`"),
        (("icd-gamma", "--family", "gamma3"), "unknown family"),
        (("icd-gamma", "--epoch", "last"), "unknown epoch"),
        (("icd-gamma", "--seeds", "0", "--no-train"), "0 seeds"),
        (("icd-gamma", "--seeds", "0-2", "--no-train"), "`--seeds 0-2` is not a number of seeds"),
        ((), "no table is named"),
    ):
        code, _, err = icdctl("reproduce", *wrong)
        assert (code, message in err) == (2, True), err


def test_params_yaml_stands_for_the_papers_cells() -> None:
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    made = expansion.expand(content, origin="params.yaml")
    expected: dict[str, GridCell] = {}
    for table in ("icd-cifar100", "icd-cub200", "icd-gamma", "icd-scales", "icd-time"):
        for cell in experiments.select(tables.load(table).cells, family="gamma2"):
            if cell.why_not(METHODS) is None:
                expected.setdefault(name_of(cell), grid_cell(cell, {}))
    assert made.keys() == expected.keys()
    for name, options in made.items():
        own = dict(expected[name].options)
        folder = f"data/{content['datasets'][own['dataset']]['folder']}"
        if "teacher" in own:
            own["teacher"] = f"teachers/{own['dataset']}-{own['teacher']}"
        assert options == {"after": own.get("teacher", folder), **own, "data_dir": "data"}
    assert not [name for name in (*made, *content["teachers"]) if "." in name]  # DVC could not find its parameters
    assert len([name for name in made if name.startswith("cifar100") and "cd_sdd" in name and "lr" not in name]) == 30
    assert content["deployed"]["cell"] in made


@pytest.mark.parametrize("folder", [ROOT, ROOT / "demo"], ids=["papers", "demo"])
def test_cells_yaml_is_what_params_yaml_stands_for(folder: Path) -> None:
    content = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    made = cells_file.text(expansion.expand(content, origin="params.yaml"))
    assert (folder / "cells.yaml").read_text(encoding="utf-8") == made, "run `icdctl grid expand` there"
    assert dvc_pipeline.form_beside(folder / "params.yaml").stages


def test_the_demo_has_the_stages_of_the_papers() -> None:
    papers, demo = (yaml.safe_load((ROOT / name).read_text())["stages"] for name in ("dvc.yaml", "demo/dvc.yaml"))
    assert papers.keys() - demo.keys() == {"fetch-data"}
    assert demo.keys() <= papers.keys()


class Clone:
    """The project as it was committed, with the demo's pipeline as it is now, and DVC in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.root)], check=True)
        shutil.copyfile(ROOT / "demo/dvc.yaml", self.root / "demo/dvc.yaml")
        self._surroundings = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(folder / "site"),
            "OMP_NUM_THREADS": "1",
        }
        self._surroundings.pop("ICDCTL_HOME", None)

    def dvc(self, *arguments: str, folder: str = ".", code: int = 0) -> str:
        """What a command of DVC prints."""
        command = [sys.executable, "-m", "dvc", *arguments]
        place, settings = self.root / folder, self._surroundings
        done = subprocess.run(command, cwd=place, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + (done.stderr if code else "")

    def git(self, *arguments: str) -> str:
        """What a command of git prints."""
        user = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", str(self.root), *user, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_dvc_repro_makes_everything_once_in_a_fresh_clone(tmp_path: Path) -> None:
    made = Clone(tmp_path)
    clone, dvc = made.root, made.dvc
    write_params(clone / "demo")
    first = dvc("repro", "demo/dvc.yaml")
    assert first.count("Running stage") == 8
    assert (clone / "demo/exported/model.onnx").is_file()
    assert "Running stage" not in dvc("repro", "demo/dvc.yaml")
    weights = (clone / "demo/runs/kd/s0/student.safetensors").read_bytes()
    cells = {**PARAMS["cells"], "cd": {**PARAMS["cells"]["cd"], "settings": {"gamma": 1}}}
    write_params(clone / "demo", cells=cells)
    again = dvc("repro", "demo/dvc.yaml")
    assert ("distill@cd" in again, "> icdctl grid run kd" in again) == (True, False)
    assert (clone / "demo/runs/kd/s0/student.safetensors").read_bytes() == weights
    # DVC has git ignore what it keeps; the record of what was made, and the numbers, are for git.
    told = made.git("status", "--porcelain", "--untracked-files=all")
    new = {line.split()[1] for line in told.splitlines()} - {f"demo/{name}.yaml" for name in ("dvc", "params", "cells")}
    assert new == {"demo/dvc.lock", "demo/results/cd.json", "demo/results/kd.json"}


def test_an_experiment_changes_values_and_nothing_else(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    # DVC records all stages of all pipelines at each experiment: those of the papers alone take it half a minute.
    clone.git("rm", "--quiet", "dvc.yaml", "params.yaml", "cells.yaml")
    demo = clone.root / "demo"
    tables = {"methods": {"cd_sdd_kd": {"gamma": 2}}, "pairs": {"res14:res8": {}}, "cells": {}}
    name = "res14-res8-cd_sdd_kd-gamma2"
    write_params(demo, **tables, deployed={"cell": name, "seed": 0})
    head = "# kept\n"
    (demo / "params.yaml").write_text(head + (demo / "params.yaml").read_text())
    clone.git("add", "--all")
    clone.git("commit", "--quiet", "--message", "small")
    clone.dvc("exp", "run", "-S", "train.epochs=2", "-S", "seeds=[0]", folder="demo")
    config = json.loads((demo / "runs" / name / "s0/config.json").read_text())
    assert (config["epochs"], config["settings"]["gamma"]) == (2, 2.0)
    assert [path.name for path in (demo / "runs" / name).iterdir()] == ["s0"]
    assert (demo / "params.yaml").read_text().startswith(head)
    changed = {line.split()[1] for line in clone.git("status", "--porcelain", "--untracked-files=all").splitlines()}
    assert changed == {"demo/dvc.lock", "demo/params.yaml", f"demo/results/{name}.json"}
    content = yaml.safe_load((demo / "params.yaml").read_text())
    content["methods"]["kd"] = {}
    (demo / "params.yaml").write_text(yaml.safe_dump(content))
    told = clone.dvc("repro", "demo/dvc.yaml", code=255)
    assert "cells.yaml` is out of date with params.yaml: 1 added (res14-res8-kd)" in told
    assert "hint: `icdctl grid expand` makes it again" in told


@pytest.mark.slow
def test_a_killed_repro_goes_on_and_its_orphan_is_not_raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("runs", "teachers", ".icdctl"))
    monkeypatch.chdir(tmp_path / "demo")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ICDCTL_HOME")
    cells = {"kd": {**PARAMS["cells"]["kd"], "epochs": 200}, "cd": PARAMS["cells"]["cd"]}
    write_params(tmp_path / "demo", cells=cells, seeds=[0])

    def dvc(*arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def repro(name: str) -> tuple[subprocess.Popen[bytes], Path]:
        said = tmp_path / f"{name}.txt"
        with said.open("wb") as file:
            command = [sys.executable, "-m", "dvc", "repro", "-s", "demo/dvc.yaml:distill@kd"]
            return subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file, start_new_session=True), said

    def trainers() -> set[int]:
        return {number for number in processes_naming("icdctl\0grid\0run\0kd") if Path(f"/proc/{number}/cwd").exists()}

    dvc("init", "--no-scm")
    dvc("repro", "-s", "demo/dvc.yaml:teacher@digits100-res14")
    first, first_said = repro("first")
    wait_until(lambda: len(epochs_of("kd/s0")) >= 2, what="two epochs")
    (orphan,) = trainers()
    os.kill(orphan, signal.SIGSTOP)
    first.kill()
    first.wait()
    num_before = len(epochs_of("kd/s0"))
    second, second_said = repro("second")
    try:
        wait_until(lambda: "waiting: run folder" in second_said.read_text(), what="the second to wait")
        assert orphan in trainers()
        os.kill(orphan, signal.SIGCONT)
        wait_until(lambda: orphan not in trainers(), what="the orphan to end")
        wait_until(lambda: len(epochs_of("kd/s0")) > num_before, what="the second to continue")
        assert "continuing after epoch" in second_said.read_text()
        (trainer,) = trainers()
        os.kill(trainer, signal.SIGKILL)  # dead this time: taken over at once
        assert second.wait(timeout=120) != 0
        third, third_said = repro("third")
        assert third.wait(timeout=300) == 0, third_said.read_text()
    finally:
        second.kill()
        second.wait()
    assert "was removed during the run" in first_said.read_text()
    assert "continuing after epoch" in third_said.read_text()
    assert "waiting: " not in third_said.read_text()
    assert len(epochs_of("kd/s0")) == 200
    assert "Running stage" not in dvc("repro", "-s", "demo/dvc.yaml:distill@kd")


def test_reproduce_trains_again_only_when_it_is_asked_to(icdctl: CommandLine) -> None:
    small = {"train_images": 100, "test_images": 50, "epochs": 1, "max_steps": 2}
    Path("params.yaml").write_text(yaml.safe_dump({"train": small}))
    given = ("reproduce", "demo", "--seeds", "1", "--cells", "res8-dkd")
    code, out, _ = icdctl("reproduce", "demo", "--list", "--cells", "res8-dkd", "--json")
    assert (code, len(json.loads(out)["cells"]), Path("runs").exists()) == (0, 1, False)
    code, _, err = icdctl(*given, "--jobs", "2")
    assert code == 0, err
    assert "done before; in" in err
    assert err.count("warning: `train` of params.yaml or `ICDCTL_` variables change test_images, max_steps in ") == 1
    (teacher,) = Path("runs").glob("digits100-teacher-*")
    folders = sorted(path.parent for path in Path("runs").glob("*/s0/metrics.json"))
    assert folders
    old = {path: (path / "student.safetensors").read_bytes() for path in [teacher, *folders]}
    Path("params.yaml").write_text(yaml.safe_dump({"train": {**small, "lr": 0.02}}))
    code, _, err = icdctl(*given, "--no-train")
    assert code == 0, err
    assert err.count("is left out, it was trained with other settings: lr 0.1 -> 0.02") == len(folders)
    code, _, err = icdctl(*given)
    assert (code, "was trained with other settings: lr 0.1 -> 0.02" in err, "`--replace`" in err) == (1, True, True)
    assert old == {path: (path / "student.safetensors").read_bytes() for path in old}
    code, _, err = icdctl(*given, "--replace")
    assert code == 0, err
    kept = {Path("runs/.replaced", *path.parts[1:-1], f"{path.name}-1"): content for path, content in old.items()}
    assert kept == {path: (path / "student.safetensors").read_bytes() for path in kept}
    assert "left out" not in icdctl(*given, "--no-train")[2]
