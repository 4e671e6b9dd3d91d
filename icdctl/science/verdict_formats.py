"""Verdicts as text: sheets for people in Markdown and LaTeX, CSV files and a JSON value for programs."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from icdctl.science.compare import Summary
from icdctl.science.verdicts import CellRow, ClaimRow, Judgement


@dataclass(frozen=True)
class Sheet:
    """Rows and columns of text, the same in every format."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def sheets(judgement: Judgement) -> tuple[Sheet, ...]:
    """A sheet for the cells, and one each for the claims over all pairs and for single pairs, if there are any."""
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
        f"reproduced: within {judgement.margin:g} {unit} of the published number (two one-sided t tests, alpha "
        f"{judgement.alpha:g}); not reproduced: the {100 * (1 - judgement.alpha):.4g} % interval, which includes the "
        "spread of the published number, lies wholly beyond that margin; underpowered: neither.",
        *(
            [
                f"Each verdict has its own error rate: up to about {judgement.alpha * judged:.1f} of {judged} judged "
                "cells may be wrong."
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
        "measured: final epochs, first method minus second, paired by seed; ± is the standard deviation of one seed's "
        "difference, and d_z is the mean divided by it.",
        f"p (Holm): corrected for the {sum(row.p_holm is not None for row in rows)} tests of this list, at alpha "
        f"{judgement.alpha:g}.",
        "published: differences between single numbers, whose spread is unknown, so they can't be tested.",
    )
    return Sheet(f"{judgement.table.name}: {title}", headers, tuple(lines), notes)


def to_markdown(found: Sequence[Sheet]) -> str:
    """A heading, a table and the notes for each sheet."""
    blocks = []
    for sheet in found:
        lines = ["| " + " | ".join(_in_a_cell(cell) for cell in line) + " |" for line in (sheet.headers, *sheet.rows)]
        lines.insert(1, "|" + "---|" * len(sheet.headers))
        notes = [f"- {note}" for note in sheet.notes]
        blocks.append("\n".join([f"## {sheet.title}", "", *lines, "", *notes]) + "\n")
    return "\n".join(blocks)


def _in_a_cell(text: str) -> str:
    """Text as a cell of a table in Markdown, without tags of HTML."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", _escaped(text, {"|": "\\|", "\n": " "}))


_LATEX = {
    "\n": " ",
    "[": "{[}",
    "]": "{]}",
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
    """A `table` environment with a `tabular` for each sheet; it needs no LaTeX package."""
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
"""Columns of `cells_csv`: name -> the value of a row in that column."""
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
"""Columns of `claims_csv`: name -> the value of a row in that column."""


def as_json(judgement: Judgement) -> dict[str, object]:
    """A value that `json` can write: the columns of both CSV files, with the table's source, margin and notes."""
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
    """The cells as CSV with six decimals, for programs."""
    return _csv([{name: value(row) for name, value in CSV_CELLS.items()} for row in judgement.cells], CSV_CELLS)


def claims_csv(judgement: Judgement) -> str:
    """The claims as CSV with six decimals, those over all pairs first."""
    rows = (*judgement.overall, *judgement.claims)
    return _csv([{name: value(row) for name, value in CSV_CLAIMS.items()} for row in rows], CSV_CLAIMS)


def _csv(rows: Sequence[Mapping[str, object]], columns: Collection[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_in_csv(value) for value in row.values()])
    return text.getvalue()


def _in_csv(value: object) -> object:
    """A value for a CSV file; a spreadsheet would take text that begins with `=`, `+`, `-` or `@` for a formula."""
    if isinstance(value, float):
        return f"{value:.6f}"
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def _escaped(text: str, marks: Mapping[str, str]) -> str:
    return "".join(marks.get(character, character) for character in text)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    """Two decimals with a sign; a value that rounds to zero has no sign."""
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
