"""Files that are broken, hostile or of another kind: weights, configurations, variables, what the registry holds."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from failure_support import TINY, TRAIN, check_flags, contents, fails, finished, run_folder, said
from safetensors.torch import load_file, save_file

__all__ = ["finished", "run_folder"]


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
    check_flags("train", failure.hint)


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
