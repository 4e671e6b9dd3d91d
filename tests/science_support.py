"""The maintenance scripts of docs/, for tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import icdctl

SCIENCE = Path(icdctl.__file__).parent / "science"


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    path = Path(__file__).parents[1] / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
