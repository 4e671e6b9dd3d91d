"""Pictures of runs: numbers in, a PNG out; nothing here knows how training works."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from icdctl import files

_COLOURS = ("#4c4c4c", "#c44e52", "#2a6fbb", "#55a868", "#8172b3", "#937860")


def read_history(run_folder: Path) -> list[dict[str, float]]:
    """The rows of a run's history.csv."""
    with (run_folder / "history.csv").open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def learning_curves(histories: Mapping[str, list[dict[str, float]]], path: Path, *, title: str) -> None:
    """Test top-1 by epoch, a line a run, each with its final value.

    Args:
        histories: label -> rows of history.csv.
        path: the PNG to write.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (label, rows), colour in zip(histories.items(), _COLOURS, strict=False):
        epochs = [row["epoch"] for row in rows]
        accuracy = [row["test_top1"] for row in rows]
        axes.plot(epochs, accuracy, label=f"{label}: {accuracy[-1]:.1f}", color=colour, marker="o", markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("top-1 on the test set, %")
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    axes.legend(title="final epoch", frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    files.write_bytes(path, picture.getvalue())
