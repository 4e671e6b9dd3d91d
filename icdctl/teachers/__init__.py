"""Where a distillation finds its teacher, and where a person gets one."""

from __future__ import annotations

from icdctl import data, files, models, registry, targets
from icdctl.errors import ArtifactError, UsageError
from icdctl.targets import Target
from icdctl.teachers.fetch import Fetched, Watcher, Wishes, clear_cache, fetch_teacher, find_fetched, overview
from icdctl.teachers.published import Published, find_published, load_list, read_lock

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
    "overview",
    "read_lock",
]


def find(teacher: str, *, dataset: str) -> Target:
    """What `--teacher` names: a path, `registry:NAME`, or a model.

    A model stands for its newest registered teacher for the data set, else for the published one that was fetched.

    Raises:
        UsageError: no path and no model.
        ArtifactError: the model has no teacher here, or it is another data set's; the hint says how to get one.
    """
    is_path = bool(teacher) and (files.user_path(teacher).exists() or "/" in teacher or "." in teacher)
    if not (is_path or teacher.startswith("registry:")):
        return _by_model(models.resolve(teacher), data.resolve(dataset))
    name = data.resolve(dataset)
    target = targets.resolve(teacher, dataset=name)
    if target.dataset != name:
        raise ArtifactError(
            f"teacher `{teacher}` was trained on `{target.dataset}`, the run is on `{name}`",
            hint=f"train one with `icdctl train --model {target.model} --dataset {name}`, or change `--dataset`",
        )
    num_classes = len(data.DATASETS[name].class_names)
    if target.num_classes != num_classes:
        raise ArtifactError(
            f"teacher `{teacher}` tells {target.num_classes} classes apart, `{name}` has {num_classes}",
            hint=f"train one with `icdctl train --model {target.model} --dataset {name}`",
        )
    return target


def _by_model(model: str, name: str) -> Target:
    """The newest registered teacher of a model on a data set, or the fetched one."""
    artifact = registry.find_teacher(registry.default_folder(), model=model, dataset=name)
    if artifact is not None:
        return targets.resolve(f"registry:{artifact.reference}")
    published = _published(model, name)
    fetched = None if published is None else find_fetched(published)
    if fetched is not None:
        return targets.resolve(str(fetched))
    fetching = "" if published is None else f"`icdctl fetch-teachers {model}` brings the published one; or "
    raise ArtifactError(
        f"teacher `{model}` for `{name}` is not there: no such artifact in `{registry.default_folder()}`"
        + (", and the published one is not fetched" if published is not None else ""),
        hint=f"{fetching}`icdctl train --model {model} --dataset {name} --as-teacher` trains one",
    )


def _published(model: str, dataset: str) -> Published | None:
    try:
        return find_published(f"{dataset}/{model}")
    except UsageError:
        return None
