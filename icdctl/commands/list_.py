"""`icdctl list`: tables of what there is to choose from."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from icdctl.commands import console, options
from icdctl.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from icdctl.config.recipes import Recipe


class What(StrEnum):
    """The tables that can be listed."""

    METHODS = "methods"
    MODELS = "models"
    DATASETS = "datasets"
    RECIPES = "recipes"
    TEACHERS = "teachers"


_ONLY_IN_JSON = {What.METHODS: ("loss", "variant", "source")}
"""Columns that would make the table too wide for a terminal."""


def list_(
    what: Annotated[
        str, typer.Argument(metavar="TABLE", help=f"Table to show: {', '.join(f'`{name}`' for name in What)}.")
    ],
    audit: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="With `methods`: where each method's published code and its paper differ, and which of them "
            "`--set variant=published` and `variant=corrected` follow.",
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List the methods, models, data sets, recipes or teachers to choose from.

    Example: icdctl list methods
    """
    if what not in list(What):
        raise unknown_name("table", what, list(What), listing="icdctl list --help")
    if audit:
        if what != What.METHODS:
            raise UsageError(f"`--audit` is about methods, not about {what}", hint="`icdctl list methods --audit`")
        _show_audit(as_json=as_json)
        return
    rows = {
        What.METHODS: _methods,
        What.MODELS: _models,
        What.DATASETS: _datasets,
        What.RECIPES: recipe_rows,
        What.TEACHERS: _teachers,
    }[What(what)]()
    if as_json:
        console.show_json({what: rows})
    elif rows:
        hidden = _ONLY_IN_JSON.get(What(what), ())
        columns = [column for column in rows[0] if column not in hidden]
        console.show_table(columns, [[_cell(row[column]) for column in columns] for row in rows])
        if what == What.MODELS:
            console.talk(
                "also `torchvision:NAME`, `timm:NAME` and `package.module:callable`, with arguments as JSON in "
                "parentheses"
            )
        if hidden:
            console.talk(f"`icdctl list {what} --json` also shows {', '.join(hidden)}")
        if what == What.METHODS:
            console.talk(
                "made of these: `sdd_rld` and `cd_sdd_rld` for any loss per row, `kd+ls` (standardised logits), "
                "`kd+ea` (rows weighted by entropy), `fitnet+kd` (a sum)"
            )
    else:
        console.talk(f"there are no {what}")


def _cell(value: object) -> object:
    """A value as one cell of a table: a dictionary as `key=value` pairs, None as empty."""
    if isinstance(value, dict):
        pairs = ((key, f"{each:g}" if isinstance(each, float) else each) for key, each in value.items())
        return " ".join(f"{key}={each}" for key, each in pairs)
    return "" if value is None else value


def _methods() -> list[dict[str, object]]:
    from icdctl.methods import METHODS, PUBLISHED_AT, VARIANTS, check_settings

    rows: list[dict[str, object]] = []
    for name, row in METHODS.items():
        settings = check_settings(name, {})
        venue, year = PUBLISHED_AT.get(row.source, (None, None))
        rows.append(
            {
                "name": name,
                "paper": venue,
                "year": year,
                "loss": row.family,
                "patches": "yes" if row.patches else "",
                "cluster": "yes" if row.cluster else "",
                "reads": ", ".join(sorted(row.student_reads(settings))),
                "parameters": "yes" if row.has_parameters else "",
                "settings": dict(row.defaults),
                "variant": VARIANTS[0],
                "source": row.source,
            }
        )
    return rows


def _show_audit(*, as_json: bool) -> None:
    from icdctl.methods import DIFFERENCES, METHODS, differences_of

    if as_json:
        console.show_json({"methods": {name: [asdict(each) for each in differences_of(name)] for name in METHODS}})
        return
    for each in DIFFERENCES:
        console.show_line(f"{each.of}: {each.where}")
        console.show_line(f"  code: {each.code}")
        console.show_line(f"  paper: {each.paper}")
        console.show_line(f"  variant=published follows the {each.published}, variant=corrected the {each.corrected}")
        console.show_line(f"  test: {each.test}")
    console.talk("`sdd` and `cd` concern the methods of these prefixes; `--json` lists the differences of each method")


def _models() -> list[dict[str, object]]:
    from icdctl.models import MODELS

    return [
        {"name": name, "family": row.family, "parameters": row.num_params, "reference": ", ".join(row.aliases)}
        for name, row in MODELS.items()
    ]


def _datasets() -> list[dict[str, object]]:
    from icdctl import data, files
    from icdctl.config.lookup import SETTINGS

    folder = files.data_folder()
    rows: list[dict[str, object]] = []
    for name, row in data.DATASETS.items():
        known = row.description
        defaults = {key: each.setting.datasets[name] for key, each in SETTINGS.items() if name in each.setting.datasets}
        if known is None:
            state = "your own"
        elif row.release is None:
            state = "embedded"
        else:
            state = "there" if data.is_there(name, folder) else "not fetched"
        rows.append(
            {
                "name": name if known is not None else f"{name}:DIR",
                "classes": None if known is None else known.num_classes,
                "image size": defaults["image_size"] if known is None else known.preprocessing.size[0],
                "train": row.train_images or defaults.get("train_images"),
                "test": row.test_images or defaults.get("test_images"),
                "state": state,
                "hashes": "" if row.release is None else "published",
                "licence": row.licence,
                "source": row.source,
            }
        )
    return rows


def recipe_rows() -> list[dict[str, object]]:
    """The rows of the training recipes; `icdctl recipes list` shows the papers' cells that use them."""
    from icdctl.config.recipes import RECIPES

    return [
        {
            "name": name,
            "dataset": row.dataset,
            "epochs": row.epochs,
            "batch size": row.batch_size,
            "lr": row.lr,
            "schedule": row.schedule,
            "crop": _crop(row),
            "flip": "yes" if row.flip else "",
            "about": row.about,
        }
        for name, row in RECIPES.items()
    ]


def _crop(recipe: Recipe) -> str:
    if recipe.crop_scale is not None:
        return f"{recipe.crop_scale[0]:.0%} to {recipe.crop_scale[1]:.0%} of the area"
    return f"padded by {recipe.crop_padding}" if recipe.crop_padding else ""


def _teachers() -> list[dict[str, object]]:
    from icdctl import registry, teachers

    def rounded(top1: object) -> float | None:
        return round(top1, 2) if isinstance(top1, int | float) else None

    registered: list[dict[str, object]] = [
        {
            "name": artifact.reference,
            "dataset": artifact.manifest.dataset.name,
            "model": artifact.manifest.model,
            "top-1": rounded(artifact.manifest.metrics.get("final_top1")),
            "state": "registered",
            "hash": "recorded",
            "source": "trained here",
            "licence": f"your own; of its data: {artifact.manifest.dataset.licence or 'not known'}",
        }
        for artifact in registry.list_artifacts(registry.default_folder())
        if artifact.manifest.method == "ce"
    ]
    published: list[dict[str, object]] = [
        {
            "name": row["name"],
            "dataset": row["dataset"],
            "model": row["model"],
            "top-1": rounded(row["published top-1"] if row["measured top-1"] is None else row["measured top-1"]),
            "state": row["state"],
            "hash": row["hash"],
            "source": row["source"],
            "licence": row["licence"],
        }
        for row in teachers.overview()
    ]
    return registered + published
