"""The published results and the paper's settings: every row in our names, every fault with what is done about it."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from science_support import SCIENCE, script

from icdctl import methods, models
from icdctl.config import recipes
from icdctl.errors import ArtifactError, UsageError
from icdctl.science import paper, published

TRANSCRIPTS = os.environ.get("ICDCTL_TRANSCRIPTS")
"""Folder of published_results.json and paper_configs.json, where it is at hand."""
LOGIT = {"ce", *(f"{kind}{loss}" for kind in ("", "sdd_", "cd_sdd_") for loss in ("kd", "dkd", "nkd"))}
"""Methods that the paper's settings are for."""
NO_MODEL = {"mobilenetv1"}
"""In published rows, but no model of icdctl: ImageNet's MobileNetV1."""


def test_no_row_is_lost() -> None:
    rows = published.load_rows()
    assert len(rows) == 908
    assert [row.id for row in rows] == list(range(908))
    assert Counter(row.kind for row in rows) == {
        "student": 818,
        "reproduction": 32,
        "teacher": 20,
        "plain": 17,
        "time": 13,
        "not found": 6,
        "claim": 2,
    }
    assert Counter(row.dataset for row in rows) == {
        "cifar100": 688,
        "cub200": 166,
        "imagenet": 43,
        None: 7,
        "tiny_imagenet": 4,
    }


def test_every_row_has_names_of_ours_a_source_and_a_kind_of_number() -> None:
    for row in published.load_rows():
        for name in (row.teacher, row.student):
            if name is not None and name not in NO_MODEL:
                assert name.startswith("torchvision:") or models.resolve(name) == name, row
        if row.kind in ("student", "plain", "teacher", "reproduction"):
            assert row.top1 is not None
            assert row.student is not None
            assert row.method is not None
            assert row.method == row.method.lower()
            assert row.epoch is not None
            assert "epoch" in row.number
        if row.kind == "time":
            assert row.seconds_per_step is not None
        assert row.source
        assert "stored" not in row.source
        if row.family is not None:
            assert row.gamma is not None


def test_the_known_suspects_are_marked_and_say_why() -> None:
    suspect = {row.source for row in published.load_rows() if row.suspect}
    assert {
        "iCD:eval_cub.sh:76",
        "iCD:eval_cub.sh:80",
        "iCD:eval_cub.sh:122",
        "iCD:eval.sh:200",
        "iCD:eval.sh:312",
        "iCD:eval.sh:192",
        "iCD:eval.sh:291",
    } <= suspect
    assert sum(row.suspect is not None for row in published.load_rows()) == 24
    assert sum(row.repeats is not None for row in published.load_rows()) == 129
    same = [row for row in published.load_rows() if row.top1 == 65.878]
    assert {(row.method, row.suspect is not None) for row in same} == {
        ("cd_sdd_kd", True),
        ("kd", True),
        ("cd_sdd_nkd", True),
    }


def test_numbers_that_repeat_others_are_marked_and_are_the_same_kind() -> None:
    kd = published.find(dataset="cifar100", teacher="res32x4", student="shuv1", method="kd", kind="student")
    assert [(row.top1, row.epoch, row.repeats is None) for row in kd][:1] == [(74.07, "final", True)]
    assert all(row.epoch == "final" for row in kd if row.top1 == 74.07 and row.repeats)
    cub = published.find(dataset="cub200", source="iCD:eval_cub.sh", family="gamma8", method="cd_sdd_nkd")
    assert all(row.repeats and row.repeats.startswith("iCD:eval.sh") for row in cub)
    assert len(cub) == 5


def test_the_wrong_column_of_mdistiller_is_the_pair_that_it_is_of() -> None:
    (row,) = published.find(paper="DKD", teacher="res32x4", student="shuv2", method="dkd")
    assert (row.top1, row.notes[0]) == (77.07, "its column is headed resnet32x4 -> MobileNetV2")
    assert not published.find(paper="DKD", teacher="res32x4", student="mv2")


def test_a_reference_says_how_many_runs_it_counts_as() -> None:
    arrows = published.reference(published.find(source="iCD:eval.sh:118"))
    assert arrows is not None
    assert (round(arrows.top1, 3), arrows.runs) == (70.103, 1)
    logged = published.reference(published.find(source="SDD-CVPR2024:teacher_unpair.sh:9"))
    assert logged is not None
    assert (logged.top1, logged.runs, logged.epoch) == (78.13, 1, "best")
    two = published.find(teacher="res50", student="shuv1", method="sdd_dkd", paper="SDD-CVPR2024", dataset="cifar100")
    mean = published.reference(two)
    assert mean is not None
    assert mean.top1 == pytest.approx(78.035)
    assert (mean.runs, mean.number) == (2, "mean of 2 recorded runs, best epoch on the test set")
    assert published.reference(published.find(source="iCD:eval.sh:312")) is None
    spread = published.reference(published.find(kind="reproduction", method="kd", student="res8x4"))
    assert spread is not None
    assert (spread.runs, spread.sd, spread.epoch) == (5, 0.206, "final")


def test_a_broken_file_is_an_error_that_names_the_place() -> None:
    with pytest.raises(ArtifactError, match="broken at `rows"):
        published.parse(b'{"made_by": "", "made_from": {"file": "", "sha256": "", "rows": 0}, "rows": [{"id": 0}]}')
    with pytest.raises(ArtifactError, match="the paper's configurations is broken"):
        paper.parse(b"{}")


def test_the_paper_file_has_every_config_and_every_fault() -> None:
    held = paper.load()
    assert len(held.configs) == 190
    assert sum(not config.runs for config in held.configs) == 39
    faulty = {correction.config for correction in held.corrections if not correction.why.startswith("kept")}
    assert len(faulty) == 97
    assert {config.config for config in held.configs} >= {correction.config for correction in held.corrections}
    for correction in held.corrections:
        assert correction.said
        assert correction.used
        assert correction.why
    by_why = Counter((correction.key, correction.said) for correction in held.corrections)
    assert by_why["gamma", "project named gamma8, CD.GAMMA 2.0"] == 21
    assert by_why["dataset", "none, so cifar100 by default"] == 12
    assert by_why["lr", "0.05"] == 2


def test_every_setting_of_the_paper_is_one_that_the_methods_take() -> None:
    for config in paper.load().configs:
        assert models.resolve(config.teacher) == config.teacher
        assert models.resolve(config.student) == config.student
        assert (config.settings is not None) == (config.method in LOGIT)
        recipe = recipes.RECIPES[config.dataset]
        assert config.lr == recipe.lr_of_student.get(config.student, recipe.lr)
        for settings in (config.settings or {}).values():
            methods.check_settings(config.method, settings)
        for scales in config.scales:
            methods.check_scales(scales)


def test_both_families_have_what_a_file_states_and_their_own_defaults_else() -> None:
    def settings(student: str, family: str) -> dict[str, float]:
        return dict(paper.settings_of("cifar100", "wrn40_2", student, "cd_sdd_dkd", family))

    assert settings("vgg8", "gamma2") == {"beta": 2, "gamma": 2}
    assert settings("vgg8", "gamma8") == {"beta": 8, "gamma": 8}
    assert settings("mv2", "gamma2") == {"beta": 6, "gamma": 2}
    assert settings("mv2", "gamma8") == {"beta": 6, "gamma": 8}
    assert paper.settings_of("cifar100", "res56", "res20", "dkd", "gamma8") == {"beta": 2}
    with pytest.raises(UsageError, match="no settings for `crd`"):
        paper.settings_of("cifar100", "res56", "res20", "crd", "gamma8")


def test_a_fault_without_a_rule_stops_the_script() -> None:
    make_paper = script("make_paper")
    with pytest.raises(SystemExit, match="no rule"):
        make_paper.correction("configs/x.yaml", "something new", {})


def test_the_scripts_make_what_the_package_holds(tmp_path: Path) -> None:
    if TRANSCRIPTS is None:
        pytest.skip("needs the transcripts: ICDCTL_TRANSCRIPTS=FOLDER")
    for name, file in (("make_published", published.FILE), ("make_paper", paper.FILE)):
        made_from = json.loads((SCIENCE / file).read_text(encoding="utf-8"))["made_from"]["file"]
        made = script(name).make((Path(TRANSCRIPTS) / made_from).read_bytes(), made_from)
        assert made == (SCIENCE / file).read_text(encoding="utf-8")
