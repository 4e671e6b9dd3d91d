"""A folder from elsewhere: its git configuration and its modules name programs, none of which icdctl runs."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest

import icdctl
from icdctl.engine.environment import git_state

NAME = ("-c", "user.name=x", "-c", "user.email=x@example.org")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *NAME, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a commit of one file, `a.txt`."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.txt").write_text("one\n")
    (folder / ".gitattributes").write_text("*.txt filter=own\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_the_state_of_a_checkout_is_its_commit_and_whether_it_differs(checkout: Path, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout) == {"commit": commit, "dirty": False}
    (checkout / "new.txt").write_text("not tracked\n")
    assert git_state(checkout) == {"commit": commit, "dirty": False}
    (checkout / "a.txt").write_text("two\n")
    assert git_state(checkout) == {"commit": commit, "dirty": True}
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q")
    assert git_state(tmp_path / "empty") is None


def _changed_in_time(checkout: Path) -> None:
    """Make git compare the content of a file, which its filter would read."""
    os.utime(checkout / "a.txt", (1, 1))


PROGRAMS = {
    "monitor": ["core.fsmonitor"],
    "filter": ["filter.own.clean"],
    "required-filter": ["filter.own.clean", "filter.own.required"],
    "process": ["filter.own.process"],
    "name-with-an-equals-sign": ["filter.a=b.clean"],
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_no_program_of_a_git_configuration_is_run(checkout: Path, tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "ran"
    for key in PROGRAMS[kind]:
        git(checkout, "config", key, "true" if key.endswith("required") else f"touch {marker}; cat")
    if "=" in PROGRAMS[kind][0]:
        (checkout / ".gitattributes").write_text("*.txt filter=a=b\n")
    _changed_in_time(checkout)
    found = git_state(checkout)
    assert found is not None
    assert not marker.exists()
    git(checkout, "update-index", "--refresh") if kind == "monitor" else git(checkout, "diff", "--stat")
    _changed_in_time(checkout)
    subprocess.run(["git", "-C", str(checkout), "status"], capture_output=True, check=False)
    assert marker.exists(), "git itself would have run it"


def test_no_hook_is_run(checkout: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    hook = checkout / ".git" / "hooks" / "post-index-change"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {marker}\n")
    hook.chmod(0o755)
    _changed_in_time(checkout)
    assert git_state(checkout) is not None
    assert not marker.exists()


def test_no_program_of_a_submodule_is_run(checkout: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    inner = tmp_path / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    git(inner, "commit", "-q", "--allow-empty", "-m", "inner")
    git(checkout, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner), "part")
    git(checkout, "commit", "-q", "-m", "with a part")
    git(checkout / "part", "config", "core.fsmonitor", f"touch {marker}; false")
    found = git_state(checkout)
    assert found is not None
    assert found["dirty"] is False
    assert not marker.exists()


def test_modules_in_the_current_folder_are_not_imported_by_child_processes() -> None:
    """`python -m` would put the current folder before all others; `-P` does not."""
    found = []
    for path in Path(icdctl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = [each.value for each in getattr(node, "elts", []) if isinstance(each, ast.Constant)]
            if isinstance(node, ast.List) and ast.unparse(node).startswith("[sys.executable"):
                found.append((path.name, words[0]))
    assert len(found) == 3
    assert {word for _, word in found} == {"-P"}, found
