"""The catalogue of `icdctl recipes`: training recipes, and every cell of the papers, once.

A cell is a row of the papers' tables (`icdctl.science.tables`), or a configuration file of the reference that no table
has, whatever the scales that its scripts give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from icdctl.config import recipes, resolving
from icdctl.config.lookup import OPTIONS
from icdctl.config.recipes import RECIPES, Recipe
from icdctl.config.run_config import RunConfig
from icdctl.config.settings import RecipeSettings
from icdctl.config.sources import Options
from icdctl.config.values import NONE
from icdctl.data import IMAGE_FOLDER
from icdctl.errors import UsageError, unknown_name
from icdctl.methods import METHODS
from icdctl.papers.table_runs import folder_name, grid_cell, name_of
from icdctl.science import paper, tables
from icdctl.science.experiments import SCALES, Cell
from icdctl.science.paper import FAMILIES, Correction, PaperConfig

LISTING = "icdctl recipes list"


@dataclass(frozen=True)
class PaperRecipe:
    """A cell of the papers, with all that is known about it."""

    cell: Cell
    """The cell, with the families of all its tables."""
    in_tables: tuple[tuple[str, Cell], ...]
    """Each table that has it, and its form there; empty for a file of the reference that no table has."""
    configs: tuple[PaperConfig, ...]
    """The reference's configuration files for it."""

    @property
    def name(self) -> str:
        """Its name in `icdctl recipes`: `cifar100/res32x4-mv2-cd_sdd_dkd-beta2-gamma2`."""
        return self.cell.key

    @property
    def why_not(self) -> str | None:
        """Why it can't be run; None if it can."""
        return self.cell.why_not(METHODS)

    @property
    def options(self) -> dict[str, object]:
        """Options of its runs, without seed and folder."""
        return dict(grid_cell(self.cell, {}).options)

    @property
    def corrections(self) -> tuple[Correction, ...]:
        """Errors in its files, and what is used instead; a cell that reproduces the error says so."""
        names = {config.config for config in self.configs}
        return tuple(
            correction.model_copy(
                update={
                    "used": f"{self.cell.overrides[correction.key]:g}, as the file says",
                    "why": self.cell.note or correction.why,
                }
            )
            if correction.key in self.cell.overrides
            else correction
            for correction in paper.load().corrections
            if correction.config in names
        )


def find(name: str) -> Recipe | PaperRecipe:
    """The recipe of that name; a cell is also found by the name of its folder (`cifar100-res32x4-...`).

    Raises:
        UsageError: there is none.
    """
    if name in RECIPES:
        return RECIPES[name]
    known = paper_recipes()
    found = known.get(folder_name(name.strip()))
    if found is None:
        names = [*RECIPES, *(recipe.name for recipe in known.values())]
        raise unknown_name("recipe", name, names, listing=LISTING)
    return found


def select(
    texts: Sequence[str] = (), *, table: str | None = None, family: str | None = None
) -> tuple[dict[str, Recipe], tuple[PaperRecipe, ...]]:
    """Training recipes and cells.

    Args:
        texts: texts that must all be in the name.
        table: the table that must have the cells; training recipes are then left out.
        family: the set of defaults that the cells belong to; cells that belong to none are in all of them.

    Raises:
        UsageError: there is no such table or family, or nothing is left.
    """
    known = paper_recipes()
    shown = list(known.values()) if table is None else [known[name_of(cell)] for cell in tables.load(table).cells]
    if family is not None and family not in FAMILIES:
        raise unknown_name("family", family, FAMILIES, listing="icdctl recipes list --help")
    training = {
        name: recipe
        for name, recipe in RECIPES.items()
        if table is None and family is None and all(text in name for text in texts)
    }
    cells = tuple(
        recipe
        for recipe in shown
        if all(text in recipe.name for text in texts)
        and (family is None or not recipe.cell.families or family in recipe.cell.families)
    )
    if not training and not cells:
        wanted = [*texts, *(f"{key} {value}" for key, value in (("table", table), ("family", family)) if value)]
        raise UsageError(f"no recipe is of {' and '.join(f'`{each}`' for each in wanted)}", hint=f"`{LISTING}`")
    return training, cells


@cache
def paper_recipes() -> Mapping[str, PaperRecipe]:
    """Name of a cell's folder -> the cell, in the order of the tables."""
    found: dict[str, list[tuple[str, Cell]]] = {}
    for table in tables.TABLES:
        for cell in tables.load(table).cells:
            found.setdefault(name_of(cell), []).append((table, cell))
    made = {}
    for name, in_tables in found.items():
        cells = [cell for _, cell in in_tables]
        made[name] = _recipe(replace(cells[0], metric="top1", families=_all_families(cells)), tuple(in_tables))
    known = {_but_scales(cell) for cells in found.values() for _, cell in cells}
    of_files: dict[str, list[Cell]] = {}
    for cell in _cells_of_files():
        if _but_scales(cell) not in known:
            of_files.setdefault(name_of(cell), []).append(cell)
    for name, cells in of_files.items():
        made[name] = _recipe(replace(cells[0], families=_all_families(cells)), ())
    return made


def training_options(name: str) -> dict[str, object]:
    """The numbers of a training recipe as options of a run, and its name, which stands for what is not an option.

    The learning rate is left out where it depends on the student: as an option it would hold for every student.
    """
    recipe = RECIPES[recipes.resolve(name)]
    options: dict[str, object] = {"recipe": name}
    if recipe.dataset != IMAGE_FOLDER:  # whose name lacks the folder
        options["dataset"] = recipe.dataset
    for key in RecipeSettings.model_fields:
        if key != "lr" or not recipe.lr_of_student:
            value = getattr(recipe, key)
            options[key] = NONE if value is None else list(value) if isinstance(value, tuple) else value
    return options


def resolved(options: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run by these options alone: params.yaml, variables and teachers are not read.

    Raises:
        UsageError: a value is not valid.
    """
    own = {key: value for key, value in options.items() if key in OPTIONS and value is not None}
    teacher = own.get("teacher")
    is_plain = own.get("method", "ce") == "ce"
    return resolving.make_config(
        "train" if is_plain else "distill",
        Options(own),
        teacher=None if is_plain or teacher is None else (str(teacher), "", ""),
    )


def _recipe(cell: Cell, in_tables: tuple[tuple[str, Cell], ...]) -> PaperRecipe:
    return PaperRecipe(cell, in_tables, tuple(config for config in paper.load().configs if _is_of(config, cell)))


def _is_of(config: PaperConfig, cell: Cell) -> bool:
    """Whether a file of the reference is about a cell; a file whose method does not exist is matched by its folder."""
    same_method = config.method == cell.method or (config.settings is None and config.group == cell.method)
    same_models = config.student == cell.student and cell.teacher in (None, config.teacher)
    if config.dataset != cell.dataset or not same_method or not same_models or cell.detail:
        return False
    if config.settings is not None and dict(cell.settings) not in [dict(each) for each in config.settings.values()]:
        return False
    return not cell.scales or not config.scales or cell.scales in config.scales


def _but_scales(cell: Cell) -> tuple[object, ...]:
    return cell.dataset, cell.teacher, cell.student, cell.method, tuple(sorted(cell.settings.items()))


def _cells_of_files() -> Iterable[Cell]:
    """The reference's files as cells, without ablations, which are tables, and methods that do not exist."""
    unreal = {correction.config for correction in paper.load().corrections if correction.used == "none"}
    for config in paper.load().configs:
        if config.group.startswith("ablation") or (config.settings is None and config.config in unreal):
            continue
        teacher = None if config.method == "ce" else config.teacher
        for scales in config.scales or (SCALES,):
            for family, settings in (config.settings or {family: {} for family in FAMILIES}).items():
                has_patches = "sdd" in config.method
                yield Cell(
                    config.dataset,
                    teacher,
                    config.student,
                    config.method,
                    settings=dict(settings),
                    scales=scales if has_patches else (),
                    families=(family,),
                )


def _all_families(cells: Iterable[Cell]) -> tuple[str, ...]:
    found = {family for cell in cells for family in cell.families}
    return tuple(family for family in FAMILIES if family in found)
