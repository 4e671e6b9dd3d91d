"""Tables as text: a line a row where they are piped, whole words within the width of a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import CommandLine

from icdctl.commands import table_layout

LONG = "trained on all of the images, and tested once"


def on_terminal(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    numeric = [bool(rows) and all(row[place].isdecimal() for row in rows) for place in range(len(columns))]
    return "\n".join(line for line, _ in table_layout.for_terminal(columns, rows, numeric, width=width))


def test_what_fits_is_a_table_without_the_columns_that_say_nothing() -> None:
    columns, rows = ("name", "empty", "n", "note"), (("a", "", "5", ""), ("bcdefg", "", "12", "x y"))
    assert on_terminal(columns, rows, 80) == "name     n  note\na        5\nbcdefg  12  x y"
    assert list(table_layout.piped(columns, rows, (False, False, True, False))) == [
        "name    empty   n  note",
        "a               5",
        "bcdefg         12  x y",
    ]
    assert on_terminal(columns, (), 80) == "name  empty  n  note"
    assert on_terminal(("a", "b"), (("", ""),), 80) == "a\n"


def test_what_is_too_wide_is_wrapped_between_words() -> None:
    columns, rows = ("name", "n", "state", "note"), (("first", "12", "done", LONG), ("second", "7", "done", "fine"))
    assert on_terminal(columns, rows, 44) == (
        "name     n  state  note\n"
        "first   12  done   trained on all of the\n"
        "                   images, and tested once\n"
        "second   7  done   fine"
    )


def test_long_names_stand_above_the_rest() -> None:
    columns = ("name", "top-1", "n", "note")
    rows = (("cifar100/res32x4-mv2-cd_sdd_kd", "69.46", "5", "one of many"), ("b", "70.225", "5", ""))
    assert on_terminal(columns, rows, 34) == (
        "name\n    top-1   n  note\ncifar100/res32x4-mv2-cd_sdd_kd\n    69.46   5  one of many\nb\n    70.225  5"
    )


def test_what_fits_in_no_other_way_is_a_record_a_row() -> None:
    columns = ("name", "state", "hash", "source", "licence")
    rows = (("res56", "fetched", "published", "https://example.org/a/long/address", LONG), ("x", "", "none", "", "own"))
    assert on_terminal(columns, rows, 44) == (
        "res56\n"
        "    state    fetched\n"
        "    hash     published\n"
        "    source   https://example.org/a/long/address\n"
        "    licence  trained on all of the images,\n"
        "             and tested once\n"
        "x\n"
        "    hash     none\n"
        "    licence  own"
    )


def test_a_list_with_remarks_stays_one() -> None:
    columns, rows = ("", "what", "found"), (("ok", "state", f"/home/{'somebody/' * 5}state"), ("ok", "cpu", LONG))
    assert on_terminal(columns, rows, 40).splitlines()[1:4] == [
        f"ok  state  /home/{'somebody/' * 5}state",  # for the terminal to fold, so that it is copied whole
        "ok  cpu    trained on all of the images,",
        "           and tested once",
    ]


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize(
    "command", [("recipes", "list", "mv2"), ("list", "methods"), ("list", "datasets"), ("reproduce", "demo", "--list")]
)
def test_every_word_of_every_cell_is_there_whole(
    icdctl: CommandLine, command: Sequence[str], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Sequence[str], Sequence[Sequence[str]], str]] = []
    real = table_layout.piped

    def piped(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> list[str]:
        lines = list(table_layout.for_terminal(columns, rows, numeric, width=width))
        seen.append((columns, rows, "\n".join(line for line, _ in lines)))
        return list(real(columns, rows, numeric))

    with monkeypatch.context() as patch:
        patch.setattr(table_layout, "piped", piped)
        out = icdctl(*command)[1]
    assert seen
    assert len([line for line in out.splitlines() if line]) == sum(1 + len(rows) for _, rows, _ in seen)
    for _, rows, text in seen:
        assert {word for row in rows for cell in row for word in cell.split()} <= set(text.split())
        longest = max(len(word) for word in text.split())
        assert all(len(line) <= max(width, 40 + longest) for line in text.splitlines())


def test_a_terminal_of_80_columns_is_filled_and_not_left() -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (50, 80))
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "icdctl", "recipes", "list", "cifar100/res32x4-mv2", "sdd_kd"],
        stdin=follower,
        stdout=follower,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(follower)
    content = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        content += part
    os.close(leader)
    assert process.wait() == 0
    assert process.stderr is not None
    process.stderr.close()
    lines = content.decode().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert max(map(len, lines)) <= 80
    assert "cifar100/res32x4-mv2-cd_sdd_kd-gamma2" in lines


def test_the_state_folder_keeps_git_out(icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ICDCTL_HOME")
    given = ("--model", "res8", "--dataset", "digits100", "--train-images", "100", "--test-images", "50")
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert icdctl("train", *given, "--epochs", "1", "--device", "cpu", "--out", "run")[0] == 0
    assert Path(".icdctl/.gitignore").read_text(encoding="utf-8").splitlines()[-1] == "*"
    told = subprocess.run(["git", "status", "--porcelain"], check=True, capture_output=True, text=True)
    assert told.stdout == "?? run/\n"
    Path(".icdctl/.gitignore").write_text("!kept\n")  # whoever changes it means it
    assert icdctl("train", *given, "--epochs", "1", "--device", "cpu", "--out", "other")[0] == 0
    assert Path(".icdctl/.gitignore").read_text() == "!kept\n"


def test_a_state_folder_that_was_there_before_is_left_as_it_is(
    icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path))
    given = ("--model", "res8", "--dataset", "digits100", "--train-images", "100", "--test-images", "50")
    assert icdctl("train", *given, "--epochs", "1", "--device", "cpu", "--out", "run")[0] == 0
    assert (tmp_path / "checkpoints").is_dir()
    assert not (tmp_path / ".gitignore").exists()
