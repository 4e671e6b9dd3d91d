"""`icdctl recipes`: training recipes and the papers' cells, listed, shown, copied, and made of files of others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CommandLine

from icdctl.config.recipes import RECIPES
from icdctl.config.run_config import RunConfig
from icdctl.errors import UsageError
from icdctl.grid.cells import read_grid
from icdctl.grid.dvc_pipeline import DATA_FOLDERS, Form
from icdctl.grid.params_file import write_entries
from icdctl.methods import METHODS
from icdctl.papers import catalogue, describe, params_entries
from icdctl.papers.table_runs import grid_cell, name_of
from icdctl.science import paper, tables
from icdctl.science.published import PublishedNumber

ROOT = Path(__file__).resolve().parent.parent
CD = "cifar100/res32x4-mv2-cd_sdd_dkd-beta2-gamma2"
TINY = ("--dataset", "digits100", "--train-images", "100", "--test-images", "50", "--epochs", "1", "--device", "cpu")


def params() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    return content


def listed(icdctl: CommandLine, *arguments: str) -> list[dict[str, Any]]:
    code, out, err = icdctl("recipes", "list", *arguments, "--json")
    assert code == 0, err
    rows: list[dict[str, Any]] = json.loads(out)["recipes"]
    return rows


def test_the_list_has_every_cell_once_behind_the_training_recipes(icdctl: CommandLine) -> None:
    rows = listed(icdctl)
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    assert names[: len(RECIPES)] == list(RECIPES)
    assert {row["kind"] for row in rows[len(RECIPES) :]} == {"paper"}
    for table in tables.TABLES:
        keys = {cell.key.removesuffix("-time") for cell in tables.load(table).cells}
        assert {row["name"] for row in rows if table in row.get("tables", [])} == keys
    by_name = {row["name"]: row for row in rows}
    assert by_name[CD]["families"] == ["gamma2"]
    assert by_name["cifar100/res32x4-mv2-kd"]["families"] == ["gamma2", "gamma8"]
    assert by_name["cub200/res32x4-mv2-kd"]["tables"] == ["icd-cub200", "sdd-cub200", "icd-time"]
    assert by_name["cifar100/wrn40_2-wrn16_2-sdd_kd"]["tables"] == []  # a file of the reference that no table has
    out = icdctl("recipes", "list")[1]
    assert all(name in out for name in names)
    weighed = "cifar100/res32x4-shuv1-sdd_kd-disagreeing_patches_weigh_8"
    assert by_name[weighed]["why_not"] in next(line for line in out.splitlines() if weighed in line)


def test_the_list_is_narrowed_by_words_table_and_family(icdctl: CommandLine) -> None:
    of_pair = [row["name"] for row in listed(icdctl, "res32x4-mv2", "cd_sdd_dkd", "cifar100", "--family", "gamma8")]
    assert of_pair == ["cifar100/res32x4-mv2-cd_sdd_dkd-beta8-gamma8"]
    assert [row["name"] for row in listed(icdctl, "--table", "icd-gamma")] == [
        f"cub200/res32x4-shuv1-cd_sdd_kd-gamma{gamma}" for gamma in range(1, 9)
    ]
    assert [row["kind"] for row in listed(icdctl, "digits100")].count("training") == 2
    for wrong, message in (
        (("nothing",), "no recipe is of `nothing`"),
        (("--table", "icd-gama"), "unknown table"),
        (("--family", "gamma3"), "unknown family"),
    ):
        code, _, err = icdctl("recipes", "list", *wrong)
        assert (code, message in err) == (2, True), err


def test_the_short_list_has_the_same_training_recipes(icdctl: CommandLine) -> None:
    short = json.loads(icdctl("list", "recipes", "--json")[1])["recipes"]
    assert [{**row, "kind": "training"} for row in short] == [
        row for row in listed(icdctl) if row["kind"] == "training"
    ]


def test_all_of_a_cell_is_shown(icdctl: CommandLine) -> None:
    code, out, _ = icdctl("recipes", "show", "cifar100-vgg13-mv2-cd_sdd_kd-gamma2", "--json")
    facts = json.loads(out)
    assert (code, facts["name"]) == (0, "cifar100/vgg13-mv2-cd_sdd_kd-gamma2")
    assert (facts["training"]["lr"], facts["training"]["epochs"], facts["recipe"]) == (0.01, 240, "cifar100")
    assert facts["method_settings"]["gamma"] == 2
    assert facts["files"] == ["cifar100/cd_sdd_kd/vgg13_mv2.yaml"]
    corrected = {row["key"]: (row["said"], row["used"]) for row in facts["corrections"]}
    assert corrected["lr"] == ("0.05", "0.01")
    assert corrected["beta"] == ("DKD.BETA 6.0", "none")
    assert "0.05" in facts["tables"][0]["suspect"]
    faulty = json.loads(icdctl("recipes", "show", f"{facts['name']}-lr0.05", "--json")[1])
    assert faulty["training"]["lr"] == 0.05
    assert {row["key"]: row["used"] for row in faulty["corrections"]}["lr"] == "0.05, as the file says"
    assert faulty["tables"][0]["top1"] == 60.19
    text = icdctl("recipes", "show", f"{facts['name']}-lr0.05")[1]
    lines = [line.split() for line in text.splitlines()]
    assert ["lr", "0.05", "the", "cell"] in lines
    assert ["momentum", "0.9", "recipe", "cifar100"] in lines
    assert ["temperature", "4", "default", "of", "cd_sdd_kd"] in lines
    assert ["crop_scale", "none", "recipe", "cifar100"] in lines
    assert "iCD:eval.sh:312" in text


def test_all_of_a_training_recipe_is_shown(icdctl: CommandLine) -> None:
    for name, recipe in RECIPES.items():
        facts = json.loads(icdctl("recipes", "show", name, "--json")[1])
        assert {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()} == {
            "name": name,
            "kind": "training",
            **vars(recipe),
        }
    assert "padding" in icdctl("recipes", "show", "cifar100")[1]
    code, _, err = icdctl("recipes", "show", "cifar10")
    assert (code, "did you mean `cifar100`?" in err) == (2, True)


def test_every_correction_is_shown_with_a_cell() -> None:
    shown = {
        (row.config, row.key, row.said) for recipe in catalogue.paper_recipes().values() for row in recipe.corrections
    }
    assert {(row.config, row.key, row.said) for row in paper.load().corrections} == shown


@pytest.mark.parametrize("form", [Form(), Form(stages=True, datasets=True)])
def test_every_cell_that_can_be_run_copies_into_a_run_of_its_recipe(tmp_path: Path, form: Form) -> None:
    recipes = [recipe for recipe in catalogue.paper_recipes().values() if recipe.why_not is None]
    if form.datasets:
        recipes = [recipe for recipe in recipes if recipe.cell.dataset in DATA_FOLDERS]
    cells = [grid_cell(recipe.cell, {}) for recipe in recipes]
    write_entries(tmp_path / "params.yaml", params_entries.entries(cells, form))
    read = {cell.name: cell for cell in read_grid(tmp_path).cells}
    assert len(read) == len(recipes)
    for recipe in recipes:
        cell = recipe.cell
        config = catalogue.resolved(read[name_of(cell)].options)
        assert (config.dataset, config.student, config.method) == (cell.dataset, cell.student, cell.method)
        assert config.scales == cell.scales
        assert dict(cell.settings).items() <= config.settings.items()
        for key, value in cell.overrides.items():
            assert getattr(config, key) == value
        numbers = RECIPES[cell.dataset]
        assert config.lr == cell.overrides.get("lr", numbers.lr_of_student.get(cell.student, numbers.lr))
        assert METHODS[config.method].needs_teacher == (config.teacher is not None)


def test_cells_are_copied_beside_what_is_there(icdctl: CommandLine) -> None:
    before = "# mine\ntrain: {device: cpu}  # here\ncells:\n  own: {student: res8, method: ce}  # a cell\n\n# the end\n"
    Path("params.yaml").write_text(before)
    code, out, err = icdctl("recipes", "copy", CD, "cifar100/res32x4-mv2-kd", "--seeds", "0-2")
    assert code == 0, err
    text = Path("params.yaml").read_text()
    lines = iter(text.splitlines())
    assert all(line in lines for line in before.splitlines())  # all of them, in their order
    assert params()["seeds"] == [0, 1, 2]
    cell = {"dataset": "cifar100", "teacher": "res32x4", "student": "mv2", "method": "cd_sdd_dkd", "scales": [1, 2, 4]}
    assert params()["cells"]["cifar100-res32x4-mv2-cd_sdd_dkd-beta2-gamma2"] == {
        **cell,
        "settings": {"beta": 2.0, "gamma": 2.0},
    }
    assert next(iter(params()["cells"])) == "own"
    assert yaml.safe_load(out)["cells"].keys() == params()["cells"].keys() - {"own"}
    code, out, _ = icdctl("grid", "plan", "--json")
    assert (code, len(json.loads(out)["cells"])) == (0, 3)
    code, out, _ = icdctl("recipes", "copy", CD, "--json")
    assert json.loads(out)["unchanged"] == ["cells.cifar100-res32x4-mv2-cd_sdd_dkd-beta2-gamma2"]
    assert Path("params.yaml").read_text() == text

    Path("params.yaml").write_text(text.replace("gamma: 2.0", "gamma: 3.0"))
    code, _, err = icdctl("recipes", "copy", CD, "cifar100/res32x4-mv2-kd", "--seeds", "7")
    assert code == 2
    assert "has another `seeds`, `cells.cifar100-res32x4-mv2-cd_sdd_dkd-beta2-gamma2`" in err
    assert "hint: `--replace`" in err
    assert icdctl("recipes", "copy", CD, "--seeds", "0-2", "--replace")[0] == 0
    assert Path("params.yaml").read_text() == text


def test_a_training_recipe_becomes_the_train_section_that_runs_honour(icdctl: CommandLine, tmp_path: Path) -> None:
    code, _, err = icdctl("recipes", "copy", "cifar100")
    assert code == 0
    assert "`lr` is left to `recipe: cifar100`" in err
    options = ("--student", "mv2", "--method", "ce", "--dry-run")
    config = json.loads(icdctl("distill", *options)[1])
    shutil.move("params.yaml", tmp_path / "params.yaml")
    assert config == json.loads(icdctl("distill", *options)[1])

    assert icdctl("recipes", "copy", "digits100-teacher")[0] == 0
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("epochs: 8", "epochs: 3").replace("lr: 0.1", "lr: 0.25"))
    config = json.loads(icdctl("distill", "--student", "res8", "--method", "ce", "--dry-run")[1])
    found = (config["dataset"], config["recipe"], config["epochs"], config["lr"], config["crop_padding"])
    assert found == ("digits100", "digits100-teacher", 3, 0.25, 2)
    code, _, err = icdctl("recipes", "copy", "cifar100")
    assert (code, "`train.epochs`" in err) == (2, True)
    code, _, err = icdctl("recipes", "copy", "cifar100", "cub200/res32x4-mv2-kd", "--replace")
    assert code == 0
    assert "`train.lr` was there and stays" in err
    assert "changes lr, crop_padding, drop_last of `cub200-res32x4-mv2-kd`" in err
    code, _, err = icdctl("recipes", "copy", "cifar100", "cub200")
    assert (code, "has one section `train`" in err) == (2, True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_copied_train_section_changes_no_run_of_its_data_set(name: str) -> None:
    dataset = "imagefolder:photos" if RECIPES[name].dataset == "imagefolder" else RECIPES[name].dataset
    for student in ("mv2", "res8"):
        run = {"dataset": dataset, "student": student, "method": "cd_sdd_dkd", "teacher": "res20", "out": "x"}
        section = catalogue.training_options(name)
        assert catalogue.resolved({**section, **run}) == catalogue.resolved({"recipe": name, **run})


def test_the_form_of_the_projects_dvc_yaml_is_kept(icdctl: CommandLine, tmp_path: Path) -> None:
    for file in ("dvc.yaml", "params.yaml", "cells.yaml"):
        shutil.copy(ROOT / file, file)
    before = Path("params.yaml").read_text()
    names = (CD, "cifar100/res56-res20-kd", "cifar100/mv2-ce", "cifar100/res32x4-mv2-cd_sdd_dkd-beta8-gamma8")
    code, out, err = icdctl("recipes", "copy", *names, "--json")
    assert code == 0, err
    added = ["teachers.cifar100-res56", "cells.cifar100-res56-res20-kd"]
    added += ["cells.cifar100-res32x4-mv2-cd_sdd_dkd-beta8-gamma8"]
    assert json.loads(out)["added"] == added
    made_by_pairs = ["cells.cifar100-res32x4-mv2-cd_sdd_dkd-beta2-gamma2", "cells.cifar100-mv2-ce"]
    assert json.loads(out)["unchanged"] == made_by_pairs
    assert "cells.yaml: 2 added (cifar100-res56-res20-kd, cifar100-res32x4-mv2-cd_sdd_dkd-beta8-gamma8)" in err
    lines = iter(Path("params.yaml").read_text().splitlines())
    assert all(line in lines for line in before.splitlines())
    cell = params()["cells"]["cifar100-res56-res20-kd"]
    assert cell == {"dataset": "cifar100", "teacher": "teachers/cifar100-res56", "student": "res20", "method": "kd"}
    expanded = yaml.safe_load(Path("cells.yaml").read_text())["grid"]["cifar100-res56-res20-kd"]
    assert expanded == {"after": "teachers/cifar100-res56", **cell, "data_dir": "data"}
    assert icdctl("grid", "expand", "--check")[0] == 0
    assert params()["teachers"]["cifar100-res56"]["source"] == "fetch"
    demo = "digits100/res8-ce-epochs6-trainimages2000"
    code, _, err = icdctl("recipes", "copy", demo)
    assert (code, "needs nothing that `dvc.yaml` makes" in err) == (2, True)
    assert icdctl("recipes", "copy", demo, "--to", tmp_path / "other.yaml")[0] == 0


def test_a_projects_own_teacher_of_that_name_is_used_as_it_is(icdctl: CommandLine, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("runs", "teachers", ".icdctl"))
    file = tmp_path / "demo" / "params.yaml"
    before = yaml.safe_load(file.read_text())
    name = "digits100-res20-res8-dkd-beta2-epochs6-trainimages2000"
    code, out, err = icdctl("recipes", "copy", name, "--to", file, "--json")
    assert code == 0, err
    assert json.loads(out)["added"] == [f"cells.{name}"]
    after = yaml.safe_load(file.read_text())
    cells = after.pop("cells")
    assert (list(cells), cells[name]["teacher"]) == ([name], "teachers/digits100-res20")
    assert after == before
    assert len(yaml.safe_load((file.parent / "cells.yaml").read_text())["grid"]) == 4


def test_a_copied_cell_trains(icdctl: CommandLine) -> None:
    (Path.cwd() / "registry").mkdir()
    assert icdctl("train", "--model", "res20", *TINY, "--out", "teacher", "--as-teacher")[0] == 0
    name = "digits100/res20-res8-cd_sdd_dkd-beta2-gamma2-epochs6-trainimages2000"
    assert icdctl("recipes", "copy", name, "--seeds", "3")[0] == 0
    text = Path("params.yaml").read_text().replace("epochs: 6", "epochs: 1")
    text = text.replace("train_images: 2000", "train_images: 100\n    test_images: 50")
    Path("params.yaml").write_text(text)
    code, out, err = icdctl("grid", "run", "--device", "cpu", "--json")
    assert code == 0, err
    folder = Path("runs") / name.replace("/", "-") / "s3"
    config = json.loads((folder / "config.json").read_text())
    assert (config["settings"]["gamma"], config["train_images"], config["epochs"]) == (2.0, 100, 1)
    assert (folder / "metrics.json").is_file()

    code, out, err = icdctl("recipes", "import", folder / "config.json", "--name", "again", "--seeds", "3", "--json")
    assert code == 0, err
    warnings = json.loads(out)["warnings"]
    assert [warning.partition(": ")[2].partition(" ")[0] for warning in warnings] == ["seed", "out"]
    assert icdctl("grid", "run", "again")[0] == 0
    again = json.loads((Path("runs/again/s3") / "config.json").read_text())
    assert {**again, "out": config["out"]} == config
    weights = [path / "student.safetensors" for path in (folder, Path("runs/again/s3"))]
    assert weights[0].read_bytes() == weights[1].read_bytes()


REFERENCE = """\
EXPERIMENT:
  TAG: "{tag}"
  PROJECT: "{project}"
DISTILLER:
  TYPE: "{method}"
  TEACHER: "{teacher}"
  STUDENT: "{student}"
SOLVER:
  BATCH_SIZE: 64
  EPOCHS: 240
  LR: {lr}
  LR_DECAY_STAGES: [150, 180, 210]
  LR_DECAY_RATE: 0.1
  WEIGHT_DECAY: 0.0005
  MOMENTUM: 0.9
  TYPE: "SGD"
"""
FILE = {
    "tag": "",
    "project": "",
    "method": "CD_SDD_KD",
    "teacher": "vgg13_sdd",
    "student": "MobileNetV2_sdd",
    "lr": "0.01",
}


def imported(icdctl: CommandLine, path: Path, text: str, *arguments: str) -> tuple[str, list[str]]:
    """The name of the cell that a file becomes, and what was told, without the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    code, out, err = icdctl("recipes", "import", path, *arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert all(f"warning: {warning}\n" in err for warning in result["warnings"])
    return result["name"], [warning.removeprefix(f"{path}: ") for warning in result["warnings"]]


def test_a_file_of_a_method_with_a_connector_keeps_its_settings(icdctl: CommandLine) -> None:
    given = {**FILE, "method": "FITNET", "teacher": "vgg13", "student": "vgg8", "lr": "0.05"}
    own = "FITNET:\n  HINT_LAYER: 1\n  INPUT_SIZE: [32, 32]\n  LOSS: {CE_WEIGHT: 1.0, FEAT_WEIGHT: 50.0}\n"
    name, told = imported(icdctl, Path("fitnet.yaml"), REFERENCE.format(**given) + own)
    assert params()["cells"][name]["method"] == "fitnet"
    assert params()["cells"][name]["settings"] == {"hint_stage": 1.0, "feature_weight": 50.0}
    assert [line for line in told if "FITNET" in line] == [
        "FITNET.INPUT_SIZE [32, 32] is left out: `fitnet` never reads it"
    ]


def test_a_file_of_the_reference_keeps_what_it_says_and_its_faults_are_told(icdctl: CommandLine) -> None:
    faulty = {**FILE, "lr": "0.05", "project": "baselines_gamma8", "tag": "SDD_DKD,vgg13"}
    more = "DKD:\n  BETA: 6.0\nLOG:\n  WANDB: false\nKD:\n  TEMPERATURE: 2\n"
    name, told = imported(icdctl, Path("cub200/x.yaml"), REFERENCE.format(**faulty) + more)
    assert name == "cifar100-vgg13-mv2-cd_sdd_kd-gamma2-temperature2-lr0_05"
    assert params()["cells"][name] == {
        "dataset": "cifar100",
        "teacher": "vgg13",
        "student": "mv2",
        "method": "cd_sdd_kd",
        "scales": [1, 2, 4],
        "settings": {"temperature": 2.0, "gamma": 2.0},
        "lr": 0.05,
    }
    assert told == [
        "DATASET.TYPE is not stated, which is cifar100 in that code, though the file lies under cub200/: cifar100 is "
        "used",
        "such a file does not state scales (that code takes `--M`): 1,2,4 are used; `--scales` gives others",
        "CD.GAMMA is not stated: 2, the default of gamma2; 8 by `--family gamma8`",
        "SOLVER.LR 0.05 is kept; the recipe `cifar100` has 0.01 for `mv2`",
        "EXPERIMENT.PROJECT baselines_gamma8 contradicts gamma 2, which is used",
        "EXPERIMENT.TAG SDD_DKD,vgg13 names another method than `cd_sdd_kd`, which is used",
        "DKD.BETA 6.0 is left out: `cd_sdd_kd` never reads it",
        "LOG.WANDB False is left out: it can't be taken over",
    ]


def test_a_train_section_that_a_cell_can_not_have_is_a_warning(icdctl: CommandLine) -> None:
    Path("params.yaml").write_text("train: {dataset: digits100, train_images: 400}\n")
    code, out, err = icdctl("recipes", "copy", "cifar100/vgg13-mv2-kd")
    assert (code, "cifar100-vgg13-mv2-kd:" in out) == (0, True), err
    assert "can't be trained with `train` of this file: `--train-images` is given" in err
    assert "cifar100-vgg13-mv2-kd" in params()["cells"]


def test_settings_families_and_scales_of_a_file(icdctl: CommandLine) -> None:
    text = REFERENCE.format(**{**FILE, "method": "CD_SDD_DKD", "teacher": "resnet32x4", "lr": "1e-3"})
    name, told = imported(icdctl, Path("a.yaml"), text, "--family", "gamma8", "--scales", "1,2")
    assert name == "cifar100-res32x4-mv2-cd_sdd_dkd-scales12-beta8-gamma8-lr0_001"
    assert any("DISTILLER.TEACHER named without `_sdd`" in line for line in told)
    name, told = imported(icdctl, Path("b.yaml"), text + "DKD: {BETA: 6, WARMUP: 1}\nCD: {GAMMA: 4}\n")
    assert params()["cells"][name]["settings"] == {"beta": 6.0, "gamma": 4.0}
    assert "DKD.WARMUP 1 is left out: `cd_sdd_dkd` never reads it" in told
    text = REFERENCE.format(**{**FILE, "method": "DKD"}).replace("  WEIGHT_DECAY: 0.0005\n", "")
    name, told = imported(icdctl, Path("c.yaml"), text + "DKD: {BETA: 6, WARMUP: 1}\n")
    cell = params()["cells"][name]
    assert (cell["settings"], cell["weight_decay"]) == ({"beta": 6.0, "warmup_epochs": 1.0}, 0.0001)
    assert any(line.startswith("SOLVER.WEIGHT_DECAY is not stated: 0.0001") for line in told)
    text = REFERENCE.format(**{**FILE, "method": "NONE"})
    name, told = imported(icdctl, Path("d.yaml"), text.replace("[150, 180, 210]", "[30, 60]"))
    assert name == "cifar100-mv2-ce-lrdecayepochs30_60"
    assert told == ["DISTILLER.TEACHER vgg13 is left out: `ce` reads no teacher"]
    assert icdctl("grid", "plan")[0] == 0


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (REFERENCE.format(**{**FILE, "method": "CD_SDD_KP"}), 2, "unknown method `CD_SDD_KP`"),
        (REFERENCE.format(**{**FILE, "student": "MobileNetV3"}), 2, "unknown model `MobileNetV3`"),
        (REFERENCE.format(**{**FILE, "lr": "fast"}), 2, "`SOLVER.LR` in `x.yaml` is `fast`, expected a number"),
        (REFERENCE.format(**{**FILE, "lr": ".nan"}), 1, "a number that is not finite, in `SOLVER.LR`"),
        (REFERENCE.format(**{**FILE, "lr": "-1"}), 2, "`lr` is `-1`"),
        (REFERENCE.format(**FILE) + "CD: {GAMMA: -1}", 2, "setting `gamma` is -1"),
        (REFERENCE.format(**FILE) + "CD: 3", 2, "`CD.GAMMA` in `x.yaml` is `3`, expected a section"),
        (REFERENCE.format(**FILE) + "DATASET: {TYPE: imagenet}", 2, "unknown data set `imagenet`"),
        ("DISTILLER: {TYPE: KD}", 2, "states no `DISTILLER.STUDENT`"),
        ("DISTILLER: {TYPE: KD, STUDENT: vgg8}", 2, "states no `DISTILLER.TEACHER`"),
        ("DISTILLER: 3", 2, "expected a section"),
        ("cells: {a: {method: kd}}", 2, "neither a section `DISTILLER`"),
        ("- a", 2, "does not hold a mapping"),
        ("[" * 5000, 1, "can't be read as YAML"),
        ("a: &a [*a]", 1, "it has YAML aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n", 1, "it has YAML aliases"),
        ("a: !!python/object/apply:os.system [ls]", 1, "can't be read as YAML"),
        ("a: 2020-99-99", 1, "can't be read as YAML"),
        ("a: " + "1" * 5000, 1, "can't be read as YAML"),
        ("a: b\n" * 100_000, 1, "larger than 256 KiB"),
        ("\0", 1, "can't be read as YAML"),
        ("", 1, "is empty"),
        ('{"command": "train", "student": "res8"}', 2, "`method` is missing"),
    ],
)
def test_what_can_not_be_imported_is_told(icdctl: CommandLine, content: str, code: int, message: str) -> None:
    Path("x.yaml").write_text(content)
    found, _, err = icdctl("recipes", "import", "x.yaml")
    assert (found, message in err) == (code, True), err
    assert not Path("params.yaml").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("cells: {}\n", "cells: \n  n: {x: 1}\n"),
        ("cells: # mine\nz: 1\n", "cells: # mine\n  n: {x: 1}\nz: 1\n"),
        ("cells: {a: {x: 2}} # mine", "cells: {n: {x: 1}, a: {x: 2}} # mine"),
        ("{cells: {a: {x: 2}}, z: 1}\n", "{cells: {n: {x: 1}, a: {x: 2}}, z: 1}\n"),
        ("cells:\n  a: 1\n", "cells:\n  a: 1\n  n: {x: 1}\n"),
        ("{z: 1}", "{cells: {n: {x: 1}}, z: 1}"),
        ("{z: 1, cells: {}}", "{z: 1, cells:  {n: {x: 1}}}"),
        ("cells:\n    a: # b\n      x: |\n        text\n# c\nz: 1\n", None),
        (
            "base: &b {y: 1}\ncells:\n  a: *b # b\n\nz: 1\n",
            "base: &b {y: 1}\ncells:\n  a: *b # b\n  n: {x: 1}\n\nz: 1\n",
        ),
        ("cells:\r\n  a: 1\r\n", "cells:\r\n  a: 1\r\n  n: {x: 1}\r\n"),
        ("cells:\n  a: 1", "cells:\n  a: 1\n  n: {x: 1}\n"),
        ("# only\n", "# only\n\ncells:\n  n: {x: 1}\n"),
    ],
)
def test_entries_join_any_form_of_yaml(tmp_path: Path, before: str, after: str | None) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(before.encode())
    write_entries(path, {"cells": {"n": {"x": 1}}})
    expected = after or "cells:\n    a: # b\n      x: |\n        text\n    n: {x: 1}\n# c\nz: 1\n"
    assert path.read_bytes().decode() == expected


def test_only_what_is_replaced_changes(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        "# a\nseeds:\n- 0\n- 1\ncells:\n  n:\n    x: 2\n    y: [1]\n  m: {x: 3}  # b\ntrain:\n  lr: 1\n  # c\n"
    )
    entries = {"seeds": [5], "cells": {"n": {"x": 1}}, "train": {"lr": 2, "epochs": 3}}
    with pytest.raises(UsageError, match=r"another `seeds`, `cells\.n`, `train\.lr`"):
        write_entries(path, entries)
    written = write_entries(path, entries, replace=True)
    assert (written.added, written.replaced) == (("train.epochs",), ("seeds", "cells.n", "train.lr"))
    assert path.read_text() == (
        "# a\nseeds: [5]\ncells:\n  n: {x: 1}\n  m: {x: 3}  # b\ntrain:\n  lr: 2\n  epochs: 3\n  # c\n"
    )


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("cells: [1]", 2, "`cells` in"),
        ("[", 1, "can't be read as YAML"),
        ("- 1", 1, "does not hold a mapping"),
        ("b: &b {x: 1}\ncells: *b\n", 1, "can't be added to"),
        ("z: 1\n...\n", 1, "can't be added to"),
    ],
)
def test_a_params_yaml_that_can_not_be_added_to_is_left_alone(
    icdctl: CommandLine, content: str, code: int, message: str
) -> None:
    Path("params.yaml").write_text(content)
    found, _, err = icdctl("recipes", "copy", CD)
    assert (found, message in err) == (code, True), err
    assert Path("params.yaml").read_text() == content


def test_unknown_and_unrunnable_names_are_told_together(icdctl: CommandLine) -> None:
    weighed = "cifar100/res32x4-shuv1-sdd_kd-disagreeing_patches_weigh_8"
    code, _, err = icdctl("recipes", "copy", "cifar10", CD, weighed)
    assert (code, Path("params.yaml").exists()) == (2, False)
    assert "unknown recipe `cifar10`" in err
    assert f"`{weighed}` can't be run" in err


def test_what_is_shown_of_a_number_is_what_reproduce_compares_with() -> None:
    for recipe in catalogue.paper_recipes().values():
        for (_, cell), row in zip(recipe.in_tables, describe.paper(recipe)["tables"], strict=True):
            reference = cell.reference
            assert row["top1"] == (round(reference.top1, 4) if isinstance(reference, PublishedNumber) else None)
    assert isinstance(catalogue.resolved(catalogue.paper_recipes()[CD.replace("/", "-")].options), RunConfig)
