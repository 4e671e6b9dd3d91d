"""The tables of a report, and its rows for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from icdctl.registry.trained import TrainedModel
from icdctl.reporting.collect import Cell, Group, short
from icdctl.reporting.figures import TEACHER, spread
from icdctl.reporting.numbers import Measured
from icdctl.reporting.page import Table
from icdctl.reporting.pictures import num_parameters
from icdctl.reporting.questions import Asked
from icdctl.science import compare

_ALPHA = 0.05
_TOP = 5
_RESULTS = (
    "pair",
    "method",
    "n",
    "top-1, final",
    "best on test",
    "top-5",
    "loss",
    "ECE",
    "agreement",
    "KL, nats",
    "parameters",
    "latency, ms",
)


def rows_of(found: Asked) -> list[dict[str, Any]]:
    """A cell each, with its numbers, for programs."""
    rows = []
    for cell in found.group.cells:
        held = found.of(cell)
        bests = [run.metrics.get("best_top1") for run in cell.runs]
        rows.append(
            {
                "pair": found.group.name,
                "dataset": found.group.dataset,
                "teacher": found.group.teacher,
                "student": found.group.student,
                "cell": cell.label,
                "method": cell.config.method,
                "variant": cell.config.settings["variant"],
                "seeds": [run.config.seed for run in cell.runs],
                "final_top1": [run.top1 for run in cell.runs],
                "best_top1": None if None in bests else bests,
                "final_top5": [run.metrics.get("final_top5") for run in cell.runs],
                "loss": [each.numbers.loss for each in held] or None,
                "ece": [each.numbers.ece for each in held] or None,
                "agreement": [each.agreement for each in held if each.agreement is not None] or None,
                "fidelity": [each.fidelity for each in held if each.fidelity is not None] or None,
                "params": cell.runs[0].metrics.get("params"),
                "latency_ms": found.latencies.get(found.group.student),
                "seconds": [run.metrics.get("seconds") for run in cell.runs],
                "weights_sha256": [run.sha256 for run in cell.runs],
            }
        )
    return rows


def results(asked: Sequence[Asked]) -> Table:
    """All cells, after their teachers."""
    lines: list[tuple[str, ...]] = []
    shown: set[tuple[str, str]] = set()
    has_few_classes = any(each.num_classes is not None and each.num_classes <= _TOP for each in asked)
    for each in asked:
        if each.teacher is not None and each.teacher_numbers is not None:
            place = (each.group.images, each.teacher.sha256)
            if place not in shown:
                lines.append(_teacher_line(each.group, each.teacher, each.teacher_numbers, each.latencies))
            shown.add(place)
        for row in rows_of(each):
            line = (
                each.group.pair,
                row["cell"],
                str(len(row["seeds"])),
                spread(row["final_top1"]),
                spread(row["best_top1"]),
                spread(row["final_top5"]),
                spread(row["loss"], 3),
                spread(row["ece"]),
                spread(row["agreement"]),
                spread(row["fidelity"], 3),
                _counted(row["params"]),
                spread([row["latency_ms"]]),
            )
            lines.append(line)
    datasets = ", ".join(dict.fromkeys(each.group.images for each in asked))
    notes = [
        "Percent, but for the loss and for KL, of the student from the teacher. Best: the epoch is chosen on "
        "the test images. Latency: one image, ONNX Runtime, one thread; measured once and kept in the state folder."
    ]
    if has_few_classes:
        notes.append(f"Of {_TOP} classes or fewer, all are among the top-{_TOP}.")
    return Table(f"All cells, {datasets}", _RESULTS, tuple(lines), tuple(notes))


def _teacher_line(
    group: Group, teacher: TrainedModel, measured: Measured, latencies: Mapping[str, float]
) -> tuple[str, ...]:
    numbers = measured.numbers
    shares = (f"{numbers.top1:.2f}", "", f"{numbers.top5:.2f}", f"{numbers.loss:.3f}", f"{numbers.ece:.2f}", "", "")
    cost = (_counted(num_parameters(teacher)), spread([latencies.get(teacher.model)]))
    return (str(group.teacher_label), TEACHER, "1", *shares, *cost)


def _counted(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else ""


def comparisons(found: Asked) -> tuple[Table | None, list[str]]:
    """What each part of a method adds, paired by seed; and what a reader must know of it: what else differs, and which
    student is further from the teacher."""
    group = found.group
    told = [_why_not(first, second) for first, second in group.unmatched]
    pairs = [
        (first, second, compare.paired_difference(first.top1, second.top1))
        for first, second in group.comparisons
        if first.top1.keys() & second.top1.keys()
    ]
    if not pairs:
        return None, told
    tested = [difference.p for *_, difference in pairs if difference.p is not None]
    adjusted = iter(compare.holm(tested))
    lines = []
    for first, second, difference in pairs:
        p = next(adjusted) if difference.p is not None else None
        has_interval = p is not None and difference.low is not None and difference.high is not None
        if p is None:
            finding = "one seed: no spread to test with" if difference.n == 1 else "no spread to test with"
        elif p > _ALPHA:
            finding = "not distinguishable"
        else:
            finding = "higher" if difference.mean > 0 else "lower"
        lines.append(
            (
                f"{first.label} - {second.label}",
                f"{difference.mean:+.2f}" + ("" if difference.sd is None else f" ± {difference.sd:.2f}"),
                f"{difference.low:+.2f} to {difference.high:+.2f}" if has_interval else "",
                str(difference.n),
                "" if difference.effect_size is None else f"{difference.effect_size:+.2f}",
                "" if p is None else ("< 0.001" if p < 0.001 else f"{p:.3f}"),
                finding,
            )
        )
        unlike = first.unlike(second)
        if unlike:
            listed = ", ".join(f"{name} ({short(mine)}, {short(theirs)})" for name, (mine, theirs) in unlike.items())
            told.append(f"{first.label} and {second.label} also differ in {listed}.")
    notes = [
        "Top-1 at the final epoch, paired by seed; ± is the standard deviation of one seed's difference, d_z the mean "
        "over it."
    ]
    if tested:
        count = "the only test" if len(tested) == 1 else f"the {len(tested)} tests"
        notes.append(
            f"p of the paired t test with Holm's correction over {count} of this table; `higher` and `lower` are said "
            f"of p up to {_ALPHA:g}."
        )
    told += _further(found, group.comparisons)
    headers = ("comparison", "difference", "95 % interval", "n", "d_z", "p (Holm)", "finding")
    return Table("What each part adds", headers, tuple(lines), tuple(notes)), told


def _why_not(cell: Cell, base: Cell) -> str:
    mine, theirs = cell.training, base.training
    apart = ", ".join(f"`{key}`" for key in mine if mine[key] != theirs[key])
    return f"{cell.label} is compared with nothing that it builds on: {base.label} was trained with other {apart}."


def _further(found: Asked, pairs: Sequence[tuple[Cell, Cell]]) -> list[str]:
    """Which students are further from the teacher than what they build on, by agreement or by divergence."""
    less, more = [], []
    for first, second in pairs:
        sides = [found.of(cell) for cell in (first, second)]
        shares = [[each.agreement for each in side if each.agreement is not None] for side in sides]
        if all(shares) and fmean(shares[0]) < fmean(shares[1]):
            less.append(f"{first.label} ({spread(shares[0])} %, {second.label} {spread(shares[1])} %)")
        nats = [[each.fidelity for each in side if each.fidelity is not None] for side in sides]
        if all(nats) and round(fmean(nats[0]), 3) > round(fmean(nats[1]), 3):
            more.append(f"{first.label} ({spread(nats[0], 3)}, {second.label} {spread(nats[1], 3)} nats)")
    told = []
    if less:
        told.append(f"Agree with the teacher less than what they build on, on average: {'; '.join(less)}.")
    if more:
        told.append(f"Diverge from the teacher more than what they build on, by KL on average: {'; '.join(more)}.")
    return told
