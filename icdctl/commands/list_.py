"""`icdctl list`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from icdctl import console
from icdctl.commands import options
from icdctl.errors import unknown_name


class What(StrEnum):
    """What can be listed."""

    METHODS = "methods"
    MODELS = "models"
    DATASETS = "datasets"
    RECIPES = "recipes"
    TEACHERS = "teachers"


def list_(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(What)}.")], as_json: options.Json = False
) -> None:
    """Show what there is to choose from.

    Example: icdctl list methods
    """
    if what not in list(What):
        raise unknown_name("table", what, list(What), listing="icdctl list --help")
    rows = {
        What.METHODS: _methods,
        What.MODELS: _models,
        What.DATASETS: _datasets,
        What.RECIPES: _recipes,
        What.TEACHERS: _teachers,
    }[What(what)]()
    if as_json:
        console.show_json({what: rows})
    elif rows:
        console.show_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])
    else:
        console.talk("there are none")


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return " ".join(f"{key}={number:g}" if isinstance(number, float) else key for key, number in value.items())
    return "" if value is None else value


def _methods() -> list[dict[str, Any]]:
    from icdctl.methods import METHODS

    return [
        {
            "name": name,
            "loss": row.loss,
            "patches": "yes" if row.patches else "",
            "cluster": "yes" if row.cluster else "",
            "settings": dict(row.defaults),
            "source": row.source,
        }
        for name, row in METHODS.items()
    ]


def _models() -> list[dict[str, Any]]:
    from icdctl.models import MODELS

    return [
        {"name": name, "family": row.family, "parameters": row.num_params, "reference": ", ".join(row.aliases)}
        for name, row in MODELS.items()
    ]


def _datasets() -> list[dict[str, Any]]:
    from icdctl import files
    from icdctl.data import DATASETS

    folder = files.data_folder()
    return [
        {
            "name": name,
            "classes": len(row.class_names),
            "image size": row.preprocessing.size[0],
            "train": row.train_images,
            "test": row.test_images,
            "state": "embedded"
            if row.release is None
            else "there"
            if all((folder / row.release.folder / name).is_file() for name in row.release.member_md5)
            else "not fetched",
            "hashes": "" if row.release is None else "published",
            "licence": row.licence,
            "source": row.source,
        }
        for name, row in DATASETS.items()
    ]


def _recipes() -> list[dict[str, Any]]:
    from icdctl.recipes import RECIPES

    return [
        {
            "name": name,
            "dataset": row.dataset,
            "epochs": row.epochs,
            "batch size": row.batch_size,
            "lr": row.lr,
            "schedule": row.schedule,
            "crop padding": row.crop_padding,
            "flip": "yes" if row.flip else "",
            "about": row.about,
        }
        for name, row in RECIPES.items()
    ]


def _teachers() -> list[dict[str, Any]]:
    from icdctl import registry, teachers

    artifacts = [artifact.as_json() for artifact in registry.list_artifacts(registry.default_folder())]
    registered = [
        {
            "name": item["reference"],
            "dataset": item["dataset"],
            "model": item["model"],
            "top-1": item["final_top1"],
            "state": "registered",
            "hash": "recorded",
            "source": "trained here",
            "licence": "",
        }
        for item in artifacts
        if item["method"] == "ce"
    ]
    published = [
        {
            "name": row["name"],
            "dataset": row["dataset"],
            "model": row["model"],
            "top-1": row["published top-1"] if row["measured top-1"] is None else row["measured top-1"],
            "state": row["state"],
            "hash": row["hash"],
            "source": row["source"],
            "licence": row["licence"],
        }
        for row in teachers.overview()
    ]
    return registered + published
