"""Cells of a grid: a set of options that is trained with several seeds, and how far its runs are.

`params.yaml` names them: `seeds` is a list, `cells` a mapping from names to options of a run, the same as in its
`train` section, which holds the defaults of all cells.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from icdctl import files
from icdctl.errors import ArtifactError, UsageError, unknown_name
from icdctl.lists import parse_seeds
from icdctl.sources import Options

State = Literal["done", "begun", "missing"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OWN = ("seed", "out")
"""Options that the grid gives each run."""
_AFTER = "after"
"""What a pipeline makes before a cell; `dvc.yaml` reads it, and nothing here."""
PARAMS_FILE = "params.yaml"


@dataclass(frozen=True)
class GridCell:
    """What is trained, whatever the seed."""

    name: str
    options: Mapping[str, Any]
    """Of `icdctl.sources.Options`, but `seed` and `out`."""

    @property
    def command(self) -> Literal["train", "distill"]:
        """`train` for plain cross-entropy."""
        return "train" if self.options.get("method", "ce") == "ce" else "distill"


@dataclass(frozen=True)
class GridRun:
    """A cell with a seed."""

    cell: GridCell
    seed: int
    folder: Path
    """The run folder."""

    @property
    def label(self) -> str:
        """`CELL/sSEED`."""
        return f"{self.cell.name}/s{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """What `icdctl.api.start` takes."""
        own = {
            key: value for key, value in self.cell.options.items() if key != "method" or self.cell.command != "train"
        }
        return {**own, "seed": self.seed, "out": str(self.folder)}

    @property
    def state(self) -> State:
        """By the files in its folder."""
        if (self.folder / "metrics.json").is_file():
            return "done"
        return "begun" if (self.folder / "config.json").is_file() else "missing"

    @property
    def epochs_done(self) -> int:
        """By the lines of its history."""
        try:
            with (self.folder / "history.csv").open(newline="", encoding="utf-8") as file:
                return sum(1 for _ in csv.DictReader(file))
        except OSError:
            return 0

    def metrics(self) -> dict[str, Any]:
        """Of a run that is done.

        Raises:
            ArtifactError: the file is broken.
        """
        hint = f"delete `{self.folder}`, and train it again"
        value = files.read_json(self.folder / "metrics.json", what="metrics", hint=hint)
        if not isinstance(value, dict) or "final_top1" not in value:
            raise ArtifactError(f"`{self.folder / 'metrics.json'}` states no `final_top1`", hint=hint)
        return value


@dataclass(frozen=True)
class Grid:
    """Cells, seeds, and where the runs lie."""

    cells: tuple[GridCell, ...]
    seeds: tuple[int, ...]
    folder: Path
    """Run folders are `<folder>/<cell>/s<seed>`."""
    origin: str = field(default=PARAMS_FILE, compare=False)

    @property
    def runs(self) -> tuple[GridRun, ...]:
        """Every cell with every seed."""
        return tuple(
            GridRun(cell, seed, self.folder / cell.name / f"s{seed}")
            for cell, seed in itertools.product(self.cells, self.seeds)
        )

    def chosen(self, names: Iterable[str]) -> Grid:
        """The cells of these names, in the grid's order; all where none is named.

        Raises:
            UsageError: there is no such cell.
        """
        wanted = list(names)
        known = [cell.name for cell in self.cells]
        for name in wanted:
            if name not in known:
                raise unknown_name(f"cell of `{self.origin}`", name, known, listing="icdctl grid status")
        cells = tuple(cell for cell in self.cells if not wanted or cell.name in wanted)
        return Grid(cells, self.seeds, self.folder, self.origin)

    def given(self, options: Mapping[str, Any]) -> Grid:
        """With options that hold for all cells, in place of their own."""
        cells = (GridCell(cell.name, {**cell.options, **options}) for cell in self.cells)
        return Grid(tuple(cells), self.seeds, self.folder, self.origin)

    def swept(self, axes: Mapping[str, Sequence[str]]) -> Grid:
        """Each cell once for every combination of values of settings of its method.

        Args:
            axes: setting -> values.
        """
        cells = []
        for cell, values in itertools.product(self.cells, itertools.product(*axes.values())):
            chosen = dict(zip(axes, values, strict=True))
            parts = [f"{key.replace('_', '')}{_short(value)}" for key, value in chosen.items()]
            settings = {**(cell.options.get("settings") or {}), **chosen}
            cells.append(GridCell("-".join([cell.name, *parts]), {**cell.options, "settings": settings}))
        return Grid(tuple(cells), self.seeds, self.folder, self.origin)


def make_cell(name: str, options: Mapping[str, Any], *, origin: str) -> GridCell:
    """A cell whose name can be a folder's and whose options are known.

    Raises:
        UsageError: the name or a key can't be.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"`{name}` in {origin} can't be the name of a cell", hint="letters, digits, `.`, `_` and `-`, as a folder's"
        )
    own = {key: value for key, value in options.items() if key != _AFTER}
    for key in own:
        if key in _OWN:
            raise UsageError(
                f"cell `{name}` in {origin} has `{key}`, which the grid gives each run", hint="leave it out"
            )
        if key not in Options.model_fields:
            raise unknown_name(
                f"option of cell `{name}`", str(key), Options.model_fields, listing="icdctl distill --dry-run"
            )
    return GridCell(name, own)


def read_grid(root: Path, *, seeds: str | None = None) -> Grid:
    """The grid of a project.

    Args:
        root: of the project.
        seeds: `0-4`, in place of those in params.yaml.

    Raises:
        UsageError: the file has no cells, or a cell can't be.
        ArtifactError: there is no such file, or it is no YAML.
    """
    path = root / PARAMS_FILE
    content = read_params(root)
    cells = content.get("cells")
    if not isinstance(cells, dict) or not cells:
        raise UsageError(
            f"`{path}` names no cells", hint="write e.g. `cells: {mine: {method: kd, teacher: res20, ...}}`"
        )
    origin = f"`{path}`"
    made = []
    for name, options in cells.items():
        if not isinstance(options, dict):
            raise UsageError(f"cell `{name}` in {origin} is no mapping of options", hint="e.g. `{method: kd, ...}`")
        made.append(make_cell(str(name), options, origin=origin))
    given = content.get("seeds", [0]) if seeds is None else parse_seeds(seeds)
    if not isinstance(given, list) or not given or not all(type(seed) is int and seed >= 0 for seed in given):
        raise UsageError(f"`seeds` in {origin} is no list of whole numbers", hint="e.g. `seeds: [0, 1, 2]`")
    return Grid(tuple(made), tuple(given), root / "runs", str(path))


def read_params(root: Path) -> dict[str, Any]:
    """params.yaml, whole.

    Raises:
        ArtifactError: there is no such file, or it is no mapping.
    """
    path = root / PARAMS_FILE
    hint = "a grid is the `cells` and `seeds` of a project's params.yaml; `icdctl reproduce` brings its own"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArtifactError(f"`{path}` can't be read: {str(error).splitlines()[0]}", hint=hint) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"`{path}` holds no mapping", hint=hint)
    return content


def parse_sweeps(given: Sequence[str]) -> dict[str, list[str]]:
    """`["gamma=1,2,4", "temperature=2,4"]` as settings and their values.

    Raises:
        UsageError: one is not KEY=VALUES.
    """
    axes: dict[str, list[str]] = {}
    for item in given:
        key, equals, values = item.partition("=")
        found = [value.strip() for value in values.split(",")]
        if not equals or not key.strip() or "" in found or key.strip() in axes or len(set(found)) < len(found):
            raise UsageError(f"sweep `{item}` is not KEY=VALUES, each once", hint="e.g. `--sweep gamma=1,2,4`")
        axes[key.strip()] = found
    return axes


def _short(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", value)
