"""The values that a search may try, as ranges and lists, and the trials that it has made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from icdctl.config.run_config import RunConfig
from icdctl.errors import UsageError
from icdctl.grid.cells import Grid
from icdctl.grid.sweeps import lacking, parse_sweeps, swept

_DIGITS = 4
"""Significant digits of a number from a range: enough for a search, and a short name for its folder."""
_EXAMPLE = "e.g. `--search optuna --sweep gamma=0.5..8 --sweep lr=0.001..0.1:log --sweep temperature=2,4`"


@dataclass(frozen=True)
class Range:
    """A range of numbers."""

    low: float
    high: float
    is_logarithmic: bool
    is_whole: bool
    """Whether only whole numbers are tried."""


Axis = Range | tuple[str, ...]
"""The values of one setting: a range, or a list to choose from."""
Space = Mapping[str, Axis]
"""Setting or option -> its values."""


@dataclass(frozen=True)
class Trial:
    """Values that were tried, and their top-1."""

    values: Mapping[str, str]
    val_top1: tuple[float, ...] | None
    """Top-1 on the held-out images after the final epoch, for each seed; None where a run failed."""

    @property
    def score(self) -> float:
        """What the search maximises: the mean over seeds, -inf for a trial that failed."""
        return -math.inf if self.val_top1 is None else math.fsum(self.val_top1) / len(self.val_top1)


def parse_space(given: Sequence[str]) -> dict[str, Axis]:
    """Read `["gamma=0.5..8", "lr=0.001..0.1:log", "temperature=2,4"]` as a space.

    Raises:
        UsageError: one is neither KEY=LOW..HIGH nor KEY=VALUES, or a key is named twice.
    """
    space: dict[str, Axis] = {}
    for item in given:
        key, equals, text = item.partition("=")
        if ".." not in text:
            ((name, values),) = parse_sweeps([item]).items()
            found: Axis = tuple(values)
        else:
            name = key.strip().replace("-", "_")
            found = _range(item, name, text)
        if not equals or not name or name in space:
            raise UsageError(f"`--sweep {item}` names no setting, or one for the second time", hint=_EXAMPLE)
        space[name] = found
    if not space:
        raise UsageError("nothing is searched", hint=_EXAMPLE)
    return space


def _range(item: str, name: str, text: str) -> Range:
    numbers, _, scale = text.partition(":")
    low_text, _, high_text = (part.strip() for part in numbers.partition(".."))
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        low, high = math.nan, math.nan
    if scale.strip() not in ("", "log") or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"`--sweep {item}` is not a range LOW..HIGH or LOW..HIGH:log", hint=_EXAMPLE)
    if scale and low <= 0:
        raise UsageError(f"`--sweep {item}`: a logarithmic range begins above 0", hint=_EXAMPLE)
    known = RunConfig.model_fields.get(name)
    return Range(low, high, bool(scale), is_whole=known is not None and known.annotation is int)


def searchable(grid: Grid, space: Space) -> tuple[Grid, list[str]]:
    """The cells whose methods have all settings of a space, and a message for each cell that is left out.

    Raises:
        UsageError: no cell has them, or a range ends at a value that its setting can't have.
    """
    axes = {
        key: [as_text(axis.low, axis), as_text(axis.high, axis)] if isinstance(axis, Range) else list(axis)
        for key, axis in space.items()
    }
    _, left_out = swept(grid, axes, taken=())
    return replace(grid, cells=tuple(cell for cell in grid.cells if lacking(cell, axes) is None)), left_out


def as_text(value: float | str, axis: Axis) -> str:
    """A value as `--sweep` takes it: rounded to a few digits, and still in its range."""
    if isinstance(axis, tuple):
        return str(value)
    if axis.is_whole:
        return str(int(value))
    rounded = float(f"{value:.{_DIGITS}g}")
    return repr(min(max(rounded, axis.low), axis.high))


def as_value(text: str, axis: Axis) -> float | str:
    """The inverse of `as_text`: a choice stays text, a number becomes one."""
    if isinstance(axis, tuple):
        return text
    return int(text) if axis.is_whole else float(text)
