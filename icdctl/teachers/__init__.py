"""Where a distillation finds its teacher, and where a person gets one."""

from __future__ import annotations

from icdctl import files, models, registry
from icdctl.data import DatasetInfo
from icdctl.errors import ArtifactError, UsageError
from icdctl.registry import trained
from icdctl.registry.trained import TrainedModel
from icdctl.teachers.fetch import Fetched, Watcher, Wishes, clear_cache, fetch_teacher, find_fetched, overview
from icdctl.teachers.sources import Published, find_published, load_list, read_lock

__all__ = [
    "Fetched",
    "Published",
    "Watcher",
    "Wishes",
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
    """What `--teacher` names: a path, `registry:NAME`, or a model.

    A model stands for its newest registered teacher for the data set, else for the published one that was fetched.

    Args:
        teacher: as typed.
        dataset: what the student is to be trained on.

    Raises:
        UsageError: no path and no model.
        ArtifactError: the model has no teacher here, or it is another data set's; the hint says how to get one.
    """
    model = model_of(teacher)
    if model is None and not teacher.startswith("registry:") and not files.user_path(teacher).exists():
        raise ArtifactError(
            f"teacher `{teacher}` does not exist",
            hint=f"check the path, or train one: `icdctl train --model MODEL --dataset {_shown_name(dataset)} "
            f"--out {teacher}`",
        )
    target = trained.resolve(teacher, dataset=dataset) if model is None else _by_model(model, dataset)
    _check_fit(teacher, target, dataset)
    return target


def model_of(teacher: str) -> str | None:
    """The model that `--teacher` names; None where it points at weights.

    Raises:
        UsageError: no path and no model.
    """
    is_path = bool(teacher) and (files.user_path(teacher).exists() or "/" in teacher or "." in teacher)
    return None if is_path or teacher.startswith("registry:") else models.resolve(teacher)


def _check_fit(teacher: str, target: TrainedModel, dataset: DatasetInfo) -> None:
    """Refuse a teacher that learnt other classes, or from images of another size."""
    kinds = [name.partition(":")[0] for name in (target.dataset, dataset.name)]
    train = f"train one with `icdctl train --model {target.model} --dataset {_shown_name(dataset)} --as-teacher`"
    if kinds[0] != kinds[1]:
        raise ArtifactError(
            f"teacher `{teacher}` was trained on `{target.dataset}`, the run is on `{dataset.name}`",
            hint=f"{train}, or change `--dataset`",
        )
    if target.num_classes != dataset.num_classes:
        raise ArtifactError(
            f"teacher `{teacher}` tells {target.num_classes} classes apart, `{dataset.name}` has {dataset.num_classes}",
            hint=train,
        )
    pairs = zip(target.class_names, dataset.class_names, strict=True)
    other = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if other is not None:
        raise ArtifactError(
            f"teacher `{teacher}` knows other classes: its `{other[0]}` stands where `{dataset.name}` has `{other[1]}`",
            hint=train,
        )
    if target.preprocessing != dataset.preprocessing:
        (height, width), (our_height, our_width) = target.preprocessing.size, dataset.preprocessing.size
        raise ArtifactError(
            f"teacher `{teacher}` reads images of {height} x {width}, the run has {our_height} x {our_width}"
            if (height, width) != (our_height, our_width)
            else f"teacher `{teacher}` prepares pixels otherwise (mean, deviation, crop) than `{dataset.name}` asks",
            hint=f"`--image-size {height}`, or {train}" if kinds[0] == "imagefolder" else train,
        )


def _shown_name(dataset: DatasetInfo) -> str:
    """A data set in a command to be typed."""
    return "imagefolder:DIR" if dataset.name.startswith("imagefolder:") else dataset.name


def _by_model(model: str, dataset: DatasetInfo) -> TrainedModel:
    """The newest registered teacher of a model on a data set, or the fetched one."""
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
        f"teacher `{model}` for `{name}` is not there: no such artifact in `{registry.default_folder()}`"
        + (", and the published one is not fetched" if published is not None else ""),
        hint=f"{fetching}`icdctl train --model {model} --dataset {_shown_name(dataset)} --as-teacher` trains one",
    )


def _how_to_fetch(teacher: Published) -> str:
    if teacher.urls:
        return f"`icdctl fetch-teachers {teacher.short_name}` brings the published one"
    return (
        f"`icdctl fetch-teachers {teacher.short_name} --from FILE` takes the published one, which lies on "
        f"{teacher.page} and no program can download"
    )


def _published(model: str, dataset: str) -> Published | None:
    try:
        return find_published(f"{dataset}/{model}")
    except UsageError:
        return None
