"""What people get wrong: names, numbers, several mistakes at once, jobs that are too small.

Each failure has the same shape, whatever failed: `error:` and `hint:` on stderr, the right exit code, no traceback, no
escape codes, nothing on stdout, nothing half-written, nothing of the user's lost.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import CommandLine
from failure_support import TINY, TRAIN, contents, fails, finished, said

__all__ = ["finished"]


# --- names ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_images_named_alone_is_told_how(icdctl: CommandLine) -> None:
    Path("photos").mkdir()
    failure = fails(icdctl("train", "--model", "res8", "--dataset", "photos"), 2)
    assert failure == (["unknown data set `photos`"], ["for your own images, write `imagefolder:photos`"])


@pytest.mark.parametrize(
    ("flag", "value", "error", "hint"),
    [
        ("--method", "cd_sdd_dkk", "unknown method `cd_sdd_dkk`", "did you mean `cd_sdd_dkd`? `icdctl list methods`"),
        ("--method", "", "unknown method ``", "`icdctl list methods`"),
        ("--student", "resnet8x5", "unknown model `resnet8x5`", "did you mean `res8x4`? `icdctl list models`"),
        ("--student", "mv3", "unknown model `mv3`", "did you mean `mv2`? `icdctl list models`"),
        ("--student", "", "unknown model ``", "`icdctl list models`"),
        ("--teacher", "res32x5", "unknown model `res32x5`", "did you mean `res32x4`? `icdctl list models`"),
        ("--dataset", "cifar10", "unknown data set `cifar10`", "did you mean `cifar100`? `icdctl list datasets`"),
        ("--dataset", "", "unknown data set ``", "`icdctl list datasets`"),
        ("--recipe", "digit100", "unknown recipe `digit100`", "did you mean `digits100`? `icdctl list recipes`"),
        ("--recipe", "", "unknown recipe ``", "`icdctl list recipes`"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(
    icdctl: CommandLine, finished: Path, flag: str, value: str, error: str, hint: str
) -> None:
    given = {"--method": "kd", "--teacher": str(finished), "--student": "res8", "--dataset": "digits100", flag: value}
    words = [word for pair in given.items() for word in pair]
    failure = fails(icdctl("distill", *words, "--dry-run"), 2)
    assert failure == ([error], [hint + " shows all of them"])


@pytest.mark.parametrize(
    ("flag", "value", "choices"),
    [
        ("--optimizer", "adam", ("sgd", "adamw")),
        ("--precision", "fp16", ("fp32", "tf32", "bf16")),
        ("--device", "gpu", ("auto", "cpu", "cuda")),
        ("--device", "cuda:-1", ("auto", "cpu", "cuda")),
        ("--device", "", ("auto", "cpu", "cuda")),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_an_unknown_choice_is_told_the_others(
    icdctl: CommandLine, tmp_path: Path, flag: str, value: str, choices: tuple[str, ...], dry: bool
) -> None:
    out = tmp_path / "run"
    failure = fails(icdctl(*TRAIN, flag, value, "--out", out, *["--dry-run"] * dry), 2)
    assert f"`{value}`" in failure.error
    for choice in choices:
        assert choice in failure.error + failure.hint
    assert not out.exists()


def test_a_teacher_that_is_neither_name_nor_path_is_not_the_current_folder(icdctl: CommandLine) -> None:
    failure = fails(icdctl("distill", "--method", "kd", "--teacher", "", "--student", "res8", "--dry-run"), 2)
    assert "``" in failure.error
    assert "`.`" not in failure.error


@pytest.mark.parametrize(
    ("arguments", "error", "suggested"),
    [
        (["distil"], "no such command", "distill"),
        (["trian", "--model", "res8"], "no such command", "train"),
        (["registry", "lst"], "no such command", "list"),
        (["list", "method"], "method", "methods"),
        (["train", "--modell", "res8"], "no such option", "--model"),
    ],
)
def test_a_mistyped_command_is_told_the_nearest(
    icdctl: CommandLine, arguments: list[str], error: str, suggested: str
) -> None:
    failure = fails(icdctl(*arguments), 2)
    assert error in failure.error
    assert "Value error" not in failure.error
    assert suggested in failure.error + failure.hint
    (hinted,) = re.findall(r"`icdctl([^`]*)--help`", failure.hint)
    assert icdctl(*hinted.split(), "--help")[0] == 0, "the hint names a command that exists"


@pytest.mark.parametrize("arguments", [[], ["registry"]])
def test_no_command_shows_the_help_and_no_empty_error(icdctl: CommandLine, arguments: list[str]) -> None:
    code, out, err = icdctl(*arguments)
    assert code in (0, 2)
    assert "Usage:" in out + err
    assert "error: \n" not in err


# --- numbers -------------------------------------------------------------------------------------------------------

_WHOLE = ("--epochs", "--batch-size", "--seed", "--train-images", "--test-images", "--max-steps")


@pytest.mark.parametrize("value", ["abc", "nan", "inf", "1.5", "", "-1", "1e400"])
@pytest.mark.parametrize("flag", _WHOLE)
def test_a_whole_number_must_be_one(icdctl: CommandLine, flag: str, value: str) -> None:
    failure = fails(icdctl(*TRAIN, f"{flag}={value}", "--dry-run"), 2)
    assert flag in failure.error + failure.hint


@pytest.mark.parametrize("flag", [flag for flag in _WHOLE if flag != "--seed"])
def test_zero_is_refused(icdctl: CommandLine, flag: str) -> None:
    failure = fails(icdctl(*TRAIN, flag, "0", "--dry-run"), 2)
    assert flag in failure.error + failure.hint


@pytest.mark.parametrize("flag", ["--epochs", "--batch-size", "--seed", "--train-images", "--test-images"])
def test_a_number_beyond_all_reason_is_refused_before_anything_is_allocated(icdctl: CommandLine, flag: str) -> None:
    failure = fails(icdctl(*TRAIN, flag, "9" * 20, "--dry-run"), 2)
    assert flag in failure.error + failure.hint


@pytest.mark.parametrize("value", ["abc", "nan", "inf", "-inf", "1e400", "-1", "0", "", "0x10"])
def test_a_learning_rate_must_be_finite_and_above_0(icdctl: CommandLine, value: str) -> None:
    failure = fails(icdctl(*TRAIN, f"--lr={value}", "--dry-run"), 2)
    assert "--lr" in failure.error + failure.hint


@pytest.mark.parametrize("value", ["abc", "nan", "inf", "-1", "0", "", "1e400", "1_000", "90x", "0s", "-5m"])
def test_a_time_limit_must_be_a_duration(icdctl: CommandLine, value: str) -> None:
    assert fails(icdctl(*TRAIN, f"--time-limit={value}", "--dry-run"), 2) == (
        [f"time limit `{value}` is not a duration above 0"],
        ["e.g. `--time-limit 90m`, `1h30m` or `45s`"],
    )


@pytest.mark.parametrize("images", ["0", "-5", "99999999999"])
def test_eval_checks_its_number_of_images(icdctl: CommandLine, finished: Path, images: str) -> None:
    code, out, err = icdctl("eval", finished, "--test-images", images)
    assert (code in (1, 2), out) == (True, "")
    assert images in said(err).error or "memory" in said(err).error


def test_training_that_diverges_in_its_last_step_is_a_known_failure(icdctl: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "run"
    failure = fails(icdctl(*TRAIN, "--lr", "1e22", "--out", out), 1)
    assert "finite" in failure.error
    assert "--lr" in failure.hint
    assert not out.exists()


@pytest.mark.parametrize(
    ("scales", "error", "hint"),
    [
        ("", "scales `` are not whole numbers with commas between them", "e.g. `--scales 1,2,4`"),
        ("abc", "scales `abc` are not whole numbers with commas between them", "e.g. `--scales 1,2,4`"),
        ("1.0", "scales `1.0` are not whole numbers with commas between them", "e.g. `--scales 1,2,4`"),
        ("1 2 4", "scales `1 2 4` are not whole numbers with commas between them", "e.g. `--scales 1,2,4`"),
        ("1,,2", "scales `1,,2` are not whole numbers with commas between them", "e.g. `--scales 1,2,4`"),
        ("1,9", "scale 9 of `1,9` is not a number from 1 to 8", None),
        ("0", "scale 0 of `0` is not a number from 1 to 8", None),
        ("-1", "scale -1 of `-1` is not a number from 1 to 8", None),
        ("16", "scale 16 of `16` is not a number from 1 to 8", None),
        ("2,2", "scales `2,2` name one twice", None),
    ],
)
def test_scales_that_are_impossible(
    icdctl: CommandLine, finished: Path, scales: str, error: str, hint: str | None
) -> None:
    job = ("distill", "--method", "cd_sdd_dkd", "--teacher", finished, "--student", "res8", *TINY, "--dry-run")
    failure = fails(icdctl(*job, f"--scales={scales}"), 2)
    assert failure == ([error], [hint or "choose whole numbers from 1 to 8, e.g. `--scales 1,2,4`"])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["gamma"], "setting `gamma` is not KEY=VALUE"),
        (["=8"], "setting `=8` is not KEY=VALUE"),
        (["gamma="], "setting `gamma=` is not KEY=VALUE"),
        (["gamma=8", "gamma=9"], "setting `gamma` is given twice"),
        (["gamma=abc"], "setting `gamma` is `abc`, expected a number"),
        (["alpha=1=2"], "setting `alpha` is `1=2`, expected a number"),
        (["gamma=nan"], "setting `gamma` is nan, expected a number from 0 to 1,000,000"),
        (["gamma=inf"], "setting `gamma` is inf, expected a number from 0 to 1,000,000"),
        (["gamma=-1"], "setting `gamma` is -1, expected a number from 0 to 1,000,000"),
        (["temperature=0"], "setting `temperature` is 0, expected a number from 0.001 to 10,000"),
        (["temperature=1e300"], "setting `temperature` is 1e300, expected a number from 0.001 to 10,000"),
        (["temperature=1e-300"], "setting `temperature` is 1e-300, expected a number from 0.001 to 10,000"),
        (["beta=1e39"], "setting `beta` is 1e39, expected a number from 0 to 1,000,000"),
        (["warmup_epochs=-1"], "setting `warmup_epochs` is -1, expected a number from 0 to 100,000"),
        (["lr=0.1"], "unknown setting of `cd_sdd_dkd` `lr`"),
        (["gama=8"], "unknown setting of `cd_sdd_dkd` `gama`"),
        (["variant=new"], "variant is `new`"),
    ],
)
def test_settings_that_are_impossible(icdctl: CommandLine, finished: Path, settings: list[str], error: str) -> None:
    job = ("distill", "--method", "cd_sdd_dkd", "--teacher", finished, "--student", "res8", *TINY, "--dry-run")
    failure = fails(icdctl(*job, *(word for item in settings for word in ("--set", item))), 2)
    assert failure.error == error


# --- several mistakes ----------------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_at_once_and_each_once(icdctl: CommandLine) -> None:
    failure = fails(
        icdctl(
            *("distill", "--method", "cd_sdd_dkk", "--teacher", "res32x5", "--student", "mv3", "--dataset", "cifar10"),
            *("--recipe", "cifar", "--scales", "1,9", "--time-limit", "soon", "--epochs", "0", "--optimizer", "adam"),
        ),
        2,
    )
    assert len(set(failure.errors)) == len(failure.errors)
    whole = "\n".join(failure.errors)
    for wrong in ("cd_sdd_dkk", "res32x5", "mv3", "cifar10", "cifar", "1,9", "soon", "epochs", "adam"):
        assert wrong in whole, f"`{wrong}` is not reported"


def test_what_is_missing_is_named_whole(icdctl: CommandLine) -> None:
    assert fails(icdctl("distill"), 2) == (
        ["`--method`, `--student`, `--teacher` are missing"],
        ["e.g. `icdctl distill --method cd_sdd_dkd --teacher res32x4 --student mv2 --scales 1,2,4`"],
    )


def test_the_main_command_says_how_to_get_the_teacher_and_the_data(icdctl: CommandLine) -> None:
    line = "distill --method cd_sdd_dkd --teacher res32x4 --student mv2 --scales 1,2,4"
    failure = fails(icdctl(*line.split()), 1)
    teacher, data = failure.errors
    assert teacher.startswith("teacher `res32x4` for `cifar100` is not there")
    assert data.startswith("CIFAR-100 is missing")
    assert "icdctl train --model res32x4 --dataset cifar100" in failure.hints[0]
    assert "cifar-100-python" in failure.hints[1]
    assert contents(Path.cwd()) == {}


def test_json_of_several_problems_holds_no_prefixes(icdctl: CommandLine) -> None:
    line = "distill --method cd_sdd_dkk --teacher res32x4 --student mv3 --scales 1,9 --json"
    code, out, err = icdctl(*line.split())
    assert code == 2
    said(err)
    stated = json.loads(out)
    assert set(stated) == {"error"}
    assert set(stated["error"]) == {"code", "message", "hint"}
    assert stated["error"]["code"] == 2
    assert "error:" not in stated["error"]["message"]
    assert "hint:" not in stated["error"]["hint"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["train", "--model", "res9", "--json"], 2),
        (["train", "--epochs", "x", "--json"], 2),
        (["eval", "nope", "--json"], 1),
        (["export", "nope", "--json"], 1),
        (["verify", "nope", "--json"], 1),
        (["validate", "nope", "--json"], 1),
        (["registry", "show", "nope", "--json"], 1),
        (["registry", "add", "nope", "--json"], 1),
        (["list", "nope", "--json"], 2),
        (["demo", "--seed", "x", "--json"], 2),
    ],
)
def test_a_failure_with_json_is_one_object(icdctl: CommandLine, arguments: list[str], code: int) -> None:
    got, out, err = icdctl(*arguments)
    assert got == code
    failure = said(err)
    assert json.loads(out) == {"error": {"code": code, "message": failure.error, "hint": failure.hint}}


# --- very small jobs -----------------------------------------------------------------------------------------------


def test_one_image_is_too_few(icdctl: CommandLine, tmp_path: Path) -> None:
    assert fails(icdctl(*TRAIN, "--train-images", "1", "--out", tmp_path / "run"), 2) == (
        ["one training image is too few"],
        ["train on 2 images or more"],
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given",
    [
        ["--train-images", "2"],
        ["--train-images", "3", "--batch-size", "2"],
        ["--batch-size", "1000"],
        ["--max-steps", "1"],
        ["--test-images", "1"],
    ],
    ids=" ".join,
)
def test_very_small_jobs_work(icdctl: CommandLine, tmp_path: Path, given: list[str]) -> None:
    code, out, err = icdctl(*TRAIN, *given, "--out", tmp_path / "run", "--json")
    assert code == 0
    assert err.startswith("each epoch leaves out one of the 3 training images") if "3" in given else err == ""
    assert json.loads(out)["finished"] is True
    assert icdctl("validate", tmp_path / "run")[0] == 0


def test_speed_counts_images_that_were_seen(icdctl: CommandLine, tmp_path: Path) -> None:
    """A batch size beyond the data does not make the run faster."""
    result = json.loads(icdctl(*TRAIN, "--batch-size", "100000", "--out", tmp_path / "run", "--json")[1])
    assert result["images_per_second"] * result["seconds"] <= 40 * 1.01
