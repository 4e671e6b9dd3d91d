"""From run folders to a report: numbers measured, figures drawn, page written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from icdctl import data, evaluation, files, methods, models, registry
from icdctl.data import Dataset
from icdctl.engine.device import resolve_device
from icdctl.engine.environment import cpu_name
from icdctl.engine.observer import Observer
from icdctl.errors import IcdctlError, UsageError
from icdctl.reporting import figures, measure
from icdctl.reporting.drawing import Picture
from icdctl.reporting.figures import Curve, Node, Point
from icdctl.reporting.gather import Cell, Gathered, Group, Run, gather
from icdctl.reporting.measure import BROKEN, Chosen, Examiner, Measured, View
from icdctl.reporting.page import Page, Section, Table, render_markdown, render_page
from icdctl.science import compare
from icdctl.science.verdicts import Judgement, sheets
from icdctl.targets import Target

PAGE_FILE, NUMBERS_FILE, SUMMARY_FILE, FIGURES = "index.html", "report.json", "summary.md", "figures"
_SHORT_HASH = 10
_ALPHA = 0.05


@dataclass(frozen=True)
class Wishes:
    """What a report should be like."""

    title: str = "icdctl report"
    detailed: Sequence[str] = ()
    """Groups whose name has one of these in it get all figures; the first ones where none is named."""
    most_detailed: int = 3
    """How many groups get all figures where none is named."""
    images: Sequence[int] | None = None
    """Numbers of the test images whose Gram matrices are drawn; None for four by a fixed seed."""
    latency: bool = True
    """Measure one image in ONNX Runtime."""
    device: str = "auto"
    data_dir: str | None = None
    """What holds the data sets; None for where the runs found them."""


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    folder: Path
    files: tuple[Path, ...]
    rows: tuple[Mapping[str, Any], ...]
    """A cell each, with numbers."""
    notes: tuple[str, ...]
    """What is not in it, and why."""


@dataclass
class _Looked:
    """What was found out about a group, as far as its models could be asked."""

    group: Group
    teacher: Target | None = None
    teacher_numbers: Measured | None = None
    measured: dict[Path, Measured] = field(default_factory=dict)
    """By run folder."""
    targets: dict[str, Target] = field(default_factory=dict)
    """Label of a cell -> weights of its first run."""
    data_sha256: str | None = None
    latencies: dict[str, float] = field(default_factory=dict)
    """Model -> milliseconds."""
    pictures: list[Picture] = field(default_factory=list)

    def of(self, cell: Cell) -> list[Measured]:
        """Of all runs of a cell; none where one could not be asked."""
        found = [self.measured[run.folder] for run in cell.runs if run.folder in self.measured]
        return found if len(found) == len(cell.runs) else []


def build_report(
    paths: Sequence[Path],
    out: Path,
    wishes: Wishes,
    *,
    judgements: Sequence[Judgement] = (),
    observer: Observer,
) -> Report:
    """Write a report.

    Args:
        paths: run folders, or folders that hold some.
        out: the folder; figures of an earlier report in it are replaced.
        wishes: what it should be like.
        judgements: tables of papers that go into it.
        observer: told of the progress.

    Raises:
        UsageError: a wish that can't be fulfilled.
        ArtifactError: no runs, or a folder that can't be written to.
    """
    gathered = gather(paths)
    notes = list(gathered.notes)
    device = resolve_device(wishes.device)
    chosen = _detailed(gathered.groups, wishes, notes)
    looked = []
    for group in gathered.groups:
        found = _Looked(group)
        found.pictures.append(_curves(group))
        try:
            examiner = _ask(found, wishes, device, observer, notes)
        except BROKEN as error:
            notes.append(f"{group.title}: its models were not asked: {error.message}")
        else:
            if group in chosen:
                found.pictures += _pictures(found, examiner, wishes)
        looked.append(found)
    rows = [row for each in looked for row in _rows(each)]
    across = _pareto(looked)
    page = Page(
        wishes.title,
        _about(gathered),
        [
            *_judged(judgements),
            _overview(looked, across),
            *(_section(each, in_detail=each.group in chosen) for each in looked),
            _origins(looked, gathered, notes),
        ],
        notes,
    )
    pictures = [picture for section in page.sections for picture in section.pictures]
    written = _write(out, page, pictures, rows, judgements)
    return Report(out, tuple(written), tuple(rows), tuple(notes))


def _detailed(groups: Sequence[Group], wishes: Wishes, notes: list[str]) -> list[Group]:
    """The groups that get all figures."""
    for text in wishes.detailed:
        if not any(text in group.name for group in groups):
            names = ", ".join(f"`{group.name}`" for group in groups)
            raise UsageError(f"no pair of models has `{text}` in its name", hint=f"they are {names}")
    if wishes.detailed:
        return [group for group in groups if any(text in group.name for text in wishes.detailed)]
    if len(groups) > wishes.most_detailed:
        notes.append(
            f"all figures for {wishes.most_detailed} of {len(groups)} pairs of models; `--detail TEXT` chooses others"
        )
    return list(groups[: wishes.most_detailed])


def _ask(found: _Looked, wishes: Wishes, device: torch.device, observer: Observer, notes: list[str]) -> Examiner:
    """Measure the models of a group."""
    group = found.group
    dataset = _load(group.cells[0].config, wishes)
    found.data_sha256 = dataset.sha256
    examiner = Examiner(dataset, device, observer)
    try:
        found.teacher = measure.teacher_target(group, dataset)
    except BROKEN as error:
        notes.append(f"{group.title}: nothing is compared with the teacher: {error.message}")
    if found.teacher is not None:
        found.teacher_numbers = examiner.measure(found.teacher, teacher=None)
    for cell in group.cells:
        for run in cell.runs:
            try:
                target = measure.run_target(run)
                found.measured[run.folder] = examiner.measure(target, teacher=found.teacher)
            except IcdctlError as error:
                notes.append(f"{run.folder} was not measured: {error.message}")
                continue
            if run is cell.runs[0]:
                found.targets[cell.label] = target
    if wishes.latency:
        for target in [*([found.teacher] if found.teacher else []), *found.targets.values()]:
            if target.model not in found.latencies:
                found.latencies[target.model] = measure.latency_ms(target, cpu_name())
    return examiner


def _load(config: Any, wishes: Wishes) -> Dataset:
    """The data set of a run, from where it lies now."""
    if wishes.data_dir is not None:
        config = config.model_copy(update={"data_dir": wishes.data_dir})
    return data.load(config.images)


def _curves(group: Group) -> Picture:
    """Learning curves of the drawn cells, on whatever images they watched."""
    watched = "test" if all("test_top1" in run.history[0] for cell in group.drawn for run in cell.runs) else "val"
    curves = [
        Curve(cell.label, [[row[f"{watched}_top1"] for row in run.history] for run in cell.runs])
        for cell in group.drawn
        if all(f"{watched}_top1" in run.history[0] for run in cell.runs)
    ]
    kind = {"test": "test", "val": "held-out"}[watched]
    return figures.learning_curves(f"{group.name}-curves", curves, title="Learning curves", watched=kind)


def _pictures(found: _Looked, examiner: Examiner, wishes: Wishes) -> list[Picture]:
    """The figures of a group that need its models."""
    group, name, dataset = found.group, found.group.name, examiner.dataset
    cells = [cell for cell in group.drawn if found.of(cell)]
    pictures = []
    gains = {}
    for first, second in group.comparisons:
        values = _class_gains(found, first, second)
        if values is not None:
            gains[f"{first.label} - {second.label}"] = values
    if gains:
        pictures.append(figures.per_class_gains(f"{name}-classes", gains))
    bins = {cell.label: _together([each.numbers for each in found.of(cell)]) for cell in cells}
    ece = {cell.label: [each.numbers.ece for each in found.of(cell)] for cell in cells}
    if found.teacher_numbers is not None:
        label = f"{group.teacher} {figures.TEACHER}"
        bins = {label: found.teacher_numbers.numbers.reliability, **bins}
        ece = {label: [found.teacher_numbers.numbers.ece], **ece}
    if bins:
        pictures.append(figures.reliability(f"{name}-reliability", bins, ece))
    if not cells:
        return pictures
    chosen = measure.choose_images(dataset.test_labels, num_shown=4, shown=wishes.images)
    views = {cell.label: examiner.look(found.targets[cell.label], chosen) for cell in cells}
    placed = {label: view.features for label, view in views.items()}
    if found.teacher is not None and group.teacher is not None:
        theirs = examiner.look(found.teacher, chosen)
        pictures.append(_agreement(found, cells, group.teacher))
        differences = {
            label: measure.correlation(view.logits) - measure.correlation(theirs.logits)
            for label, view in views.items()
        }
        pictures.append(figures.correlation_differences(f"{name}-correlation", differences, teacher=group.teacher))
        placed = {f"{group.teacher} {figures.TEACHER}": theirs.features, **placed}
        pictures += [
            _gram_picture(found, cell, views[cell.label], theirs, dataset, chosen) for cell in _clustered(cells)
        ]
    if len(chosen.mapped) >= measure.FEWEST_MAPPED:
        maps = {label: measure.feature_map(features) for label, features in placed.items()}
        names = {number: dataset.class_names[number] for number in chosen.classes}
        labels = dataset.test_labels[chosen.mapped].numpy()
        pictures.append(figures.feature_maps(f"{name}-features", maps, labels, names))
    return pictures


def _clustered(cells: Sequence[Cell]) -> list[Cell]:
    """Whose Gram matrices are drawn: those with the cluster term, and the same without; else the last one."""
    clustered = [cell for cell in cells if methods.METHODS[cell.config.method].cluster]
    losses = {methods.METHODS[cell.config.method].loss for cell in clustered}
    beside = [
        cell
        for cell in cells
        if cell not in clustered
        and methods.METHODS[cell.config.method].patches
        and methods.METHODS[cell.config.method].loss in losses
    ]
    return [*beside, *clustered] or list(cells[-1:])


def _gram_picture(found: _Looked, cell: Cell, view: View, theirs: View, dataset: Dataset, chosen: Chosen) -> Picture:
    scales = [scale for scale in (cell.config.scales or methods.SCALES) if scale > 1] or [2, 4]
    images = dataset.test_images[chosen.shown].numpy()
    names = [
        f"{dataset.class_names[int(dataset.test_labels[number])]} (no. {number})" for number in chosen.shown.tolist()
    ]
    grams = [
        {
            scale: (measure.gram_of(theirs.cells[place], scale), measure.gram_of(view.cells[place], scale))
            for scale in scales
        }
        for place in range(len(names))
    ]
    name = f"{found.group.name}-patches-{cell.config.method}"
    return figures.gram_maps(name, images, names, grams, student=cell.label, teacher=str(found.group.teacher))


def _agreement(found: _Looked, cells: Sequence[Cell], teacher: str) -> Picture:
    shares, divergences = {}, {}
    for cell in cells:
        held = found.of(cell)
        shares[cell.label] = [each.agreement for each in held if each.agreement is not None]
        divergences[cell.label] = [each.fidelity for each in held if each.fidelity is not None]
    return figures.agreements(f"{found.group.name}-agreement", shares, divergences, teacher=teacher)


def _class_gains(found: _Looked, first: Cell, second: Cell) -> list[float] | None:
    """Points for each class, over the seeds that both have; None where none is measured."""
    sides = [
        {run.config.seed: found.measured[run.folder] for run in cell.runs if run.folder in found.measured}
        for cell in (first, second)
    ]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return None
    gains = [np.array(sides[0][seed].numbers.per_class) - np.array(sides[1][seed].numbers.per_class) for seed in seeds]
    return [float(value) for value in np.mean(gains, axis=0)]


def _together(several: Sequence[evaluation.Evaluation]) -> tuple[evaluation.Bin, ...]:
    """The bins of several models as one."""
    found = []
    for same in zip(*(each.reliability for each in several), strict=True):
        images = sum(each.images for each in same)
        share = max(images, 1)
        confidence = sum(each.images * each.confidence for each in same) / share
        accuracy = sum(each.images * each.accuracy for each in same) / share
        found.append(evaluation.Bin(images, confidence, accuracy))
    return tuple(found)


def _rows(found: _Looked) -> list[dict[str, Any]]:
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


def _pareto(looked: Sequence[_Looked]) -> list[Picture]:
    """A figure for each data set: its teachers, and the cells of its students."""
    pictures = []
    for dataset in dict.fromkeys(each.group.dataset for each in looked):
        points: dict[str, Point] = {}
        for each in looked:
            if each.group.dataset != dataset:
                continue
            if each.teacher is not None and each.teacher_numbers is not None:
                label = f"{each.group.teacher} {figures.TEACHER}"
                size = _megabytes(each.teacher.model, each.teacher.num_classes)
                latency = each.latencies.get(each.teacher.model)
                points[label] = Point(label, [each.teacher_numbers.numbers.top1], size, latency)
            for cell in each.group.drawn:
                params = cell.runs[0].metrics.get("params")
                if isinstance(params, int):
                    label = f"{each.group.student}, {cell.label}"
                    finals = list(cell.top1.values())
                    points[label] = Point(label, finals, 4e-6 * params, each.latencies.get(each.group.student))
        if len(points) > 1:
            slug = "".join(char if char.isalnum() and char.isascii() else "-" for char in dataset)
            hardware = cpu_name() if any(point.latency_ms for point in points.values()) else ""
            pictures.append(figures.pareto(f"pareto-{slug}", list(points.values()), hardware=hardware))
    return pictures


def _megabytes(model: str, num_classes: int) -> float:
    with torch.device("meta"):
        made = models.create(model, num_classes)
    return 4e-6 * sum(parameter.numel() for parameter in made.parameters())


def _about(gathered: Gathered) -> list[str]:
    """What a reader must know before the numbers."""
    runs = [run for group in gathered.groups for cell in group.cells for run in cell.runs]
    unique = {run.folder for run in runs}
    variants = sorted({str(run.config.settings["variant"]) for run in runs})
    watched = any(run.config.val_split for run in runs)
    return [
        f"{len(unique)} runs in {len(gathered.groups)} pairs of models. The number of a run is its final epoch on the "
        "test images; ± is the standard deviation over seeds.",
        "Best-epoch numbers are chosen on the test images, so they are too high; they are shown as `best` alone, for "
        "comparison with papers that print them." + (" Runs that watch held-out images have none." if watched else ""),
        f"Variant of the losses: {', '.join(f'`{name}`' for name in variants)}"
        + (", the reference code's numbers with its quirks." if variants == ["published"] else "."),
    ]


def _judged(judgements: Sequence[Judgement]) -> list[Section]:
    """The tables of papers, with verdicts."""
    return [
        Section(
            f"table-{judgement.table.name}",
            f"Reproduction: {judgement.table.name}",
            [", ".join(f"{number} {status}" for status, number in judgement.counts.items())],
            tables=[Table(sheet.title, sheet.headers, sheet.rows, sheet.notes) for sheet in sheets(judgement)],
        )
        for judgement in judgements
    ]


def _overview(looked: Sequence[_Looked], pareto: list[Picture]) -> Section:
    headers = (
        "pair",
        "method",
        "n",
        "top-1, final",
        "best",
        "top-5",
        "loss",
        "ECE",
        "agreement",
        "KL, nats",
        "parameters",
        "latency, ms",
    )
    lines = []
    shown: set[str] = set()
    for each in looked:
        pair = f"{each.group.teacher} : {each.group.student}" if each.group.teacher else each.group.student
        if each.teacher_numbers is not None and each.teacher is not None and each.teacher.sha256 not in shown:
            shown.add(each.teacher.sha256)
            numbers = each.teacher_numbers.numbers
            values = [f"{numbers.top1:.2f}", f"{numbers.top5:.2f}", f"{numbers.loss:.3f}", f"{numbers.ece:.2f}"]
            params = round(1e6 * _megabytes(each.teacher.model, each.teacher.num_classes) / 4)
            latency = each.latencies.get(each.teacher.model)
            line = (str(each.group.teacher), figures.TEACHER, "1", values[0], "", *values[1:], "", "", f"{params:,}")
            lines.append((*line, _fixed(latency)))
        for cell, row in zip(each.group.cells, _rows(each), strict=True):
            params = row["params"]
            lines.append(
                (
                    pair,
                    cell.label,
                    str(len(cell.runs)),
                    _spread(row["final_top1"]),
                    _spread(row["best_top1"]),
                    _spread(row["final_top5"]),
                    _spread(row["loss"], 3),
                    _spread(row["ece"]),
                    _spread(row["agreement"]),
                    _spread(row["fidelity"], 3),
                    f"{params:,}" if isinstance(params, int) else "",
                    _fixed(row["latency_ms"]),
                )
            )
    datasets = ", ".join(dict.fromkeys(each.group.dataset for each in looked))
    notes = (
        "Percent, but for the loss and for KL, of the student from the teacher. Latency: one image, ONNX Runtime, one "
        "thread.",
    )
    table = Table(f"All cells, {datasets}", headers, tuple(lines), notes)
    return Section("results", "Results", [], tables=[table], pictures=pareto)


def _section(found: _Looked, *, in_detail: bool) -> Section:
    group = found.group
    told = []
    if len(group.drawn) < len(group.cells):
        told.append(
            f"Figures show {len(group.drawn)} of {len(group.cells)} cells, one for each method; the table above has "
            "all."
        )
    if not in_detail:
        told.append(f"Learning curves alone; `icdctl report --detail {group.name}` draws the rest.")
    comparisons, further = _comparisons(found)
    told += further
    tables = [comparisons] if comparisons is not None else []
    return Section(group.name, group.title, told, tables=tables, pictures=found.pictures)


def _comparisons(found: _Looked) -> tuple[Table | None, list[str]]:
    """What each part of a method adds, paired by seed; and where a better student is further from the teacher."""
    group = found.group
    pairs = [
        (first, second, compare.paired_difference(first.top1, second.top1))
        for first, second in group.comparisons
        if first.top1.keys() & second.top1.keys()
    ]
    if not pairs:
        return None, []
    tested = [difference.p for *_, difference in pairs if difference.p is not None]
    adjusted = iter(compare.holm(tested))
    lines, told = [], []
    for first, second, difference in pairs:
        p = next(adjusted) if difference.p is not None else None
        has_interval = difference.low is not None and difference.high is not None
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
        shares = [[each.agreement for each in found.of(cell) if each.agreement is not None] for cell in (first, second)]
        if all(shares) and fmean(shares[0]) < fmean(shares[1]):
            told.append(
                f"{first.label} agrees with the teacher less than {second.label}: {figures.spread(shares[0])} % "
                f"against {figures.spread(shares[1])} %."
            )
    notes = (
        "Top-1 at the final epoch, paired by seed; ± is the standard deviation of one seed's difference, d_z the mean "
        f"over it. p of the paired t test with Holm's correction over the {len(tested)} tests of this table.",
    )
    headers = ("comparison", "difference", "95 % interval", "n", "d_z", "p (Holm)", "finding")
    return Table("What each part adds", headers, tuple(lines), notes), told


def _origins(looked: Sequence[_Looked], gathered: Gathered, notes: list[str]) -> Section:
    """What was made from what, with hashes, sources and licences."""
    registered = _registered(notes)
    nodes: dict[str, Node] = {}
    lines: dict[tuple[str, ...], None] = {}
    for each in looked:
        group = each.group
        described = f"{each.group.dataset}"
        data_key = f"data {group.dataset} {each.data_sha256}"
        nodes[data_key] = Node(data_key, (described, _short_hash(each.data_sha256)), 0)
        row = data.row_of(group.dataset)
        origin = "" if row is None else f"{row.source}; licence: {row.licence}"
        lines[("data", described, each.data_sha256 or "not loaded", origin)] = None
        parents: tuple[str, ...] = (data_key,)
        if group.teacher_sha256 is not None:
            key = f"teacher {group.teacher_sha256}"
            nodes[key] = Node(key, (f"{group.teacher}", _short_hash(group.teacher_sha256)), 1, (data_key,))
            parents = (key,)
            lines[("teacher", str(group.teacher), group.teacher_sha256, _teacher_origin(group, gathered))] = None
        for cell in group.cells:
            key = f"cell {group.name} {cell.label}"
            if cell in group.drawn:
                count = f"{len(cell.runs)} seeds" if len(cell.runs) > 1 else _short_hash(cell.runs[0].sha256)
                from_ = parents if cell.config.teacher is not None else (data_key,)
                nodes[key] = Node(key, (f"{group.student}, {cell.label}", count), 2, from_)
            for run in cell.runs:
                delivered = _delivered(run, registered)
                versions = run.environment.get("versions", {})
                made = f"icdctl {versions.get('icdctl', '?')}, torch {versions.get('torch', '?')}"
                lines[("student", f"{cell.label}, seed {run.config.seed}", run.sha256, made)] = None
                for place, (what, sha256) in enumerate(delivered):
                    lines[(what, f"{cell.label}, seed {run.config.seed}", sha256, "")] = None
                    if cell in group.drawn:
                        node = f"{what} {run.folder} {place}"
                        nodes[node] = Node(node, (what, _short_hash(sha256)), 3, (key,))
    headers = ["data", "teacher", "students", "delivered"]
    if not any(node.column == 3 for node in nodes.values()):
        headers.pop()
    ordered = sorted(nodes.values(), key=lambda node: node.column)
    picture = figures.lineage("lineage", ordered, headers)
    table = Table("All of it", ("kind", "what", "sha256", "source"), tuple(lines), ())
    return Section("lineage", "Lineage", [], tables=[table], pictures=[picture])


def _teacher_origin(group: Group, gathered: Gathered) -> str:
    own = gathered.teachers.get(group.teacher_sha256 or "")
    run = next(run for cell in group.cells for run in cell.runs if run.config.teacher is not None)
    source, licence = run.metrics.get("teacher_source"), run.metrics.get("teacher_licence")
    told = [str(source)] if source else []
    if licence:
        told.append(f"licence: {licence}")
    if own is not None:
        told.append(f"its own run reached {own.top1:.2f}")
    return "; ".join(told)


def _registered(notes: list[str]) -> dict[str, str]:
    """Hash of weights -> the newest artifact that holds them."""
    try:
        found = registry.list_artifacts(registry.default_folder())
    except IcdctlError as error:
        notes.append(f"the registry was not read: {error.message}")
        return {}
    return {artifact.sha256: artifact.reference for artifact in found}


def _delivered(run: Run, registered: Mapping[str, str]) -> list[tuple[str, str]]:
    """ONNX files and registered copies of a run, each with its hash."""
    found = []
    onnx = run.folder / "onnx" / "model.onnx"
    if onnx.is_file():
        found.append(("ONNX", files.sha256_file(onnx)))
    if run.sha256 in registered:
        found.append((f"registry: {registered[run.sha256]}", run.sha256))
    return found


def _short_hash(sha256: str | None) -> str:
    return "not loaded" if sha256 is None else sha256[:_SHORT_HASH]


def _spread(values: Sequence[float | None] | None, digits: int = 2) -> str:
    """`figures.spread`, and nothing where a number is missing."""
    held = [value for value in values or () if value is not None]
    return figures.spread(held, digits) if held and len(held) == len(values or ()) else ""


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _write(
    out: Path,
    page: Page,
    pictures: Sequence[Picture],
    rows: Sequence[Mapping[str, Any]],
    judgements: Sequence[Judgement],
) -> list[Path]:
    """All files; figures of an earlier report go."""
    from icdctl.science import verdicts

    content: dict[Path, bytes] = {out / PAGE_FILE: render_page(page).encode()}
    content[out / SUMMARY_FILE] = render_markdown(page).encode()
    for picture in pictures:
        content[out / FIGURES / f"{picture.name}.svg"] = picture.svg.encode()
        content[out / FIGURES / f"{picture.name}.png"] = picture.png
    if (out / NUMBERS_FILE).is_file():  # ours
        shutil.rmtree(out / FIGURES, ignore_errors=True)
    for path, value in content.items():
        files.write_bytes(path, value)
    numbers = {"cells": list(rows), "tables": [verdicts.as_json(judgement) for judgement in judgements]}
    files.write_json(out / NUMBERS_FILE, {**numbers, "notes": page.notes})
    return [*content, out / NUMBERS_FILE]
