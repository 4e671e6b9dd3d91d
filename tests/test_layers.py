"""The house has floors: imports go down, never up, and never in circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import icdctl
from icdctl import grid

PACKAGE = Path(icdctl.__file__).parent
BASE = {"errors", "files"}
ALLOWED: dict[str, set[str]] = {
    "__init__": {"api", "errors", "methods", "models"},
    "__main__": {"cli"},
    "cli": {"__init__", "commands", "errors"},
    "commands": {
        *BASE,
        "api",
        "benchmark",
        "cleanup",
        "config",
        "data",
        "demo",
        "engine",
        "exporting",
        "grid",
        "methods",
        "models",
        "papers",
        "registry",
        "reporting",
        "run_files",
        "science",
        "teachers",
        "validate",
        "versions",
    },
    "papers": {*BASE, "api", "config", "data", "engine", "grid", "methods", "models", "science", "teachers"},
    "demo": {*BASE, "api", "data", "engine", "exporting", "registry", "reporting"},
    "grid": {*BASE, "api", "config", "data", "engine", "methods", "run_files", "teachers"},
    "api": {
        *BASE,
        "config",
        "data",
        "engine",
        "evaluation",
        "exporting",
        "methods",
        "models",
        "registry",
        "run_files",
        "teachers",
    },
    "reporting": {
        *BASE,
        "config",
        "data",
        "engine",
        "evaluation",
        "exporting",
        "methods",
        "models",
        "registry",
        "run_files",
        "science",
        "teachers",
        "versions",
    },
    "benchmark": {*BASE, "config", "data", "engine", "evaluation", "methods", "models", "versions"},
    "cleanup": {*BASE, "config", "engine", "run_files"},
    "validate": {*BASE, "config", "data", "exporting", "registry", "run_files"},
    "teachers": {*BASE, "data", "evaluation", "models", "registry", "run_files"},
    "exporting": {*BASE, "data", "models", "registry", "versions"},
    "engine": {*BASE, "config", "data", "evaluation", "methods", "models", "run_files", "versions"},
    "registry": {*BASE, "data", "models", "run_files"},
    "config": {*BASE, "data", "methods", "models"},
    "evaluation": {"data", "errors"},
    "run_files": BASE,
    "science": {"errors"},
    "methods": {"errors"},
    "models": BASE,
    "data": BASE,
    "files": {"errors"},
    "errors": set(),
    "versions": set(),
}
"""Room -> the rooms that it may import, besides itself."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of icdctl that a file imports, at its head or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "icdctl" else [node.module]
            )
        for name in names:
            parts = name.split(".")
            if parts[0] == "icdctl":
                known = len(parts) > 1 and parts[1] in ALLOWED
                rooms.add(parts[1] if known else "__init__")
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_the_rooms_below_it_alone(path: Path) -> None:
    room = room_of(path)
    assert imported_rooms(path) - {room} <= ALLOWED[room]


def test_the_floors_have_no_circle() -> None:
    below = {room: rooms - {"__init__"} for room, rooms in ALLOWED.items() if room != "__init__"}
    while below:
        free = {room for room, rooms in below.items() if not rooms & set(below)}
        assert free, f"a circle among {sorted(below)}"
        below = {room: rooms for room, rooms in below.items() if room not in free}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["distill", "--help"],
        ["--version"],
        ["registry", "--help"],
        ["fetch-data", "--help"],
        ["recipes", "--help"],
        ["clean", "--help"],
        ["grid", "run", "--help"],
    ],
)
def test_help_comes_without_importing_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from icdctl.cli import main
code = main({arguments!r})
heavy = [name for name in ("torch", "numpy", "onnx", "sklearn") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_names_of_the_grid_are_there() -> None:
    # They are fetched when they are first used, by a table of strings that no type checker reads.
    assert sorted(grid.__all__) == dir(grid)
    for name in grid.__all__:
        assert getattr(grid, name) is not None


def test_the_public_names_are_there() -> None:
    assert sorted(icdctl.__all__) == dir(icdctl)
    for name in icdctl.__all__:
        assert getattr(icdctl, name) is not None
    assert callable(icdctl.export)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        icdctl.distil  # noqa: B018 (looking is the test)
