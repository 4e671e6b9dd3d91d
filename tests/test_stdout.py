"""Stdout and stderr of any kind: ASCII or cp1252 alone, closed, full, or a pipe whose reader leaves."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest

import icdctl as package
from icdctl import files
from icdctl.commands import console

MODULE = [sys.executable, "-m", "icdctl"]
NAMES = {"кот": "\\u043a\\u043e\\u0442", "é": "\\xe9", "😀": "\\U0001f600"}
"""Names of classes, and how ASCII shows them."""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1]), **more}


def shell(command: str) -> tuple[int, str]:
    """Exit code and stderr of a line of bash, in which `icdctl` is the program."""
    whole = f'icdctl() {{ "{sys.executable}" -m icdctl "$@"; }}; {command}'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", whole], env=environment(), capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@contextmanager
def stdout_in(encoding: str) -> Iterator[io.BytesIO]:
    """A stdout of this encoding; gives the bytes that reach it."""
    sent = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(sent, encoding=encoding)):
        yield sent


def test_characters_that_stdout_does_not_have_are_escaped() -> None:
    with stdout_in("ascii") as sent:
        for name in NAMES:
            console.show_line(name)
        console.show_table(["class"], [[name] for name in NAMES])

        expected = list(NAMES.values())
        lines = [line.strip() for line in sent.getvalue().decode("ascii").splitlines()]
    assert lines == [*expected, "class", *expected]


def test_characters_that_stdout_has_stay() -> None:
    with stdout_in("cp1252") as sent:
        console.show_line("é кот")
        assert sent.getvalue() == "é \\u043a\\u043e\\u0442\n".encode("cp1252")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-16"])
def test_json_stays_json_in_any_encoding(encoding: str) -> None:
    value = {"names": [*NAMES, "f\udcff.png"]}
    with stdout_in(encoding) as sent:
        console.show_json(value)
        assert json.loads(sent.getvalue().decode(encoding)) == value


def test_bytes_of_a_name_that_is_no_utf8_are_shown() -> None:
    with stdout_in("utf-8") as sent:
        console.show_line(os.fsdecode(b"b\xff\x1b[31m.png"))
        console.show_line("half a character: \ud800")
        assert sent.getvalue() == b"b\\xff\\x1b[31m.png\nhalf a character: \\ud800\n"


def test_a_name_that_is_no_utf8_as_text() -> None:
    assert files.utf8_name("Käse") == "Käse"
    assert files.utf8_name(os.fsdecode(b"b\xff.png")) == "b\\xff.png"
    assert files.utf8_name("\ud800") == "\\ud800"


def test_a_command_under_ascii() -> None:
    command = [*MODULE, "list", "кот"]
    done = subprocess.run(
        command, env=environment(PYTHONIOENCODING="ascii"), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: unknown table `\\u043a\\u043e\\u0442`")


@pytest.mark.parametrize("command", ["icdctl train --help", "icdctl --version", "icdctl registry list --json"])
def test_a_reader_that_leaves_at_once_is_no_failure(command: str) -> None:
    assert shell(f"{command} | true") == (0, "")


@pytest.mark.parametrize("command", ["icdctl train --help", "icdctl --version", "icdctl registry list --json"])
def test_a_full_stdout_is_a_failure_that_says_so(command: str) -> None:
    code, said = shell(f"{command} >/dev/full")
    assert code == 1
    assert said.startswith("error: ")
    assert "No space left on device\n\nhint: " in said
    assert "Traceback" not in said


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_a_stderr_that_takes_nothing_does_not_change_the_exit_code(stderr: str) -> None:
    assert shell(f"(icdctl list nothing; exit $?) {stderr}")[0] == 2


def test_a_closed_descriptor_is_not_given_to_a_file(tmp_path: Path) -> None:
    code = (
        "import os, pathlib\nfrom icdctl.commands import console\nconsole.guard_stdout()\n"
        f"with open({str(tmp_path / 'weights')!r}, 'w') as file:\n"
        "    file.write('kept'); os.write(1, b'a warning of a library')\n"
    )
    subprocess.run(["bash", "-c", '"$0" -c "$1" >&- <&-', sys.executable, code], env=environment(), check=True)
    assert (tmp_path / "weights").read_text() == "kept"


def test_an_error_is_said_even_where_rich_can_open_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(sys, "stderr", Failing())
    console.show_error(["[no] room"], ["wait"])
    assert capfd.readouterr().err == "error: [no] room\n\nhint: wait\n"
