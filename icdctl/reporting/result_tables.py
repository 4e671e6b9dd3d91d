"""The tables of a report, and its numbers as rows for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypedDict

from icdctl.registry.trained import TrainedModel
from icdctl.reporting.drawing import TEACHER
from icdctl.reporting.figures import spread
from icdctl.reporting.group_measurements import GroupMeasurements
from icdctl.reporting.measure import Measurement
from icdctl.reporting.page import PageTable
from icdctl.reporting.pictures import num_parameters
from icdctl.reporting.run_groups import ReportCell, RunGroup, short
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


class ReportRow(TypedDict):
    """The numbers of a cell in report.json; lists have one value for each seed, None stands for what is not known."""

    pair: str
    dataset: str
    teacher: str | None
    student: str
    cell: str
    method: str
    variant: object
    seeds: list[int]
    final_top1: list[float]
    best_top1: list[float | None] | None
    final_top5: list[float | None]
    loss: list[float] | None
    ece: list[float] | None
    agreement: list[float] | None
    fidelity: list[float] | None
    params: int | None
    latency_ms: float | None
    seconds: list[float | None]
    weights_sha256: list[str]


def rows_of(found: GroupMeasurements) -> list[ReportRow]:
    """The numbers of each cell of a group, for programs."""
    rows: list[ReportRow] = []
    for cell in found.group.cells:
        held = found.measurements_of(cell)
        bests = [run.metrics.best_top1 for run in cell.runs]
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
                "final_top5": [run.metrics.final_top5 for run in cell.runs],
                "loss": [each.numbers.loss for each in held] or None,
                "ece": [each.numbers.ece for each in held] or None,
                "agreement": [each.agreement for each in held if each.agreement is not None] or None,
                "fidelity": [each.fidelity for each in held if each.fidelity is not None] or None,
                "params": cell.runs[0].metrics.params,
                "latency_ms": found.latencies.get(found.group.student),
                "seconds": [run.metrics.seconds for run in cell.runs],
                "weights_sha256": [run.sha256 for run in cell.runs],
            }
        )
    return rows


def results(groups: Sequence[GroupMeasurements]) -> PageTable:
    """The table of all cells, with the teachers before their students."""
    lines: list[tuple[str, ...]] = []
    shown: set[tuple[str, str]] = set()
    has_few_classes = any(each.num_classes is not None and each.num_classes <= _TOP for each in groups)
    for each in groups:
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
    datasets = ", ".join(dict.fromkeys(each.group.images for each in groups))
    notes = [
        "All accuracies are in percent. KL is the divergence of the student from the teacher. `best on test`: the "
        "epoch is chosen on the test images. Latency: one image, ONNX Runtime, one thread; measured once and kept in "
        "the state folder."
    ]
    if has_few_classes:
        notes.append(f"With {_TOP} classes or fewer, top-{_TOP} is always 100 %.")
    return PageTable(f"All cells, {datasets}", _RESULTS, tuple(lines), tuple(notes))


def _teacher_line(
    group: RunGroup, teacher: TrainedModel, measured: Measurement, latencies: Mapping[str, float]
) -> tuple[str, ...]:
    numbers = measured.numbers
    shares = (f"{numbers.top1:.2f}", "", f"{numbers.top5:.2f}", f"{numbers.loss:.3f}", f"{numbers.ece:.2f}", "", "")
    cost = (_counted(num_parameters(teacher)), spread([latencies.get(teacher.model)]))
    return (str(group.teacher_label), TEACHER, "1", *shares, *cost)


def _counted(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def comparisons(found: GroupMeasurements) -> tuple[PageTable | None, list[str]]:
    """The table of what each part of a method adds, paired by seed, None without pairs; and sentences for its reader:
    which cells are not compared, what else differs, which students are further from the teacher."""
    group = found.group
    sentences = [_why_not(first, second) for first, second in group.uncompared]
    pairs = [
        (first, second, compare.paired_difference(first.top1, second.top1))
        for first, second in group.comparisons
        if first.top1.keys() & second.top1.keys()
    ]
    if not pairs:
        return None, sentences
    tested = [difference.p for *_, difference in pairs if difference.p is not None]
    adjusted = iter(compare.holm(tested))
    lines = []
    for first, second, difference in pairs:
        p = next(adjusted) if difference.p is not None else None
        lines.append(_comparison_row(first, second, difference, p))
        unlike = first.differing_settings(second)
        if unlike:
            listed = ", ".join(f"{name} ({short(mine)}, {short(theirs)})" for name, (mine, theirs) in unlike.items())
            sentences.append(f"{first.label} and {second.label} also differ in {listed}.")
    notes = [
        "Top-1 at the final epoch, paired by seed; ± is the standard deviation of one seed's difference, and d_z is "
        "the mean divided by it."
    ]
    if tested:
        count = "the only test" if len(tested) == 1 else f"the {len(tested)} tests"
        notes.append(
            f"p (Holm): paired t test with Holm's correction over {count} of this table; a finding is `higher` or "
            f"`lower` if p is at most {_ALPHA:g}."
        )
    sentences += _further(found, group.comparisons)
    headers = ("comparison", "difference", "95 % interval", "n", "d_z", "p (Holm)", "finding")
    return PageTable("What each part adds", headers, tuple(lines), tuple(notes)), sentences


def _comparison_row(
    first: ReportCell, second: ReportCell, difference: compare.PairedDifference, p: float | None
) -> tuple[str, ...]:
    """A row of the table of comparisons; `p` is corrected, and None where the test is undefined."""
    has_interval = p is not None and difference.low is not None and difference.high is not None
    if p is None:
        finding = "one seed: no spread to test with" if difference.n == 1 else "no spread to test with"
    elif p > _ALPHA:
        finding = "not distinguishable"
    else:
        finding = "higher" if difference.mean > 0 else "lower"
    return (
        f"{first.label} - {second.label}",
        f"{difference.mean:+.2f}" + ("" if difference.sd is None else f" ± {difference.sd:.2f}"),
        f"{difference.low:+.2f} to {difference.high:+.2f}" if has_interval else "",
        str(difference.n),
        "" if difference.effect_size is None else f"{difference.effect_size:+.2f}",
        "" if p is None else ("< 0.001" if p < 0.001 else f"{p:.3f}"),
        finding,
    )


def _why_not(cell: ReportCell, base: ReportCell) -> str:
    mine, theirs = cell.training, base.training
    apart = ", ".join(f"`{key}`" for key in mine if mine[key] != theirs[key])
    return (
        f"{cell.label} is not compared with {base.label}, which it builds on: they were trained with different {apart}."
    )


def _further(found: GroupMeasurements, pairs: Sequence[tuple[ReportCell, ReportCell]]) -> list[str]:
    """Sentences on students that are further from the teacher than the cells they build on."""
    less, more = [], []
    for first, second in pairs:
        sides = [found.measurements_of(cell) for cell in (first, second)]
        shares = [[each.agreement for each in side if each.agreement is not None] for side in sides]
        if all(shares) and fmean(shares[0]) < fmean(shares[1]):
            less.append(f"{first.label} ({spread(shares[0])} %, {second.label} {spread(shares[1])} %)")
        nats = [[each.fidelity for each in side if each.fidelity is not None] for side in sides]
        if all(nats) and round(fmean(nats[0]), 3) > round(fmean(nats[1]), 3):
            more.append(f"{first.label} ({spread(nats[0], 3)}, {second.label} {spread(nats[1], 3)} nats)")
    sentences = []
    if less:
        sentences.append(
            f"On average, these agree with the teacher less than the cells they build on: {'; '.join(less)}."
        )
    if more:
        sentences.append(
            f"On average, these diverge from the teacher (by KL) more than the cells they build on: {'; '.join(more)}."
        )
    return sentences
