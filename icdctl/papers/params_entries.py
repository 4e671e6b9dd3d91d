"""Entries of a params.yaml for cells of the papers, in the form that the `dvc.yaml` beside it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from icdctl.grid import dvc_pipeline
from icdctl.grid.cells import GridCell
from icdctl.grid.dvc_pipeline import Form, Sections
from icdctl.grid.expansion import CELLS, DATASETS, TEACHERS
from icdctl.papers.catalogue import resolved

SEEDS = (0, 1, 2, 3, 4)
_NO_NUMBERS = frozenset({"out", "device", "data_dir", "recipe", "precision", "teacher_mode", "teacher_precision"})
"""Fields of a run that do not change its published numbers."""


def entries(cells: Sequence[GridCell], form: Form) -> Sections:
    """Sections of a params.yaml and their entries: `cells`, and the data sets and teachers that they need.

    Raises:
        UsageError: the pipeline has no stage that makes what a cell needs.
    """
    if not form.stages:
        return {CELLS: {cell.name: dict(cell.options) for cell in cells}}
    found: Sections = {DATASETS: {}, TEACHERS: {}, CELLS: {}}
    for cell in cells:
        options = dict(cell.options)
        teacher = options.get("teacher")
        model = None if teacher is None or "/" in str(teacher) else str(teacher)
        needed = dvc_pipeline.needed(str(options.get("dataset", "cifar100")), model, form)
        for section, values in needed.items():
            found[section].update(values)
        if model is not None:
            (key,) = needed[TEACHERS]
            options["teacher"] = f"{TEACHERS}/{key}"
        found[CELLS][cell.name] = options
    return {section: held for section, held in found.items() if held}


def changed_by(train: Mapping[str, object], cell: GridCell) -> list[str]:
    """Numbers of a cell that the `train` section of a params.yaml changes.

    Raises:
        UsageError: a value of the section is not valid.
    """
    alone = resolved(cell.options).model_dump()
    together = resolved({**train, **cell.options}).model_dump()
    return [key for key, value in alone.items() if key not in _NO_NUMBERS and together[key] != value]
