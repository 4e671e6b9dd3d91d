"""The figures of a report: numbers in, a picture out. Nothing here knows where the numbers come from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icdctl.evaluation import Bin
from icdctl.reporting.drawing import COLOURS, INK, MARKERS, RULE, Picture, drawing, finish, panels, plain

Matrix = NDArray[np.float64]
TEACHER = "(teacher)"
"""What ends a teacher's label; it is drawn in ink, everywhere."""
_TEACHERS_MARKERS = ("*", "p", "H", "8")
_FEWEST_SHARE = 0.005
"""Of the images: what a bin must have to be a point of a reliability diagram."""
_PANEL = 2.35
"""Side of a square panel, in inches."""
_LINE = 0.2
"""Height of a line of a legend, in inches."""
_LONG, _ROOM = 22, 60
"""Characters of a label: from how many on legends have fewer columns, and how many they have room for."""
_TITLE, _CLASS, _BOX = 30, 24, 34
"""Characters that a panel's title, a class and a box of the lineage have room for."""


@dataclass(frozen=True)
class Curve:
    """A quantity by epoch, a row for each seed."""

    label: str
    rows: Sequence[Sequence[float]]
    """[seeds][epochs], in percent."""


def spread(values: Sequence[float | None] | None, digits: int = 2) -> str:
    """`93.10 ± 0.21`, the standard deviation over seeds; the mean alone where there is one; empty without."""
    held = [value for value in values or () if value is not None]
    if not held or len(held) < len(values or ()):
        return ""
    mean = f"{fmean(held):.{digits}f}"
    return f"{mean} ± {stdev(held):.{digits}f}" if len(held) > 1 else mean


def brief(text: str, length: int) -> str:
    """The text, cut where it is longer than there is room for."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def learning_curves(name: str, curves: Sequence[Curve], *, title: str, watched: str = "test") -> Picture:
    """Top-1 by epoch: the mean over seeds, and the band from the lowest to the highest.

    Args:
        name: of the files.
        curves: one for each cell.
        title: of the figure.
        watched: which images it was measured on.
    """
    legend_columns = 2 if max(len(curve.label) for curve in curves) < _LONG else 1
    with drawing(7.2, 3.3 + _LINE * (1 + -(-len(curves) // legend_columns))) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        for curve, colour, marker in _styled(curves):
            length = min(len(row) for row in curve.rows)
            values = np.array([row[:length] for row in curve.rows])
            epochs = np.arange(1, length + 1)
            final = spread([row[-1] for row in curve.rows])
            seeds = f"n={len(curve.rows)}"
            axes.plot(
                epochs,
                values.mean(axis=0),
                label=f"{brief(curve.label, _ROOM)}: {final} ({seeds})",
                color=colour,
                marker=marker,
                markersize=3.5,
                markevery=max(1, length // 12),
            )
            if len(values) > 1:
                axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"top-1 on the {watched} images, %")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if all(len(row) == 1 for curve in curves for row in curve.rows):
            axes.set_xlim(0.5, 1.5)
        figure.legend(title="final epoch", loc="outside lower center", ncols=legend_columns)
        finals = "; ".join(f"{curve.label} {spread([row[-1] for row in curve.rows])}" for curve in curves)
        return finish(
            figure,
            name,
            title=title,
            caption=f"Top-1 on the {watched} images after each epoch: mean over seeds, and the band from the lowest to "
            "the highest seed. The legend has the final epoch, ± the standard deviation over seeds.",
            alternative=f"Learning curves. At the final epoch, in percent: {finals}.",
        )


def correlation_differences(name: str, differences: Mapping[str, Matrix], *, teacher: str) -> Picture:
    """Where the classes of student and teacher are not alike in the same way, a panel a student.

    Args:
        name: of the files.
        differences: label -> [K, K], correlation of the student's logits less that of the teacher's.
        teacher: the model.
    """
    columns = min(4, len(differences))
    rows = -(-len(differences) // columns)
    sizes = {label: float(np.abs(matrix).mean()) for label, matrix in differences.items()}
    limit = max(1e-6, max(float(np.quantile(np.abs(matrix), 0.995)) for matrix in differences.values()))
    with drawing(columns * _PANEL + 0.9, rows * (_PANEL + 0.35)) as figure:
        figure.set_layout_engine("compressed")
        axes = panels(figure, len(differences), columns=columns)
        image = None
        for each, (label, matrix) in zip(axes, differences.items(), strict=True):
            image = each.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            plain(each)
            each.set_title(f"{brief(label, _TITLE)}\nmean |difference| {sizes[label]:.3f}", fontsize=8.5)
        if image is not None:
            bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=24)
            bar.outline.set_visible(False)
        listed = "; ".join(f"{label} {size:.3f}" for label, size in sizes.items())
        return finish(
            figure,
            name,
            title=f"Correlation of classes: student less {teacher}",
            caption="Pearson's correlation of two classes' logits over the test images, student less teacher; rows and "
            "columns are classes. White is the teacher's own structure. First seed; one colour scale, cut at the "
            "99.5 % quantile.",
            alternative=f"Differences of correlation matrices between each student and the teacher {teacher}. "
            f"Mean absolute difference: {listed}.",
        )


def gram_maps(
    name: str,
    images: NDArray[np.uint8],
    names: Sequence[str],
    grams: Sequence[Mapping[int, tuple[Matrix, Matrix]]],
    *,
    student: str,
    teacher: str,
) -> Picture:
    """How patches of chosen images cluster, for teacher and student, at each scale.

    Args:
        name: of the files.
        images: [I, H, W, 3] uint8.
        names: of the images.
        grams: for each image, scale -> Gram matrices of teacher and student, [scale^2, scale^2] each.
        student: its label.
        teacher: the model.
    """
    scales = sorted(grams[0])
    kinds = ("teacher", "student", "difference")
    headers = ["image", *(f"{kind}, {scale}x{scale}" for scale in scales for kind in kinds)]
    gaps = {scale: fmean(float(np.abs(row[scale][1] - row[scale][0]).mean()) for row in grams) for scale in scales}
    with drawing(1.22 * len(headers) + 0.6, 1.13 * len(images) + 0.35) as figure:
        figure.set_layout_engine("compressed")
        grid = figure.subplots(len(images), len(headers), squeeze=False)
        shown = None
        for row, (pixels, each_name, matrices) in enumerate(zip(images, names, grams, strict=True)):
            pictures: list[tuple[Any, dict[str, Any]]] = [(pixels, {})]
            for scale in scales:
                theirs, ours = matrices[scale]
                pictures += [(matrix, {"cmap": "viridis", "vmin": -0.2, "vmax": 1.0}) for matrix in (theirs, ours)]
                pictures.append((ours - theirs, {"cmap": "RdBu_r", "vmin": -0.6, "vmax": 0.6}))
            for axes, header, (picture, options) in zip(grid[row], headers, pictures, strict=True):
                drawn = axes.imshow(picture, interpolation="nearest", **options)
                shown = drawn if header.startswith("difference") else shown
                plain(axes)
                if row == 0:
                    axes.set_title(header, fontsize=7.5)
            grid[row][0].set_ylabel(each_name, fontsize=7, color=INK)
        if shown is not None:
            bar = figure.colorbar(shown, ax=grid[:, -1], shrink=0.8, aspect=24)
            bar.outline.set_visible(False)
        listed = ", ".join(f"{gap:.3f} at {scale}x{scale}" for scale, gap in gaps.items())
        return finish(
            figure,
            name,
            title=f"How patches cluster: {teacher} and {student}",
            caption="Cosine of the logits of any two patches of an image, patches row by row, from -0.2 (dark) to 1 "
            "(bright): bright blocks are patches that the model takes for the same. Teacher, student (first seed), and "
            "student less teacher. This is what the cluster term of iCD compares.",
            alternative=f"Gram matrices of patch logits for {len(images)} test images ({', '.join(names)}). Mean "
            f"absolute difference between {student} and {teacher}: {listed}.",
        )


def feature_maps(
    name: str,
    placed: Mapping[str, Matrix],
    labels: NDArray[np.int64],
    class_names: Mapping[int, str],
    *,
    perplexity: float,
) -> Picture:
    """t-SNE of what each model's head reads.

    Args:
        name: of the files.
        placed: label of a model -> [F, 2].
        labels: [F].
        class_names: of the classes among them.
        perplexity: that the maps were made with.
    """
    columns = min(3, len(placed))
    rows = -(-len(placed) // columns)
    apart = {label: _silhouette(points, labels) for label, points in placed.items()}
    shown_names = [brief(each, _CLASS) for each in class_names.values()]
    legend_width = 0.6 + 0.085 * max(map(len, shown_names))
    with drawing(columns * _PANEL + legend_width, rows * (_PANEL + 0.35)) as figure:
        figure.set_layout_engine("compressed")
        axes = panels(figure, len(placed), columns=columns)
        handles: list[Any] = []
        for each, (label, points) in zip(axes, placed.items(), strict=True):
            handles = [
                each.scatter(
                    points[labels == number, 0],
                    points[labels == number, 1],
                    s=13,
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index % len(MARKERS)],
                    linewidths=0,
                    rasterized=True,
                )
                for index, number in enumerate(class_names)
            ]
            plain(each)
            each.set_box_aspect(1)
            each.set_title(f"{brief(label, _TITLE)}\nsilhouette {apart[label]}", fontsize=8.5)
        figure.legend(handles, shown_names, loc="outside right center", title="class", markerscale=1.6)
        listed = "; ".join(f"{label} {value}" for label, value in apart.items())
        return finish(
            figure,
            name,
            title="Features before the classifier, by t-SNE",
            caption=f"Penultimate features of {len(labels)} test images of {len(class_names)} classes, classes and "
            f"images drawn by a fixed seed; t-SNE with perplexity {perplexity:.3g}, started from principal components. "
            "Distances between clusters mean little. Silhouette: of the points as drawn. First seed.",
            alternative=f"Maps of features of {len(labels)} test images. Silhouette of the classes: {listed}.",
        )


def _silhouette(points: Matrix, labels: NDArray[np.int64]) -> str:
    """How far apart the classes are, from -1 to 1: [F, 2], [F]."""
    from sklearn.metrics import silhouette_score

    num_classes = len(set(labels.tolist()))
    if not 1 < num_classes < len(labels):
        return "not defined: an image a class"
    return f"{silhouette_score(points, labels):.2f}"


def per_class_gains(name: str, gains: Mapping[tuple[str, str], Sequence[float]]) -> Picture:
    """Which classes win and which lose by what a method adds, a panel a comparison.

    Args:
        name: of the files.
        gains: first and second label -> points of top-1 for each class with test images, mean over
            the seeds that both have.
    """
    told = {}
    columns = min(3, len(gains))
    rows = -(-len(gains) // columns)
    with drawing(columns * 2.3 + 0.4, rows * 2.4 + 0.2) as figure:
        for axes, ((first, second), values) in zip(
            panels(figure, len(gains), columns=columns), gains.items(), strict=True
        ):
            label = f"{first} - {second}"
            ordered = np.sort(np.array(values))[::-1]
            places = np.arange(len(ordered))
            axes.bar(places[ordered >= 0], ordered[ordered >= 0], width=1.0, color=COLOURS[0], linewidth=0)
            axes.bar(places[ordered < 0], ordered[ordered < 0], width=1.0, color=COLOURS[3], linewidth=0)
            axes.axhline(0, color=INK, linewidth=0.7)
            limit = 1.08 * (float(np.abs(ordered).max()) or 1.0)
            axes.set_ylim(-limit, limit)
            axes.set_xlabel("classes, by gain")
            axes.set_xticks([])
            better, worse = int((ordered > 0).sum()), int((ordered < 0).sum())
            told[label] = f"{better} classes better, {worse} worse, mean {ordered.mean():+.2f}"
            title = f"{brief(first, _TITLE)}\n- {brief(second, _TITLE)}" if len(label) > _TITLE else label
            axes.set_title(f"{title}\n{better} better, {worse} worse", fontsize=8)
        figure.supylabel("points of top-1 within the class", fontsize=9)
        listed = "; ".join(f"{label}: {text}" for label, text in told.items())
        return finish(
            figure,
            name,
            title="Gain of each class",
            caption="Top-1 within each class, first method less second, mean over the seeds that both have; classes in "
            "order of the gain; each panel has a scale of its own. A class with few test images moves a lot by chance: "
            "among equal methods, about as many classes go up as down.",
            alternative=f"Gains by class. {listed}.",
        )


def reliability(name: str, bins: Mapping[str, Sequence[Bin]], ece: Mapping[str, Sequence[float]]) -> Picture:
    """How often a model is right when it is so certain.

    Args:
        name: of the files.
        bins: label -> bins over all seeds together.
        ece: label -> calibration error of each seed.
    """
    total = {label: sum(each.images for each in several) for label, several in bins.items()}
    with drawing(5.2, 3.9 + _LINE * (1 + len(bins))) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="perfect")
        for label, colour, marker in _styled(list(bins)):
            held = [each for each in bins[label] if each.images > _FEWEST_SHARE * total[label]]
            axes.plot(
                [each.confidence for each in held],
                [each.accuracy for each in held],
                color=colour,
                marker=marker,
                markersize=4,
                label=f"{brief(label, _ROOM)}: ECE {spread(ece[label])}",
            )
        axes.set_xlabel("probability of the chosen class, %")
        axes.set_ylabel("share of these images that is right, %")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_aspect("equal")
        figure.legend(loc="outside lower center")
        listed = "; ".join(f"{label} {spread(values)}" for label, values in ece.items())
        return finish(
            figure,
            name,
            title="Is it right as often as it is sure?",
            caption="Test images in 15 bins of the chosen class's probability, all seeds together; bins with less than "
            f"{100 * _FEWEST_SHARE:g} % of the images are not drawn. Below the dashed line a model is too sure of "
            "itself. ECE: mean gap, weighted by images, in percent, ± over seeds.",
            alternative=f"Reliability diagram. Expected calibration error in percent: {listed}.",
        )


def agreements(
    name: str, shares: Mapping[str, Sequence[float]], divergences: Mapping[str, Sequence[float]], *, teacher: str
) -> Picture:
    """How much of the teacher is in each student.

    Args:
        name: of the files.
        shares: label -> percent of test images classified as the teacher does, for each seed.
        divergences: label -> mean KL(teacher || student) in nats, for each seed.
        teacher: the model.
    """
    labels = list(shares)
    with drawing(7.2, 0.36 * len(labels) + 1.1) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, values, title in (
            (left, shares, "same class as the teacher, %"),
            (right, divergences, "KL(teacher || student), nats"),
        ):
            for place, (label, colour, marker) in enumerate(_styled(labels)):
                each = values[label]
                axes.plot(
                    each, [place] * len(each), marker=marker, linestyle="", color=colour, alpha=0.45, markersize=5
                )
                axes.plot([fmean(each)], [place], marker="|", color=INK, markersize=13, markeredgewidth=1.8)
            axes.set_xlabel(title)
        left.set_yticks(range(len(labels)), [brief(label, _TITLE) for label in labels])
        left.set_ylim(len(labels) - 0.5, -0.5)
        listed = "; ".join(
            f"{label} {spread(shares[label])} %, {spread(divergences[label], 3)} nats" for label in labels
        )
        return finish(
            figure,
            name,
            title=f"Agreement with the teacher, {teacher}",
            caption="A point for each seed, a line at the mean. Agreement is not accuracy: a better student may agree "
            "less.",
            alternative=f"Agreement with {teacher} and divergence from it: {listed}.",
        )


@dataclass(frozen=True)
class Point:
    """A model on the map of cost and accuracy."""

    label: str
    top1: Sequence[float]
    """Of each seed, in percent."""
    megabytes: float
    """Of its weights in float32."""
    latency_ms: float | None
    """Of one image; None where it was not measured."""


def pareto(name: str, points: Sequence[Point], *, hardware: str) -> Picture:
    """Accuracy against size and latency; the line joins what nothing smaller beats.

    Args:
        name: of the files.
        points: models.
        hardware: what latencies were measured on; empty where none was.
    """
    timed = [point for point in points if point.latency_ms is not None]
    kinds: list[tuple[str, list[tuple[float, Point]]]] = [
        ("weights in float32, MB", [(point.megabytes, point) for point in points])
    ]
    if timed:
        kinds.append(("latency, ms an image", [(point.latency_ms or 0.0, point) for point in timed]))
    legend_columns = 3 if max(len(point.label) for point in points) < 2 * _LONG else 2
    with drawing(3.9 * len(kinds) + 0.6, 3.3 + _LINE * -(-len(points) // legend_columns)) as figure:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        all_axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        styles = {label: style for label, *style in _styled([point.label for point in points])}
        for axes, (title, placed) in zip(all_axes, kinds, strict=True):
            for cost, point in placed:
                colour, marker = styles[point.label]
                axes.errorbar(
                    [cost],
                    [fmean(point.top1)],
                    yerr=stdev(point.top1) if len(point.top1) > 1 else None,
                    color=colour,
                    marker=marker,
                    markersize=9 if marker in _TEACHERS_MARKERS else 6,
                    linestyle="",
                    label=brief(point.label, _ROOM),
                    capsize=2,
                )
            line = _frontier([(cost, fmean(point.top1)) for cost, point in placed])
            axes.plot(*zip(*line, strict=True), color=RULE, linewidth=1.4, zorder=1, drawstyle="steps-post")
            axes.set_xlabel(title)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.margins(x=0.25)
        all_axes[0].set_ylabel("top-1, final epoch, %")
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=legend_columns)
        listed = "; ".join(
            f"{point.label} {spread(point.top1)} %, {point.megabytes:.2f} MB"
            + ("" if point.latency_ms is None else f", {point.latency_ms:.2f} ms")
            for point in points
        )
        told = f" Latency: median of one image in ONNX Runtime on one thread, {hardware}." if timed else ""
        return finish(
            figure,
            name,
            title="Accuracy, size and latency",
            caption=f"The grey line joins the models that none of less cost beats. Bars: ± the standard deviation over "
            f"seeds.{told} Logarithmic cost.",
            alternative=f"Accuracy against cost: {listed}.",
        )


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Cost and value of those that beat all of no more cost."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


@dataclass(frozen=True)
class Node:
    """A box in the drawing of lineage."""

    key: str
    lines: tuple[str, ...]
    column: int
    parents: tuple[str, ...] = ()


def lineage(name: str, nodes: Sequence[Node], headers: Sequence[str]) -> Picture:
    """What was made from what.

    Args:
        name: of the files.
        nodes: boxes; parents stand in columns before their children's.
        headers: of the columns.
    """
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    columns = [[node for node in nodes if node.column == number] for number in range(len(headers))]
    column_of = {node.key: node.column for node in nodes}
    tallest = max(len(column) for column in columns)
    width, height = 2.3 * len(headers), 0.62 * tallest + 0.45
    with drawing(width, height) as figure:
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.set_xlim(0, 2.3 * len(headers))
        axes.set_ylim(0.62 * tallest + 0.4, 0)
        places: dict[str, tuple[float, float]] = {}
        for number, (header, column) in enumerate(zip(headers, columns, strict=True)):
            left = 2.3 * number + 0.1
            axes.text(left + 0.95, 0.12, header, ha="center", va="center", fontsize=9, fontweight="bold")
            offset = 0.62 * (tallest - len(column)) / 2
            for row, node in enumerate(column):
                middle = offset + 0.62 * row + 0.66
                places[node.key] = (left, middle)
                box = FancyBboxPatch(
                    (left, middle - 0.22),
                    1.9,
                    0.44,
                    boxstyle="round,pad=0,rounding_size=0.06",
                    facecolor="none",
                    edgecolor=INK,
                    linewidth=0.8,
                )
                axes.add_patch(box)
                axes.text(
                    left + 0.95,
                    middle,
                    "\n".join(brief(line, _BOX) for line in node.lines),
                    ha="center",
                    va="center",
                    fontsize=7.2,
                )
                for parent in node.parents:
                    start = places[parent]
                    axes.add_patch(
                        FancyArrowPatch(
                            (start[0] + 1.9, start[1]),
                            (left, middle),
                            arrowstyle="-|>",
                            mutation_scale=7,
                            color=COLOURS[9],
                            linewidth=0.9,
                            shrinkA=0,
                            shrinkB=1,
                            connectionstyle=f"arc3,rad={0 if number - column_of[parent] == 1 else -0.25}",
                        )
                    )
        told = {node.key: " ".join(node.lines) for node in nodes}
        listed = "; ".join(
            told[node.key] + (f" from {' and '.join(told[parent] for parent in node.parents)}" if node.parents else "")
            for node in nodes
        )
        return finish(
            figure,
            name,
            title="Lineage",
            caption="What was made from what, with the first digits of the sha256 of pixels and labels, weights and "
            "ONNX files; the table has all of them.",
            alternative=f"Lineage: {listed}.",
        )


def _styled(items: Sequence[Any]) -> list[tuple[Any, str, str]]:
    """Labels, or what has one, with a colour and a marker each, by place; a teacher takes none of them."""
    # After as many as there are colours, each has the next marker.
    styles = (
        (colour, MARKERS[(place + turn) % len(MARKERS)])
        for turn in itertools.count()
        for place, colour in enumerate(COLOURS)
    )
    teachers = itertools.cycle(_TEACHERS_MARKERS)
    found = []
    for item in items:
        label = item if isinstance(item, str) else item.label
        colour, marker = (INK, next(teachers)) if label.endswith(TEACHER) else next(styles)
        found.append((item, colour, marker))
    return found
