"""The pipeline of `dvc.yaml`: which teachers and data sets it makes before cells, and cells.yaml, which it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from icdctl import teachers
from icdctl.data import cifar100, cub200
from icdctl.errors import ArtifactError, UsageError
from icdctl.files import yaml_reading
from icdctl.grid import cells_file, expansion, params_file
from icdctl.grid.cells import PARAMS_FILE, read_params
from icdctl.grid.cells_file import Difference
from icdctl.grid.expansion import AFTER, DATA, DATASETS, TEACHERS, Cells
from icdctl.grid.params_file import Written

Sections = dict[str, dict[str, object]]
"""Section of a params.yaml -> its entries by name."""

DATA_FOLDERS = {"cifar100": cifar100.FOLDER, "cub200": cub200.FOLDER}
"""Data sets that are fetched -> the folders that their archives unpack to."""
OWN_TEACHERS = {"digits100": "digits100-teacher"}
"""Data sets without published teachers -> the recipe that trains ours."""
PIPELINE_FILE = "dvc.yaml"


@dataclass(frozen=True)
class Form:
    """What a `dvc.yaml` makes for the cells of cells.yaml; nothing where it does not read that file."""

    stages: bool = False
    """Teachers are stages, and each cell names what is made before it."""
    datasets: bool = False
    """Data sets are stages too, with their files in `data/`."""


@dataclass(frozen=True)
class Expanded:
    """The result of `expand`."""

    path: Path
    """cells.yaml"""
    cells: Cells
    difference: Difference
    """What changed in cells.yaml."""
    written: Written
    """The teachers and data sets that pairs need, as they were added to params.yaml."""


def form_beside(params_file: Path) -> Form:
    """The form that the `dvc.yaml` in a file's folder reads.

    Raises:
        ArtifactError: it exists, but can't be read.
    """
    path = params_file.parent / PIPELINE_FILE
    try:
        content = yaml_reading.read_yaml(path)
    except FileNotFoundError:
        return Form()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"`{path}` can't be read: {str(error).splitlines()[0]}", hint=f"fix `{path}`") from error
    stages = content.get("stages") if isinstance(content, dict) else None
    each = [stage for stage in (stages.values() if isinstance(stages, dict) else ()) if isinstance(stage, dict)]
    read = {stage["foreach"] for stage in each if isinstance(stage.get("foreach"), str)}
    return Form(stages={"${grid}", "${teachers}"} <= read, datasets="${datasets}" in read)


def needed(dataset: str, teacher: str | None, form: Form) -> Sections:
    """The entries of `datasets` and `teachers` that a pipeline of this form needs to train on a data set.

    Args:
        dataset: its name.
        teacher: a model; None for students that are trained without one.
        form: of the pipeline.

    Raises:
        UsageError: the pipeline has no stage that makes the data set.
    """
    found: Sections = {}
    if form.datasets and dataset in DATA_FOLDERS:
        found[DATASETS] = {dataset: {"folder": DATA_FOLDERS[dataset]}}
    if teacher is not None:
        found[TEACHERS] = {f"{dataset}-{teacher}": _teacher(dataset, teacher, form)}
    return found


def lacking(content: Mapping[str, object], *, form: Form, origin: str) -> Sections:
    """The teachers and data sets that pairs of a params.yaml name, and that it does not list.

    Raises:
        UsageError: a pair can't be read, or its teacher is neither listed nor known.
    """
    found: Sections = {}
    for pair in expansion.pairs_of(content, origin=origin):
        if expansion.teacher_key(pair, content, origin=origin) is not None:
            continue
        if pair.dataset is None:
            raise UsageError(
                f"teacher `{pair.teacher}` of a pair in {origin} is not among its `{TEACHERS}`",
                hint=f"write DATASET/{pair.teacher}:{pair.student}, or add the teacher to `{TEACHERS}`",
            )
        for section, entries in needed(pair.dataset, pair.teacher, form).items():
            found.setdefault(section, {}).update(unlisted(content, section, entries))
    return {section: entries for section, entries in found.items() if entries}


def unlisted(content: Mapping[str, object], section: str, entries: Mapping[str, object]) -> dict[str, object]:
    """The entries whose names a section does not have yet; an existing entry is the project's own and stays."""
    listed = content.get(section)
    return {key: value for key, value in entries.items() if not isinstance(listed, dict) or key not in listed}


def joined(content: Mapping[str, object], more: Sections) -> dict[str, object]:
    """A params.yaml with more entries in its sections; existing ones stay as they are."""
    made = dict(content)
    for section, entries in more.items():
        held = content.get(section)
        made[section] = {**entries, **held} if isinstance(held, dict) else entries
    return made


def check_placed(cells: Mapping[str, Mapping[str, object]]) -> None:
    """Check that every cell names what `dvc.yaml` makes before it.

    Raises:
        UsageError: one does not.
    """
    for name, options in cells.items():
        if options.get(AFTER) is None:
            raise UsageError(
                f"`{name}` needs nothing that `{PIPELINE_FILE}` makes, which wants an `{AFTER}` for each entry",
                hint="state its `dataset` and `teacher`, or put it into a params.yaml in another folder",
            )


def expand(root: Path) -> Expanded:
    """Write cells.yaml for the params.yaml of a project, and add to that file the teachers and data sets of new pairs.

    Raises:
        UsageError: the file names no cells, or a pair, method, ablation or cell is not valid.
        ArtifactError: a file can't be read or written.
    """
    path = root / PARAMS_FILE
    origin = f"`{path}`"
    form = form_beside(path)
    content = read_params(root)
    added = lacking(content, form=form, origin=origin) if form.stages else {}
    cells = expansion.expand(joined(content, added), origin=origin)
    if form.stages:
        check_placed(cells)
    written = params_file.write_entries(path, added)
    return Expanded(root / cells_file.CELLS_FILE, cells, cells_file.write(root, cells), written)


def check(root: Path) -> None:
    """Check that the cells.yaml of a project is up to date with its params.yaml.

    Raises:
        ArtifactError: it is stale, missing, or can't be read.
        UsageError: params.yaml can't be expanded.
    """
    path = root / cells_file.CELLS_FILE
    if not path.is_file():
        raise ArtifactError(f"`{path}` is not there", hint=f"`{cells_file.COMMAND}` makes it")
    cells_file.current(root, expansion.expand(read_params(root), origin=f"`{root / PARAMS_FILE}`"))


def is_expanded(root: Path) -> bool:
    """Whether a project has a cells.yaml, or a `dvc.yaml` that reads one."""
    return (root / cells_file.CELLS_FILE).is_file() or form_beside(root / PARAMS_FILE).stages


def _teacher(dataset: str, model: str, form: Form) -> dict[str, object]:
    """The entry of a teacher that is fetched if a program can download it, and trained here otherwise."""
    can_fetch = any((row.dataset, row.model) == (dataset, model) and row.urls for row in teachers.load_list())
    entry: dict[str, object] = {"dataset": dataset, "model": model, "source": "fetch" if can_fetch else "train"}
    if not can_fetch and dataset in OWN_TEACHERS:
        entry["recipe"] = OWN_TEACHERS[dataset]
    if form.datasets:
        if dataset not in DATA_FOLDERS:
            raise UsageError(
                f"`{PIPELINE_FILE}` has no stage that makes the data set `{dataset}` of the teacher `{model}`",
                hint=f"list the teacher under `{TEACHERS}`, with an `{AFTER}`, or use a params.yaml in another folder",
            )
        entry[AFTER] = f"{DATA}/{DATA_FOLDERS[dataset]}"
    return entry
