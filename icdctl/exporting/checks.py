"""The outcome of a verification: named checks with their numbers, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Check:
    """One property of the graph that was checked."""

    name: str
    status: Status
    detail: str
    """What was expected and what was found, in one sentence."""
    numbers: Mapping[str, object] = field(default_factory=dict)
    """Measured values by name; every value is a JSON value."""

    def as_json(self) -> dict[str, object]:
        """A value that `json` can write; numbers that are not finite become null."""
        numbers = {key: _finite(value) for key, value in self.numbers.items()}
        return {"name": self.name, "status": self.status, "detail": self.detail, "numbers": numbers}


@dataclass(frozen=True)
class VerificationReport:
    """All checks of one verification, in the order in which they were made."""

    checks: tuple[Check, ...]
    max_error: float | None = None
    """Largest difference between the logits of the graph and of the reference; infinity if a logit is not finite, None
    without a reference."""
    tolerance: float | None = None
    """The largest `max_error` that passes."""
    agreement: float | None = None
    """Percent of the given images that the graph and the reference put into the same class; None without images."""
    reference: tuple[tuple[float, ...], ...] | None = field(default=None, repr=False)
    """The reference's logits for the first probes. An export records them, so that its graph can be verified later
    without the weights."""

    @property
    def passed(self) -> bool:
        """True if no check failed; `checks` names the skipped ones."""
        return all(check.status != "fail" for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "fail")

    def as_json(self) -> dict[str, object]:
        """A value that `json` can write, without the recorded logits."""
        return {
            "passed": self.passed,
            "max_error": _finite(self.max_error),
            "tolerance": self.tolerance,
            "agreement": self.agreement,
            "checks": [check.as_json() for check in self.checks],
        }


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
