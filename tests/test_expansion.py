"""The hand-made sections of params.yaml as cells, and cells.yaml, which is made from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CommandLine

from icdctl.api import planning
from icdctl.errors import ArtifactError, UsageError
from icdctl.grid import cells_file, expansion
from icdctl.grid.cells import read_grid

ROOT = Path(__file__).resolve().parent.parent


def expanded(text: str) -> dict[str, Any]:
    """The cells of a params.yaml, by name."""
    return dict(expansion.expand(yaml.safe_load(text), origin="`params.yaml`"))


def test_a_cell_is_called_by_all_that_is_stated_of_it() -> None:
    made = expanded("""
methods:
  ce: {}
  nkd: {beta: 1.5}
  cd_sdd_kd: {gamma: 2, scales: [1, 2, 4]}
pairs: {cifar100/res32x4:mv2: {cd_sdd_kd: {gamma: 4}}, res20:res8: }
ablations:
  some: {pairs: [res20:res8, 'imagefolder:my/photos/res20:res8'], methods: cd_sdd_kd, scales: [[2, 1], '4'], lr: 0.05}
""")
    assert list(made) == [
        "cifar100-mv2-ce",
        "cifar100-res32x4-mv2-nkd-beta1_5",
        "cifar100-res32x4-mv2-cd_sdd_kd-gamma4",
        "res8-ce",
        "res20-res8-nkd-beta1_5",
        "res20-res8-cd_sdd_kd-gamma2",
        "res20-res8-cd_sdd_kd-scales12-gamma2-lr0_05",
        "res20-res8-cd_sdd_kd-scales4-gamma2-lr0_05",
        "imagefolder_my-photos-res20-res8-cd_sdd_kd-scales12-gamma2-lr0_05",
        "imagefolder_my-photos-res20-res8-cd_sdd_kd-scales4-gamma2-lr0_05",
    ]
    assert made["cifar100-mv2-ce"] == {"dataset": "cifar100", "student": "mv2", "method": "ce"}
    assert made["res20-res8-cd_sdd_kd-scales12-gamma2-lr0_05"] == {
        "teacher": "res20",
        "student": "res8",
        "method": "cd_sdd_kd",
        "scales": [1, 2],
        "settings": {"gamma": 2.0},
        "lr": 0.05,
    }


def test_teachers_and_data_sets_of_the_pipeline_are_named() -> None:
    made = expanded("""
datasets: {cifar100: {folder: unpacked}}
teachers:
  cifar100-res20: {dataset: cifar100, model: res20}
  mine: {dataset: cifar100, model: res56}
  digits: {dataset: digits100, model: res20}
methods: {kd: {}, ce: {}}
pairs: {cifar100/res20:res8: {}, cifar100/mine:res8: {}, cifar100/vgg13:res8: {}}
cells: {own: {dataset: cifar100, student: res8, method: ce}, other: {student: res8, after: mine.txt, method: ce}}
""")
    named = {name: (cell.get("teacher"), cell.get("after")) for name, cell in made.items()}
    assert named == {
        "cifar100-res20-res8-kd": ("teachers/cifar100-res20", "teachers/cifar100-res20"),
        "cifar100-res8-ce": (None, "data/unpacked"),
        "cifar100-mine-res8-kd": ("teachers/mine", "teachers/mine"),
        "cifar100-vgg13-res8-kd": ("vgg13", "data/unpacked"),
        "own": (None, "data/unpacked"),
        "other": (None, "mine.txt"),
    }
    assert made["own"]["data_dir"] == "data"
    assert "data_dir" not in made["other"]


def test_a_custom_cell_takes_the_place_of_the_one_of_its_name() -> None:
    made = expanded("""
methods: {kd: {}}
pairs: {res20:res8: {}}
cells: {res20-res8-kd: {teacher: res20, student: res8, method: kd, epochs: 3}}
""")
    assert made == {"res20-res8-kd": {"teacher": "res20", "student": "res8", "method": "kd", "epochs": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pairs: {res20: {}}\nmethods: {kd: {}}", "pair `res20` in `params.yaml` can't be read"),
        ("pairs: [res20:res8]", "`pairs` in `params.yaml` is not a mapping, found list"),
        ("pairs: {res20:res8: 3}", "pair `res20:res8` in `params.yaml` is `3`, expected a mapping"),
        ("pairs: {res20:res8: {kd: 3}}\nmethods: {kd: {}}", "`kd` of pair `res20:res8`"),
        ("pairs: {res20:res8: {kdd: {}}}\nmethods: {kd: {}}", "unknown method of pair `res20:res8`"),
        ("pairs: {res20:res8: {}}\nmethods: {kdd: {}}", "unknown method `kdd`"),
        ("pairs: {res20:res8: {}}\nmethods: {kd: {gama: 1}}", "unknown setting of `kd` in `params.yaml` `gama`"),
        ("pairs: {res20:res8: {}}\nmethods: {sdd_kd: {scales: 3}}", "scales `3` are not a list"),
        ("pairs: {res20:res8: {}}\nmethods: {sdd_kd: {scales: [9]}}", "scale 9"),
        ("ablations: {a: {methods: kd}}", "ablation `a` in `params.yaml` names no `pairs`"),
        ("ablations: {a: {pairs: res20:res8}}", "ablation `a` in `params.yaml` names no `methods`"),
        (
            "ablations: {a: {pairs: res20:res8, methods: sdd_kd, scales: [1, 2]}}",
            "`scales` of ablation `a` in `params.yaml` is `[1, 2]`, expected a list of lists",
        ),
        (
            "ablations: {a: {pairs: res20:res8, methods: kd, temperature: [1, 1.0000001]}}",
            "two cells `res20-res8-kd-temperature1` with different options",
        ),
        (
            "teachers: {a: {model: res20}, b: {model: res20}}\npairs: {res20:res8: {}}\nmethods: {kd: {}}",
            "several teachers `res20`: `a`, `b`",
        ),
        ("methods: {kd: {}}", "names no cells"),
    ],
)
def test_what_can_not_be_expanded_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        expanded(text)
    assert message in raised.value.message


def test_scales_as_text_and_as_a_list_are_one_run() -> None:
    Path("params.yaml").write_text(
        "cells:\n"
        "  text: {student: res8, method: sdd_kd, teacher: res20, dataset: digits100, scales: '1,2'}\n"
        "  list: {student: res8, method: sdd_kd, teacher: res20, dataset: digits100, scales: [2, 1]}\n"
    )
    stand_in = planning.StandIn(("res20", "/elsewhere/teacher.safetensors", "0" * 64), None)
    configs = [
        planning.Planner().plan(cell.command, {**cell.options, "out": "x"}, stand_in=stand_in)
        for cell in read_grid(Path.cwd()).cells
    ]
    assert configs[0] == configs[1]
    assert configs[0].scales == (1, 2)


def project(icdctl: CommandLine) -> Path:
    """The demo's pipeline in the current folder."""
    for name in ("dvc.yaml", "params.yaml", "cells.yaml"):
        shutil.copy(ROOT / "demo" / name, name)
    assert icdctl("grid", "expand", "--check")[0] == 0
    return Path("params.yaml")


def test_a_line_and_a_command_add_a_method_and_a_pair(icdctl: CommandLine) -> None:
    params = project(icdctl)
    params.write_text(params.read_text().replace("methods:\n", "methods: # mine\n  kd: {temperature: 2}\n"))
    code, _, err = icdctl("grid", "plan")
    assert (code, "out of date with params.yaml: 1 added (res20-res8-kd-temperature2)" in err) == (1, True), err
    assert "hint: `icdctl grid expand` makes it again" in err
    assert icdctl("grid", "expand", "--check")[0] == 1
    code, out, err = icdctl("grid", "expand", "--json")
    assert (code, json.loads(out)["added"]) == (0, ["res20-res8-kd-temperature2"]), err
    found = json.loads(icdctl("grid", "status", "--json")[1])["cells"]
    assert "res20-res8-kd-temperature2" in [cell["name"] for cell in found]
    params.write_text(f"{params.read_text()}  digits100/res14:res8: {{}}\n")
    code, out, err = icdctl("grid", "expand", "--json")
    assert json.loads(out)["added_to_params"] == ["teachers.digits100-res14"], err
    assert len(json.loads(out)["added"]) == 4
    content = yaml.safe_load(params.read_text())
    trained = {"dataset": "digits100", "model": "res14", "source": "train", "recipe": "digits100-teacher"}
    assert content["teachers"]["digits100-res14"] == trained
    assert "methods: # mine\n" in params.read_text()
    assert icdctl("grid", "expand", "--check")[0] == 0


def test_a_pair_whose_teacher_can_not_be_made_is_an_error(icdctl: CommandLine) -> None:
    params = project(icdctl)
    before = params.read_text()
    params.write_text(f"{before}  vgg13:res8: {{}}\n")
    code, _, err = icdctl("grid", "expand")
    assert (code, "teacher `vgg13` of a pair in" in err) == (2, True), err
    params.write_text(f"{before}cells:\n  plain: {{student: res8, method: ce}}\n")
    code, _, err = icdctl("grid", "expand")
    assert (code, "`plain` needs nothing that `dvc.yaml` makes" in err) == (2, True), err


def test_a_value_that_an_experiment_changes_in_cells_yaml_counts(icdctl: CommandLine) -> None:
    project(icdctl)
    file = Path("cells.yaml")
    made = file.read_text()
    file.write_text(made.replace("method: sdd_dkd}", "method: sdd_dkd, settings: {beta: 4.0}}"))
    assert icdctl("grid", "expand", "--check")[0] == 0
    settings = {cell.name: cell.options.get("settings") for cell in read_grid(Path.cwd()).cells}
    assert settings == {"res20-res8-dkd": None, "res20-res8-sdd_dkd": {"beta": 4.0}, "res20-res8-cd_sdd_dkd": None}
    code, _, err = icdctl("grid", "expand")
    assert (code, "3 cells, 1 changed (res20-res8-sdd_dkd)" in err) == (0, True), err
    assert file.read_text() == made


@pytest.mark.parametrize("text", ["", "grid: {}", "expanded_from: x\ngrid: {a: 1}", "- a"])
def test_a_broken_cells_yaml_is_refused_and_made_again(icdctl: CommandLine, text: str) -> None:
    project(icdctl)
    Path("cells.yaml").write_text(text)
    code, _, err = icdctl("grid", "plan")
    assert (code, "is not what `icdctl grid expand` writes" in err) == (1, True), err
    assert icdctl("grid", "expand")[0] == 0
    assert icdctl("grid", "plan")[0] == 0


def test_a_project_without_a_cells_yaml_is_read_from_params_yaml(icdctl: CommandLine) -> None:
    project(icdctl)
    Path("cells.yaml").unlink()
    assert len(read_grid(Path.cwd()).cells) == 3
    code, _, err = icdctl("grid", "expand", "--check")
    assert (code, "cells.yaml` is not there" in err) == (1, True)


def test_the_digest_is_of_values_not_of_their_form(tmp_path: Path) -> None:
    cells: expansion.Cells = {"a": {"lr": 1, "settings": {"gamma": 2}}}
    cells_file.write(tmp_path, cells)
    assert cells_file.current(tmp_path, {"a": {"settings": {"gamma": 2.0}, "lr": 1.0}}) == cells
    with pytest.raises(ArtifactError, match=r"1 changed \(a\)"):
        cells_file.current(tmp_path, {"a": {"lr": 2, "settings": {"gamma": 2}}})
