"""The output of `icdctl recipes list` and `show` as plain values, ready for JSON."""

from __future__ import annotations

from typing import Any

from icdctl.config.recipes import RECIPES
from icdctl.config.settings import RecipeSettings
from icdctl.papers.catalogue import PaperRecipe, resolved
from icdctl.papers.table_runs import name_of
from icdctl.science.experiments import Cell


def training(name: str) -> dict[str, Any]:
    """All facts about a training recipe."""
    recipe = RECIPES[name]
    numbers: dict[str, Any] = {}
    for key in RecipeSettings.model_fields:
        numbers[key] = getattr(recipe, key)
        if key == "lr":
            numbers["lr_of_student"] = dict(recipe.lr_of_student)
    return {
        "name": name,
        "kind": "training",
        "about": recipe.about,
        "source": recipe.source,
        "dataset": recipe.dataset,
        **numbers,
        "distillation_warmup_share": recipe.distillation_warmup_share,
    }


def paper_row(recipe: PaperRecipe) -> dict[str, Any]:
    """The entry of a cell in the list."""
    cell = recipe.cell
    return {
        "name": recipe.name,
        "kind": "paper",
        "cell": name_of(cell),
        "dataset": cell.dataset,
        "teacher": cell.teacher,
        "student": cell.student,
        "method": cell.method,
        "scales": list(cell.scales),
        "settings": dict(cell.settings),
        "overrides": dict(cell.overrides),
        "families": list(cell.families),
        "tables": [table for table, _ in recipe.in_tables],
        "published": list(dict.fromkeys(_top1(each) for _, each in recipe.in_tables if each.reference is not None)),
        "corrections": len(recipe.corrections),
        "why_not": recipe.why_not,
        "note": cell.note,
    }


def paper(recipe: PaperRecipe) -> dict[str, Any]:
    """All facts about a cell: its numbers, the published results, and errors in the reference's files."""
    found = paper_row(recipe)
    runs: dict[str, Any] = {"options": None, "recipe": None, "method_settings": None, "training": None}
    if recipe.why_not is None:
        config = resolved(recipe.options)
        values = config.model_dump(mode="json")
        own = list(dict.fromkeys((*RecipeSettings.model_fields, *recipe.cell.overrides)))
        runs = {
            "options": recipe.options,
            "recipe": config.recipe,
            "method_settings": dict(config.settings),
            "training": {key: values[key] for key in own},
        }
    return {
        **found,
        **runs,
        "tables": [_in_table(table, cell) for table, cell in recipe.in_tables],
        "files": [config.config for config in recipe.configs],
        "corrections": [correction.model_dump() for correction in recipe.corrections],
    }


def _in_table(table: str, cell: Cell) -> dict[str, Any]:
    reference = cell.reference
    seconds = next((row.seconds_per_step for row in cell.published if row.seconds_per_step), None)
    known = reference is not None
    return {
        "table": table,
        "cell": cell.key,
        "top1": _top1(cell) if known else None,
        "seconds_per_step": None if seconds is None else list(seconds),
        "number": reference.number if reference is not None else cell.published[0].number if seconds else None,
        "sources": list(reference.sources) if reference is not None else [row.source for row in cell.published],
        "suspect": cell.suspect,
    }


def _top1(cell: Cell) -> float | None:
    return None if cell.reference is None else round(cell.reference.top1, 4)
