"""The drawing of a report's lineage: boxes in columns, with an arrow to each from what it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icdctl.reporting.drawing import COLOURS, INK, Picture, brief, drawing, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BOX = 34
"""Characters that fit into a line of a box."""
_COLUMN_WIDTH, _ROW_HEIGHT = 2.3, 0.62
"""In inches, with the gap to the next."""
_BOX_WIDTH, _BOX_HEIGHT = 1.9, 0.44
"""In inches."""


@dataclass(frozen=True)
class Node:
    """A box in the drawing."""

    key: str
    lines: tuple[str, ...]
    column: int
    parents: tuple[str, ...] = ()
    """Keys of the boxes that it was made from."""


def lineage(name: str, nodes: Sequence[Node], headers: Sequence[str]) -> Picture:
    """Draw what was made from what.

    Args:
        name: name of the figure's files.
        nodes: the boxes; parents stand in columns before those of their children.
        headers: headings of the columns.
    """
    columns = [[node for node in nodes if node.column == number] for number in range(len(headers))]
    column_of = {node.key: node.column for node in nodes}
    tallest = max(len(column) for column in columns)
    width, height = _COLUMN_WIDTH * len(headers), _ROW_HEIGHT * tallest + 0.45
    with drawing(width, height) as figure:
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(_ROW_HEIGHT * tallest + 0.4, 0)
        places: dict[str, tuple[float, float]] = {}
        for number, (header, column) in enumerate(zip(headers, columns, strict=True)):
            left = _COLUMN_WIDTH * number + 0.1
            axes.text(left + 0.95, 0.12, header, ha="center", va="center", fontsize=9, fontweight="bold")
            offset = _ROW_HEIGHT * (tallest - len(column)) / 2
            for row, node in enumerate(column):
                place = (left, offset + _ROW_HEIGHT * row + 0.66)
                places[node.key] = place
                _draw_box(axes, node, place)
                for parent in node.parents:
                    _draw_arrow(axes, places[parent], place, is_bent=number - column_of[parent] != 1)
        text_of = {node.key: " ".join(node.lines) for node in nodes}
        listed = "; ".join(
            text_of[node.key]
            + (f" from {' and '.join(text_of[parent] for parent in node.parents)}" if node.parents else "")
            for node in nodes
        )
        return finish(
            figure,
            name,
            title="Lineage",
            caption="What was made from what. Each box shows the first digits of a sha256: of pixels and labels, of "
            "weights, or of an ONNX file; the table has all digits.",
            alternative=f"Lineage: {listed}.",
        )


def _draw_box(axes: Axes, node: Node, place: tuple[float, float]) -> None:
    """Draw a box at the middle of its left side."""
    from matplotlib.patches import FancyBboxPatch

    left, middle = place
    box = FancyBboxPatch(
        (left, middle - _BOX_HEIGHT / 2),
        _BOX_WIDTH,
        _BOX_HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor="none",
        edgecolor=INK,
        linewidth=0.8,
    )
    axes.add_patch(box)
    text = "\n".join(brief(line, _BOX) for line in node.lines)
    axes.text(left + _BOX_WIDTH / 2, middle, text, ha="center", va="center", fontsize=7.2)


def _draw_arrow(axes: Axes, parent: tuple[float, float], child: tuple[float, float], *, is_bent: bool) -> None:
    """Draw an arrow between two boxes, bent if it passes a column in between."""
    from matplotlib.patches import FancyArrowPatch

    axes.add_patch(
        FancyArrowPatch(
            (parent[0] + _BOX_WIDTH, parent[1]),
            child,
            arrowstyle="-|>",
            mutation_scale=7,
            color=COLOURS[9],
            linewidth=0.9,
            shrinkA=0,
            shrinkB=1,
            connectionstyle=f"arc3,rad={-0.25 if is_bent else 0}",
        )
    )
