"""Lists of methods, students, seeds and settings, and the many runs that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine

import icdctl as library
from icdctl.config.expand import expand, parse_seeds
from icdctl.errors import UsageError

TINY = ("--dataset", "digits100", "--train-images", "100", "--test-images", "50", "--epochs", "1")


def test_every_combination_is_made_once_in_the_order_of_the_lists() -> None:
    given = {"method": "kd,cd_sdd_dkd", "student": ["res8", "res14"], "settings": {"gamma": "1,2"}, "epochs": 3}
    several: list[dict[str, Any]] = [dict(each) for each in expand(given, seeds="0-1")]
    found = [
        (each["method"], each["student"], each["seed"], (each.get("settings") or {}).get("gamma")) for each in several
    ]
    expected: list[tuple[Any, ...]] = [("kd", student, seed, None) for student in ("res8", "res14") for seed in (0, 1)]
    expected += [
        ("cd_sdd_dkd", student, seed, gamma) for student in ("res8", "res14") for seed in (0, 1) for gamma in ("1", "2")
    ]
    assert found == expected
    assert all(each["epochs"] == 3 for each in expand(given))


def test_options_without_lists_are_one_run() -> None:
    given = {"method": "kd", "student": "res8", "scales": "1,2,4", "settings": {"temperature": "3"}, "seed": 4}
    assert expand(given) == [given]
    assert expand({"method": "kd", "scales": "1,2;1,2,4"}) == [
        {"method": "kd", "scales": "1,2"},
        {"method": "kd", "scales": "1,2,4"},
    ]


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-4", [0, 1, 2, 3, 4]), ("7", [7]), ("0,2,5", [0, 2, 5]), (" 1 - 2, 9", [1, 2, 9])]
)
def test_seeds_are_ranges_and_lists(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("options", "seeds", "message"),
    [
        ({"method": "kd,,dkd"}, None, "has an empty entry"),
        ({"method": "kd,kd"}, None, "`--method kd,kd` names one twice"),
        ({"student": "res8,res8"}, None, "list of models `res8,res8` names one twice"),
        ({"method": "kd,dkd", "settings": {"gamma": "2"}}, None, "unknown setting of these methods `gamma`"),
        ({"method": "kd", "seed": 1}, "0-1", "both given"),
        ({"method": "kd"}, "", "not a list of whole numbers"),
        ({"method": "kd"}, "4-1", "not a list of whole numbers"),
        ({"method": "kd"}, "0-99999", "not a list of whole numbers"),
        ({"method": "kd"}, "0-2,1", "name one twice"),
        ({"method": "kd", "settings": {"temperature": ",".join(map(str, range(1, 40)))}}, "0-99", "more than 1,000"),
    ],
)
def test_lists_that_make_no_sense_are_refused(options: dict[str, Any], seeds: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        expand(options, seeds=seeds)


def test_many_runs_by_one_command(icdctl: CommandLine, tmp_path: Path) -> None:
    assert icdctl("train", "--model", "res8", *TINY, "--out", tmp_path / "teacher")[0] == 0
    given: tuple[str, ...] = (
        "distill",
        "--method",
        "ce,kd,cd_sdd_dkd",
        "--seeds",
        "0-1",
        "--set",
        "gamma=1,4",
        "--student",
        "res8",
    )
    given += ("--teacher", str(tmp_path / "teacher"), *TINY, "--out", str(tmp_path / "runs"))
    code, out, _ = icdctl(*given, "--dry-run")
    planned = json.loads(out)["runs"]
    assert (code, len(planned), (tmp_path / "runs").exists()) == (0, 8, False)
    code, out, err = icdctl(*given, "--json")
    assert code == 0, err
    runs = json.loads(out)["runs"]
    assert [run["out"] for run in runs] == [config["out"] for config in planned]
    names = sorted(Path(run["out"]).name for run in runs)
    assert names[0] == "res8-ce-s0-epochs1-trainimages100-testimages50"
    assert sum("gamma4" in name for name in names) == 2
    assert {run["students_at_once"] for run in runs} == {8}
    assert all((Path(run["out"]) / "student.safetensors").is_file() for run in runs)
    assert "teacher_source" not in json.loads((Path(runs[0]["out"]) / "metrics.json").read_text())
    assert icdctl(*given)[0] == 1  # the folders are there
    code, out, err = icdctl(*given, "--resume")
    assert (code, out.count(str(tmp_path / "runs"))) == (0, 8), err


def test_one_of_many_that_fails_is_named_and_the_others_are_there(icdctl: CommandLine, tmp_path: Path) -> None:
    assert icdctl("train", "--model", "res8", *TINY, "--out", tmp_path / "teacher")[0] == 0
    given: tuple[str, ...] = (
        "distill",
        "--method",
        "kd",
        "--set",
        "kd_weight=1,1e6",
        "--student",
        "res8",
        "--set",
        "clip_norm=1e38",
    )
    given += ("--teacher", str(tmp_path / "teacher"), *TINY, "--out", str(tmp_path / "runs"), "--lr", "1")
    code, out, err = icdctl(*given)
    assert code == 1
    assert "kdweight1e_06" in err
    assert "the weights have diverged" in err
    assert out.count(str(tmp_path / "runs")) == 1
    code, out, _ = icdctl(*given, "--resume", "--json")
    assert (code, "error" in json.loads(out)) == (1, True)


def test_a_teacher_is_registered_one_at_a_time(icdctl: CommandLine) -> None:
    code, _, err = icdctl("train", "--model", "res8,res14", *TINY, "--as-teacher")
    assert (code, "registers one run" in err) == (2, True)


def test_many_runs_by_the_library(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"dataset": "digits100", "train_images": 100, "test_images": 50, "epochs": 1}
    teacher = library.train(model="res8", **sizes, out=str(tmp_path / "teacher"))
    results = library.distill_many(
        method=["kd", "dkd"], teacher=teacher.out, student="res8", seeds=[0, 3], **sizes, out=str(tmp_path / "runs")
    )
    assert [result.config.seed for result in results] == [0, 3, 0, 3]
    assert {result.config.method for result in results} == {"kd", "dkd"}
