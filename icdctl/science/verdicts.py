"""Verdicts on a paper's table: whether each cell is reproduced, and whether the paper's claims hold.

A published best epoch is compared with our best epochs, and a published final epoch with our final epochs, because the
best of 240 epochs is a quarter to half a point above the final one by chance alone. Both are shown. Claims compare our
own runs with each other, seed by seed, at the final epoch.

Every verdict on a cell has its own error rate, so among N cells about alpha N may be wrong. Claims are corrected with
Holm's method: the claims over all pairs of models form one family of tests, the claims for single pairs another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from icdctl.errors import UsageError
from icdctl.science import compare, power
from icdctl.science.compare import PairedDifference, Reproduction, Summary
from icdctl.science.experiments import Cell, Claim, PaperTable
from icdctl.science.published import PublishedNumber

Status = Literal[
    "reproduced", "not reproduced", "underpowered", "not measured", "nothing published", "suspect", "can't be run"
]
Compared = Literal["as published", "final", "best"]


@dataclass(frozen=True)
class Result:
    """The measurement of one cell with one seed."""

    final: float
    """Top-1 at the final epoch in percent; seconds per step in a table of times."""
    best: float | None = None
    """Top-1 at the best epoch; None in a table of times."""


@dataclass(frozen=True)
class CellRow:
    """One line of a judged table: the published number, the measured ones and the verdict."""

    cell: Cell
    reference: PublishedNumber | None
    """The published number; a ratio to kd in a table of times; None if nothing usable was published."""
    final: Summary | None
    best: Summary | None
    compared: Literal["final", "best", ""]
    """Which of the two is compared with the published number; empty if none is."""
    reproduction: Reproduction | None
    status: Status
    reason: str


@dataclass(frozen=True)
class ClaimRow:
    """A comparison that a paper makes, tested on our runs."""

    comparison: str
    family: str
    pair: str
    """Teacher and student; `mean of N of M pairs` if the seeds are compared by their mean over pairs."""
    claimed: float | None
    """Published difference between single numbers, whose spread is unknown."""
    num_claimed: int
    """The number of published differences that `claimed` is the mean of."""
    measured: PairedDifference | None
    """The measured difference; None if no seed was run for both methods."""
    p_holm: float | None
    finding: str
    """`first is better`, `second is better`, `not distinguishable`, `not measured`."""


@dataclass(frozen=True)
class Judgement:
    """A table with its verdicts and tested claims."""

    table: PaperTable
    margin: float
    alpha: float
    cells: tuple[CellRow, ...]
    overall: tuple[ClaimRow, ...]
    """Comparisons over all pairs of models, for claims made about more than one pair."""
    claims: tuple[ClaimRow, ...]
    """The same comparisons for each single pair."""

    @property
    def counts(self) -> dict[str, int]:
        """Status -> number of cells, in the order in which the statuses first appear in the table."""
        found: dict[str, int] = {}
        for row in self.cells:
            found[row.status] = found.get(row.status, 0) + 1
        return found


def judge(
    table: PaperTable,
    measured: Mapping[str, Mapping[int, Result]],
    *,
    methods: Collection[str],
    cells: Sequence[Cell] | None = None,
    margin: float | None = None,
    alpha: float = 0.05,
    epoch: Compared = "as published",
) -> Judgement:
    """Compare every cell of a table with its published number, and test the claims on our own runs.

    Args:
        table: from `tables.load`.
        measured: key of a cell -> seed -> result. A cell may have any seeds, or none.
        methods: the names of the methods that icdctl has.
        cells: the cells to judge; None for all cells of the table.
        margin: the largest difference that counts as equal; None for the table's own.
        alpha: see `compare.reproduces` and `compare.holm`.
        epoch: the epoch of our runs that is compared with the published number.

    Raises:
        UsageError: `measured` has a key that the table does not have, or a number is out of range.
    """
    for key in measured:
        table.cell(key)
    chosen = table.cells if cells is None else tuple(cells)
    margin = table.margin if margin is None else margin
    of_time = table.metric == "seconds_per_step"
    if of_time:
        measured = _ratios(table, measured)
    rows = tuple(
        _cell_row(
            cell,
            _ratio_reference(table, cell) if of_time else cell.reference,
            measured.get(cell.key, {}),
            cell.why_not(methods),
            margin=margin,
            alpha=alpha,
            epoch=epoch,
        )
        for cell in chosen
    )
    keys = {cell.key for cell in chosen}
    claims = [claim for claim in table.claims if claim.first in keys and claim.second in keys]
    final = {key: {seed: result.final for seed, result in seeds.items()} for key, seeds in measured.items()}
    return Judgement(
        table,
        margin,
        alpha,
        rows,
        _with_holm([_overall(same, final) for same in _by_comparison(claims) if len(same) > 1], alpha),
        _with_holm([_claim_row(claim, final) for claim in claims], alpha),
    )


def _cell_row(
    cell: Cell,
    reference: PublishedNumber | None,
    results: Mapping[int, Result],
    why_not: str | None,
    *,
    margin: float,
    alpha: float,
    epoch: Compared,
) -> CellRow:
    seeds = sorted(results)
    finals = [results[seed].final for seed in seeds]
    bests = [value for seed in seeds if (value := results[seed].best) is not None]
    final = compare.summarise(finals) if finals else None
    best = compare.summarise(bests) if bests and len(bests) == len(finals) else None

    def row(status: Status, reason: str, compared: Literal["final", "best", ""] = "") -> CellRow:
        return CellRow(cell, reference, final, best, compared, None, status, reason)

    if final is None:
        return row("can't be run", why_not) if why_not else row("not measured", "no run of this cell")
    if cell.metric == "seconds_per_step" and cell.method == "kd":
        return row("nothing published", "1 by definition")
    if reference is None:
        suspect = cell.suspect
        return row("suspect", suspect) if suspect else row("nothing published", "no usable number was published")
    wanted = reference.epoch if epoch == "as published" else epoch
    compared: Literal["final", "best"] = "best" if wanted == "best" and best is not None else "final"
    outcome = compare.reproduces(
        bests if compared == "best" else finals,
        reference.top1,
        margin=margin,
        alpha=alpha,
        published_runs=reference.runs,
        published_sd=reference.sd,
    )
    reason = outcome.reason
    if outcome.verdict == "underpowered":
        reason += _seeds_hint(outcome, compare.summarise(bests if compared == "best" else finals))
    if wanted != compared:
        reason += f"; our {compared} epoch is compared with a published number from the {wanted} epoch"
    return CellRow(cell, reference, final, best, compared, outcome, outcome.verdict, reason)


def _seeds_hint(outcome: Reproduction, summary: Summary) -> str:
    """How many seeds would confirm an exact reproduction in 4 cases of 5, at the spread seen; empty if unknown."""
    if outcome.interval is None or summary.sd is None:
        return ""
    try:
        needed = power.seeds_to_reproduce(outcome.margin, summary.sd, alpha=outcome.alpha)
    except UsageError:
        return ""
    if needed <= outcome.n:
        return ""
    return f"; with this spread, {needed} seeds confirm a mean equal to the published number in 4 cases of 5"


def _kd_of(table: PaperTable, cell: Cell) -> Cell:
    """The cell that a time is compared with: kd with the same models and data set."""
    wanted = (cell.dataset, cell.teacher, cell.student, "kd")
    for other in table.cells:
        if (other.dataset, other.teacher, other.student, other.method) == wanted:
            return other
    raise UsageError(f"`{table.name}` has no `kd` beside `{cell.key}`", hint="add the cell to the table")


def _ratios(table: PaperTable, measured: Mapping[str, Mapping[int, Result]]) -> dict[str, dict[int, Result]]:
    """Times divided by those of kd in the same repetition; a repetition without kd is left out."""
    found = {}
    for key, results in measured.items():
        base = measured.get(_kd_of(table, table.cell(key)).key, {})
        found[key] = {seed: Result(results[seed].final / base[seed].final) for seed in results if seed in base}
    return found


def _ratio_reference(table: PaperTable, cell: Cell) -> PublishedNumber | None:
    base = _kd_of(table, cell)
    if cell is base or not cell.published or not base.published:
        return None  # kd is 1 by definition
    seconds, of_kd = (row.published[0].seconds_per_step for row in (cell, base))
    if seconds is None or of_kd is None:
        return None
    source = cell.published[0].source
    return PublishedNumber(
        fmean(seconds) / fmean(of_kd), 1, None, "final", "ratio of two readings, no spread", (source,)
    )


def _by_comparison(claims: Sequence[Claim]) -> list[list[Claim]]:
    found: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        found.setdefault((claim.comparison, claim.family), []).append(claim)
    return list(found.values())


def _claim_row(claim: Claim, final: Mapping[str, Mapping[int, float]]) -> ClaimRow:
    first, second = final.get(claim.first, {}), final.get(claim.second, {})
    measured = compare.paired_difference(first, second) if first.keys() & second.keys() else None
    num_claimed = int(claim.claimed is not None)
    return ClaimRow(claim.comparison, claim.family, claim.pair, claim.claimed, num_claimed, measured, None, "")


def _overall(claims: Sequence[Claim], final: Mapping[str, Mapping[int, float]]) -> ClaimRow:
    """A claim tested on each seed's mean over the measured pairs: it holds for these pairs, not for all models."""
    claimed = [claim.claimed for claim in claims if claim.claimed is not None]
    usable = [claim for claim in claims if final.get(claim.first, {}).keys() & final.get(claim.second, {}).keys()]
    seeds: set[int] = set()
    if usable:
        seeds = set.intersection(*(final[claim.first].keys() & final[claim.second].keys() for claim in usable))
    measured = None
    if seeds:
        first, second = (
            {seed: fmean(final[getattr(claim, side)][seed] for claim in usable) for seed in sorted(seeds)}
            for side in ("first", "second")
        )
        measured = compare.paired_difference(first, second)
    pairs = f"mean of {len(usable)} of {len(claims)} pairs"
    mean = fmean(claimed) if claimed else None
    return ClaimRow(claims[0].comparison, claims[0].family, pairs, mean, len(claimed), measured, None, "")


def _with_holm(rows: Sequence[ClaimRow], alpha: float) -> tuple[ClaimRow, ...]:
    """The rows with their p values adjusted together, and the finding that follows from each."""
    tested = [row.measured.p for row in rows if row.measured is not None and row.measured.p is not None]
    adjusted = iter(compare.holm(tested))
    found = []
    for row in rows:
        p = next(adjusted) if row.measured is not None and row.measured.p is not None else None
        if row.measured is None:
            finding = "not measured"
        elif p is None:
            finding = "no spread to test with"
        elif p > alpha:
            finding = "not distinguishable"
        else:
            finding = "first is better" if row.measured.mean > 0 else "second is better"
        found.append(replace(row, p_holm=p, finding=finding))
    return tuple(found)
