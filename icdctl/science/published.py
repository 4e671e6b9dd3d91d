"""Results that papers, repositories and their users published: `published.json`, row by row, in our names.

docs/make_published.py makes the file from a transcript and says what is suspect and why. Top-1 and top-5 are percent.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from icdctl.errors import ArtifactError

FILE = "published.json"

Epoch = Literal["best", "final", "unknown"]
"""Which epoch a number is of; `best` is the best on the test set, and so higher than the final one by chance alone."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Frozen):
    """A number, or a statement about numbers, that somebody published."""

    id: int
    """Its place in the transcript."""
    kind: Literal["student", "plain", "teacher", "time", "reproduction", "claim", "not found"]
    """`plain`: trained without a teacher. `time`: seconds, not accuracy. `reproduction`: by others than the authors.
    `not found`: what was looked for in vain."""
    dataset: str | None = None
    teacher: str | None = None
    student: str | None = None
    """The model that the number is of, for a teacher too."""
    method: str | None = None
    """In our spelling, also where icdctl does not have it."""
    detail: str = ""
    """What sets it apart from the method as it is; empty where nothing does."""
    scales: tuple[int, ...] | None = None
    gamma: float | None = None
    family: Literal["gamma2", "gamma8"] | None = None
    """Which defaults the run was most likely made with, by its folder; see `paper.FAMILIES`."""
    top1: float | None = Field(default=None, gt=0, le=100)
    top5: float | None = Field(default=None, gt=0, le=100)
    sd: float | None = Field(default=None, ge=0)
    """Over runs, where it was stated."""
    best_top1: float | None = None
    """Mean of the best epochs, where `top1` is of the final one and both are known."""
    seconds_per_step: tuple[float, float] | None = None
    """Least and greatest that was read."""
    epoch: Epoch | None = None
    runs: int | None = Field(default=None, ge=1)
    """That the number is the mean of; None where that is not said."""
    paper: str = ""
    source: str = Field(min_length=1)
    """File and line of a repository, table of a paper, or address."""
    config: str | None = None
    """The reference's configuration file, where it is named beside the number."""
    heading: str | None = None
    """That the number stands under."""
    notes: tuple[str, ...] = ()
    text: str = ""
    """Of a claim, or of what was not found."""
    repeats: str | None = None
    """The source that has the same number first; this one adds no evidence."""
    suspect: str | None = None
    """Why it should not be compared with; None where nothing is known against it."""

    @property
    def number(self) -> str:
        """What kind of number it is, e.g. `one run, best epoch on the test set`."""
        if self.kind in ("claim", "not found"):
            return self.kind
        runs = "runs not stated" if self.runs is None else "one run" if self.runs == 1 else f"mean of {self.runs} runs"
        if self.kind == "time":
            return "read from a progress bar or a table, hardware not stated"
        epoch = {"best": "best epoch on the test set", "final": "final epoch"}.get(self.epoch or "", "epoch not stated")
        return f"{runs}, {epoch}" + (f", sd {self.sd:g}" if self.sd is not None else "")


class _MadeFrom(_Frozen):
    file: str
    sha256: str
    rows: int


class _File(_Frozen):
    made_by: str
    made_from: _MadeFrom
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Reference:
    """What one cell is compared with: a row, or the mean of several runs that are recorded one by one."""

    top1: float
    runs: int
    """That it counts as; 1 where its source does not say."""
    sd: float | None
    epoch: Epoch
    number: str
    """What kind of number it is."""
    sources: tuple[str, ...]


@cache
def load_rows() -> tuple[Row, ...]:
    """All rows, in the order of the transcript.

    Raises:
        ArtifactError: the package's file is broken.
    """
    return parse(importlib.resources.files("icdctl.science").joinpath(FILE).read_bytes())


def parse(content: bytes) -> tuple[Row, ...]:
    """The rows of a file in the format of `published.json`.

    Raises:
        ArtifactError: it is not one; the first problem is named.
    """
    try:
        return _File.model_validate_json(content).rows
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"the list of published results is broken at `{place}`: {first['msg']}", hint="install icdctl again"
        ) from error


def find(
    *,
    dataset: str | None = None,
    teacher: str | None = None,
    student: str | None = None,
    method: str | None = None,
    paper: str | Sequence[str] | None = None,
    source: str | None = None,
    kind: str | None = None,
    family: str | None = None,
    scales: Sequence[int] | None = None,
    gamma: float | None = None,
    detail: str | None = None,
) -> tuple[Row, ...]:
    """The rows that have all of the given values; `paper` and `source` are the beginning of a text, or several."""
    equal = {
        "dataset": dataset,
        "teacher": teacher,
        "student": student,
        "method": method,
        "kind": kind,
        "family": family,
        "scales": None if scales is None else tuple(scales),
        "gamma": gamma,
        "detail": detail,
    }
    papers = (paper,) if isinstance(paper, str) else tuple(paper or ("",))
    return tuple(
        row
        for row in load_rows()
        if all(value is None or getattr(row, key) == value for key, value in equal.items())
        and row.paper.startswith(papers)
        and row.source.startswith(source or "")
    )


def reference(rows: Iterable[Row]) -> Reference | None:
    """What to compare with, or None where no row is usable: suspect rows and repetitions are left out.

    Several rows are averaged, and count as that many runs if each is one. Values that stand on one line joined by
    arrows may be evaluations of the same run, so these count as one.
    """
    usable = [row for row in rows if row.top1 is not None and row.suspect is None]
    first = [row for row in usable if row.repeats is None] or usable[:1]
    if not first:
        return None
    if len(first) == 1:
        (row,) = first
        return Reference(row.top1 or 0.0, row.runs or 1, row.sd, row.epoch or "unknown", row.number, (row.source,))
    values = [row.top1 or 0.0 for row in first]
    epochs = {row.epoch for row in first}
    epoch = first[0].epoch if len(epochs) == 1 else None
    sources = tuple(dict.fromkeys(row.source for row in first))
    separate = all(row.runs == 1 for row in first) and len(sources) == len(first)
    runs = len(values) if separate else 1
    what = f"mean of {len(values)} recorded runs" if separate else f"mean of {len(values)} values on one line"
    number = f"{what}, {first[0].number.partition(', ')[2]}" if epoch else what
    return Reference(sum(values) / len(values), runs, None, epoch or "unknown", number, sources)
