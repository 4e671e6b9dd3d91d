"""What people get wrong, files that are broken or hostile, and places that can't be used.

Each failure has the same shape, whatever failed: `error:` and `hint:` on stderr, the right exit code, no traceback, no
escape codes, nothing on stdout, nothing half-written, nothing of the user's lost.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from conftest import CommandLine
from safetensors.torch import load_file, save_file

import icdctl as library
from icdctl.cli import app

TINY = ("--dataset", "digits100", "--train-images", "40", "--test-images", "20", "--epochs", "1", "--device", "cpu")
TRAIN = ("train", "--model", "res8", *TINY)
KEEP = "precious"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a res8, which no test changes."""
    out = tmp_path_factory.mktemp("finished") / "teacher"
    home = os.environ.get("ICDCTL_HOME")
    os.environ["ICDCTL_HOME"] = str(out.parent / "state")
    try:
        library.train(model="res8", dataset="digits100", train_images=40, test_images=20, epochs=1, out=str(out))
    finally:
        os.environ.pop("ICDCTL_HOME")
        if home is not None:
            os.environ["ICDCTL_HOME"] = home
    return out


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be broken."""
    return Path(shutil.copytree(finished, tmp_path / "teacher"))


class Failure(NamedTuple):
    """What was said of a failure, one string an `error:` or `hint:`."""

    errors: list[str]
    hints: list[str]

    @property
    def error(self) -> str:
        (only,) = self.errors
        return only

    @property
    def hint(self) -> str:
        (only,) = self.hints
        return only


def said(err: str) -> Failure:
    """The parts of a message on stderr, which must have the shape that every message has."""
    assert "Traceback" not in err
    assert "\x1b" not in err
    assert re.fullmatch(r"(?s)((warning: [^\n]*|going on[^\n]*)\n)*error: \S.*\n\nhint: \S.*\n", err), err
    error, _, hint = err.rstrip("\n").rpartition("\n\nhint: ")
    error = error[error.index("error: ") + len("error: ") :]
    return Failure(error.split("\nerror: "), hint.split("\nhint: "))


def fails(result: tuple[int, str, str], code: int) -> Failure:
    """Check a failed command's exit code, stdout and the shape of its stderr."""
    got, out, err = result
    failure = said(err)
    assert (got, out) == (code, "")
    return failure


def in_a_process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """One command as `python -m icdctl`; `environment` replaces variables, None removes one."""
    changed = options.pop("environment", {})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: v for k, v in changed.items() if v is not None}}
    for name, value in changed.items():
        if value is None:
            environment.pop(name, None)
    command = [sys.executable, "-m", "icdctl", *map(str, arguments)]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=50, check=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, locks aside."""
    files = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock" and path.name != ".lock"
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


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
        ("1,3", "scale 3 of `1,3` can't be pooled from the 4x4 grid", None),
        ("0", "scale 0 of `0` can't be pooled from the 4x4 grid", None),
        ("-1", "scale -1 of `-1` can't be pooled from the 4x4 grid", None),
        ("8", "scale 8 of `8` can't be pooled from the 4x4 grid", None),
        ("2,2", "scales `2,2` name one twice", None),
    ],
)
def test_scales_that_are_impossible(
    icdctl: CommandLine, finished: Path, scales: str, error: str, hint: str | None
) -> None:
    job = ("distill", "--method", "cd_sdd_dkd", "--teacher", finished, "--student", "res8", *TINY, "--dry-run")
    failure = fails(icdctl(*job, f"--scales={scales}"), 2)
    assert failure == ([error], [hint or "choose one or more of 1, 2 and 4, e.g. `--scales 1,2,4`"])


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
            *("--recipe", "cifar", "--scales", "1,3", "--time-limit", "soon", "--epochs", "0", "--optimizer", "adam"),
        ),
        2,
    )
    assert len(set(failure.errors)) == len(failure.errors)
    whole = "\n".join(failure.errors)
    for wrong in ("cd_sdd_dkk", "res32x5", "mv3", "cifar10", "cifar", "1,3", "soon", "epochs", "adam"):
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
    line = "distill --method cd_sdd_dkk --teacher res32x4 --student mv3 --scales 1,3 --json"
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


# --- weights -------------------------------------------------------------------------------------------------------


class _Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _with_metadata(run: Path, path: Path, **changed: Any) -> None:
    content = (run / "student.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    said_of_it = json.loads(header["__metadata__"]["icdctl"])
    tensors = load_file(run / "student.safetensors")
    save_file(tensors, path, {"icdctl": json.dumps({**said_of_it, **changed})})


def _not_finite(run: Path, path: Path) -> None:
    tensors = load_file(run / "student.safetensors")
    tensors["fc.bias"][0] = float("nan")
    content = (run / "student.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    save_file(tensors, path, header["__metadata__"])


_PREPROCESSING = {"colour": "RGB", "mean": [0.31, 0.31, 0.31], "size": [32, 32], "std": [0.187, 0.187, 0.187]}

BROKEN: dict[str, Callable[[Path, Path], object]] = {
    "empty": lambda run, path: path.write_bytes(b""),
    "one-byte": lambda run, path: path.write_bytes(b"\x00"),
    "web-page": lambda run, path: path.write_bytes(b"<!DOCTYPE html><title>Sign in</title>"),
    "lfs": lambda run, path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "text": lambda run, path: path.write_text("hello " * 100),
    "cut": lambda run, path: path.write_bytes((run / "student.safetensors").read_bytes()[:-1000]),
    "header-cut": lambda run, path: path.write_bytes((run / "student.safetensors").read_bytes()[:30]),
    "header-huge": lambda run, path: path.write_bytes(struct.pack("<Q", 1 << 60) + b"{" + b" " * 100),
    "zip": lambda run, path: path.write_bytes(b"PK\x03\x04" + b"x" * 100),
    "pickle": lambda run, path: path.write_bytes(pickle.dumps(_Hostile(path.parent / "ran"))),
    "torch-pickle": lambda run, path: torch.save({"model": _Hostile(path.parent / "ran")}, path),
    "folder": lambda run, path: path.mkdir(),
    "loop": lambda run, path: path.symlink_to(path),
    "absent": lambda run, path: None,
    "nan": _not_finite,
    "other-model": lambda run, path: _with_metadata(run, path, model="res20"),
    "unknown-model": lambda run, path: _with_metadata(run, path, model="res9"),
    "model-is-a-number": lambda run, path: _with_metadata(run, path, model=3),
    "model-is-a-list": lambda run, path: _with_metadata(run, path, model=["res8"]),
    "ten-names": lambda run, path: _with_metadata(run, path, class_names=list("abcdefghij")),
    "no-names": lambda run, path: _with_metadata(run, path, class_names=[]),
    "no-preprocessing": lambda run, path: _with_metadata(run, path, preprocessing={}),
    "std-0": lambda run, path: _with_metadata(run, path, preprocessing={**_PREPROCESSING, "std": [0, 0, 0]}),
    "mean-huge": lambda run, path: _with_metadata(run, path, preprocessing={**_PREPROCESSING, "mean": [1e300] * 3}),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "{}", "--test-images", "20"],
        ["export", "{}", "--out", "exported"],
        ["validate", "{}"],
        ["distill", "--method", "kd", "--student", "res8", *TINY, "--teacher", "{}", "--out", "student"],
    ],
    ids=lambda command: str(command[0]),
)
def test_weights_that_are_broken_or_hostile(
    icdctl: CommandLine, finished: Path, tmp_path: Path, kind: str, command: list[str]
) -> None:
    path = tmp_path / "weights.pth"
    BROKEN[kind](finished, path)
    got, out, err = icdctl(*(word.format(path) for word in command))
    failure = said(err)
    assert got in (1, 2)
    assert out == "" or command[0] == "validate"
    assert str(path) in " ".join(failure.errors), "the message names the file"
    assert "fetch-teachers" not in " ".join(failure.hints), "it never touches a file that the user has named"
    assert not (tmp_path / "ran").exists(), "code in the file was run"
    assert contents(Path.cwd()) == {}, "something half-written was left"


@pytest.mark.parametrize("path", ["/dev/zero", "pipe.pth"])
def test_a_device_or_pipe_is_no_weight_file(path: str) -> None:
    """Reading /dev/zero would take all memory, reading a pipe would wait for ever."""
    os.mkfifo("pipe.pth")
    limited = f"ulimit -v 8000000; exec timeout 12 {shlex.quote(sys.executable)} -m icdctl validate {path}"
    done = subprocess.run(["bash", "-c", limited], text=True, capture_output=True, timeout=40, check=False)
    assert done.returncode == 1
    assert path in said(done.stderr).error


@pytest.mark.parametrize("command", ["eval", "validate", "export", "verify"])
def test_a_name_that_no_file_can_have(icdctl: CommandLine, command: str) -> None:
    fails(icdctl(command, "x" * 300), 1)


def test_a_run_folder_that_no_folder_can_be_named(icdctl: CommandLine) -> None:
    failure = fails(icdctl(*TRAIN, "--out", "x" * 300), 1)
    assert "--out" in failure.hint


@pytest.mark.parametrize("command", ["eval", "validate", "export", "verify"])
def test_escape_codes_in_a_name_do_not_reach_the_terminal(icdctl: CommandLine, command: str) -> None:
    fails(icdctl(command, "\x1b[31mred"), 1)


@pytest.mark.parametrize("option", ["--out", "--data-dir", "--init-weights", "--dataset"])
def test_a_name_that_no_config_json_can_hold(icdctl: CommandLine, tmp_path: Path, option: str) -> None:
    place = tmp_path / os.fsdecode(b"f\xff")
    place.write_bytes(b"something")
    given = ["--dataset", "digits100", option, f"imagefolder:{place}" if option == "--dataset" else str(place)]
    failure = fails(icdctl("train", "--model", "res8", *given, "--dry-run"), 2)
    assert option in failure.error
    assert "f\\xff`, which is not valid UTF-8" in failure.error


def test_a_run_folder_below_a_name_that_is_no_utf8(icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(os.fsdecode(b"f\xff"))
    place.mkdir()
    monkeypatch.chdir(place)
    assert "`--out`" in fails(icdctl(*TRAIN, "--out", "run"), 2).error


def test_results_in_a_folder_whose_name_is_no_utf8_are_read(
    icdctl: CommandLine, finished: Path, tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"f\xff")
    shutil.copytree(finished, odd)
    code, out, _ = icdctl("eval", odd, "--test-images", "20", "--json")
    assert (code, json.loads(out)["target"]) == (0, str(odd))
    assert icdctl("validate", odd)[0] == 0
    code, _, err = icdctl("predict", odd, odd / "image.png")
    assert (code, "f\\xff/image.png` does not exist" in err) == (1, True)


def test_paths_with_spaces_newlines_and_umlauts_work(icdctl: CommandLine, finished: Path, tmp_path: Path) -> None:
    odd = tmp_path / "ünï cödé\n[red]"
    shutil.copytree(finished, odd)
    assert icdctl("eval", odd, "--test-images", "20")[0] == 0
    assert icdctl("validate", odd)[0] == 0
    assert icdctl(*TRAIN, "--out", odd / "run")[0] == 0


def test_a_teacher_of_other_classes(icdctl: CommandLine, finished: Path, tmp_path: Path) -> None:
    tensors = load_file(finished / "student.safetensors")
    tensors["fc.weight"], tensors["fc.bias"] = torch.zeros(10, 64), torch.zeros(10)
    path = tmp_path / "ten.safetensors"
    _with_metadata(finished, path, class_names=list("abcdefghij"), num_classes=10)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    save_file(tensors, path, header["__metadata__"])

    failure = fails(
        icdctl("distill", "--method", "kd", "--student", "res8", *TINY, "--teacher", path, "--out", tmp_path / "s"), 1
    )
    assert failure.error == f"teacher `{path}` has 10 classes, `digits100` has 100"
    assert not (tmp_path / "s").exists()

    failure = fails(icdctl("eval", finished, "--teacher", path, "--test-images", "20"), 1)
    assert "10 classes" in failure.error
    assert str(path) in failure.error


def test_a_teacher_of_another_data_set_is_not_taken_silently(icdctl: CommandLine, finished: Path) -> None:
    """digits100 and cifar100 both have 100 classes, which says nothing about whether the teacher fits."""
    code, _, err = icdctl(
        *("distill", "--method", "kd", "--teacher", finished, "--student", "res8", "--dataset", "cifar100", "--dry-run")
    )
    assert code != 0 or "warning:" in err
    assert "digits100" in err


def test_a_method_without_teacher_does_not_swallow_a_wrong_one(icdctl: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert icdctl("distill", "--method", "ce", "--student", "res8", *TINY, "--out", out)[0] == 0
    code, _, err = icdctl(
        *("distill", "--method", "ce", "--teacher", "nope", "--student", "res8", *TINY, "--out", tmp_path / "other")
    )
    assert code == 2 or "warning:" in err


def test_teacher_and_student_may_be_the_same_model(icdctl: CommandLine, finished: Path, tmp_path: Path) -> None:
    before = contents(finished)
    job = ("distill", "--method", "kd", "--teacher", finished, "--student", "res8", *TINY)
    assert icdctl(*job, "--out", tmp_path / "run")[0] == 0
    for resume in ([], ["--resume"]):
        fails(icdctl(*job, "--out", finished, *resume), 2 if resume else 1)
    assert contents(finished) == before


@pytest.mark.parametrize("command", [["eval"], [*TRAIN, "--out", "run"]])
def test_a_cuda_device_that_is_not_there(icdctl: CommandLine, finished: Path, command: list[str]) -> None:
    target = [str(finished)] if command == ["eval"] else []
    failure = fails(icdctl(*command, *target, "--device", "cuda:97"), 1)
    assert failure.error.startswith("device `cuda:97` is not there")
    assert "`icdctl doctor`" in failure.hint
    assert contents(Path.cwd()) == {}


# --- places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resume"])
@pytest.mark.parametrize("name", ["config.json", "environment.json", "notes.txt", ".lock"])
def test_a_foreign_folder_loses_nothing(icdctl: CommandLine, tmp_path: Path, name: str, resume: list[str]) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text(KEEP)
    (out / "model.bin").write_text(KEEP)
    fails(icdctl(*TRAIN, "--out", out, *resume), 1)
    assert (out / name).read_text() == KEEP
    assert sorted(path.name for path in out.iterdir()) == sorted([name, "model.bin"])


def test_a_stopped_run_survives_attempts_with_other_settings(icdctl: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = (*TRAIN, "--epochs", "2", "--out", out)
    assert icdctl(*job, "--time-limit", "0.001s")[0] == 0
    before = contents(out)
    fails(icdctl(*job), 1)
    fails(icdctl(*job, "--lr", "0.5"), 1)
    failure = fails(icdctl(*job, "--lr", "0.5", "--resume"), 2)
    assert failure.error == f"run folder `{out}` holds a run with other settings: lr 0.1 -> 0.5"
    fails(icdctl(*job, "--epochs", "9", "--seed", "3", "--resume"), 2)
    assert contents(out) == before
    code, _, err = icdctl(*job, "--resume")
    assert (code, err) == (0, "continuing after epoch 1 of 2\n")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"garbage" * 100,
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content.replace(b'\\"epoch\\":1', b'\\"epoch\\":x'),
    ],
    ids=["empty", "garbage", "half", "cut", "no-json"],
)
def test_a_corrupt_checkpoint_is_reported_and_kept(
    icdctl: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    out = tmp_path / "run"
    job = (*TRAIN, "--epochs", "2", "--out", out)
    assert icdctl(*job, "--time-limit", "0.001s")[0] == 0
    (state,) = (tmp_path / "state" / "checkpoints").glob("*/state.safetensors")
    whole = state.read_bytes()
    broken = damage(whole)
    assert broken != whole
    state.write_bytes(broken)
    before = contents(out)
    failure = fails(icdctl(*job, "--resume"), 1)
    assert failure.error.startswith(f"checkpoint `{state}` is broken: ")
    assert (state.read_bytes(), contents(out)) == (broken, before)
    state.write_bytes(whole)
    assert icdctl(*job, "--resume")[0] == 0


@pytest.mark.parametrize("name", ["history.csv", "student.safetensors", "metrics.json"])
def test_a_deleted_result_comes_back_by_resume(icdctl: CommandLine, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    assert icdctl(*TRAIN, "--out", out)[0] == 0
    before = contents(out)
    (out / name).unlink()
    assert icdctl(*TRAIN, "--out", out, "--resume")[0] == 0
    assert contents(out) == before, "bytes and the order of columns are those of the run itself"


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/icdctl", "/dev/full", "/dev/full/below"])
@pytest.mark.parametrize(
    "command",
    [[*TRAIN, "--out"], ["export", "{}", "--out"], ["demo", "--out"], ["registry", "add", "{}", "--registry"]],
    ids=["train", "export", "demo", "registry"],
)
def test_a_place_that_can_not_be_written(icdctl: CommandLine, finished: Path, command: list[str], place: str) -> None:
    Path("file").write_text(KEEP)
    failure = fails(icdctl(*(word.format(finished) for word in command), place), 1)
    assert place in failure.error or str(Path(place).parent) in failure.error
    assert contents(Path.cwd()) == {"file": KEEP.encode()}


@pytest.mark.parametrize("home", ["file", "file/below", "/proc/icdctl", "/dev/null"])
def test_a_state_folder_that_can_not_be_written(
    icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    Path("file").write_text(KEEP)
    monkeypatch.setenv("ICDCTL_HOME", home)
    failure = fails(icdctl(*TRAIN, "--out", "run"), 1)
    assert "`ICDCTL_HOME`" in failure.hint
    assert not Path("run").exists()
    failure = fails((1, "", icdctl("doctor")[2]), 1)
    assert "`ICDCTL_HOME`" in failure.hint


def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path) -> None:
    """A file-size limit stops the write as a full disk does."""
    out = tmp_path / "run"
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from icdctl.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *TRAIN, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ICDCTL_HOME": str(tmp_path / "state")}
    done = subprocess.run(command, text=True, capture_output=True, timeout=50, check=False, env=environment)
    failure = fails((done.returncode, done.stdout, done.stderr), 1)
    assert "can't be written: File too large" in failure.error
    left = [Path(name).name for name in contents(tmp_path)]
    whole = [name for name in left if name.startswith("digits100-") or name == ".gitignore"]
    assert left == whole, "the cached data set alone is whole"
    assert not out.exists()


def test_export_never_replaces_what_is_no_export(icdctl: CommandLine, run_folder: Path, tmp_path: Path) -> None:
    before = contents(run_folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text(KEEP)
    for place in (run_folder, tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        for replace in ([], ["--replace"]):
            fails(icdctl("export", run_folder, "--out", place, *replace), 1)
    assert contents(run_folder) == before
    assert contents(tmp_path / "mine") == {"notes.txt": KEEP.encode()}


def test_demo_never_takes_a_folder_that_is_no_demo(icdctl: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(KEEP)
    for arguments in ([tmp_path], [tmp_path, "--restart"], [tmp_path / "notes.txt", "--restart"]):
        failure = fails(icdctl("demo", "--out", *arguments), 1)
        assert failure == (
            [f"`{arguments[0]}` is not empty and holds no earlier demo"],
            ["choose another folder with `--out`"],
        )
    assert contents(tmp_path) == {"notes.txt": KEEP.encode()}


@pytest.mark.parametrize("wrong", [["--seed", "-1"], ["--device", "gpu"]])
def test_demo_with_a_wrong_option_leaves_nothing(icdctl: CommandLine, tmp_path: Path, wrong: list[str]) -> None:
    failure = fails(icdctl("demo", "--out", tmp_path / "demo", *wrong), 2)
    assert wrong[0].removeprefix("--") in failure.error
    assert not (tmp_path / "demo").exists()


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


# --- configuration files and variables -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ICDCTL_LR", "abc"),
        ("ICDCTL_EPOCHS", "-1"),
        ("ICDCTL_EPOCHS", ""),
        ("ICDCTL_OPTIMIZER", "adam"),
        ("ICDCTL_SETTINGS", "foo"),
        ("ICDCTL_DETERMINISTIC", "maybe"),
        ("ICDCTL_LR_DECAY_EPOCHS", "x"),
        ("ICDCTL_CROP_PADDING", "1000"),
    ],
)
def test_a_variable_with_a_bad_value_is_named(
    icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """No flag was given, so a hint to change a flag (which may not even exist) would send people astray."""
    monkeypatch.setenv(name, value)
    failure = fails(icdctl("train", "--model", "res8", "--dataset", "digits100", "--dry-run"), 2)
    assert name in failure.error + failure.hint
    _check_flags("train", failure.hint)


PARAMS = {
    "unknown-key": b"train:\n  epoch: 3\n",
    "negative": b"train:\n  epochs: -1\n",
    "word": b"train: hello\n",
    "list": b"train: [1, 2]\n",
    "top-list": b"- a\n- b\n",
    "scalar": b"hello\n",
    "not-yaml": b"train: {a: [\n",
    "tab": b"train:\n\tepochs: 3\n",
    "binary": b"\x00\x01\xff",
    "code": b'train: !!python/object/apply:os.system ["touch ran"]\n',
}


@pytest.mark.parametrize("kind", PARAMS)
def test_a_bad_params_yaml_is_named(icdctl: CommandLine, kind: str) -> None:
    Path("params.yaml").write_bytes(PARAMS[kind])
    code, out, err = icdctl("train", "--model", "res8", "--dataset", "digits100", "--dry-run")
    failure = said(err)
    assert (code in (1, 2), out) == (True, "")
    assert "params.yaml" in failure.error + failure.hint
    assert not Path("ran").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"3", b'"x"'])
def test_a_config_file_that_is_none(icdctl: CommandLine, content: bytes) -> None:
    Path("config.json").write_bytes(content)
    code, out, err = icdctl("train", "--config", "config.json", "--out", "run")
    failure = said(err)
    assert (code in (1, 2), out) == (True, "")
    assert "`config.json`" in failure.error
    assert failure.hint == "pass the `config.json` of a run folder"
    assert not Path("run").exists()


def test_all_unknown_keys_of_a_config_file_are_reported(icdctl: CommandLine, finished: Path) -> None:
    stated = json.loads((finished / "config.json").read_text())
    Path("config.json").write_text(json.dumps({**stated, "epoch": 3, "batchsize": 3}))
    code, _, err = icdctl("train", "--config", "config.json", "--dry-run")
    assert code == 2
    whole = "\n".join(said(err).errors)
    assert "`epoch`" in whole
    assert "`batchsize`" in whole


def test_a_config_of_distill_is_not_for_train(icdctl: CommandLine, finished: Path, tmp_path: Path) -> None:
    job = ("distill", "--method", "kd", "--teacher", finished, "--student", "res8", *TINY, "--out", tmp_path / "kd")
    assert icdctl(*job)[0] == 0
    failure = fails(icdctl("train", "--config", tmp_path / "kd" / "config.json", "--dry-run"), 2)
    assert "icdctl distill" in failure.hint


def test_a_config_whose_teacher_changed_is_not_repeated_silently(
    icdctl: CommandLine, run_folder: Path, tmp_path: Path
) -> None:
    job = ("distill", "--method", "kd", "--teacher", run_folder, "--student", "res8", *TINY, "--out", tmp_path / "kd")
    assert icdctl(*job)[0] == 0
    again = ("distill", "--config", tmp_path / "kd" / "config.json", "--out", tmp_path / "again")
    assert icdctl(*again, "--dry-run")[0] == 0

    _with_metadata(run_folder, run_folder / "student.safetensors", note="changed")
    code, _, err = icdctl(*again)
    assert code != 0 or "warning:" in err
    assert "student.safetensors" in err

    (run_folder / "student.safetensors").unlink()
    failure = fails(icdctl("distill", "--config", tmp_path / "kd" / "config.json", "--out", tmp_path / "third"), 1)
    assert str(run_folder / "student.safetensors") in failure.error


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "history.csv"])
def test_a_run_folder_with_a_broken_file(icdctl: CommandLine, run_folder: Path, name: str, content: bytes) -> None:
    (run_folder / name).write_bytes(content)
    code, out, err = icdctl("validate", run_folder)
    assert code == 1
    assert "BROKEN" in out
    assert len("\n".join(said(err).errors)) < 1000
    code, _, err = icdctl("registry", "add", run_folder)
    assert code in (0, 1)
    if code:
        said(err)
    assert icdctl("registry", "list")[0] == 0


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_an_export_of_a_run_with_a_broken_file(icdctl: CommandLine, run_folder: Path, name: str) -> None:
    """The weights say all that an export needs; the run's other files only fill the card."""
    (run_folder / name).write_bytes(b"[]")
    code, _, err = icdctl("export", run_folder, "--out", "exported")
    if code:
        assert name in said(err).error
    else:
        assert icdctl("verify", "exported")[0] == 0


@pytest.mark.parametrize("name", ["metrics.json", "environment.json"])
def test_validate_says_shortly_what_is_no_config(icdctl: CommandLine, finished: Path, name: str) -> None:
    code, _, err = icdctl("validate", finished / name)
    assert code == 1
    assert len(err) < 1000
    assert "unknown option" not in err


def test_every_broken_export_gets_a_hint(icdctl: CommandLine, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    assert icdctl("export", finished, "--out", folder)[0] == 0
    code, out, _ = icdctl("validate", folder)
    assert code == 0
    results = dict(line.split()[:2] for line in out.splitlines())
    assert (results["hashes"], results["agreement"]) == ("sound", "skipped")
    for name in ("model.json", "model.onnx"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])
        for command in ("validate", "verify"):
            code, _, err = icdctl(command, folder)
            assert code == 1
            assert name in said(err).error
            assert "icdctl export" in said(err).hint
        (folder / name).write_bytes(content)


# --- registry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../b", "", ".", "..", "a//b", "a/", "A/B", "a b", "a\nb", "-x", ".x", "a/.x", "a@v1"]
)
def test_a_name_can_not_leave_the_registry(icdctl: CommandLine, finished: Path, name: str) -> None:
    failure = fails(icdctl("registry", "add", finished, "--name", name), 2)
    shown = name.replace("\n", "\\x0a")
    assert failure.error == f"`{shown}` can't be the name of an artifact"
    code, out, err = icdctl("registry", "show", "--", name)
    assert (code in (1, 2), out) == (True, "")
    said(err)
    assert contents(Path.cwd()) == {}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"schema": 99}', b"[" * 100_000], ids=lambda value: repr(value[:9])
)
def test_a_broken_manifest_is_named(icdctl: CommandLine, finished: Path, content: bytes) -> None:
    assert icdctl("registry", "add", finished)[0] == 0
    (manifest,) = Path.cwd().glob("registry/*/*/v1/manifest.json")
    manifest.write_bytes(content)
    name = str(manifest.parent.parent.relative_to(Path.cwd() / "registry"))
    for command in (
        ["registry", "list"],
        ["registry", "show", name],
        ["list", "teachers"],
        ["eval", f"registry:{name}"],
    ):
        assert str(manifest) in fails(icdctl(*command), 1).error
    code, out, err = icdctl("registry", "verify")
    assert code == 1
    assert "BROKEN" in out
    assert str(manifest) in said(err).error


def test_nothing_is_registered(icdctl: CommandLine) -> None:
    failure = fails(icdctl("registry", "show", "digits100/res8-ce"), 1)
    assert "`icdctl registry add" in failure.hint
    code, out, _ = icdctl("registry", "list", "--json")
    assert (code, json.loads(out)) == (0, {"artifacts": []})
    assert contents(Path.cwd()) == {}


# --- the process ---------------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_is_no_failure(finished: Path) -> None:
    command = (
        f"{shlex.quote(sys.executable)} -m icdctl registry list --registry nope --json | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], text=True, capture_output=True, timeout=40, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_a_stdout_that_takes_nothing(redirection: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m icdctl registry list --json {redirection}"
    done = subprocess.run(["bash", "-c", command], text=True, capture_output=True, timeout=40, check=False)
    assert done.returncode == 1
    assert "stdout" in said(done.stderr).error


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path}/gone && rmdir ../gone && exec {shlex.quote(sys.executable)} -m icdctl list models"
    done = subprocess.run(["bash", "-c", command], text=True, capture_output=True, timeout=40, check=False)
    assert done.returncode == 1
    failure = fails((done.returncode, done.stdout, done.stderr), 1)
    assert "current folder" in failure.error
    assert "cd" in failure.hint


def test_no_home() -> None:
    """`~nobody-here` has no home either."""
    done = in_a_process("validate", "~nobody-here/run", environment={"HOME": None})
    fails((done.returncode, done.stdout, done.stderr), 1)
    done = in_a_process("registry", "list", environment={"ICDCTL_HOME": "~nobody-here/state", "HOME": None})
    assert "Traceback" not in done.stderr


def test_a_home_that_does_not_exist(icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICDCTL_HOME", "~nobody-here/state")
    failure = fails(icdctl(*TRAIN, "--out", "run"), 1)
    assert "~nobody-here/state" in failure.error
    for command in ("eval", "export"):
        assert "~nobody-here/run" in fails(icdctl(command, "~nobody-here/run"), 1).error


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"NO_COLOR": None}, {"NO_COLOR": None, "TERM": "dumb"}])
def test_no_escape_codes_in_a_pipe_and_a_traceback_only_on_request(environment: dict[str, str | None]) -> None:
    done = in_a_process("registry", "show", "nope", environment=environment)
    fails((done.returncode, done.stdout, done.stderr), 1)


def test_debugging_shows_the_traceback(icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICDCTL_DEBUG", "1")
    code, out, err = icdctl("registry", "show", "nope")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert "\nerror: " in err
    assert "\nhint: " in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_training_is_answered(finished: Path, tmp_path: Path, number: int, code: int) -> None:
    """Typer turns Ctrl-C into a silent exit of its own; what is said and returned must not depend on where it comes."""
    waiting = (
        "import sys, time; from icdctl import cli; from icdctl import registry;"
        "registry.list_artifacts = lambda folder: (print('here', flush=True), time.sleep(20));"
        "sys.argv = ['icdctl', 'registry', 'list']; cli.run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", waiting], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert "interrupted" in fails((process.returncode, out, err), code).error


def test_an_interrupted_training_goes_on(icdctl: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = (*TRAIN, "--epochs", "500", "--out", str(out))
    command = [sys.executable, "-m", "icdctl", *arguments]
    process = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 40
    while not (out / "history.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, err = process.communicate(timeout=30)
    failure = fails((process.returncode, stdout, err), 143)
    assert re.fullmatch(r"interrupted; the state after epoch \d+ of 500 is saved", failure.error)
    assert "`--resume --out" in failure.hint
    code, _, err = icdctl(*arguments, "--resume", "--time-limit", "0.001s")
    assert (code, err.startswith("continuing after epoch ")) == (0, True)


# --- hints ---------------------------------------------------------------------------------------------------------


def _command_names() -> set[str]:
    root = typer.main.get_command(app)
    names: set[str] = set()
    for name, command in getattr(root, "commands", {}).items():
        names.add(name)
        names |= {f"{name} {below}" for below in getattr(command, "commands", {})}
    return names


def _flags(name: str) -> set[str]:
    command: Any = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    return {flag for parameter in command.params for flag in parameter.opts} | {"--help", "-h"}


def _check_flags(command: str, text: str) -> None:
    for flag in re.findall(r"--[a-z][a-z-]*", text):
        assert flag in _flags(command), f"`{flag}` is no option of `icdctl {command}`"


def _messages() -> Iterator[tuple[str, str]]:
    """Every string of the package, with {} where an f-string fills in a value; docstrings are among them."""
    for path in sorted(Path(inspect.getfile(library)).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                yield path.name, "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                yield path.name, node.value


def test_messages_name_commands_and_flags_that_exist() -> None:
    known = _command_names()
    wrong = []
    for file, text in _messages():
        whole = re.fullmatch(r"icdctl [a-z][a-z -]*( \{\})?", text)
        for shown in [text.removeprefix("icdctl ")] if whole else re.findall(r"`icdctl ([a-z][^`\n]*)`", text):
            words = shown.split()
            name = next((name for name in (" ".join(words[:2]), words[0]) if name in known), None)
            if name is None:
                wrong.append(f"{file}: `icdctl {shown}`")
                continue
            flags = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", shown)) - _flags(name)
            wrong += [f"{file}: `icdctl {shown}` has no {flag}" for flag in sorted(flags)]
    assert wrong == []


def test_the_listing_in_the_hint_for_a_setting_works(icdctl: CommandLine, finished: Path) -> None:
    job = ("distill", "--method", "kd", "--teacher", finished, "--student", "res8", *TINY, "--dry-run")
    failure = fails(icdctl(*job, "--set", "temprature=4"), 2)
    assert "did you mean `temperature`?" in failure.hint
    (listing,) = re.findall(r"`icdctl ([^`]+)` shows all", failure.hint)
    code, out, _ = icdctl(*listing.split())
    assert code == 0
    assert "temperature" in out


def test_help_shows_what_stands_in_brackets(icdctl: CommandLine) -> None:
    """`[batch, H, W, 3]` is text, not markup."""
    code, out, _ = icdctl("export", "--help")
    assert code == 0
    assert "[batch, H, W, 3]" in re.sub(r"[│\s]+", " ", out)
