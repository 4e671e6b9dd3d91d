"""cells.yaml: the cells that params.yaml describes, one a line, as `dvc.yaml` reads them.

The file holds a digest of the cells that it was made from. It is stale when params.yaml describes other cells. A
value that DVC changes in it for an experiment (`dvc exp run -S cells.yaml:grid.NAME.settings.gamma=4`) counts, and
does not make it stale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from icdctl import files
from icdctl.config import sources
from icdctl.errors import ArtifactError, first_few
from icdctl.grid.expansion import Cells
from icdctl.grid.params_file import flow_entry

CELLS_FILE = "cells.yaml"
COMMAND = "icdctl grid expand"
_GRID, _DIGEST = "grid", "expanded_from"
_DIGITS = 16
_MOST_NAMED = 3
_HEAD = f"""\
# Made by `{COMMAND}` from params.yaml, for dvc.yaml to read: edit params.yaml, and run that command again.
# Until then, an edit here changes the one cell that it is in.
"""


@dataclass(frozen=True)
class Difference:
    """The difference of two sets of cells, by name."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        """`2 added (a, b), 1 removed (c)`."""
        parts = []
        for what, names in vars(self).items():
            if names:
                parts.append(f"{len(names)} {what} ({first_few(names, _MOST_NAMED)})")
        return ", ".join(parts)


def difference(before: Mapping[str, object], after: Mapping[str, object]) -> Difference:
    """Which cells were added, changed or removed from one set to the other."""
    return Difference(
        added=tuple(name for name in after if name not in before),
        changed=tuple(name for name in after if name in before and _digest(before[name]) != _digest(after[name])),
        removed=tuple(name for name in before if name not in after),
    )


def text(cells: Cells) -> str:
    """The whole text of cells.yaml."""
    lines = [f"  {flow_entry(name, options)}\n" for name, options in cells.items()]
    return f"{_HEAD}{_DIGEST}: '{_digest(cells)}'\n\n{_GRID}:\n{''.join(lines)}" if lines else _HEAD


def write(root: Path, cells: Cells) -> Difference:
    """Write cells.yaml, unless it is up to date.

    Returns:
        What changed in it.

    Raises:
        ArtifactError: it can't be written.
    """
    path = root / CELLS_FILE
    try:
        held = files.read_text(path)
        before = _read(path)[_GRID]
    except (OSError, ValueError, ArtifactError):  # it is made again, whatever it held
        held, before = "", {}
    made = text(cells)
    if held != made:
        files.write_text(path, made)
    return difference(before if isinstance(before, dict) else {}, cells)


def current(root: Path, expanded: Cells) -> Cells:
    """The cells of a project: those of cells.yaml where there is one, as DVC takes them; else the expanded ones.

    Args:
        root: the project.
        expanded: the cells that params.yaml describes.

    Raises:
        ArtifactError: the file is stale, or is not what `icdctl grid expand` writes.
        UsageError: it is not YAML.
    """
    path = root / CELLS_FILE
    if not path.is_file():
        return expanded
    content = _read(path)
    cells = content[_GRID]
    if not isinstance(cells, dict) or not all(isinstance(options, dict) for options in cells.values()):
        raise _broken(path)
    if content[_DIGEST] != _digest(expanded):
        found = difference(cells, expanded)
        raise ArtifactError(
            f"`{path}` is out of date with params.yaml: {found or 'it was made from other cells'}",
            hint=f"`{COMMAND}` makes it again",
        )
    return {str(name): options for name, options in cells.items()}


def _read(path: Path) -> dict[str, object]:
    content = sources.read_yaml(path)
    if not isinstance(content, dict) or not {_GRID, _DIGEST} <= content.keys():
        raise _broken(path)
    return content


def _broken(path: Path) -> ArtifactError:
    return ArtifactError(f"`{path}` is not what `{COMMAND}` writes", hint=f"delete it, and run `{COMMAND}`")


def _digest(value: object) -> str:
    """A digest of a value, equal for equal values, however they are written in YAML."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _plain(value: object) -> object:
    """A value of a YAML file as JSON can hold it; 2 and 2.0 are one number."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if type(value) is int:
        return float(value) if abs(value) < 2**53 else str(value)
    return value if value is None or isinstance(value, bool | float | str) else str(value)
