"""Places that can't be used, and what happens to the process: nothing half-written, nothing of the user's lost."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CommandLine
from failure_support import KEEP, TRAIN, contents, fails, finished, in_a_process, run_folder, said

__all__ = ["finished", "run_folder"]


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
