"""A finished run, and what every failed command must look like: `error:` and `hint:` on stderr, nothing on stdout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

import icdctl as library
from icdctl.cli import app

TINY = ("--dataset", "digits100", "--train-images", "40", "--test-images", "20", "--epochs", "1", "--device", "cpu")
TRAIN = ("train", "--model", "res8", *TINY)
KEEP = "precious"


@pytest.fixture(scope="session")
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


def flags_of(name: str) -> set[str]:
    """The flags of a command."""
    command: Any = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    return {flag for parameter in command.params for flag in parameter.opts} | {"--help", "-h"}


def check_flags(command: str, text: str) -> None:
    """Check that every flag in a text is one of the command."""
    for flag in re.findall(r"--[a-z][a-z-]*", text):
        assert flag in flags_of(command), f"`{flag}` is no option of `icdctl {command}`"
