"""The style of all figures, and their conversion to SVG and PNG: the same figure always gives the same bytes.

SVG keeps text as text. On the page, its colours follow the reader's light or dark mode; the files are dark on light.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE = "#1f2328", "#d1d5da"
"""Colours of text and axes, and of grid lines. The page replaces both by its own."""
COLOURS = ("#0077bb", "#ee7733", "#009988", "#cc3311", "#33bbee", "#ee3377", "#8a8d00", "#7b5bd6", "#a06c3c", "#5f7f95")
"""Colours of cells, readable on light and on dark. After P. Tol's vibrant scheme."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
"""Markers of cells, for readers who can't distinguish the colours."""

TEACHER = "(teacher)"
"""Suffix of a teacher's label; teachers are drawn in the colour of the ink in every figure."""
TEACHER_MARKERS = ("*", "p", "H", "8")
"""Markers of teachers."""
PANEL = 2.35
"""Side of a square panel, in inches."""
LINE = 0.2
"""Height of a line of a legend, in inches."""
TITLE_LENGTH = 30
"""Characters that fit into the title of a panel."""

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
"""Width in inches above which a figure gets a row of its own on the page."""


@dataclass(frozen=True)
class Picture:
    """A finished figure with its texts."""

    name: str
    """Name of its files, without suffix."""
    title: str
    caption: str
    """What the figure shows, and how it was made."""
    alternative: str
    """Its content in words and numbers, for readers who can't see it."""
    svg: str
    png: bytes
    is_wide: bool = False
    """True if it needs a row of its own on the page."""

    def inline(self) -> str:
        """The SVG as part of a page: with unique ids, and with the page's colours."""
        text = self.svg[self.svg.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(href="|url\()#', rf"\1#{self.name}-", text)
        text = text.replace(INK, "var(--ink)").replace(RULE, "var(--rule)")
        return re.sub(r"<svg ", '<svg role="presentation" aria-hidden="true" focusable="false" ', text, count=1)


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure with this size in inches and the common style, to be drawn and finished within the block."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The user's own matplotlibrc must not change the figures.
    with warnings.catch_warnings(), matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's own fonts may have them
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def finish(figure: Figure, name: str, *, title: str, caption: str, alternative: str) -> Picture:
    """Convert a drawn figure to SVG and PNG; call it inside the figure's `drawing` block."""
    import matplotlib

    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    figure.savefig(png, format="png", metadata={"Software": None}, dpi=_PNG_DPI, facecolor="white")
    is_wide = figure.get_figwidth() > _WIDE
    return Picture(name, title, caption, alternative, svg.getvalue(), png.getvalue(), is_wide)


def plain(axes: Axes) -> None:
    """Remove ticks and grid from axes that show a picture."""
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(RULE)


def panels(figure: Figure, number: int, *, columns: int) -> list[Axes]:
    """Equal axes in rows of `columns`; unused places stay empty."""
    rows = -(-number // columns)
    grid = figure.subplots(rows, columns, squeeze=False)
    flat = list(grid.flat)
    for axes in flat[number:]:
        axes.set_visible(False)
    return flat[:number]


def brief(text: str, length: int) -> str:
    """The text, cut if it is longer than `length` characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


class Labelled(Protocol):
    """Anything with a label that a figure can show."""

    @property
    def label(self) -> str: ...


Item = TypeVar("Item", bound=str | Labelled)


def styled(items: Sequence[Item]) -> list[tuple[Item, str, str]]:
    """Each label, or item with a label, with the colour and marker of its position; teachers have their own style."""
    # When all colours are used, they are used again with the next marker.
    styles = (
        (colour, MARKERS[(place + turn) % len(MARKERS)])
        for turn in itertools.count()
        for place, colour in enumerate(COLOURS)
    )
    teachers = itertools.cycle(TEACHER_MARKERS)
    found = []
    for item in items:
        label = item if isinstance(item, str) else item.label
        colour, marker = (INK, next(teachers)) if label.endswith(TEACHER) else next(styles)
        found.append((item, colour, marker))
    return found
