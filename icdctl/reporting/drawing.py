"""How all figures look, and from a figure to bytes: SVG and PNG that are the same for the same figure.

SVG keeps text as text. On the page its ink follows the reader's light or dark scheme; the files are dark on light.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE = "#1f2328", "#d1d5da"
"""Text and axes; grid lines. The page replaces both by its own."""
COLOURS = ("#0077bb", "#ee7733", "#009988", "#cc3311", "#33bbee", "#ee3377", "#8a8d00", "#7b5bd6", "#a06c3c", "#5f7f95")
"""Of cells, readable on light and on dark; as many as there are methods. After P. Tol's vibrant scheme."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
"""Beside colours, for those who can't tell these apart."""

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": INK,
    "ytick.labelsize": 8.5,
}
_PNG_DPI = 160
_WIDE = 7.5
"""Inches."""


@dataclass(frozen=True)
class Picture:
    """A figure with all that a page says of it."""

    name: str
    """Of its files, without an ending."""
    title: str
    caption: str
    """What is shown, and how it was made."""
    alternative: str
    """The same in words and numbers, for those who don't see it."""
    svg: str
    png: bytes
    is_wide: bool = False
    """Wants a row of its own."""

    def inline(self) -> str:
        """The SVG as a part of a page: names of its own, and the page's ink."""
        text = self.svg[self.svg.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(href="|url\()#', rf"\1#{self.name}-", text)
        text = text.replace(INK, "var(--ink)").replace(RULE, "var(--rule)")
        return re.sub(r"<svg ", '<svg role="presentation" aria-hidden="true" focusable="false" ', text, count=1)


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of that size in inches, in the style of all of them, to be drawn and finished within the block."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The user's own matplotlibrc must not change what is written.
    with warnings.catch_warnings(), matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's own fonts may have them
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def finish(figure: Figure, name: str, *, title: str, caption: str, alternative: str) -> Picture:
    """A drawn figure as bytes; inside its `drawing` block."""
    import matplotlib

    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    figure.savefig(png, format="png", metadata={"Software": None}, dpi=_PNG_DPI, facecolor="white")
    is_wide = figure.get_figwidth() > _WIDE
    return Picture(name, title, caption, alternative, svg.getvalue(), png.getvalue(), is_wide)


def plain(axes: Axes) -> None:
    """No frame, ticks or grid: for pictures."""
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(RULE)


def panels(figure: Figure, number: int, *, columns: int) -> list[Axes]:
    """Equal axes in rows of so many, the rest left empty."""
    rows = -(-number // columns)
    grid = figure.subplots(rows, columns, squeeze=False)
    flat = list(grid.flat)
    for axes in flat[number:]:
        axes.set_visible(False)
    return flat[:number]
