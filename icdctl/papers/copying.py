"""Recipes into a params.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icdctl.config.expand import parse_seeds
from icdctl.config.lookup import OPTIONS
from icdctl.config.recipes import RECIPES
from icdctl.config.settings import RecipeSettings
from icdctl.errors import IcdctlError, UsageError, combine
from icdctl.grid import params
from icdctl.grid.cells import GridCell
from icdctl.grid.params import Written
from icdctl.papers import catalogue, pipeline
from icdctl.papers.catalogue import PaperRecipe
from icdctl.papers.reproduce import grid_cell

_TRAIN = "train"


@dataclass(frozen=True)
class Copied:
    """What was written, and what a person should know of it."""

    written: Written
    warnings: tuple[str, ...]


def copy(names: Sequence[str], path: Path, *, seeds: str | None = None, replace: bool = False) -> Copied:
    """Write recipes to a params.yaml.

    Args:
        names: of training recipes, at most one of which becomes the section `train`, and of cells.
        path: the file; it is made where it is not there.
        seeds: `0-4`, of all cells of the file; 0 to 4 where neither this nor the file says any.
        replace: overwrite entries that differ.

    Raises:
        UsageError: a name is not known, a cell can't be run, or an entry that is there differs.
        ArtifactError: the file can't be read or written.
    """
    training, cells = _found(dict.fromkeys(names))
    if len(training) > 1:
        raise UsageError(
            f"a params.yaml has one section `train`, and {' and '.join(f'`{name}`' for name in training)} would be it",
            hint="copy one of them",
        )
    section = {_TRAIN: catalogue.training_options(training[0])} if training else {}
    done = _write(section, cells, path, seeds=seeds, replace=replace)
    return Copied(done.written, tuple(text for name in training for text in _not_taken(name, path)) + done.warnings)


def write_cells(cells: Sequence[GridCell], path: Path, *, seeds: str | None, replace: bool) -> Copied:
    """Write cells to a params.yaml; arguments and errors as for `copy`."""
    return _write({}, cells, path, seeds=seeds, replace=replace)


def _found(names: Mapping[str, None]) -> tuple[list[str], list[GridCell]]:
    """All problems of all names are told at once."""
    training, cells = [], []
    problems: list[IcdctlError] = []
    for name in names:
        try:
            recipe = catalogue.find(name)
            if not isinstance(recipe, PaperRecipe):
                training.append(name)
            elif recipe.why_not is not None:
                raise UsageError(
                    f"`{name}` can't be run: {recipe.why_not}", hint=f"`{catalogue.LISTING}` shows which can"
                )
            else:
                cells.append(grid_cell(recipe.cell, {}))
        except IcdctlError as error:
            problems.append(error)
    if problems:
        raise combine(problems)
    return training, cells


def _write(
    entries: Mapping[str, Any], cells: Sequence[GridCell], path: Path, *, seeds: str | None, replace: bool
) -> Copied:
    held = params.read(path)
    made: dict[str, Any] = dict(entries)
    if seeds is not None:
        made["seeds"] = parse_seeds(seeds)
    elif cells and held.get("seeds") is None:
        made["seeds"] = list(pipeline.SEEDS)
    if cells:
        for section, found in pipeline.entries(cells, pipeline.form_beside(path)).items():
            there = held.get(section) if section != pipeline.CELLS else None
            # A teacher or data set of that name is the project's own, whatever it is.
            made[section] = {key: value for key, value in found.items() if key not in (there or {})}
    written = params.write_entries(path, made, replace=replace)
    train = params.read(path).get(_TRAIN)
    return Copied(written, tuple(_changes(train, cells)) if isinstance(train, dict) else ())


def _not_taken(name: str, path: Path) -> list[str]:
    """Where the section `train` is not the recipe, number by number."""
    recipe = RECIPES[name]
    section, taken = params.read(path)[_TRAIN], catalogue.training_options(name)
    stays = [key for key in ("dataset", *RecipeSettings.model_fields) if key in section and key not in taken]
    found = [f"`{_TRAIN}.{key}` was there and stays; it is none of `{name}`" for key in stays]
    if recipe.lr_of_student:
        slow = ", ".join(f"{lr:g} for {student}" for student, lr in recipe.lr_of_student.items())
        found.append(f"`lr` is left to `recipe: {name}`: {recipe.lr:g}, {slow}; written here, it would be that of all")
    if recipe.distillation_warmup_share is not None:
        share = f"{recipe.distillation_warmup_share:g} of the epochs"
        found.append(f"the distillation warm-up, {share}, is left to `recipe: {name}`")
    return found


def _changes(train: Mapping[str, Any], cells: Sequence[GridCell]) -> list[str]:
    """What the file's own `train` section makes of cells that were to be as published."""
    known = {str(key): value for key, value in train.items() if key in OPTIONS and value is not None}
    found = []
    for cell in cells:
        try:
            changed = pipeline.changed_by(known, cell)
        except UsageError as error:  # it is written by now, and `train` may be changed after it
            found.append(f"`{cell.name}` can't be trained with `train` of this file: {error.message}")
            continue
        if changed:
            found.append(f"`train` of this file changes {', '.join(changed)} of `{cell.name}`")
    return found
