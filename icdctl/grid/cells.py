"""Cells of a grid: a set of options that is trained with several seeds.

A project's params.yaml states them: its pairs, methods, ablations and custom `cells` (`icdctl.grid.expansion`), and the
`seeds` of all. Its `train` section holds the defaults of all cells. Where `icdctl grid expand` has written cells.yaml,
the cells are read from there, as `dvc.yaml` reads them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from icdctl import files, methods, run_files
from icdctl.config import sources
from icdctl.config.expand import parse_seeds
from icdctl.config.lookup import OPTIONS
from icdctl.errors import ArtifactError, UsageError, unknown_name
from icdctl.grid import cells_file, expansion
from icdctl.grid.expansion import AFTER, PLAIN
from icdctl.run_files import read_history

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST_NAME = 200
_OWN = ("seed", "out")
"""Options that the grid sets for each run."""
_LARGEST_SEED = 2**31 - 1
PARAMS_FILE = "params.yaml"


@dataclass(frozen=True)
class GridCell:
    """A set of options that is trained with several seeds."""

    name: str
    options: Mapping[str, Any]
    """Options of its runs (`icdctl.config.lookup.OPTIONS`), but `seed` and `out`."""
    method: str
    """A name in `METHODS`, the project's default where the cell states none; as typed where there is no such method."""

    @property
    def command(self) -> Literal["train", "distill"]:
        """`train` for plain cross-entropy."""
        return "train" if self.method == PLAIN else "distill"


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
        """The options that `icdctl.api.start` takes."""
        own = {
            key: value for key, value in self.cell.options.items() if key != "method" or self.cell.command != "train"
        }
        return {**own, "seed": self.seed, "out": str(self.folder)}

    @property
    def history(self) -> list[dict[str, float]]:
        """The lines of its history; empty before its first epoch is over."""
        try:
            return read_history(self.folder)
        except (OSError, ValueError):
            return []

    def metrics(self) -> dict[str, Any]:
        """The metrics of a run that is done.

        Raises:
            ArtifactError: the file is broken, or has changed since the run wrote it.
        """
        hint = f"delete `{self.folder}`, and train it again"
        value = files.read_json(self.folder / "metrics.json", what="metrics", hint=hint)
        try:
            files.percentage(value.get("final_top1") if isinstance(value, dict) else None)
        except ValueError as error:
            path = self.folder / "metrics.json"
            raise ArtifactError(f"`{path}` states no number `final_top1`: {error}", hint=hint) from error
        run_files.check_numbers(self.folder, value)
        return dict(value)


@dataclass(frozen=True)
class Grid:
    """Cells, their seeds, and the folder of the runs."""

    cells: tuple[GridCell, ...]
    seeds: tuple[int, ...]
    folder: Path
    """Run folders are `<folder>/<cell>/s<seed>`."""
    origin: str = field(default=PARAMS_FILE, compare=False)
    teachers: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Paths that cells name as teachers -> the models that they hold."""

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
        return replace(self, cells=tuple(cell for cell in self.cells if not wanted or cell.name in wanted))

    def given(self, options: Mapping[str, object]) -> Grid:
        """The grid with options that hold for all cells, in place of their own."""
        cells = tuple(replace(cell, options={**cell.options, **options}) for cell in self.cells)
        return replace(self, cells=cells)

    def with_usual(self, options: Mapping[str, object]) -> Grid:
        """The grid with options for those cells that do not state them."""
        cells = tuple(replace(cell, options={**options, **cell.options}) for cell in self.cells)
        return replace(self, cells=cells)


def make_cell(name: str, options: Mapping[str, object], *, origin: str, method: str | None = None) -> GridCell:
    """A cell whose name can be a folder's and whose options are known.

    Args:
        name: the cell's.
        options: as params.yaml states them.
        origin: where it comes from, for messages.
        method: the method of a cell that states none.

    Raises:
        UsageError: the name or an option is not valid.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise UsageError(
            f"`{name[:_LONGEST_NAME]}` in {origin} can't be the name of a cell",
            hint="letters, digits, `.`, `_` and `-`, as a folder's",
        )
    own = {key: value for key, value in options.items() if key != AFTER}
    for key in own:
        if key in _OWN:
            raise UsageError(
                f"cell `{name}` in {origin} has `{key}`, which the grid sets for each run", hint="leave it out"
            )
        if key not in OPTIONS:
            raise unknown_name(f"option of cell `{name}`", str(key), OPTIONS, listing="icdctl distill --dry-run")
    settings = own.get("settings")
    if settings is not None and not (isinstance(settings, dict) and all(isinstance(key, str) for key in settings)):
        raise UsageError(
            f"`settings` of cell `{name}` in {origin} is not a mapping of names", hint="e.g. `settings: {gamma: 4}`"
        )
    stated = own.get("method") or method
    if stated is None and own.get("teacher") is not None:
        raise UsageError(
            f"cell `{name}` in {origin} has a teacher, and no method", hint="e.g. `method: cd_sdd_dkd`, or no `teacher`"
        )
    return GridCell(name, own, _resolved(PLAIN if stated is None else str(stated)))


def _resolved(method: str) -> str:
    try:
        return methods.resolve(method)
    except UsageError:  # reported when the run is planned, with its other problems
        return method


def read_grid(root: Path, *, seeds: str | None = None) -> Grid:
    """The grid of a project: the cells of params.yaml, from cells.yaml where there is one, and their seeds.

    Args:
        root: the project.
        seeds: `0-4`, in place of those in params.yaml.

    Raises:
        UsageError: the file has no cells, or a cell is not valid.
        ArtifactError: there is no such file, it is not a mapping, or cells.yaml is stale.
    """
    path = root / PARAMS_FILE
    origin = f"`{path}`"
    content = read_params(root)
    usual = sources.collect({}).text("method")
    named = cells_file.current(root, expansion.expand(content, origin=origin))
    made = [make_cell(name, options, origin=origin, method=usual) for name, options in named.items()]
    given = content.get("seeds", [0]) if seeds is None else parse_seeds(seeds)
    if not isinstance(given, list) or not given or not all(_is_seed(seed) for seed in given):
        where = f"`seeds` in {origin}" if seeds is None else f"`--seeds {seeds}`"
        raise UsageError(
            f"{where} is not a list of whole numbers up to {_LARGEST_SEED}", hint="e.g. `seeds: [0, 1, 2]`"
        )
    twice = next((seed for seed in given if given.count(seed) > 1), None)
    if twice is not None:
        raise UsageError(f"`seeds` in {origin} names {twice} twice", hint="name each seed once")
    return Grid(tuple(made), tuple(given), root / "runs", str(path), _teacher_models(content))


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_SEED


def _teacher_models(content: Mapping[str, object]) -> dict[str, str]:
    """The models of the teachers that the pipeline makes, by the paths that cells name."""
    entries = content.get("teachers")
    stated = entries.items() if isinstance(entries, dict) else ()
    return {
        f"teachers/{key}": str(entry["model"]) for key, entry in stated if isinstance(entry, dict) and "model" in entry
    }


def read_params(root: Path) -> dict[str, object]:
    """The whole content of params.yaml.

    Raises:
        ArtifactError: there is no such file, or it is not a mapping.
        UsageError: it is not YAML.
    """
    path = root / PARAMS_FILE
    hint = "a grid is the `cells` and `seeds` of a project's params.yaml; `icdctl reproduce` brings its own"
    try:
        content = sources.read_yaml(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"`{path}` can't be read: there is no such file", hint=hint) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"`{path}` does not hold a mapping", hint=hint)
    return content
