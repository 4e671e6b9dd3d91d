"""The command line as a person uses it: whole commands, whole output."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine

from icdctl import models
from icdctl.commands import train_and_show
from icdctl.methods import METHODS, check_settings

TINY = ("--dataset", "digits100", "--train-images", "128", "--test-images", "100", "--epochs", "1", "--device", "cpu")


@pytest.fixture
def run_folder(icdctl: CommandLine, tmp_path: Path) -> Path:
    out = tmp_path / "teacher"
    code, _, err = icdctl("train", "--model", "res8", *TINY, "--out", out)
    assert (code, err) == (0, "")
    return out


def test_the_whole_job_by_commands(icdctl: CommandLine, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    given = (
        "--method",
        "cd_sdd_dkd",
        "--teacher",
        run_folder,
        "--student",
        "res8",
        "--scales",
        "1,2,4",
        "--set",
        "gamma=4",
    )
    code, stdout, err = icdctl("distill", *given, *TINY, "--out", out, "--json")
    assert (code, err) == (0, "")
    result = json.loads(stdout)
    assert (result["out"], result["method"], result["variant"]) == (str(out), "cd_sdd_dkd", "published")
    assert json.loads((out / "config.json").read_text())["settings"]["gamma"] == 4

    code, stdout, _ = icdctl("eval", out, "--teacher", run_folder, "--test-images", "100", "--json")
    measured = json.loads(stdout)
    assert code == 0
    assert measured["top1"] == result["final_top1"]
    assert {"top1", "top5", "loss", "ece", "per_class", "agreement", "fidelity"} <= set(measured)
    assert len(measured["per_class"]) == 100

    code, stdout, _ = icdctl("export", out, "--json")
    exported = json.loads(stdout)
    assert code == 0
    assert exported["verification"]["passed"]
    assert icdctl("verify", out / "onnx", "--against", out)[0] == 0
    code, stdout, _ = icdctl("eval", out / "onnx" / "model.onnx", "--test-images", "100", "--json")
    assert json.loads(stdout)["top1"] == pytest.approx(measured["top1"])

    code, stdout, _ = icdctl("registry", "add", run_folder)
    assert (code, stdout) == (0, "digits100/res8-ce@v1\n")
    code, stdout, _ = icdctl("registry", "add", out, "--onnx", out / "onnx", "--json")
    added = json.loads(stdout)
    assert added["reference"] == "digits100/res8-cd_sdd_dkd@v1"
    assert added["teacher_artifact"] == "digits100/res8-ce@v1"
    listed = json.loads(icdctl("registry", "list", "--json")[1])["artifacts"]
    assert [item["name"] for item in listed] == ["digits100/res8-cd_sdd_dkd", "digits100/res8-ce"]
    assert icdctl("registry", "verify")[0] == 0
    assert "digits100/res8-ce@v1" in icdctl("registry", "show", "digits100/res8-cd_sdd_dkd")[1]

    again = ("distill", "--method", "kd", "--teacher", "res8", "--student", "res8", *TINY, "--out", tmp_path / "named")
    assert icdctl(*again)[0] == 0
    stated = json.loads((tmp_path / "named" / "config.json").read_text())
    assert stated["teacher_sha256"] == json.loads((out / "config.json").read_text())["teacher_sha256"]


def test_a_long_run_tells_a_log_now_and_then_that_it_is_alive(
    icdctl: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_and_show, "_SECONDS_BETWEEN_LINES", 0.0)
    given = ("--model", "res8", *TINY, "--epochs", "2", "--out", tmp_path / "run")
    code, stdout, err = icdctl("train", *given, "--json")
    assert code == 0
    assert [line.partition(" test top-1 ")[0] for line in err.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert err.endswith(f"{json.loads(stdout)['final_top1']:.2f}\n")


def test_a_model_trained_as_teacher_is_found_by_its_name(icdctl: CommandLine, tmp_path: Path) -> None:
    given = ("train", "--model", "res8", *TINY, "--out", tmp_path / "teacher", "--as-teacher", "--resume", "--json")
    for _ in range(2):  # the second time it is there already
        code, stdout, _ = icdctl(*given)
        assert (code, json.loads(stdout)["artifact"]) == (0, "digits100/res8-ce@v1")
    code, stdout, err = icdctl("eval", tmp_path / "teacher", "--teacher", "res8", "--test-images", "50", "--json")
    assert (code, json.loads(stdout)["agreement"]) == (0, 100.0), err
    plan = ("distill", "--method", "kd", "--teacher", "res8", "--student", "mv2", "--dataset", "digits100", "--dry-run")
    weights = Path(json.loads(icdctl(*plan)[1])["teacher_weights"])
    assert weights.read_bytes() == (tmp_path / "teacher" / "student.safetensors").read_bytes()


def test_a_config_file_repeats_a_run_bit_for_bit(icdctl: CommandLine, run_folder: Path, tmp_path: Path) -> None:
    repeated = tmp_path / "again"
    assert icdctl("train", "--config", run_folder / "config.json", "--out", repeated)[0] == 0
    assert (repeated / "student.safetensors").read_bytes() == (run_folder / "student.safetensors").read_bytes()


def test_flags_beat_the_environment_which_beats_params_yaml_which_beats_the_recipe(
    icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolved(*flags: str) -> dict[str, Any]:
        code, stdout, _ = icdctl("train", "--model", "res8", "--dataset", "digits100", "--dry-run", *flags)
        assert code == 0
        found: dict[str, Any] = json.loads(stdout)
        return found

    assert (resolved()["lr"], resolved()["epochs"], resolved()["recipe"]) == (0.1, 16, "digits100")
    Path("dvc.yaml").write_text("stages: {}\n")
    Path("params.yaml").write_text("train: {lr: 0.2, epochs: 7}\ncells: {}\n")
    assert (resolved()["lr"], resolved()["epochs"]) == (0.2, 7)
    monkeypatch.setenv("ICDCTL_LR", "0.3")
    assert (resolved()["lr"], resolved()["epochs"]) == (0.3, 7)
    assert resolved("--lr", "0.4")["lr"] == 0.4


def test_the_default_run_folder_names_what_differs_from_the_recipe(icdctl: CommandLine, run_folder: Path) -> None:
    given = ("distill", "--method", "cd_sdd_dkd", "--teacher", run_folder, "--student", "mv2", "--dataset", "digits100")
    code, stdout, _ = icdctl(*given, "--dry-run")
    assert code == 0
    assert Path(json.loads(stdout)["out"]).parts[-3:] == ("runs", "digits100", "res8-mv2-cd_sdd_dkd-s0")
    changed = ("--set", "gamma=8", "--set", "variant=corrected", "--scales", "2,4", "--epochs", "3", "--seed", "5")
    name = Path(json.loads(icdctl(*given, *changed, "--dry-run")[1])["out"]).name
    assert name == "res8-mv2-cd_sdd_dkd-s5-epochs3-scales24-gamma8-variantcorrected"


def test_the_main_job_without_teacher_and_data_says_how_to_get_both(icdctl: CommandLine) -> None:
    given = ("--method", "cd_sdd_dkd", "--teacher", "res32x4", "--student", "mv2", "--scales", "1,2,4")
    code, stdout, err = icdctl("distill", *given)
    assert (code, stdout) == (1, "")
    assert "error: teacher `res32x4` for `cifar100` is not there" in err
    assert "icdctl train --model res32x4 --dataset cifar100" in err
    assert "icdctl fetch-teachers res32x4" in err
    assert "error: CIFAR-100 is missing" in err
    assert "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz" in err


def test_a_published_checkpoint_is_recognised_by_its_shapes(icdctl: CommandLine, tmp_path: Path) -> None:
    model = models.create("wrn40_2", 100)
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": model.state_dict(), "accuracy": torch.tensor(75.61)}, path)
    given = ("distill", "--method", "kd", "--teacher", path, "--student", "res8", "--dataset", "digits100", "--dry-run")
    assert json.loads(icdctl(*given)[1])["teacher"] == "wrn40_2"


@pytest.mark.parametrize("what", ["methods", "models", "datasets", "recipes", "teachers"])
def test_every_list_is_a_table_and_a_json_object(icdctl: CommandLine, what: str) -> None:
    code, stdout, _ = icdctl("list", what)
    assert code == 0
    assert "\x1b" not in stdout
    rows = json.loads(icdctl("list", what, "--json")[1])[what]
    assert len(rows) == {"methods": len(METHODS), "models": 23, "datasets": 4, "recipes": 6, "teachers": 9}[what]
    assert all(row["name"] in stdout for row in rows)


def test_the_list_of_methods_has_the_settings_of_each_with_their_defaults(icdctl: CommandLine) -> None:
    rows = {row["name"]: row for row in json.loads(icdctl("list", "methods", "--json")[1])["methods"]}
    for name, method in METHODS.items():
        assert {**rows[name]["settings"], "variant": rows[name]["variant"]} == check_settings(name, {})
        assert rows[name]["source"] == method.source
    _, table, _ = icdctl("list", "methods")
    assert "temperature=4" in table
    assert all(method.source not in table for method in METHODS.values()), "too wide for a terminal"


def test_doctor_looks_at_the_machine(icdctl: CommandLine) -> None:
    code, stdout, _ = icdctl("doctor", "--json")
    assert code == 0
    found = {check["what"]: check["found"] for check in json.loads(stdout)["checks"]}
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["digits100"] == "embedded"


def test_validate_tells_sound_from_broken(icdctl: CommandLine, run_folder: Path) -> None:
    assert icdctl("validate", run_folder)[0] == 0
    assert icdctl("validate", run_folder / "config.json")[0] == 0
    history = run_folder / "history.csv"
    history.write_text(history.read_text().replace("\n1,", "\n2,"))
    code, stdout, err = icdctl("validate", run_folder, "--json")
    assert code == 1
    assert json.loads(stdout)["error"]["code"] == 1
    assert "has epochs 2, expected 1 to 1" in err


def test_weights_that_changed_since_their_run_are_refused(icdctl: CommandLine, run_folder: Path) -> None:
    weights = run_folder / "student.safetensors"
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the sign or the largest digits of nothing: it loads as ever
    weights.write_bytes(content)
    for command in ("eval", "export", "validate"):
        code, out, err = icdctl(command, run_folder)
        assert (code, "BROKEN" in out) == (1, command == "validate")
        assert "it has changed since its run wrote it" in err
    assert icdctl("eval", weights)[0] == 0
    code, _, err = icdctl("registry", "add", run_folder)
    assert (code, "has changed since its run wrote it" in err) == (1, True)
    assert icdctl("export", weights, "--out", run_folder / "changed")[0] == 0
    assert "final_top1" not in (run_folder / "changed" / "README.md").read_text()


def test_json_failures_and_piped_output_are_plain(tmp_path: Path) -> None:
    given = ["--method", "cd_sd_dkd", "--teacher", "res8", "--student", "mv2"]
    command = [sys.executable, "-m", "icdctl", "distill", *given]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["message"]) == (2, "unknown method `cd_sd_dkd`")
    assert error["hint"] == "did you mean `cd_sdd_dkd`? `icdctl list methods` shows all of them"
    assert "\x1b" not in done.stdout + done.stderr
