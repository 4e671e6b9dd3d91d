"""Charts of a report: numbers in, a picture out. Nothing here knows where the numbers come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from icdctl.evaluation import Bin
from icdctl.reporting.drawing import (
    COLOURS,
    INK,
    LINE,
    RULE,
    TEACHER_MARKERS,
    TITLE_LENGTH,
    Picture,
    brief,
    drawing,
    finish,
    panels,
    styled,
)

_FEWEST_SHARE = 0.005
"""The share of the images that a bin must exceed to be a point of a reliability diagram."""
_LONG, _ROOM = 22, 60
"""Characters: labels from the first length on give legends fewer columns; legends have room for the second."""


@dataclass(frozen=True)
class Curve:
    """An accuracy by epoch, with a row for each seed."""

    label: str
    rows: Sequence[Sequence[float]]
    """[seeds][epochs], in percent."""


def spread(values: Sequence[float | None] | None, digits: int = 2) -> str:
    """Mean and standard deviation over seeds, e.g. `93.10 ± 0.21`; the mean alone for one value; empty if a value is
    missing."""
    held = [value for value in values or () if value is not None]
    if not held or len(held) < len(values or ()):
        return ""
    mean = f"{fmean(held):.{digits}f}"
    return f"{mean} ± {stdev(held):.{digits}f}" if len(held) > 1 else mean


def learning_curves(name: str, curves: Sequence[Curve], *, title: str, watched: str = "test") -> Picture:
    """Top-1 by epoch: the mean over seeds, and the band from the lowest to the highest seed.

    Args:
        name: name of the figure's files.
        curves: one curve for each cell.
        title: title of the figure.
        watched: the images that it was measured on: `test` or `held-out`.
    """
    legend_columns = 2 if max(len(curve.label) for curve in curves) < _LONG else 1
    with drawing(7.2, 3.3 + LINE * (1 + -(-len(curves) // legend_columns))) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        for curve, colour, marker in styled(curves):
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
            "the highest seed. The legend shows the final epoch, ± the standard deviation over seeds.",
            alternative=f"Learning curves. At the final epoch, in percent: {finals}.",
        )


def per_class_gains(name: str, gains: Mapping[tuple[str, str], Sequence[float]]) -> Picture:
    """The gain and loss of each class between two methods, a panel for each comparison.

    Args:
        name: name of the figure's files.
        gains: first and second label -> gain in points of top-1 for each class with test images, as the mean over
            the seeds that both have.
    """
    counts = {}
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
            counts[label] = f"{better} classes better, {worse} worse, mean {ordered.mean():+.2f}"
            title = (
                f"{brief(first, TITLE_LENGTH)}\n- {brief(second, TITLE_LENGTH)}" if len(label) > TITLE_LENGTH else label
            )
            axes.set_title(f"{title}\n{better} better, {worse} worse", fontsize=8)
        figure.supylabel("points of top-1 within the class", fontsize=9)
        listed = "; ".join(f"{label}: {text}" for label, text in counts.items())
        return finish(
            figure,
            name,
            title="Gain of each class",
            caption="Top-1 within each class, first method minus second, as the mean over the seeds that both have; "
            "the classes are in order of their gain, and each panel has its own scale. A class with few test images "
            "changes a lot by chance: between equal methods, about as many classes gain as lose.",
            alternative=f"Gains by class. {listed}.",
        )


def reliability(name: str, bins: Mapping[str, Sequence[Bin]], ece: Mapping[str, Sequence[float]]) -> Picture:
    """Reliability diagram: how often a model is right, by how certain it is.

    Args:
        name: name of the figure's files.
        bins: label -> bins over all seeds together.
        ece: label -> expected calibration error of each seed, in percent.
    """
    total = {label: sum(each.images for each in several) for label, several in bins.items()}
    with drawing(5.2, 3.9 + LINE * (1 + len(bins))) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="perfect")
        for label, colour, marker in styled(list(bins)):
            held = [each for each in bins[label] if each.images > _FEWEST_SHARE * total[label]]
            axes.plot(
                [each.confidence for each in held if each.confidence is not None],
                [each.accuracy for each in held if each.accuracy is not None],
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
            title="Is the model right as often as it is certain?",
            caption="Test images in 15 bins by the probability of the chosen class, all seeds together; bins with less "
            f"than {100 * _FEWEST_SHARE:g} % of the images are not drawn. Below the dashed line, a model is too "
            "certain. ECE (expected calibration error): mean gap, weighted by images, in percent, ± over seeds.",
            alternative=f"Reliability diagram. Expected calibration error in percent: {listed}.",
        )


def agreements(
    name: str, shares: Mapping[str, Sequence[float]], divergences: Mapping[str, Sequence[float]], *, teacher: str
) -> Picture:
    """How much each student agrees with the teacher.

    Args:
        name: name of the figure's files.
        shares: label -> percent of test images that student and teacher put into the same class, for each seed.
        divergences: label -> mean KL(teacher || student) in nats, for each seed.
        teacher: the teacher's architecture.
    """
    labels = list(shares)
    with drawing(7.2, 0.36 * len(labels) + 1.1) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, values, title in (
            (left, shares, "same class as the teacher, %"),
            (right, divergences, "KL(teacher || student), nats"),
        ):
            for place, (label, colour, marker) in enumerate(styled(labels)):
                each = values[label]
                axes.plot(
                    each, [place] * len(each), marker=marker, linestyle="", color=colour, alpha=0.45, markersize=5
                )
                axes.plot([fmean(each)], [place], marker="|", color=INK, markersize=13, markeredgewidth=1.8)
            axes.set_xlabel(title)
        left.set_yticks(range(len(labels)), [brief(label, TITLE_LENGTH) for label in labels])
        left.set_ylim(len(labels) - 0.5, -0.5)
        listed = "; ".join(
            f"{label} {spread(shares[label])} %, {spread(divergences[label], 3)} nats" for label in labels
        )
        return finish(
            figure,
            name,
            title=f"Agreement with the teacher, {teacher}",
            caption="A point for each seed, a line at the mean. Agreement is not accuracy: a better student may agree "
            "less with the teacher.",
            alternative=f"Agreement with {teacher} and divergence from it: {listed}.",
        )


@dataclass(frozen=True)
class Point:
    """A model in the chart of accuracy and cost."""

    label: str
    top1: Sequence[float]
    """Top-1 of each seed, in percent."""
    megabytes: float
    """Size of its weights in float32."""
    latency_ms: float | None
    """Time of one image; None if it was not measured."""


def pareto(name: str, points: Sequence[Point], *, hardware: str) -> Picture:
    """Accuracy against size and latency; a line joins the models that no cheaper model beats.

    Args:
        name: name of the figure's files.
        points: the models.
        hardware: the processor that latencies were measured on; empty if none was measured.
    """
    timed = [point for point in points if point.latency_ms is not None]
    kinds: list[tuple[str, list[tuple[float, Point]]]] = [
        ("weights in float32, MB", [(point.megabytes, point) for point in points])
    ]
    if timed:
        kinds.append(("latency, ms per image", [(point.latency_ms or 0.0, point) for point in timed]))
    legend_columns = 3 if max(len(point.label) for point in points) < 2 * _LONG else 2
    with drawing(3.9 * len(kinds) + 0.6, 3.3 + LINE * -(-len(points) // legend_columns)) as figure:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        all_axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        styles = {label: style for label, *style in styled([point.label for point in points])}
        for axes, (title, placed) in zip(all_axes, kinds, strict=True):
            for cost, point in placed:
                colour, marker = styles[point.label]
                axes.errorbar(
                    [cost],
                    [fmean(point.top1)],
                    yerr=stdev(point.top1) if len(point.top1) > 1 else None,
                    color=colour,
                    marker=marker,
                    markersize=9 if marker in TEACHER_MARKERS else 6,
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
        about_latency = f" Latency: median of one image in ONNX Runtime on one thread, {hardware}." if timed else ""
        return finish(
            figure,
            name,
            title="Accuracy, size and latency",
            caption="The grey line joins the models that no cheaper model beats. Bars: ± the standard deviation over "
            f"seeds.{about_latency} The cost has a logarithmic scale.",
            alternative=f"Accuracy against cost: {listed}.",
        )


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points whose value is higher than that of every cheaper or equally cheap point, as (cost, value)."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best
