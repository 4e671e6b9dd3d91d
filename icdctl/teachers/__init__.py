"""Find the teacher of a distillation, and fetch published teachers."""

from __future__ import annotations

import shlex

from icdctl import files, models, registry
from icdctl.data import IMAGE_FOLDER, DatasetInfo, DatasetName
from icdctl.errors import ArtifactError, UsageError
from icdctl.registry import trained
from icdctl.registry.trained import TrainedModel
from icdctl.teachers.fetch import (
    FetchedTeacher,
    FetchOptions,
    FetchProgress,
    clear_cache,
    fetch_teacher,
    find_fetched,
    overview,
)
from icdctl.teachers.published_teachers import PublishedTeacher, find_published, load_list, read_lock

__all__ = [
    "FetchOptions",
    "FetchProgress",
    "FetchedTeacher",
    "PublishedTeacher",
    "clear_cache",
    "fetch_teacher",
    "find",
    "find_fetched",
    "find_published",
    "load_list",
    "model_of",
    "overview",
    "read_lock",
]


def find(teacher: str, *, dataset: DatasetInfo) -> TrainedModel:
    """Find the teacher that `--teacher` names: a path, `registry:NAME`, or a model.

    The name of a model stands for its newest registered teacher on the data set, or else for the published teacher, if
    that was fetched.

    Args:
        teacher: the text that the user typed.
        dataset: the data set that the student will be trained on.

    Raises:
        UsageError: the text is neither a path nor the name of a model.
        ArtifactError: there is no such teacher, or it was trained on another data set; the hint says how to get one.
    """
    model = model_of(teacher)
    if model is None and not teacher.startswith("registry:") and not _is_there(teacher):
        raise ArtifactError(
            f"teacher `{teacher}` does not exist",
            hint=f"check the path, or train one: `icdctl train --model MODEL --dataset {_shown_name(dataset)} "
            f"--out {teacher}`",
        )
    found = trained.resolve(teacher, dataset=dataset) if model is None else _by_model(model, dataset)
    _check_fit(teacher, found, dataset)
    return found


def model_of(teacher: str) -> str | None:
    """The model that `--teacher` names; None if it is a path or `registry:NAME`.

    Raises:
        UsageError: the text is neither a path nor the name of a model.
    """
    if teacher.startswith("registry:") or (teacher and _is_there(teacher)):
        return None
    is_path = not models.is_backbone(teacher) and ("/" in teacher or "." in teacher)
    return None if is_path else models.resolve(teacher)


def _is_there(path: str) -> bool:
    """Whether a path exists, or is `FILE:KEY` of a file that exists."""
    return models.split_part(files.user_path(path))[0].exists()


def _check_fit(teacher: str, found: TrainedModel, dataset: DatasetInfo) -> None:
    """Refuse a teacher whose data set, classes, image size or normalisation differ from those of the run."""
    kinds = [DatasetName.parse(name).kind for name in (found.dataset, dataset.name)]
    train = f"train one with {_how_to_train(found.model, dataset)}"
    if kinds[0] != kinds[1]:
        raise ArtifactError(
            f"teacher `{teacher}` was trained on `{found.dataset}`, but this run uses `{dataset.name}`",
            hint=f"{train}, or change `--dataset`",
        )
    if found.num_classes != dataset.num_classes:
        raise ArtifactError(
            f"teacher `{teacher}` has {found.num_classes} classes, `{dataset.name}` has {dataset.num_classes}",
            hint=train,
        )
    pairs = zip(found.class_names, dataset.class_names, strict=True)
    other = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if other is not None:
        raise ArtifactError(
            f"teacher `{teacher}` has other classes: `{other[0]}` in the place where `{dataset.name}` has `{other[1]}`",
            hint=train,
        )
    if found.preprocessing != dataset.preprocessing:
        (height, width), (our_height, our_width) = found.preprocessing.size, dataset.preprocessing.size
        raise ArtifactError(
            f"teacher `{teacher}` takes images of {height} x {width}, but this run has {our_height} x {our_width}"
            if (height, width) != (our_height, our_width)
            else f"teacher `{teacher}` normalises or crops images differently from `{dataset.name}`",
            hint=f"add `--image-size {height}`, or {train}" if kinds[0] == IMAGE_FOLDER else train,
        )


def _shown_name(dataset: DatasetInfo) -> str:
    """The data set's name as a user types it in a command."""
    return f"{IMAGE_FOLDER}:DIR" if DatasetName.parse(dataset.name).is_image_folder else dataset.name


def _how_to_train(model: str, dataset: DatasetInfo) -> str:
    """The command that trains a teacher; the arguments of a model are quoted, since a file may have named it."""
    return f"`icdctl train --model {shlex.quote(model)} --dataset {_shown_name(dataset)} --as-teacher`"


def _by_model(model: str, dataset: DatasetInfo) -> TrainedModel:
    """The newest registered teacher with this architecture on the data set, or else the fetched one."""
    name = dataset.name
    artifact = registry.find_teacher(registry.default_folder(), model=model, dataset=name)
    if artifact is not None:
        return trained.resolve(f"registry:{artifact.reference}")
    published = _published(model, name)
    fetched = None if published is None else find_fetched(published)
    if fetched is not None:
        return trained.resolve(str(fetched))
    fetching = "" if published is None else f"{_how_to_fetch(published)}; or "
    raise ArtifactError(
        f"teacher `{model}` for `{name}` is not there: `{registry.default_folder()}` has no such artifact"
        + (", and the published teacher has not been fetched" if published is not None else ""),
        hint=f"{fetching}train one with {_how_to_train(model, dataset)}",
    )


def _how_to_fetch(teacher: PublishedTeacher) -> str:
    if teacher.urls:
        return f"fetch the published one with `icdctl fetch-teachers {teacher.short_name}`"
    return (
        f"download the published one by hand from {teacher.page}, because programs can't, and run "
        f"`icdctl fetch-teachers {teacher.short_name} --from FILE`"
    )


def _published(model: str, dataset: str) -> PublishedTeacher | None:
    try:
        return find_published(f"{dataset}/{model}")
    except UsageError:
        return None
