"""The kinds of values that settings have, and how text becomes one."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_DURATION = re.compile(r"(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,12}(?:\.[0-9]{1,20})?)s?)?")
NONE = "none"
"""The word that switches off a setting of the recipe."""


def _listed(value: object) -> object:
    """`0.35,1` or `[150, 180, 210]` as a list; anything else as it is."""
    return value.strip("[]() ").split(",") if isinstance(value, str) else value


def _paired(value: object) -> object:
    """A list of exactly two values."""
    listed = _listed(value)
    if not isinstance(listed, list | tuple) or len(listed) != 2:
        raise ValueError("expected two numbers, as in `0.35,1`")
    return listed


def none_by_name(value: object) -> object:
    """`none` as None, for a setting of the recipe that can be switched off."""
    return None if value == NONE else value


def seconds_of(text: str) -> float:
    """`90m`, `2h`, `45s`, `1h30m` or a number of seconds, in seconds; 0 for anything else."""
    match = re.fullmatch(_DURATION, text.strip())
    if match is None:
        return 0.0
    hours, minutes, rest = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + rest


def interval(text: str) -> str:
    """A time, or a number of steps."""
    if not seconds_of(text):
        raise ValueError("expected a time such as `30s` or `5m`, or a number of steps such as `500`")
    return text


Positive = Annotated[float, Field(gt=0)]
TwoNumbers = Annotated[tuple[Positive, Positive], BeforeValidator(_paired)]
Epochs = Annotated[tuple[int, ...], BeforeValidator(_listed)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
