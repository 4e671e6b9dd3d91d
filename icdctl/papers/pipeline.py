"""Cells as entries of a params.yaml, in the form that the `dvc.yaml` beside it reads; without one, cells alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from icdctl import teachers
from icdctl.data import cifar100, cub200
from icdctl.errors import ArtifactError, UsageError
from icdctl.grid.cells import GridCell
from icdctl.papers.catalogue import resolved
from icdctl.papers.reproduce import OWN_TEACHERS

SEEDS = (0, 1, 2, 3, 4)
DATA_FOLDERS = {"cifar100": cifar100.FOLDER, "cub200": cub200.FOLDER}
"""Data sets that are fetched -> where their archives unpack to."""
PIPELINE_FILE = "dvc.yaml"
CELLS, _DATASETS, _TEACHERS = "cells", "datasets", "teachers"
_DATA = "data"
_NO_NUMBERS = frozenset({"out", "device", "data_dir", "recipe", "precision", "teacher_mode", "teacher_precision"})
"""Fields of a run that are not what a recipe is about."""


@dataclass(frozen=True)
class Form:
    """What a `dvc.yaml` takes from params.yaml."""

    stages: bool = False
    """Cells say what is made before them (`after`), and teachers are stages."""
    datasets: bool = False
    """Data sets are stages too, with their files in `data/`."""


def form_beside(params_file: Path) -> Form:
    """The form that the `dvc.yaml` in a file's folder reads.

    Raises:
        ArtifactError: it is there, and can't be read.
    """
    path = params_file.parent / PIPELINE_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Form()
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ArtifactError(f"`{path}` can't be read: {str(error).splitlines()[0]}", hint=f"mend `{path}`") from error
    stages = content.get("stages") if isinstance(content, dict) else None
    each = [stage for stage in (stages.values() if isinstance(stages, dict) else ()) if isinstance(stage, dict)]
    read = {stage["foreach"] for stage in each if isinstance(stage.get("foreach"), str)}
    return Form(stages={"${cells}", "${teachers}"} <= read, datasets="${datasets}" in read)


def entries(cells: Sequence[GridCell], form: Form) -> dict[str, dict[str, Any]]:
    """Sections of a params.yaml and their entries: `cells`, and what they need.

    Raises:
        UsageError: the pipeline has nothing to make before a cell, although it wants that said.
    """
    if not form.stages:
        return {CELLS: {cell.name: dict(cell.options) for cell in cells}}
    found: dict[str, dict[str, Any]] = {_DATASETS: {}, _TEACHERS: {}, CELLS: {}}
    for cell in cells:
        dataset = str(cell.options.get("dataset", "cifar100"))
        in_folder = form.datasets and dataset in DATA_FOLDERS
        if in_folder:
            found[_DATASETS][dataset] = {"folder": DATA_FOLDERS[dataset]}
        options = dict(cell.options)
        teacher = options.get("teacher")
        if teacher is not None and "/" not in str(teacher):
            key = f"{dataset}-{teacher}"
            found[_TEACHERS][key] = _teacher(dataset, str(teacher), form)
            options["teacher"] = f"{_TEACHERS}/{key}"
        after = options.get("teacher") or (_data_folder(dataset, cell.name) if form.datasets else None)
        if after is None:
            raise _nothing_before(cell.name)
        placed = {"data_dir": _DATA} if in_folder else {}
        found[CELLS][cell.name] = {"after": after, **options, **placed}
    return {section: held for section, held in found.items() if held}


def changed_by(train: Mapping[str, Any], cell: GridCell) -> list[str]:
    """Numbers of a cell that the `train` section of a params.yaml makes others than they are without it.

    Raises:
        UsageError: a value of the section can't be.
    """
    alone = resolved(cell.options).model_dump()
    together = resolved({**train, **cell.options}).model_dump()
    return [key for key, value in alone.items() if key not in _NO_NUMBERS and together[key] != value]


def _teacher(dataset: str, model: str, form: Form) -> dict[str, Any]:
    """Fetched where a program can, trained here otherwise."""
    can_fetch = any((row.dataset, row.model) == (dataset, model) and row.urls for row in teachers.load_list())
    entry = {"dataset": dataset, "model": model, "source": "fetch" if can_fetch else "train"}
    if not can_fetch and dataset in OWN_TEACHERS:
        entry["recipe"] = OWN_TEACHERS[dataset]
    if form.datasets:
        entry["after"] = _data_folder(dataset, f"{dataset}-{model}")
    return entry


def _data_folder(dataset: str, name: str) -> str:
    if dataset not in DATA_FOLDERS:
        raise _nothing_before(name)
    return f"{_DATA}/{DATA_FOLDERS[dataset]}"


def _nothing_before(name: str) -> UsageError:
    return UsageError(
        f"`{name}` needs nothing that `{PIPELINE_FILE}` makes, which wants an `after` for each entry",
        hint="copy it to a file in another folder with `--to`",
    )
