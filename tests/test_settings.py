"""A setting is declared once: what follows from the declarations, and what they must not change."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from conftest import CommandLine
from pydantic import ValidationError

import icdctl as library
from icdctl.cli import app
from icdctl.config import resolving, sources
from icdctl.config.declare import Command, Given, Identity
from icdctl.config.lookup import OPTIONS, SETTINGS, names_in_identity
from icdctl.config.recipes import RECIPES, Recipe
from icdctl.config.run_config import RunConfig

ROOT = Path(__file__).parents[1]
TEACHER = ("res32x4", "/weights/teacher.safetensors", "ab" * 32)


class Recorded(NamedTuple):
    """What the code made of some options before settings were declared in one place."""

    given: dict[str, Any]
    fingerprint: str
    config: str
    """First digits of the sha256 of its config.json: keys, values and their order."""
    run_name: str


TRAINED = {
    "cifar100": Recorded(
        {"student": "res20", "dataset": "cifar100"},
        "4f4a8bdec8f3639ad9b6",
        "bfecdc980e9130ded858",
        "res20-ce-s0",
    ),
    "compiled": Recorded(
        {"student": "res8", "dataset": "digits100", "compile": True},
        "444059ae19f7fcdf6c51",
        "fdf5341650c1c4ade9c3",
        "res8-ce-s0",
    ),
    "not compiled": Recorded(
        {"student": "res8", "dataset": "digits100", "compile": False},
        "33c7e32a0af19351e1e3",
        "1ca6d3b6bad0e2492496",
        "res8-ce-s0",
    ),
    "a recipe, changed": Recorded(
        {
            "student": "mv2",
            "dataset": "digits100",
            "recipe": "digits100-teacher",
            "seed": 3,
            "crop_padding": "4",
            "lr": "0.2",
            "momentum": 0.8,
            "max_steps": 7,
            "val_split": 0.1,
            "split_seed": 2,
            "train_images": "100",
        },
        "d124b2e80e72d90e9b75",
        "3fde00f20a93827283f9",
        "mv2-ce-s3-momentum0.8-croppadding4-lr0.2-maxsteps7-valsplit0.1-splitseed2-trainimages100",
    ),
}
DISTILLED = {
    "cifar100": Recorded(
        {"method": "cd_sdd_dkd", "student": "mv2"},
        "76005f73dee76fa2e8e6",
        "5d62347b2d388e264ae4",
        "res32x4-mv2-cd_sdd_dkd-s0",
    ),
    "many settings": Recorded(
        {
            "method": "CD-SDD-DKD",
            "student": "shuv1",
            "scales": "1,2",
            "settings": {"gamma": "8", "variant": "corrected"},
            "ema_decay": "0.99",
            "optimizer": "adamw",
            "on_nonfinite": "skip",
            "time_limit": "1h30m",
            "device": "cpu",
            "teacher_mode": "ahead",
            "teacher_precision": "bf16",
            "precision": "fp32",
            "deterministic": True,
            "data_dir": "/data",
        },
        "c583249ea290451b320e",
        "9838774ddfdb013b10dc",
        "res32x4-shuv1-cd_sdd_dkd-s0-optimizeradamw-scales12-gamma8-variantcorrected",
    ),
    "digits100": Recorded(
        {"method": "sdd_nkd", "student": "res8", "dataset": "digits100", "epochs": "9", "test_images": 50},
        "120de7838356c7300a8c",
        "37e1dc4cd835493c37bb",
        "res32x4-res8-sdd_nkd-s0-epochs9-testimages50",
    ),
    "cub200": Recorded(
        {
            "method": "kd",
            "student": "res18",
            "dataset": "cub200",
            "drop_last": "no",
            "label_smoothing": "0.1",
            "class_weights": "balanced",
        },
        "5458ee6f843712152e7a",
        "64eee97a02e0f7c4b7d4",
        "res32x4-res18-kd-s0-labelsmoothing0.1-classweightsbalanced-droplastFalse",
    ),
    "imagefolder": Recorded(
        {
            "method": "dkd",
            "student": "mv2",
            "dataset": "imagefolder:/photos",
            "crop_scale": "none",
            "crop_padding": "2",
            "image_size": "64",
            "test_split": "0.3",
            "skip_broken": "true",
            "randaugment_ops": "2",
        },
        "0e2bf805bed5a3f0ff90",
        "952817904a7293d4d3b1",
        "res32x4-mv2-dkd-s0-croppadding2-cropscaleNone-randaugmentops2-imagesize64-testsplit0.3-skipbrokenTrue",
    ),
    "cuts of images": Recorded(
        {
            "method": "nkd",
            "student": "custom",
            "dataset": "imagefolder:/photos",
            "crop_scale": [0.5, 1],
            "crop_ratio": "0.8,1.25",
            "lr_decay_epochs": "30,60",
            "schedule": "step",
            "nesterov": "no",
            "flip": "no",
        },
        "950dc27f215119a31ea3",
        "b8ceea59dd40e446d24f",
        "res32x4-custom-nkd-s0-nesterovFalse-schedulestep-lrdecayepochs30_60-flipFalse-cropscale0.5_1.0-"
        "cropratio0.8_1.25-imagesize224",
    ),
}


def configured(command: Command, given: dict[str, Any]) -> RunConfig:
    teacher = TEACHER if command == "distill" else None
    return resolving.make_config(command, sources.collect(given), teacher=teacher)


@pytest.mark.parametrize(
    ("command", "recorded"),
    [("train", each) for each in TRAINED.values()] + [("distill", each) for each in DISTILLED.values()],
    ids=[f"train {name}" for name in TRAINED] + [f"distill {name}" for name in DISTILLED],
)
def test_a_run_keeps_its_identity_its_config_and_its_name(command: Command, recorded: Recorded) -> None:
    config = configured(command, {**recorded.given, "out": "/runs/one"})
    assert config.legacy_fingerprint == recorded.fingerprint
    # Settings that came later are not in the recorded ones.
    later = {"checkpoint_every", "dot_delta", "pretrained", "pretrained_sha256"}
    stated = json.dumps(config.model_dump(mode="json", exclude=later))
    assert hashlib.sha256(stated.encode()).hexdigest()[:20] == recorded.config
    assert Path(configured(command, recorded.given).out).name == recorded.run_name


def test_a_run_is_known_by_the_bytes_it_starts_from_not_by_their_place(tmp_path: Path) -> None:
    weights = tmp_path / "first.safetensors"
    weights.write_bytes(b"weights")
    given = {"student": "res8", "dataset": "digits100", "init_weights": str(weights), "out": "/runs/one"}
    assert configured("train", given).legacy_fingerprint == "b0ede0dd01620c20522d"


def test_a_config_from_before_there_was_a_setting_is_read_and_is_the_same_run() -> None:
    config = configured("train", {**TRAINED["not compiled"].given, "out": "/runs/one"})
    stated = config.model_dump(mode="json")
    for key in names_in_identity(Identity.WHEN_CHANGED):
        del stated[key]
    assert RunConfig.model_validate(stated) == config


def test_a_recipe_with_a_typo_or_a_value_out_of_range_is_refused() -> None:
    usual: dict[str, Any] = {"about": "", "source": "", "dataset": "digits100", "epochs": 1, "batch_size": 2, "lr": 0.1}
    assert Recipe(**usual).momentum == SETTINGS["momentum"].default
    for wrong in ({"momentun": 0.5}, {"momentum": 1.5}, {"optimizer": "adam"}, {"crop_scale": (0.5, 2)}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            Recipe(**usual, **wrong)
    with pytest.raises(ValidationError, match="epochs"):
        Recipe(**{key: value for key, value in usual.items() if key != "epochs"})


def test_a_recipe_has_a_learning_rate_for_slow_students() -> None:
    assert RECIPES["cifar100"].numbers("mv2")["lr"] == 0.01
    assert RECIPES["cifar100"].numbers("res8")["lr"] == RECIPES["cifar100"].numbers()["lr"] == 0.05


@pytest.mark.parametrize("name", SETTINGS)
def test_every_help_is_a_sentence_that_names_the_thing_first(name: str) -> None:
    text = SETTINGS[name].setting.help
    assert re.match(r"`?[A-Za-z]", text)
    assert text.endswith(".")
    assert not re.match(r"(Of|For|Likewise)\b", text)


@pytest.mark.parametrize("command", ["train", "distill"])
def test_the_help_of_a_command_shows_every_flag_that_is_declared(icdctl: CommandLine, command: Command) -> None:
    code, out, _ = icdctl(command, "--help")
    shown = {flag for pair in re.findall(r"│ (--[a-z-]+)(?: +(--no-[a-z-]+))?", out) for flag in pair if flag}
    flags = {flag for each in OPTIONS.values() if (flag := each.flag(command)) is not None}
    assert code == 0
    own = {"--seeds", "--resume", "--config", "--dry-run", "--json", "--help", "--no-compile"}
    assert shown == flags | own | ({"--as-teacher"} if command == "train" else set())


def test_the_list_of_commands_comes_without_reading_the_settings() -> None:
    code = "import sys; from icdctl.cli import main; main(['--help']); sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_benchmark_shows_the_help_of_the_settings_that_it_shares(icdctl: CommandLine) -> None:
    code, out, _ = icdctl("bench", "--help")
    words = " ".join(re.sub(r"[│\s]+", " ", out).split())
    assert code == 0
    assert "Number of images in a training step." in words
    assert "Model of the teacher" in words, "what has its own help keeps it"


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


@pytest.mark.parametrize("setting", ["data_dir", "device", "test_images"])
def test_a_flag_of_several_commands_has_one_help(setting: str) -> None:
    flags = [
        (path, parameter)
        for path, command in _commands(typer.main.get_command(app), "icdctl")
        for parameter in command.params
        if parameter.name == setting
    ]
    assert {f"icdctl {name}" for name in ("train", "distill", "eval")} <= {path for path, _ in flags}
    for path, parameter in flags:
        assert parameter.help == SETTINGS[setting].setting.help, path


def test_a_setting_without_a_flag_is_given_by_set(icdctl: CommandLine) -> None:
    named = [name for name, each in OPTIONS.items() if each.setting.given is Given.SET]
    assert {"ema_decay", "weight_decay"} <= set(named)
    given = [word for name in named for word in ("--set", f"{name}={_written(SETTINGS[name].default)}")]
    code, out, err = icdctl("train", "--model", "res8", *given, "--dry-run")
    assert code == 0, err
    resolved = json.loads(out)
    assert {name: resolved[name] for name in named} == {
        name: list(value) if isinstance(value := SETTINGS[name].default, tuple) else value
        for name in named
        if name != "lr_decay_epochs"
    } | {"lr_decay_epochs": [30]}


def _written(value: object) -> str:
    """As typed on the command line; an empty list can't be, so that some epochs stand in for it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "30"
    return "none" if value is None else str(value)


def test_the_page_of_settings_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_settings.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page, "run `python docs/make_settings.py`"


# --- one more setting ----------------------------------------------------------------------------------------------

_OF_THE_RECIPE = """
    mixup_alpha: Annotated[
        float,
        Field(ge=0, lt=1),
        Setting("Strength of mixup; 0 disables it.", Given.SET, identity=Identity.WHEN_CHANGED),
    ] = 0.0
"""
_OF_THE_RUN = """
    patience: Annotated[
        int, Field(ge=0), Setting("Epochs to wait.", identity=Identity.WHEN_CHANGED, swept=True, in_run_name=True)
    ] = 0
"""
_LOOK = """
import contextlib, io, json, os, runpy, sys
from icdctl.cli import main
from icdctl.config import recipes
from icdctl.config.run_config import RunConfig
mine = {**recipes.RECIPES["digits100"].model_dump(), "mixup_alpha": 0.5}
recipes.RECIPES["mine"] = recipes.Recipe(**mine)
results = []
for arguments, variables in json.loads(sys.argv[2]):
    os.environ.update(variables)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        if arguments == ["page of settings"]:
            code = print(runpy.run_path(sys.argv[1] + "/docs/make_settings.py")["page"]())
        elif arguments[0] == "fingerprint":
            with open("config.json") as file:
                config = RunConfig(**{**json.load(file), **json.loads(arguments[1])})
            code = print(config.legacy_fingerprint, end="")
        else:
            code = main(arguments)
    results.append((code or 0, out.getvalue(), err.getvalue()))
    for name in variables:
        del os.environ[name]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with two settings more, each added in one place."""
    copy = tmp_path_factory.mktemp("more")
    shutil.copytree(Path(library.__file__).parent, copy / "icdctl", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "icdctl" / "config" / "settings.py"
    text = path.read_text(encoding="utf-8")
    for owner, added in (("RecipeSettings", _OF_THE_RECIPE), ("ExecutionSettings", _OF_THE_RUN)):
        text, count = re.subn(rf'(class {owner}\(_Frozen\):\n    """[^"]*"""\n)', rf"\1{added}", text)
        assert count == 1
    path.write_text(text, encoding="utf-8")
    return copy


def in_the_copy(copy: Path, *commands: tuple[str, ...], **variables: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of commands of the copy, in one process; the variables are set for the last."""
    wanted = [(command, variables if command is commands[-1] else {}) for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, str(ROOT), json.dumps(wanted)],
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


def test_a_setting_that_is_added_in_one_place_can_be_given_everywhere(more: Path) -> None:
    base = ("train", "--model", "res8", "--dataset", "digits100", "--dry-run")
    given = ("--set", "mixup_alpha=0.3", "--patience", "3")
    variables = {"ICDCTL_MIXUP_ALPHA": "0.2", "ICDCTL_PATIENCE": "2"}

    def resolved(result: tuple[int, str, str]) -> tuple[float, int]:
        assert result[0] == 0, result
        found = json.loads(result[1])
        return found["mixup_alpha"], found["patience"]

    plain, by_recipe, (code, _, err) = in_the_copy(
        more, base, (*base, "--recipe", "mine"), (*base, "--set", "mixup_alpha=2", "--patience", "-1")
    )
    assert (resolved(plain), resolved(by_recipe)) == ((0.0, 0), (0.5, 0))
    assert code == 2
    assert "`mixup_alpha` is `2`" in err
    assert "change `--set mixup_alpha`" in err
    assert "change `--patience`" in err
    Path("dvc.yaml").touch()
    Path("params.yaml").write_text("train: {mixup_alpha: 0.1, patience: 1}\n")
    by_file, by_flag, by_variable = in_the_copy(more, (*base, "--recipe", "mine"), (*base, *given), base, **variables)
    assert (resolved(by_file), resolved(by_flag), resolved(by_variable)) == ((0.1, 1), (0.3, 3), (0.2, 2))


def test_a_setting_that_is_added_is_shown_and_swept(more: Path) -> None:
    Path("dvc.yaml").touch()
    Path("params.yaml").write_text("cells: {plain: {student: res8, dataset: digits100, method: ce}}\n")
    sweep = ("grid", "plan", "--sweep", "mixup_alpha=0,0.3", "--sweep", "patience=1,2", "--json")
    (_, help_, _), (_, page, _), (code, out, err) = in_the_copy(more, ("train", "--help"), ("page of settings",), sweep)
    assert re.search(r"--patience +<int> +Epochs to wait\.", help_)
    assert "| `mixup_alpha` | number, 0 or above, below 1 | the recipe's, or `0` | `--set mixup_alpha=...` |" in page
    assert "| `patience` | whole number, 0 or above | `0` | `--patience` | yes | where it is not the default |" in page
    assert code == 0, err
    assert [cell["name"] for cell in json.loads(out)["cells"]] == [
        f"plain-mixupalpha{alpha}-patience{epochs}" for alpha in ("0", "0.3") for epochs in (1, 2)
    ]


def test_a_setting_that_is_added_leaves_earlier_runs_as_they_are(more: Path) -> None:
    earlier = configured("train", {"student": "res8", "dataset": "digits100", "out": "/runs/one"})
    Path("config.json").write_text(earlier.model_dump_json())
    same, other, (code, out, err) = in_the_copy(
        more,
        ("fingerprint", "{}"),
        ("fingerprint", '{"mixup_alpha": 0.3}'),
        ("train", "--config", "config.json", "--recipe", "mine", "--dry-run"),
    )
    assert same[1] == earlier.legacy_fingerprint != other[1]
    assert code == 0, err
    repeated = json.loads(out)
    assert repeated["mixup_alpha"] == 0.0, "it was trained without, whatever its recipe says today"
    assert Path(repeated["out"]).name == "res8-ce-s0-mixupalpha0"
