"""Where a distillation finds its teacher, and where a person gets one."""

from __future__ import annotations

from pathlib import Path

from icdctl import data, models, registry, targets
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
        ArtifactError: the model has no teacher here; the hint says how to get one.
    """
    name = data.resolve(dataset)
    if teacher.startswith("registry:") or Path(teacher).expanduser().exists() or "/" in teacher or "." in teacher:
        return targets.resolve(teacher, dataset=name)
    model = models.resolve(teacher)
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
        hint=f"{fetching}train one with `icdctl train --model {model} --dataset {name} --out runs/teacher`, then pass "
        "`--teacher runs/teacher`, or register it with `icdctl registry add runs/teacher`",
    )


def _published(model: str, dataset: str) -> Published | None:
    try:
        return find_published(f"{dataset}/{model}")
    except UsageError:
        return None
