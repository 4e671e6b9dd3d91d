"""Figures of what models compute: correlations of classes, Gram matrices of patches, maps of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from icdctl.reporting.drawing import (
    COLOURS,
    INK,
    MARKERS,
    PANEL,
    TITLE_LENGTH,
    Picture,
    brief,
    drawing,
    finish,
    panels,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.collections import PathCollection

Matrix = NDArray[np.float64]
_Panel = tuple[NDArray[np.uint8] | Matrix, str | None, float | None, float | None]
"""Values, and the name, lowest and highest value of their colour scale; None for images with colours of their own."""
_COSINES = ("viridis", -0.2, 1.0)
_DIFFERENCES = ("RdBu_r", -0.6, 0.6)
_CLASS = 24
"""Characters that fit into a class's line of the legend."""


def correlation_differences(name: str, differences: Mapping[str, Matrix], *, teacher: str) -> Picture:
    """How the similarity of classes differs between students and their teacher, a panel for each student.

    Args:
        name: name of the figure's files.
        differences: label -> [K, K], correlation of the student's logits minus that of the teacher's.
        teacher: the teacher's architecture.
    """
    columns = min(4, len(differences))
    rows = -(-len(differences) // columns)
    sizes = {label: float(np.abs(matrix).mean()) for label, matrix in differences.items()}
    limit = max(1e-6, max(float(np.quantile(np.abs(matrix), 0.995)) for matrix in differences.values()))
    with drawing(columns * PANEL + 0.9, rows * (PANEL + 0.35)) as figure:
        figure.set_layout_engine("compressed")
        axes = panels(figure, len(differences), columns=columns)
        image = None
        for each, (label, matrix) in zip(axes, differences.items(), strict=True):
            image = each.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            plain(each)
            each.set_title(f"{brief(label, TITLE_LENGTH)}\nmean |difference| {sizes[label]:.3f}", fontsize=8.5)
        if image is not None:
            bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=24)
            bar.outline.set_visible(False)
        listed = "; ".join(f"{label} {size:.3f}" for label, size in sizes.items())
        return finish(
            figure,
            name,
            title=f"Correlation of classes: student minus {teacher}",
            caption="Pearson's correlation of the logits of two classes over the test images, student minus teacher; "
            "rows and columns are classes. White means that the student is like the teacher. First seed; one colour "
            "scale, cut at the 99.5 % quantile.",
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
    """How patches of chosen images cluster at each scale, for teacher and student.

    Args:
        name: name of the figure's files.
        images: [I, H, W, 3] uint8.
        names: names of the images.
        grams: for each image, scale -> Gram matrices of teacher and student, [scale^2, scale^2] each.
        student: the student's label.
        teacher: the teacher's architecture.
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
            row_of_panels: list[_Panel] = [(pixels, None, None, None)]
            for scale in scales:
                theirs, ours = matrices[scale]
                row_of_panels += [(theirs, *_COSINES), (ours, *_COSINES), (ours - theirs, *_DIFFERENCES)]
            for axes, header, (values, colours, low, high) in zip(grid[row], headers, row_of_panels, strict=True):
                drawn = axes.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
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
            "(bright): bright blocks are patches that the model takes for the same class. Teacher, student (first "
            "seed), and student minus teacher. This is what the cluster term of iCD compares.",
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
    """Maps of the features before each model's head, made by t-SNE.

    Args:
        name: name of the figure's files.
        placed: label of a model -> [F, 2], the positions of the images on its map.
        labels: [F], the class of each image.
        class_names: number -> name of the classes on the maps.
        perplexity: the perplexity that the maps were made with.
    """
    columns = min(3, len(placed))
    rows = -(-len(placed) // columns)
    apart = {label: _silhouette(points, labels) for label, points in placed.items()}
    shown_names = [brief(each, _CLASS) for each in class_names.values()]
    legend_width = 0.6 + 0.085 * max(map(len, shown_names))
    with drawing(columns * PANEL + legend_width, rows * (PANEL + 0.35)) as figure:
        figure.set_layout_engine("compressed")
        axes = panels(figure, len(placed), columns=columns)
        handles: list[PathCollection] = []
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
            each.set_title(f"{brief(label, TITLE_LENGTH)}\nsilhouette {apart[label]}", fontsize=8.5)
        figure.legend(handles, shown_names, loc="outside right center", title="class", markerscale=1.6)
        listed = "; ".join(f"{label} {value}" for label, value in apart.items())
        return finish(
            figure,
            name,
            title="Features before the classifier, by t-SNE",
            caption=f"Penultimate features of {len(labels)} test images from {len(class_names)} classes, both chosen "
            f"by a fixed seed; t-SNE with perplexity {perplexity:.3g}, started from principal components. Distances "
            "between clusters mean little. The silhouette is that of the points as drawn. First seed.",
            alternative=f"Maps of features of {len(labels)} test images. Silhouette of the classes: {listed}.",
        )


def _silhouette(points: Matrix, labels: NDArray[np.int64]) -> str:
    """The silhouette of the classes on a map, from -1 to 1, as text: how far apart they are. [F, 2], [F]."""
    from sklearn.metrics import silhouette_score

    num_classes = len(set(labels.tolist()))
    if not 1 < num_classes < len(labels):
        return "not defined: one image per class"
    return f"{silhouette_score(points, labels):.2f}"
