"""Writes params.yaml: the papers' cells for `dvc repro`. Run it as `python docs/make_params.py`.

The cells come from `icdctl.science.tables`, in the family of defaults of the reference code as published (beta and
gamma 2); `icdctl reproduce TABLE --family gamma8` trains the other one. Each cell names what DVC makes before it.
`icdctl recipes copy` writes the same entries, one by one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from icdctl.grid.cells import GridCell
from icdctl.grid.params import dump
from icdctl.methods import METHODS
from icdctl.papers import pipeline
from icdctl.papers.pipeline import Form
from icdctl.papers.reproduce import grid_cell, name_of
from icdctl.science import experiments, tables

TABLES = ("icd-cifar100", "icd-cub200", "icd-gamma", "icd-scales", "icd-time")
FAMILY = "gamma2"
HEAD = """\
# What `dvc repro` reproduces. Made by docs/make_params.py; edit a cell by hand, and that cell alone runs again.
#
# train     options of all runs (`icdctl distill --help`)
# seeds     of every cell
# datasets  where their archives unpack to, below data/
# teachers  fetched where they are published, trained here where a program can't get them
# cells     options of the runs of a cell; `after` is what DVC makes first
"""


def paper_cells() -> list[GridCell]:
    """Every cell of the tables that can be run, once."""
    found: dict[str, GridCell] = {}
    for name in TABLES:
        for cell in experiments.select(tables.load(name).cells, family=FAMILY):
            if cell.why_not(METHODS) is None:
                found.setdefault(name_of(cell), grid_cell(cell, {}))
    return list(found.values())


def params() -> dict[str, Any]:
    """The content of params.yaml."""
    entries = pipeline.entries(paper_cells(), Form(stages=True, datasets=True))
    return {
        "train": {"device": "auto"},
        "seeds": list(pipeline.SEEDS),
        "datasets": entries["datasets"],
        "teachers": dict(sorted(entries["teachers"].items())),
        "deployed": {"cell": "cifar100-res32x4-mv2-cd_sdd_dkd-beta2-gamma2", "seed": 0},
        "cells": entries["cells"],
    }


def text() -> str:
    """params.yaml, whole."""
    return "\n".join([HEAD, *(dump({key: value}) for key, value in params().items())])


if __name__ == "__main__":
    (Path(__file__).resolve().parent.parent / "params.yaml").write_text(text(), encoding="utf-8")
