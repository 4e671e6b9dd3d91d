"""Sweeps: a cell for every combination of values of some settings and options."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from icdctl import methods
from icdctl.api import planning
from icdctl.config.expand import settings_of
from icdctl.config.lookup import OPTIONS
from icdctl.errors import ArtifactError, UsageError, unknown_name
from icdctl.grid.cells import Grid, GridCell

_OPTIONS = {name for name, each in OPTIONS.items() if each.swept}
"""Options that a sweep may change besides a method's settings. Method, teacher and data set make another cell."""
_LISTS = {name for name, each in OPTIONS.items() if each.is_list}
"""Options whose values are lists themselves; `;` separates two of them."""
_MOST_CELLS = 10_000
_ANY_TEACHER = planning.StandIn(("custom", "", ""), None)


def parse_sweeps(given: Sequence[str]) -> dict[str, list[str]]:
    """`["gamma=1,2,4", "scales=1,2;1,2,4"]` as settings or options and their values.

    Raises:
        UsageError: one is not KEY=VALUES, or names a key or a value twice.
    """
    axes: dict[str, list[str]] = {}
    for item in given:
        key, equals, values = item.partition("=")
        name = key.strip().replace("-", "_")
        found = [value.strip() for value in values.split(";" if name in _LISTS else ",")]
        if name not in _LISTS and any(".." in value for value in found):
            raise UsageError(
                f"sweep `{item}` is a range",
                hint="list its values, or search it with `icdctl grid run --search optuna`",
            )
        if not equals or not name or "" in found:
            example = "scales=1,2;1,2,4" if name in _LISTS else "gamma=1,2,4"
            raise UsageError(f"sweep `{item}` is not KEY=VALUES", hint=f"e.g. `--sweep '{example}'`")
        if name in axes:
            raise UsageError(f"`{name}` is swept twice", hint="give all its values at once")
        if len({_plain(value) for value in found}) < len(found):
            raise UsageError(f"sweep `{item}` names a value twice", hint="give each once")
        axes[name] = found
    return axes


def swept(grid: Grid, axes: Mapping[str, Sequence[str]], *, taken: Collection[str]) -> tuple[Grid, list[str]]:
    """Make a cell for every combination of values, and name it after them: `mine-gamma4-lr0.1`.

    Args:
        grid: the cells.
        axes: setting of the cells' methods, or option -> values.
        taken: names of other cells.

    Returns:
        The cells, and why others were left out: their methods do not have what is swept.

    Raises:
        UsageError: no cell has all that is swept, a value is not valid, or two cells would have one name.
    """
    for key in axes:
        if not any(_has(cell, key) for cell in grid.cells):
            known = {*_OPTIONS, *(name for method in methods.METHODS for name in settings_of(method))}
            if key in known:
                raise UsageError(f"no cell that is swept has `{key}`: their methods do not read it", hint=_HINT)
            raise unknown_name("setting or option to sweep", key, sorted(known), listing="icdctl list methods")
    planner = planning.Planner()
    cells: dict[str, GridCell] = {}
    left_out = []
    for cell in grid.cells:
        lacks = lacking(cell, axes)
        if lacks is not None:
            left_out.append(f"`{cell.name}` is left out of the sweep: `{cell.method}` has no `{lacks}`")
            continue
        for values in itertools.product(*axes.values()):
            made = changed(cell, dict(zip(axes, values, strict=True)))
            if made.name in cells or made.name in taken:
                raise UsageError(f"the sweep makes two cells `{made.name}`", hint="call the cells otherwise")
            _check(made, planner)
            cells[made.name] = made
            if len(cells) > _MOST_CELLS:
                raise UsageError(f"the sweep makes more than {_MOST_CELLS:,} cells", hint="give fewer values")
    if not cells:
        raise UsageError(f"no cell has all of `{'`, `'.join(axes)}`", hint=_HINT)
    return replace(grid, cells=tuple(cells.values())), left_out


_HINT = "`icdctl list methods` shows which method has which settings; name the cells to sweep"


def lacking(cell: GridCell, keys: Iterable[str]) -> str | None:
    """The first of these settings and options that a cell does not have; None where it has all."""
    return next((key for key in keys if not _has(cell, key)), None)


def _has(cell: GridCell, key: str) -> bool:
    if key == "scales":
        return _reads_patches(cell.method)
    return key in _OPTIONS or key in settings_of(cell.method)


def _reads_patches(method: str) -> bool:
    try:
        return methods.get(method).needs_patches
    except UsageError:  # reported when the run is planned, with its other problems
        return False


def changed(cell: GridCell, values: Mapping[str, str]) -> GridCell:
    """A cell with these values of its method's settings or of options, named after them."""
    options = dict(cell.options)
    settings: dict[str, Any] = dict(options.get("settings") or {})
    for key, value in values.items():
        (settings if key in settings_of(cell.method) else options)[key] = value
    if settings:
        options["settings"] = settings
    parts = [f"{key.replace('_', '')}{_short(value)}" for key, value in values.items()]
    return replace(cell, name="-".join([cell.name, *parts]), options=options)


def _check(cell: GridCell, planner: planning.Planner) -> None:
    """Refuse wrong values before anything is trained; the teacher need not be there.

    Raises:
        UsageError: the configuration is not valid.
    """
    try:
        planner.plan(cell.command, cell.options, stand_in=_ANY_TEACHER)
    except ArtifactError:
        pass
    except UsageError as error:
        raise UsageError(f"swept cell `{cell.name}`: {error.message}", hint=error.hint) from error


def _plain(value: str) -> float | str:
    """Equal for two ways to write one value."""
    try:
        return float(value)
    except ValueError:
        return value


def _short(value: str) -> str:
    """A value as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", value).strip("_")
