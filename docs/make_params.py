"""Writes params.yaml: the papers' cells for `dvc repro`. Run it as `python docs/make_params.py`.

The cells come from `icdctl.science.tables`, in the family of defaults of the reference code as published (beta and
gamma 2); `icdctl reproduce TABLE --family gamma8` trains the other one. Each cell names what DVC makes before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from icdctl.methods import METHODS
from icdctl.reproducing import grid_cell, name_of
from icdctl.science import tables
from icdctl.science.tables import Cell

TABLES = ("icd-cifar100", "icd-cub200", "icd-gamma", "icd-scales", "icd-time")
FAMILY = "gamma2"
FOLDERS = {"cifar100": "cifar-100-python", "cub200": "CUB_200_2011"}
HEAD = """\
# What `dvc repro` reproduces. Made by docs/make_params.py; edit a cell by hand, and that cell alone runs again.
#
# train     options of all runs (`icdctl distill --help`)
# seeds     of every cell
# datasets  where their archives unpack to, below data/
# teachers  fetched where they are published, trained here where a program can't get them
# cells     options of the runs of a cell; `after` is what DVC makes first
"""


def paper_cells() -> list[Cell]:
    """Every cell of the tables that can be run, once."""
    found: dict[str, Cell] = {}
    for name in TABLES:
        for cell in tables.select(tables.load(name).cells, family=FAMILY):
            if cell.why_not(METHODS) is None:
                found.setdefault(name_of(cell), cell)
    return list(found.values())


def params() -> dict[str, Any]:
    """The content of params.yaml."""
    cells = paper_cells()
    teachers = sorted({(cell.dataset, cell.teacher) for cell in cells if cell.teacher})
    return {
        "train": {"device": "auto"},
        "seeds": [0, 1, 2, 3, 4],
        "datasets": {name: {"folder": folder} for name, folder in FOLDERS.items()},
        "teachers": {
            f"{dataset}-{model}": {
                "dataset": dataset,
                "model": model,
                "source": "fetch" if dataset == "cifar100" else "train",
                "after": f"data/{FOLDERS[dataset]}",
            }
            for dataset, model in teachers
        },
        "deployed": {"cell": "cifar100-res32x4-mv2-cd_sdd_dkd-beta2-gamma2", "seed": 0},
        "cells": {name_of(cell): _options(cell) for cell in cells},
    }


def _options(cell: Cell) -> dict[str, Any]:
    options = dict(grid_cell(cell, {}).options)
    after = f"data/{FOLDERS[cell.dataset]}"
    if cell.teacher:
        after = f"teachers/{cell.dataset}-{cell.teacher}"
        options["teacher"] = after
    return {"after": after, **options, "data_dir": "data"}


def text() -> str:
    """params.yaml, whole."""
    parts = [HEAD]
    for key, value in params().items():
        parts.append(yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=None, width=200))
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).resolve().parent.parent / "params.yaml").write_text(text(), encoding="utf-8")
