"""Results that papers, repositories and their users published, row by row under icdctl's names: `published.json`.

docs/make_published.py writes this file from a transcript and explains which rows are suspect. Top-1 and top-5 are in
percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from pydantic import Field

from icdctl.science.package_file import StrictModel, parse_package_file, read_package_file

FILE = "published.json"

Epoch = Literal["best", "final", "unknown"]
"""The epoch that a number belongs to; `best` is chosen on the test set, so it is higher than the final epoch by chance
alone."""


class Row(StrictModel):
    """A published number, or a published statement about numbers."""

    id: int
    """Position in the transcript."""
    kind: Literal["student", "plain", "teacher", "time", "reproduction", "claim", "not found"]
    """`plain`: trained without a teacher. `time`: seconds, not accuracy. `reproduction`: not by the authors. `not
    found`: a number that was searched for without success."""
    dataset: str | None = None
    teacher: str | None = None
    student: str | None = None
    """The model that was measured; this field holds it for rows of a teacher, too."""
    method: str | None = None
    """The method in icdctl's spelling, even if icdctl does not have it."""
    detail: str = ""
    """How the run deviates from the method; empty if it does not."""
    scales: tuple[int, ...] | None = None
    gamma: float | None = None
    family: Literal["gamma2", "gamma8"] | None = None
    """The set of defaults that the run most likely used, inferred from its folder; see `paper.FAMILIES`."""
    top1: float | None = Field(default=None, gt=0, le=100)
    top5: float | None = Field(default=None, gt=0, le=100)
    sd: float | None = Field(default=None, ge=0)
    """Standard deviation over runs, if the source states it."""
    best_top1: float | None = None
    """Mean over the best epochs, if `top1` is from the final epoch and both are known."""
    seconds_per_step: tuple[float, float] | None = None
    """The lowest and the highest reading."""
    epoch: Epoch | None = None
    runs: int | None = Field(default=None, ge=1)
    """How many runs the number is the mean of; None if the source does not say."""
    paper: str = ""
    source: str = Field(min_length=1)
    """File and line in a repository, table in a paper, or web address."""
    config: str | None = None
    """The reference's configuration file, if the source names it beside the number."""
    heading: str | None = None
    """The heading that the number stands under in the source."""
    notes: tuple[str, ...] = ()
    text: str = ""
    """The wording of a claim, or a description of what was not found."""
    repeats: str | None = None
    """The source that published the same number first; this row adds no evidence."""
    suspect: str | None = None
    """The reason not to compare with this number; None if there is none."""

    @property
    def number(self) -> str:
        """The kind of number, e.g. `one run, best epoch on the test set`."""
        if self.kind in ("claim", "not found"):
            return self.kind
        runs = "runs not stated" if self.runs is None else "one run" if self.runs == 1 else f"mean of {self.runs} runs"
        if self.kind == "time":
            return "read from a progress bar or a table, hardware not stated"
        epoch = {"best": "best epoch on the test set", "final": "final epoch"}.get(self.epoch or "", "epoch not stated")
        return f"{runs}, {epoch}" + (f", sd {self.sd:g}" if self.sd is not None else "")


class _RowTranscript(StrictModel):
    file: str
    sha256: str
    rows: int


class _PublishedFile(StrictModel):
    made_by: str
    made_from: _RowTranscript
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class PublishedNumber:
    """The number that a cell is compared with: one row, or the mean of several runs that are recorded one by one."""

    top1: float
    """Top-1 in percent; in a table of times, a ratio to kd."""
    runs: int
    """How many runs the number counts as; 1 if its source does not say."""
    sd: float | None
    """Standard deviation of one run; None if the source does not state it."""
    epoch: Epoch
    number: str
    """The kind of number, as `Row.number` describes it."""
    sources: tuple[str, ...]


@cache
def load_rows() -> tuple[Row, ...]:
    """All rows, in the order of the transcript.

    Raises:
        ArtifactError: the file in the package is broken.
    """
    return parse(read_package_file(FILE))


def parse(content: bytes) -> tuple[Row, ...]:
    """The rows of a file in the format of `published.json`.

    Raises:
        ArtifactError: the content does not have this format; the message names the first problem.
    """
    return parse_package_file(_PublishedFile, content, what="list of published results").rows


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
    """The rows that have all of the given values.

    `paper` and `source` match by their beginning; `paper` may be several beginnings, and one match is enough.
    """
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


def reference(rows: Iterable[Row]) -> PublishedNumber | None:
    """The number to compare with; None if no row is usable. Suspect rows and repetitions are left out.

    Several rows are averaged, and count as that many runs if each is a single run. Values that stand on one line,
    joined by arrows, may be evaluations of the same run, so they count as one run.
    """
    usable = [row for row in rows if row.top1 is not None and row.suspect is None]
    first = [row for row in usable if row.repeats is None] or usable[:1]
    if not first:
        return None
    if len(first) == 1:
        (row,) = first
        return PublishedNumber(
            row.top1 or 0.0, row.runs or 1, row.sd, row.epoch or "unknown", row.number, (row.source,)
        )
    values = [row.top1 or 0.0 for row in first]
    epochs = {row.epoch for row in first}
    epoch = first[0].epoch if len(epochs) == 1 else None
    sources = tuple(dict.fromkeys(row.source for row in first))
    separate = all(row.runs == 1 for row in first) and len(sources) == len(first)
    runs = len(values) if separate else 1
    what = f"mean of {len(values)} recorded runs" if separate else f"mean of {len(values)} values on one line"
    number = f"{what}, {first[0].number.partition(', ')[2]}" if epoch else what
    return PublishedNumber(sum(values) / len(values), runs, None, epoch or "unknown", number, sources)
