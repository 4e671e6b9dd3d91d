"""Where options come from: which source wins, what a message says to change, and what a config.json repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from icdctl.config import resolving
from icdctl.config.lookup import OPTIONS
from icdctl.config.sources import Options, collect, options_of
from icdctl.errors import ArtifactError, IcdctlError, UsageError

TEACHER = ("res20", "/weights/teacher.safetensors", "ab" * 32)


def write_config(**changes: Any) -> Path:
    """The config.json of a distilled run in the current folder, but for what is changed; None takes a key away."""
    given = {"method": "cd_sdd_dkd", "student": "res8", "dataset": "digits100", "out": "runs/one", "lr": 0.3}
    config = resolving.make_config("distill", Options(given), teacher=TEACHER)
    stated = {**config.model_dump(mode="json"), **changes}
    path = Path("config.json")
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))
    return path


def write_params(text: str) -> None:
    Path("dvc.yaml").touch()
    Path("params.yaml").write_text(text)


def test_keywords_beat_the_config_file_which_beats_variables_which_beat_params_yaml(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert collect({}).get("lr") is None
    write_params("train: {lr: 0.1}")
    assert collect({}).get("lr") == 0.1
    monkeypatch.setenv("ICDCTL_LR", "0.2")
    assert collect({}).get("lr") == "0.2"
    config = write_config()
    assert collect({}, config_file=config).get("lr") == 0.3
    assert collect({"lr": 0.4}, config_file=config).get("lr") == 0.4
    assert collect({"lr": None}, config_file=config).get("lr") == 0.3, "None is not given"


def test_an_option_remembers_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config()
    write_params("train: {epochs: 3, lr: 0.1}")
    monkeypatch.setenv("ICDCTL_BATCH_SIZE", "32")
    monkeypatch.setenv("ICDCTL_MOMENTUM", "0.5")
    options = collect({"ema_decay": 0.9, "batch_size": 16, "settings": {"gamma": 4}})
    assert options.origin("epochs") == "`epochs` in `params.yaml`"
    assert options.origin("momentum") == "the variable `ICDCTL_MOMENTUM`"
    assert options.origin("batch_size") == "`--batch-size`"
    assert options.origin("ema_decay") == "`--set ema_decay`"
    assert options.origin("settings") == "`--set`"
    assert options.origin("seed") == "`seed`", "nothing gave it"
    assert collect({}, config_file=config).origin("lr") == "`lr` in `config.json`"


@pytest.mark.parametrize(
    ("source", "kind", "change"),
    [
        ("keyword", "option", None),
        ("params.yaml", "key of `{}`", None),
        ("config.json", "key of `config.json`", None),
    ],
)
def test_an_unknown_name_is_told_the_nearest_and_two_are_told_at_once(
    source: str, kind: str, change: str | None
) -> None:
    wrong = {"epoch": 3, "batchsize": 16}
    config = None
    if source == "params.yaml":
        write_params(f"train: {json.dumps(wrong)}")
        kind = kind.format(Path("params.yaml").absolute())
    elif source == "config.json":
        config = write_config(**wrong)
    with pytest.raises(UsageError) as caught:
        collect(wrong if source == "keyword" else {}, config_file=config)
    assert caught.value.messages == (f"unknown {kind} `epoch`", f"unknown {kind} `batchsize`")
    assert "did you mean `epochs`?" in caught.value.hints[0]
    assert "did you mean `batch_size`?" in caught.value.hints[1]


def test_what_icdctl_works_out_itself_can_not_be_given() -> None:
    for key in ("command", "teacher_weights", "time_limit_seconds"):
        with pytest.raises(UsageError, match=f"unknown option `{key}`"):
            collect({key: 1})


def test_text_and_mappings_are_checked_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    write_params("train: {student: 3, settings: [1]}")
    with pytest.raises(UsageError) as caught:
        collect({})
    assert caught.value.messages == (
        "`student` is `3`: input should be a valid string",
        "`settings` is `[1]`: input should be a valid dictionary",
    )
    assert caught.value.hints == ("change `student` in `params.yaml`", "change `settings` in `params.yaml`")
    write_params("cells: {}")
    monkeypatch.setenv("ICDCTL_SETTINGS", "gamma=4")
    with pytest.raises(UsageError) as caught:
        collect({})
    assert caught.value.message == "`settings` is `gamma=4`: input should be a valid dictionary"
    assert caught.value.hint == "change the variable `ICDCTL_SETTINGS`"
    monkeypatch.setenv("ICDCTL_SETTINGS", '{"gamma": 4}')
    assert collect({}).settings == {"gamma": 4}
    assert collect({"settings": {"beta": 2}}).settings == {"gamma": 4, "beta": 2}


@pytest.mark.parametrize("key", ["out", "data_dir"])
def test_an_empty_folder_is_no_wish_for_the_default(key: str) -> None:
    with pytest.raises(UsageError, match="is empty") as caught:
        collect({key: ""})
    assert f"`--{key.replace('_', '-')}`" in caught.value.message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: {lr: 0.1, lr: 0.2}", "the key `lr` appears twice, in line 1"),
        ("train: [1]", "does not hold a mapping `train`, found list"),
        ("train: {lr: ]", "can't be read as YAML"),
        ("- a list", "does not hold a mapping `train`, found list"),
    ],
)
def test_a_params_yaml_that_can_not_be_is_refused(text: str, problem: str) -> None:
    write_params(text)
    with pytest.raises(UsageError) as caught:
        collect({})
    assert problem in caught.value.message


def test_a_config_file_repeats_a_run_but_for_its_folder() -> None:
    config = write_config(time_limit_seconds=60.0)
    options = collect({}, config_file=config, command="distill")
    assert options.get("out") is None
    assert options.get("time_limit") == 60.0
    assert options.text("teacher") == TEACHER[1], "the weights, whatever the name stands for today"
    assert options.text("teacher_sha256") == TEACHER[2]
    again = resolving.make_config("distill", options, teacher=TEACHER)
    stated = json.loads(config.read_text())
    assert {**again.model_dump(mode="json", exclude_none=True), "out": "runs/one"} == stated


def test_a_keyword_changes_one_setting_of_the_method_that_a_config_file_states() -> None:
    settings = collect({"settings": {"gamma": 8}}, config_file=write_config()).settings
    assert (settings["gamma"], settings["beta"], settings["variant"]) == (8, 2.0, "published")


def test_another_teacher_than_that_of_the_config_file_need_not_have_its_hash() -> None:
    options = collect({"teacher": "res56"}, config_file=write_config())
    assert (options.text("teacher"), options.text("teacher_sha256")) == ("res56", None)


def test_a_config_file_of_the_other_command_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        collect({}, config_file=write_config(), command="train")
    assert caught.value.message == "`config.json` is a configuration of `icdctl distill`"
    assert caught.value.hint == "run `icdctl distill --config config.json`"


def test_a_config_file_that_is_no_object_or_is_not_there_is_refused() -> None:
    with pytest.raises(ArtifactError):
        collect({}, config_file=Path("config.json"))
    Path("config.json").write_text("[]")
    with pytest.raises(UsageError, match="holds no JSON object"):
        collect({}, config_file=Path("config.json"))


def test_a_run_from_before_there_was_a_setting_is_repeated_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICDCTL_COMPILE", "true")
    assert collect({}).get("compile") == "true"
    assert collect({}, config_file=write_config(compile=None)).get("compile") is False
    Path("part.json").write_text('{"student": "res8"}')
    assert collect({}, config_file=Path("part.json")).get("compile") == "true", "some options, by hand, are no run"


def test_a_crop_that_was_switched_off_stays_off_whatever_the_recipe_has() -> None:
    given = {"student": "res8", "dataset": "imagefolder:/photos", "crop_scale": "none"}
    config = resolving.make_config("train", Options(given))
    assert options_of(config.model_dump())["crop_scale"] == "none"


def test_options_know_no_other_names() -> None:
    options = Options({"lr": 0.1})
    assert (options.get("lr"), options.get("epochs"), options.text("student")) == (0.1, None, None)
    assert options.without("lr").get("lr") is None
    with pytest.raises(KeyError):
        options.get("learning_rate")


def test_many_problems_are_told_and_not_more_than_ten() -> None:
    values = dict.fromkeys(("epochs", "batch_size", "lr", "momentum", "clip_norm", "nesterov", "flip"), "wrong")
    values |= dict.fromkeys(("drop_last", "lr_decay_rate", "label_smoothing", "crop_padding", "seed"), "wrong")
    with pytest.raises(IcdctlError) as caught:
        resolving.make_config("train", collect({"student": "res8", "dataset": "digits100", **values}))
    assert len(caught.value.messages) == 10
    assert f"change {OPTIONS['lr'].shown()}" in caught.value.hints
