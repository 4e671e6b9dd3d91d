"""From the cells of a table and what was measured to statements: reproduced or not, and what the paper claims.

Like is compared with like: a published best epoch with our best epochs, a published final epoch with our final ones,
for the best of 240 epochs is a quarter to half a point above the final one by chance alone. Both are shown. Claims
compare our own runs with each other, seed by seed, at the final epoch.

Every verdict on a cell keeps its own error rate, so among N cells about alpha N may be wrong. Claims are corrected by
Holm's method, the overall ones of a table as one family, those of single pairs of models as another.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from icdctl.errors import UsageError
from icdctl.science import compare
from icdctl.science.compare import PairedDifference, Reproduction, Summary
from icdctl.science.published import Reference
from icdctl.science.tables import Cell, Claim, Table

Status = Literal[
    "reproduced", "not reproduced", "underpowered", "not measured", "nothing published", "suspect", "can't be run"
]
Compared = Literal["as published", "final", "best"]


@dataclass(frozen=True)
class Result:
    """What one seed gave for one cell."""

    final: float
    """Top-1 at the final epoch in percent, or seconds a step in a table of times."""
    best: float | None = None
    """Top-1 at the best epoch; None in a table of times."""


@dataclass(frozen=True)
class CellRow:
    """A line of a table: published, measured, verdict."""

    cell: Cell
    reference: Reference | None
    """In a table of times, a ratio to kd."""
    final: Summary | None
    best: Summary | None
    compared: Literal["final", "best", ""]
    """Which of them stands against the published number; empty where nothing does."""
    reproduction: Reproduction | None
    status: Status
    reason: str


@dataclass(frozen=True)
class ClaimRow:
    """A comparison that a paper makes, tested on our runs."""

    comparison: str
    family: str
    pair: str
    """Pair of models; `mean of N pairs` where seeds are compared by their mean over pairs."""
    claimed: float | None
    """Published difference: single numbers, which say nothing of their spread."""
    num_claimed: int
    """How many published differences that is the mean of."""
    measured: PairedDifference | None
    """None where no seed has both."""
    p_holm: float | None
    finding: str
    """`first is better`, `second is better`, `not distinguishable`, `not measured`."""


@dataclass(frozen=True)
class Judgement:
    """A table with everything that can be said of it."""

    table: Table
    margin: float
    alpha: float
    cells: tuple[CellRow, ...]
    overall: tuple[ClaimRow, ...]
    """Comparisons of methods over all pairs of models; only where there is more than one pair."""
    claims: tuple[ClaimRow, ...]
    """The same for each pair."""

    @property
    def counts(self) -> dict[str, int]:
        """Status -> number of cells, in the order in which they are first met."""
        found: dict[str, int] = {}
        for row in self.cells:
            found[row.status] = found.get(row.status, 0) + 1
        return found


def judge(
    table: Table,
    measured: Mapping[str, Mapping[int, Result]],
    *,
    methods: Collection[str],
    cells: Sequence[Cell] | None = None,
    margin: float | None = None,
    alpha: float = 0.05,
    epoch: Compared = "as published",
) -> Judgement:
    """Every cell of a table against its published number, and the claims against our own runs.

    Args:
        table: from `tables.load`.
        measured: key of a cell -> seed -> result. A cell may have any seeds, or none.
        methods: the names that icdctl has.
        cells: some of the table's; None for all.
        margin: the difference that does not matter; None for the table's.
        alpha: see `compare.reproduces` and `compare.holm`.
        epoch: which of ours stands against the published number.

    Raises:
        UsageError: a key that the table does not have, or a number out of range.
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
    reference: Reference | None,
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
        reason += f"; our {compared} epoch against a published number of the {wanted} one"
    return CellRow(cell, reference, final, best, compared, outcome, outcome.verdict, reason)


def _seeds_hint(outcome: Reproduction, summary: Summary) -> str:
    """How many seeds would decide, at the spread seen, if nothing is wrong."""
    if outcome.interval is None or summary.sd is None:
        return ""
    try:
        needed = compare.seeds_to_reproduce(outcome.margin, summary.sd, alpha=outcome.alpha)
    except UsageError:
        return ""
    if needed <= outcome.n:
        return ""
    return f"; with this spread, {needed} seeds find a mean that is the published number in 4 cases of 5"


def _kd_of(table: Table, cell: Cell) -> Cell:
    """What a time is compared with: kd of the same models and data set."""
    wanted = (cell.dataset, cell.teacher, cell.student, "kd")
    for other in table.cells:
        if (other.dataset, other.teacher, other.student, other.method) == wanted:
            return other
    raise UsageError(f"`{table.name}` has no `kd` beside `{cell.key}`", hint="add the cell to the table")


def _ratios(table: Table, measured: Mapping[str, Mapping[int, Result]]) -> dict[str, dict[int, Result]]:
    """Times over those of kd in the same repetition; a repetition without kd is left out."""
    found = {}
    for key, results in measured.items():
        base = measured.get(_kd_of(table, table.cell(key)).key, {})
        found[key] = {seed: Result(results[seed].final / base[seed].final) for seed in results if seed in base}
    return found


def _ratio_reference(table: Table, cell: Cell) -> Reference | None:
    base = _kd_of(table, cell)
    if cell is base or not cell.published or not base.published:
        return None  # kd is 1 by definition
    seconds, of_kd = (row.published[0].seconds_per_step for row in (cell, base))
    if seconds is None or of_kd is None:
        return None
    source = cell.published[0].source
    return Reference(fmean(seconds) / fmean(of_kd), 1, None, "final", "ratio of two readings, no spread", (source,))


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
    """Each seed's mean over the pairs of models that were measured: a statement on these pairs, not on all models."""
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
    """p values adjusted over all rows that have one, and what that leaves to be said."""
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


@dataclass(frozen=True)
class Sheet:
    """Lines and columns of text, the same in every format."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def sheets(judgement: Judgement) -> tuple[Sheet, ...]:
    """The cells, then the claims over all pairs and for each pair, where there are any."""
    found = [_cell_sheet(judgement)]
    for title, rows in (
        ("claims, over all pairs of models", judgement.overall),
        ("claims, for each pair of models", judgement.claims),
    ):
        if rows:
            found.append(_claim_sheet(judgement, title, rows))
    return tuple(found)


def _cell_sheet(judgement: Judgement) -> Sheet:
    of_time = judgement.table.metric == "seconds_per_step"
    what = "ratio to kd" if of_time else "top-1"
    headers = (
        "cell",
        f"published {what}",
        "kind of number",
        f"{what}, final epoch" if not of_time else what,
        "best epoch",
        "n",
        "compared",
        "difference",
        "verdict",
        "reason",
    )
    rows = tuple(
        (
            row.cell.key,
            _number(row.reference.top1 if row.reference else None),
            row.reference.number if row.reference else "",
            _spread(row.final),
            _spread(row.best),
            str(row.final.n) if row.final else "0",
            row.compared,
            _signed(row.reproduction.difference if row.reproduction else None),
            row.status,
            row.reason,
        )
        for row in judgement.cells
    )
    unit = "of the ratio" if of_time else "points"
    judged = sum(row.reproduction is not None for row in judgement.cells)
    notes = (
        f"reproduced: equivalent within {judgement.margin:g} {unit} of the published number (two one-sided t tests, "
        f"alpha {judgement.alpha:g}); not reproduced: the {100 * (1 - judgement.alpha):.4g} % interval, with the "
        "spread of the published number in it, is wholly beyond; underpowered: neither.",
        *(
            [
                f"Each verdict has its own error rate: of {judged} judged cells, up to about "
                f"{judgement.alpha * judged:.1f} may be wrong."
            ]
            if judged
            else []
        ),
        *judgement.table.notes,
    )
    return Sheet(f"{judgement.table.name}: {judgement.table.about}", headers, rows, notes)


def _claim_sheet(judgement: Judgement, title: str, rows: Sequence[ClaimRow]) -> Sheet:
    headers = (
        "comparison",
        "defaults",
        "pair",
        "published",
        "measured",
        "95 % interval",
        "n",
        "d_z",
        "p",
        "p (Holm)",
        "finding",
    )
    lines = []
    for row in rows:
        found = row.measured
        has_interval = found is not None and found.low is not None
        lines.append(
            (
                row.comparison,
                row.family,
                row.pair,
                _signed(row.claimed) + (f" ({row.num_claimed})" if row.num_claimed > 1 else ""),
                _signed(found.mean if found else None)
                + (f" ± {found.sd:.2f}" if found is not None and found.sd is not None else ""),
                f"{_signed(found.low)} to {_signed(found.high)}" if found is not None and has_interval else "",
                str(found.n) if found else "0",
                _signed(found.effect_size if found else None),
                _probability(found.p if found else None),
                _probability(row.p_holm),
                row.finding,
            )
        )
    notes = (
        "Measured: final epochs, first less second, paired by seed; ± is the sd of one seed's difference, d_z the mean "
        "over it.",
        f"Holm's correction is over the {sum(row.p_holm is not None for row in rows)} tests of this list, at alpha "
        f"{judgement.alpha:g}.",
        "Published: differences of single numbers, which have no spread to test with.",
    )
    return Sheet(f"{judgement.table.name}: {title}", headers, tuple(lines), notes)


def to_markdown(found: Sequence[Sheet]) -> str:
    """A heading, a table and the notes for each sheet."""
    blocks = []
    for sheet in found:
        lines = [
            "| " + " | ".join(_escaped(cell, {"|": "\\|", "\n": " "}) for cell in line) + " |"
            for line in (sheet.headers, *sheet.rows)
        ]
        lines.insert(1, "|" + "---|" * len(sheet.headers))
        notes = [f"- {note}" for note in sheet.notes]
        blocks.append("\n".join([f"## {sheet.title}", "", *lines, "", *notes]) + "\n")
    return "\n".join(blocks)


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    ">": r"$>$",
    "<": r"$<$",
}


def to_latex(found: Sequence[Sheet]) -> str:
    """A `table` with `tabular` for each sheet; needs no package."""
    blocks = []
    for sheet in found:
        lines = [" & ".join(_escaped(cell, _LATEX) for cell in line) + r" \\" for line in (sheet.headers, *sheet.rows)]
        blocks.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"\caption{{{_escaped(sheet.title, _LATEX)}}}",
                    rf"\begin{{tabular}}{{{'l' * len(sheet.headers)}}}",
                    r"\hline",
                    lines[0],
                    r"\hline",
                    *lines[1:],
                    r"\hline",
                    r"\end{tabular}",
                    *(rf"\par {_escaped(note, _LATEX)}" for note in sheet.notes),
                    r"\end{table}",
                ]
            )
            + "\n"
        )
    return "\n".join(blocks)


CSV_CELLS: dict[str, Callable[[CellRow], object]] = {
    "cell": lambda row: row.cell.key,
    "dataset": lambda row: row.cell.dataset,
    "teacher": lambda row: row.cell.teacher,
    "student": lambda row: row.cell.student,
    "method": lambda row: row.cell.method,
    "families": lambda row: " ".join(row.cell.families),
    "metric": lambda row: "top1" if row.cell.metric == "top1" else "ratio_to_kd",
    "published": lambda row: row.reference and row.reference.top1,
    "published_number": lambda row: row.reference and row.reference.number,
    "published_runs": lambda row: row.reference and row.reference.runs,
    "source": lambda row: row.reference and "; ".join(row.reference.sources),
    "n": lambda row: row.final.n if row.final else 0,
    "final_mean": lambda row: row.final and row.final.mean,
    "final_sd": lambda row: row.final and row.final.sd,
    "best_mean": lambda row: row.best and row.best.mean,
    "best_sd": lambda row: row.best and row.best.sd,
    "compared": lambda row: row.compared,
    "difference": lambda row: row.reproduction and row.reproduction.difference,
    "margin": lambda row: row.reproduction and row.reproduction.margin,
    "alpha": lambda row: row.reproduction and row.reproduction.alpha,
    "p_equivalence": lambda row: row.reproduction and row.reproduction.p_equivalence,
    "p_outside": lambda row: row.reproduction and row.reproduction.p_outside,
    "verdict": lambda row: row.status,
    "reason": lambda row: row.reason,
}
"""Columns of `cells_csv`: name -> what stands there."""
CSV_CLAIMS: dict[str, Callable[[ClaimRow], object]] = {
    "comparison": lambda row: row.comparison,
    "family": lambda row: row.family,
    "pair": lambda row: row.pair,
    "published": lambda row: row.claimed,
    "n_published": lambda row: row.num_claimed,
    "n": lambda row: row.measured.n if row.measured else 0,
    "mean": lambda row: row.measured and row.measured.mean,
    "sd": lambda row: row.measured and row.measured.sd,
    "low": lambda row: row.measured and row.measured.low,
    "high": lambda row: row.measured and row.measured.high,
    "effect_size": lambda row: row.measured and row.measured.effect_size,
    "p": lambda row: row.measured and row.measured.p,
    "p_holm": lambda row: row.p_holm,
    "finding": lambda row: row.finding,
}
"""Columns of `claims_csv`."""


def as_json(judgement: Judgement) -> dict[str, object]:
    """A plain value: the columns of both CSV files, and what they rest on."""
    return {
        "table": judgement.table.name,
        "about": judgement.table.about,
        "source": judgement.table.source,
        "margin": judgement.margin,
        "alpha": judgement.alpha,
        "counts": judgement.counts,
        "cells": [{name: value(row) for name, value in CSV_CELLS.items()} for row in judgement.cells],
        "overall": [{name: value(row) for name, value in CSV_CLAIMS.items()} for row in judgement.overall],
        "claims": [{name: value(row) for name, value in CSV_CLAIMS.items()} for row in judgement.claims],
        "notes": list(judgement.table.notes),
    }


def cells_csv(judgement: Judgement) -> str:
    """The cells with six decimals, for programs."""
    return _csv([{name: value(row) for name, value in CSV_CELLS.items()} for row in judgement.cells], CSV_CELLS)


def claims_csv(judgement: Judgement) -> str:
    """The claims with six decimals, those over all pairs first."""
    rows = (*judgement.overall, *judgement.claims)
    return _csv([{name: value(row) for name, value in CSV_CLAIMS.items()} for row in rows], CSV_CLAIMS)


def _csv(rows: Sequence[Mapping[str, object]], columns: Collection[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"{value:.6f}" if isinstance(value, float) else value for value in row.values()])
    return text.getvalue()


def _escaped(text: str, marks: Mapping[str, str]) -> str:
    return "".join(marks.get(character, character) for character in text)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    """Two decimals with a sign, but for what rounds to zero."""
    if value is None:
        return ""
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}"


def _spread(summary: Summary | None) -> str:
    if summary is None:
        return ""
    return f"{summary.mean:.2f}" + ("" if summary.sd is None else f" ± {summary.sd:.2f}")


def _probability(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
