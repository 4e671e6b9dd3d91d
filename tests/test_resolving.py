"""Options to a configuration: defaults by recipe and data set, names, and all problems at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from icdctl.config import resolving
from icdctl.config.recipes import RECIPES
from icdctl.config.run_config import RunConfig, check_device, parse_duration
from icdctl.config.sources import Options, collect
from icdctl.errors import ArtifactError, UsageError

TEACHER = ("res20", "/weights/teacher.safetensors", "ab" * 32)


def trained(**given: Any) -> RunConfig:
    return resolving.make_config("train", Options({"student": "res8", "dataset": "digits100", **given}))


def distilled(**given: Any) -> RunConfig:
    usual = {"method": "cd_sdd_dkd", "student": "res8", "dataset": "digits100"}
    return resolving.make_config("distill", Options({**usual, **given}), teacher=TEACHER)


def test_what_is_given_beats_the_recipe_which_beats_the_default() -> None:
    assert trained().schedule == RECIPES["digits100"].schedule == "cosine", "the default is `step`"
    assert trained(schedule="step").schedule == "step"
    assert trained().momentum == 0.9, "the recipe says nothing of it"
    assert (trained().recipe, trained(recipe="digits100-teacher").epochs) == ("digits100", 8)
    assert trained(flip="yes", crop_padding="3").flip is True


def test_a_slow_student_has_the_learning_rate_that_the_recipe_has_for_it() -> None:
    assert trained(dataset="cifar100", student="mv2").lr == 0.01
    assert trained(dataset="cifar100", student="res8").lr == 0.05
    assert trained(dataset="cifar100", student="MobileNetV2", lr=0.2).lr == 0.2


def test_names_are_resolved() -> None:
    config = distilled(method="CD-SDD-DKD", student="resnet8", dataset="Digits-100", scales=[4, 1])
    assert (config.method, config.student, config.dataset, config.scales) == ("cd_sdd_dkd", "res8", "digits100", (1, 4))
    assert (config.teacher, config.teacher_weights, config.teacher_sha256) == TEACHER


def test_training_alone_is_cross_entropy_without_scales_or_teacher() -> None:
    config = trained(scales="1,2", method="kd")
    assert (config.command, config.method, config.scales, config.teacher) == ("train", "ce", (), None)


@pytest.mark.parametrize("scales", ["2,1", " 1, 2", "[1,2]", (1, 2), [2, 1]])
def test_scales_are_text_or_numbers(scales: object) -> None:
    assert distilled(scales=scales).scales == (1, 2)


def test_scales_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match=r"scales `1,a` are not whole numbers"):
        distilled(scales=[1, "a"])


def test_settings_of_a_data_set_are_its_own() -> None:
    assert (trained().train_images, trained().test_images, trained().image_size) == (4000, 2000, None)
    with pytest.raises(UsageError) as caught:
        trained(image_size=64)
    assert caught.value.message == "`--image-size` is given, but `digits100` has no such setting"


def test_a_custom_model_reads_larger_images_of_a_folder() -> None:
    assert trained(dataset="imagefolder:/photos").image_size == 32
    assert trained(dataset="imagefolder:/photos", student="custom").image_size == 224
    assert trained(dataset="imagefolder:/photos", student="custom", image_size=48).image_size == 48


def test_all_problems_are_told_at_once_with_what_to_change() -> None:
    Path("dvc.yaml").touch()
    Path("params.yaml").write_text("train: {epochs: 0}")
    given = {"student": "res9", "dataset": "digit100", "device": "gpu", "time_limit": "soon", "lr": -1}
    with pytest.raises(UsageError) as caught:
        resolving.make_config("train", collect(given))
    assert caught.value.messages == (
        "unknown data set `digit100`",
        "unknown model `res9`",
        "unknown device `gpu`",
        "time limit `soon` is not a duration above 0",
        "`epochs` is `0`: input should be greater than or equal to 1",
        "`lr` is `-1`: input should be greater than 0",
    )
    assert {"change `epochs` in `params.yaml`", "change `--lr`"} <= set(caught.value.hints)
    assert "did you mean `digits100`?" in caught.value.hints[0]


def test_what_was_wrong_before_is_told_too() -> None:
    known = [UsageError("the teacher is wrong", hint="name another")]
    with pytest.raises(UsageError) as caught:
        resolving.make_config("train", Options({"student": "res9"}), problems=[*known])
    assert caught.value.messages == ("the teacher is wrong", "unknown model `res9`")


def test_wrong_pairs_of_numbers_are_told_in_words() -> None:
    with pytest.raises(UsageError, match=r"`crop_scale` is `5`: expected two numbers, as in `0\.35,1`"):
        trained(crop_scale=5)
    with pytest.raises(UsageError, match="the first must not be the larger"):
        trained(crop_ratio="2,1")
    with pytest.raises(UsageError, match="`crop_scale` and `crop_padding` are two ways to crop"):
        trained(crop_scale="0.5,1", crop_padding=2)


def test_an_unknown_setting_of_the_method_is_told_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        distilled(settings={"gama": 8})
    assert caught.value.message == "unknown setting of `cd_sdd_dkd` `gama`"
    assert "did you mean `gamma`?" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        distilled(settings={"weight_deca": 8})
    assert "did you mean `weight_decay`?" in caught.value.hint


def test_an_option_among_the_settings_of_the_method_is_told_how_it_is_given() -> None:
    with pytest.raises(UsageError) as caught:
        distilled(settings={"lr": 0.1})
    assert caught.value.hint == "it is a separate option: `--lr`"
    with pytest.raises(UsageError) as caught:
        distilled(settings={"ema_decay": 0.1})
    assert caught.value.hint == "it is a separate option: `--set ema_decay`"


def test_the_warm_up_of_the_distillation_is_a_share_of_the_epochs() -> None:
    assert distilled(epochs=16).settings["warmup_epochs"] == 2.0, "an eighth, by the recipe"
    assert distilled(epochs=1).settings["warmup_epochs"] == 1.0
    assert distilled(epochs=16, settings={"warmup_epochs": "5"}).settings["warmup_epochs"] == 5.0
    assert distilled(method="kd").settings["warmup_epochs"] == 0.0, "KD has none"
    assert distilled(dataset="cifar100").settings["warmup_epochs"] == 20.0, "this recipe leaves the method's own"


def test_the_default_folder_is_named_by_what_differs_from_the_recipe() -> None:
    assert Path(trained().out) == Path.cwd() / "runs" / "digits100" / "res8-ce-s0"
    assert trained(out="here").out == "here"
    assert Path(trained(dataset="imagefolder:/some/photos").out).parent.name == "imagefolder-photos"
    changed = distilled(seed=2, lr=0.1, epochs=4, scales="1,2", settings={"gamma": 8}, device="cpu", ema_decay=0.9)
    assert Path(changed.out).name == "res20-res8-cd_sdd_dkd-s2-epochs4-scales12-gamma8"
    assert resolving.default_run_name(trained(max_steps=3, val_split=0.1)) == "res8-ce-s0-maxsteps3-valsplit0.1"


def test_first_weights_are_known_by_their_hash() -> None:
    weights = Path("first.safetensors")
    weights.write_bytes(b"weights")
    config = trained(init_weights=str(weights))
    assert config.init_weights == str(weights.absolute())
    assert config.init_sha256 is not None
    assert trained(init_weights=str(weights), init_sha256=config.init_sha256) == config
    weights.write_bytes(b"other weights")
    with pytest.raises(ArtifactError, match="the configuration states"):
        trained(init_weights=str(weights), init_sha256=config.init_sha256)
    with pytest.raises(ArtifactError, match=r"first weights `.*` can't be read"):
        trained(init_weights="nowhere.safetensors")


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:3"])
def test_a_device_need_not_be_there(name: str) -> None:
    assert check_device(name) == name


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "CPU"])
def test_a_device_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        check_device(name)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400.0), ("2h", 7200.0), ("1h30m", 5400.0), ("45s", 45.0), (" 7.5 ", 7.5), (60, 60.0)]
)
def test_a_duration_is_read(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "90x", "1m30h", "nan"])
def test_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration above 0"):
        parse_duration(text)
