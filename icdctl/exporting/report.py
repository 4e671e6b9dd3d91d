"""What a verification found: named checks with their numbers, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    detail: str
    """What was expected and found, in a sentence."""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """A plain value; what is not finite becomes null."""
        numbers = {key: _finite(value) for key, value in self.numbers.items()}
        return {"name": self.name, "status": self.status, "detail": self.detail, "numbers": numbers}


@dataclass(frozen=True)
class Report:
    """All checks, in the order in which they were made."""

    checks: tuple[Check, ...]
    max_error: float | None = None
    """Largest difference between a logit of the graph and of the reference, where there was one; infinity for NaN."""
    tolerance: float | None = None
    """What `max_error` may be at most."""
    agreement: float | None = None
    """Percent of the given images whose top class is the reference's."""
    reference: tuple[tuple[float, ...], ...] | None = field(default=None, repr=False)
    """The reference's logits for the first probes: an export records them, so that it can be run against them later,
    without the weights."""

    @property
    def passed(self) -> bool:
        """No check failed. Skipped ones are named in `checks`."""
        return all(check.status != "fail" for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "fail")

    def as_json(self) -> dict[str, Any]:
        """A plain value, without the recorded logits."""
        return {
            "passed": self.passed,
            "max_error": _finite(self.max_error),
            "tolerance": self.tolerance,
            "agreement": self.agreement,
            "checks": [check.as_json() for check in self.checks],
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
