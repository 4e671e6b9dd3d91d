"""Runs that are not started: what is missing, what stands in for it, and teachers that are looked at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from failure_support import finished
from torch import nn

from icdctl.api.planning import Job, Planner, StandIn, plan, plan_many
from icdctl.config.declare import Command
from icdctl.errors import ArtifactError, IcdctlError, UsageError
from icdctl.models.external import CUSTOM_MODEL

__all__ = ["finished"]

TINY: dict[str, Any] = {"dataset": "digits100", "train_images": 40, "test_images": 20, "epochs": 1}
ABSENT = StandIn(("res20", "/elsewhere/teacher.safetensors", "0" * 64), "1" * 64)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("train", {}, "`--model` is missing"),
        ("distill", {}, "`--method`, `--student`, `--teacher` are missing"),
        ("distill", {"method": "kd", "student": "res8"}, "`--teacher` is missing"),
        ("distill", {"method": "ce"}, "`--student` is missing"),
    ],
)
def test_what_a_run_can_not_do_without(command: Command, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(command, options)
    assert caught.value.message == message
    assert caught.value.hint.startswith(f"e.g. `icdctl {command} ")


def test_a_plan_names_the_teacher_and_starts_nothing(finished: Path) -> None:
    config = plan("distill", {"method": "kd", "teacher": finished, "student": "res8", **TINY, "out": "run"})
    weights = finished / "student.safetensors"
    stated = json.loads((finished / "metrics.json").read_text())["weights_sha256"]
    assert (config.teacher, config.teacher_weights, config.teacher_sha256) == ("res8", str(weights), stated)
    assert not Path("run").exists()


def test_a_missing_teacher_is_told_after_all_that_is_typed_wrong() -> None:
    given = {"method": "kd", "teacher": "res20", "student": "res8", **TINY}
    with pytest.raises(ArtifactError) as caught:
        plan("distill", given)
    assert "res20" in caught.value.message
    with pytest.raises(UsageError) as wrong:
        plan("distill", {**given, "lr": -1, "student": "res9"})
    assert wrong.value.messages == ("unknown model `res9`", "`lr` is `-1`: input should be greater than 0")


def test_missing_data_are_told_with_a_missing_teacher() -> None:
    given = {"method": "kd", "teacher": "res20", "student": "res8", "dataset": "cifar100", "data_dir": "nowhere"}
    with pytest.raises(ArtifactError) as caught:
        plan("distill", given)
    assert len(caught.value.messages) == 2
    assert "nowhere" in caught.value.messages[1]


def test_a_stand_in_takes_the_place_of_what_is_not_here(finished: Path) -> None:
    given = {"method": "kd", "teacher": "res20", "student": "res8", **TINY}
    config = Planner().plan("distill", given, stand_in=ABSENT)
    assert (config.teacher, config.teacher_weights, config.teacher_sha256) == ABSENT.teacher
    config = Planner().plan("train", {"student": "res8", **TINY, "init_weights": "nowhere"}, stand_in=ABSENT)
    assert (config.init_weights, config.init_sha256) == (None, ABSENT.init_sha256)
    here = Planner().plan("distill", {**given, "teacher": str(finished)}, stand_in=ABSENT)
    assert here.teacher == "res8", "what is here needs no stand-in"
    with pytest.raises(UsageError, match="unknown model"):
        Planner().plan("distill", {**given, "student": "res9"}, stand_in=ABSENT)


def test_a_planner_looks_at_a_teacher_once(finished: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(finished, tmp_path / "teacher"))
    given = {"method": "kd", "teacher": str(teacher), "student": "res8", **TINY}
    planner = Planner()
    first = planner.plan("distill", given)
    shutil.rmtree(teacher)
    assert planner.plan("distill", {**given, "seed": 1}).teacher_sha256 == first.teacher_sha256
    for _ in range(2):  # that it is not here is remembered too
        with pytest.raises(IcdctlError):
            Planner().plan("distill", given)


def test_a_teacher_that_has_changed_since_its_configuration_is_refused(finished: Path) -> None:
    given = {"method": "kd", "teacher": str(finished), "student": "res8", **TINY}
    config = plan("distill", given)
    assert plan("distill", {**given, "teacher_sha256": config.teacher_sha256}) == config
    with pytest.raises(ArtifactError, match=r"the configuration states 000000000000\.\.\."):
        plan("distill", {**given, "teacher_sha256": "0" * 64})


def test_many_runs_have_folders_of_their_own_in_the_one_that_is_named() -> None:
    several = [{"student": "res8", **TINY, "seed": seed, "out": "many"} for seed in (0, 1)]
    planned = plan_many("train", several, in_folder=True)
    names = [f"res8-ce-s{seed}-epochs1-trainimages40-testimages20" for seed in (0, 1)]
    assert [Path(config.out) for config in planned] == [Path("many") / name for name in names]
    (alone,) = plan_many("train", several[:1])
    assert alone.out == "many"


def test_a_custom_module_stands_under_one_name(finished: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 100))
    job = Job("distill", {"method": "kd", "teacher": module, "student": module, **TINY})
    assert (job.config.student, job.config.teacher, job.config.teacher_weights) == (CUSTOM_MODEL, CUSTOM_MODEL, "")
    assert job.config.teacher_sha256
    assert (job.student_module, job.teacher_module) == (module, module)


def test_what_is_given_and_does_nothing_is_told(finished: Path) -> None:
    given = {"teacher": str(finished), "student": "res8", **TINY}
    assert Job("distill", {**given, "method": "kd", "scales": "1,2"}).warnings() == [
        "warning: method `kd` reads no patches, `--scales` is ignored"
    ]
    assert Job("distill", {**given, "method": "ce"}).warnings() == [
        "warning: method `ce` reads no teacher, `--teacher` is ignored"
    ]
    (alone,) = Job("distill", {**given, "method": "sdd_kd", "scales": "1"}).warnings()
    assert "with scale 1 alone there are no patches" in alone
    assert Job("distill", {**given, "method": "sdd_kd"}).warnings() == []
