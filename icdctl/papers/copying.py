"""Copying recipes and imported cells into the hand-made part of a params.yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from icdctl.config.expand import parse_seeds
from icdctl.config.lookup import OPTIONS
from icdctl.config.recipes import RECIPES
from icdctl.config.settings import RecipeSettings
from icdctl.errors import IcdctlError, UsageError, combine
from icdctl.grid import expansion, params_file
from icdctl.grid.cells import PARAMS_FILE, GridCell
from icdctl.grid.cells_file import difference
from icdctl.grid.dvc_pipeline import (
    Expanded,
    Form,
    Sections,
    check_placed,
    expand,
    form_beside,
    is_expanded,
    joined,
    unlisted,
)
from icdctl.grid.expansion import CELLS, DATASETS, TEACHERS
from icdctl.grid.params_file import Written
from icdctl.papers import catalogue, params_entries
from icdctl.papers.catalogue import PaperRecipe
from icdctl.papers.table_runs import grid_cell

_TRAIN = "train"


@dataclass(frozen=True)
class Copied:
    """What was written, and what the user should know about it."""

    written: Written
    warnings: tuple[str, ...]
    expanded: Expanded | None
    """The cells.yaml beside the file, written again; None where the project has none."""


def copy(names: Sequence[str], path: Path, *, seeds: str | None = None, replace: bool = False) -> Copied:
    """Write recipes to a params.yaml.

    Args:
        names: names of cells, and of at most one training recipe, which becomes the section `train`.
        path: the file; it is created if it does not exist.
        seeds: `0-4`, for all cells of the file; 0 to 4 where neither this nor the file states any.
        replace: overwrite entries that differ.

    Raises:
        UsageError: a name is not known, a cell can't be run, or an existing entry differs.
        ArtifactError: the file can't be read or written.
    """
    training, cells = _found(dict.fromkeys(names))
    if len(training) > 1:
        raise UsageError(
            f"a params.yaml has one section `train`, and {' and '.join(f'`{name}`' for name in training)} are given",
            hint="copy one of them",
        )
    section: Sections = {_TRAIN: catalogue.training_options(training[0])} if training else {}
    done = _write(section, cells, path, seeds=seeds, replace=replace)
    warnings = tuple(text for name in training for text in _not_taken(name, path))
    return dataclasses.replace(done, warnings=warnings + done.warnings)


def write_cells(cells: Sequence[GridCell], path: Path, *, seeds: str | None, replace: bool) -> Copied:
    """Write cells to a params.yaml; arguments and errors as for `copy`."""
    return _write({}, cells, path, seeds=seeds, replace=replace)


def _found(names: Mapping[str, None]) -> tuple[list[str], list[GridCell]]:
    """The training recipes and cells of these names; all problems are reported at once."""
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


def _write(entries: Sections, cells: Sequence[GridCell], path: Path, *, seeds: str | None, replace: bool) -> Copied:
    held = params_file.read(path)
    made: dict[str, object] = dict(entries)
    if seeds is not None:
        made["seeds"] = parse_seeds(seeds)
    elif cells and held.get("seeds") is None:
        made["seeds"] = list(params_entries.SEEDS)
    form = form_beside(path)
    found = params_entries.entries(cells, form)
    for section in (DATASETS, TEACHERS):
        made[section] = unlisted(held, section, found.get(section, {}))
    known: tuple[str, ...] = ()
    if cells:
        known, made[CELLS] = _new_cells(held, found, path, form=form, replace=replace)
    written = params_file.write_entries(path, {key: value for key, value in made.items() if value}, replace=replace)
    written = dataclasses.replace(written, unchanged=(*written.unchanged, *known))
    expands = bool(cells) and path.name == PARAMS_FILE and is_expanded(path.parent)
    expanded = expand(path.parent) if expands else None
    train = params_file.read(path).get(_TRAIN)
    return Copied(written, tuple(_changes(train, cells)) if isinstance(train, dict) else (), expanded)


def _new_cells(
    held: Mapping[str, object], found: Sections, path: Path, *, form: Form, replace: bool
) -> tuple[tuple[str, ...], dict[str, object]]:
    """Cells that the pairs and ablations of a file make already, and the others, which are to be written.

    Raises:
        UsageError: a pair or ablation makes another cell of that name, or the pipeline can't make what a cell needs.
    """
    origin = f"`{path}`"
    content = joined(held, {section: found[section] for section in (DATASETS, TEACHERS) if section in found})
    new = {
        name: expansion.placed(options, content) for name, options in found[CELLS].items() if isinstance(options, dict)
    }
    if form.stages:
        check_placed(new)
    listed = held.get(CELLS)
    there = {
        name: options
        for name, options in expansion.combined(held, origin=origin).items()
        if name in found[CELLS] and not (isinstance(listed, dict) and name in listed)
    }
    others = difference(there, {name: new[name] for name in there}).changed
    if others and not replace:
        named = ", ".join(f"`{name}`" for name in others)
        raise UsageError(f"{origin} makes another {named}", hint="`--replace` writes it to `cells`, which wins")
    known = tuple(f"{CELLS}.{name}" for name in there if name not in others)
    return known, {name: value for name, value in found[CELLS].items() if f"{CELLS}.{name}" not in known}


def _not_taken(name: str, path: Path) -> list[str]:
    """Warnings about numbers of the section `train` that are not the recipe's."""
    recipe = RECIPES[name]
    train, taken = params_file.read(path)[_TRAIN], catalogue.training_options(name)
    there = train if isinstance(train, dict) else {}
    stays = [key for key in ("dataset", *RecipeSettings.model_fields) if key in there and key not in taken]
    found = [f"`{_TRAIN}.{key}` was there and stays; it is none of `{name}`" for key in stays]
    if recipe.lr_of_student:
        slow = ", ".join(f"{lr:g} for {student}" for student, lr in recipe.lr_of_student.items())
        found.append(f"`lr` is left to `recipe: {name}`: {recipe.lr:g}, {slow}; written here, it would be that of all")
    if recipe.distillation_warmup_share is not None:
        share = f"{recipe.distillation_warmup_share:g} of the epochs"
        found.append(f"the distillation warm-up, {share}, is left to `recipe: {name}`")
    return found


def _changes(train: Mapping[str, object], cells: Sequence[GridCell]) -> list[str]:
    """Warnings about numbers of cells that the file's `train` section changes from the published ones."""
    known = {str(key): value for key, value in train.items() if key in OPTIONS and value is not None}
    found = []
    for cell in cells:
        try:
            changed = params_entries.changed_by(known, cell)
        except UsageError as error:  # it is written by now, and `train` may be changed after it
            found.append(f"`{cell.name}` can't be trained with `train` of this file: {error.message}")
            continue
        if changed:
            found.append(f"`train` of this file changes {', '.join(changed)} of `{cell.name}`")
    return found
