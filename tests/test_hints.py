"""Every command and flag that a message names exists."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import typer
from conftest import CommandLine
from failure_support import TINY, fails, finished, flags_of

import icdctl as library
from icdctl.cli import app

__all__ = ["finished"]


def _command_names() -> set[str]:
    root = typer.main.get_command(app)
    names: set[str] = set()
    for name, command in getattr(root, "commands", {}).items():
        names.add(name)
        names |= {f"{name} {below}" for below in getattr(command, "commands", {})}
    return names


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
            flags = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", shown)) - flags_of(name)
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
