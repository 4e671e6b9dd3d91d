"""Options to a configuration: names looked up, defaults filled in, everything that is wrong reported at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from icdctl import data, files, methods, models
from icdctl.config import recipes
from icdctl.config.dataset_request import check_dataset_settings
from icdctl.config.declare import Command, Given
from icdctl.config.lookup import OPTIONS, SETTINGS, Declared, Owner, names_owned_by
from icdctl.config.recipes import RECIPES, Recipe
from icdctl.config.run_config import RunConfig, check_device, parse_duration
from icdctl.config.settings import CUSTOM_IMAGE_SIZE, DatasetSettings
from icdctl.config.sources import Options, from_validation
from icdctl.errors import ArtifactError, IcdctlError, UsageError, combine, unknown_name
from icdctl.methods import SCALES
from icdctl.models import backbone_names
from icdctl.models.external import CUSTOM_MODEL

G = TypeVar("G")
T = TypeVar("T")

DEFAULT_DATASET = "cifar100"


def make_config(
    command: Command,
    options: Options,
    *,
    teacher: tuple[str, str, str] | None = None,
    problems: list[IcdctlError] | None = None,
) -> RunConfig:
    """The frozen configuration of a run.

    Args:
        command: `train` has no teacher.
        options: the result of `sources.collect`.
        teacher: model name, weights file and its sha256, already resolved.
        problems: known problems, which are reported together with those found here.

    Raises:
        UsageError, ArtifactError: all problems at once.
    """
    found = list(problems or [])
    dataset = _attempt(found, data.resolve, _given(options.text("dataset"), DEFAULT_DATASET)) or DEFAULT_DATASET
    method = "ce" if command == "train" else _attempt(found, methods.resolve, options.text("method") or "") or "ce"
    student = options.text("student") or ""
    if student != CUSTOM_MODEL:
        student = _attempt(found, models.resolve, student) or ""
        _attempt(found, models.check_available, student)
    default_recipe = recipes.default_for(dataset)
    name_of_recipe = _attempt(found, recipes.resolve, _given(options.text("recipe"), default_recipe)) or default_recipe
    recipe = RECIPES[name_of_recipe]
    scales = _attempt(found, _scales, options.get("scales")) or SCALES
    settings: dict[str, float | str] = {}
    if not found:  # a wrong method would make every setting wrong
        settings = _attempt(found, partial(_method_settings, method), options.settings) or {}
    model, weights, sha256 = teacher or (None, None, None)
    values = {
        **recipe.numbers(student),
        **_stated(options),
        **dict(_attempt(found, partial(dataset_settings, dataset, student), options) or {}),
        "command": command,
        "method": method,
        "dataset": dataset,
        "student": student,
        "teacher": model,
        "teacher_weights": weights,
        "teacher_sha256": sha256,
        "scales": scales if methods.get(method).needs_patches else (),
        "settings": settings,
        "recipe": name_of_recipe,
        "device": _attempt(found, check_device, _given(options.text("device"), "auto")) or "auto",
        "time_limit_seconds": _attempt(found, parse_duration, options.get("time_limit")),
        "out": options.text("out") or "",
    }
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        found.append(from_validation(error, options.origin))
    else:
        _attempt(found, _check_optimizer, config)
    _attempt(found, partial(_check_pretrained, student), options)
    first_weights = _attempt(found, _first_weights, options) if options.get("init_weights") is not None else {}
    if found:
        raise combine(found)
    _fill_warmup(settings, options.settings, recipe, config.epochs)
    config = config.model_copy(update={**(first_weights or {}), "settings": settings})
    config = config if config.out else config.model_copy(update={"out": str(_default_folder(config))})
    _check_names(config, options.origin)
    return config


def _check_optimizer(config: RunConfig) -> None:
    """Refuse `dot` where it can't separate two gradients, or without a stable momentum for each."""
    if config.optimizer != "dot":
        return
    if not methods.get(config.method).needs_teacher:
        raise UsageError(
            f"optimizer `dot` separates distillation from the cross-entropy, and `{config.method}` has no distillation",
            hint="choose `--optimizer sgd`",
        )
    if not config.dot_delta <= config.momentum < 1 - config.dot_delta:
        raise UsageError(
            f"momentum {config.momentum:g} less and plus dot_delta {config.dot_delta:g} must be from 0 to below 1",
            hint="e.g. `--set momentum=0.9 --set dot_delta=0.075`",
        )


def _check_names(config: RunConfig, origin: Callable[[str], str]) -> None:
    """Refuse file names that are no UTF-8: config.json could not hold them."""
    names = {key: value for key, value in config if isinstance(value, str)}
    names["out"] = str(Path(config.out).absolute())  # as checkpoints hold it
    for key, name in names.items():
        if not name.isascii() and files.utf8_name(name) != name:
            raise UsageError(
                f"{origin(key)} is `{files.utf8_name(name)}`, which is not valid UTF-8",
                hint="rename the file or folder, or name another one",
            )


def _stated(options: Options) -> dict[str, object]:
    """Settings that need no lookup, as given; those of data sets are checked elsewhere."""
    return {
        each.name: options.get(name)
        for name, each in OPTIONS.items()
        if name == each.name and name not in DatasetSettings.model_fields and options.get(name) is not None
    }


def dataset_settings(dataset: str, student: str | None, options: Options) -> DatasetSettings:
    """The settings of the data set: as given, or its defaults."""
    settings = check_dataset_settings(dataset, {key: options.get(key) for key in DatasetSettings.model_fields})
    if settings.image_size is not None and options.get("image_size") is None and _is_foreign(student):
        return settings.model_copy(update={"image_size": CUSTOM_IMAGE_SIZE})
    return settings


def _is_foreign(student: str | None) -> bool:
    """Whether a student is none of icdctl's models, most of which are made for smaller images than others."""
    return student is not None and (student == CUSTOM_MODEL or models.is_backbone(student))


def _check_pretrained(student: str, options: Options) -> None:
    """Check that the library's trained weights are asked for where there are such, and nothing else to start from.

    Raises:
        UsageError: the model has none, or `--init-weights` is given too.
    """
    if options.get("pretrained") in (None, False):
        return
    if not backbone_names.has_pretrained(student):
        raise UsageError(
            f"{options.origin('pretrained')} is given, and `{student}` is no model of torchvision or timm",
            hint="start from weights of your own with `--init-weights PATH`",
        )
    if options.get("init_weights") is not None:
        raise UsageError("`--pretrained` and `--init-weights` are both given", hint="give one of them")


def _first_weights(options: Options) -> dict[str, str]:
    """The file that a student starts from, and its hash.

    Raises:
        ArtifactError: it can't be read, or is not the one that the configuration pins.
    """
    path = files.user_path(str(options.get("init_weights"))).absolute()
    file, part = models.split_part(path)
    try:
        state = file.stat()
        sha256 = _sha256_of(file, state.st_mtime_ns, state.st_size, state.st_ino)
        sha256 = models.hash_of_part(sha256, part)
    except OSError as error:
        raise ArtifactError(
            f"first weights `{path}` can't be read: {error.strerror}", hint="name a weights file with `--init-weights`"
        ) from error
    pinned = options.text("init_sha256")
    if pinned not in (None, sha256):
        raise ArtifactError(
            f"first weights `{path}` have sha256 {sha256[:12]}..., the configuration states {str(pinned)[:12]}...",
            hint="name the file with `--init-weights` to use it as it is now",
        )
    return {"init_weights": str(path), "init_sha256": sha256}


@lru_cache(maxsize=64)
def _sha256_of(path: Path, *state: int) -> str:
    """sha256 of a file in that state; it is kept, because many runs may start from one file."""
    return files.sha256_file(path)


def _method_settings(method: str, given: Mapping[str, object]) -> dict[str, float | str]:
    """The checked settings of a method; the error for another name also suggests settings of the recipe."""
    known = methods.check_settings(method, {})
    for key in given:
        if key in known:
            continue
        if key in OPTIONS:
            hint = f"it is a separate option: {OPTIONS[key].shown()}"
            raise UsageError(f"unknown setting of `{method}` `{key}`", hint=hint)
        names = [*known, *sorted(name for name, each in OPTIONS.items() if each.setting.given is Given.SET)]
        raise unknown_name(f"setting of `{method}`", key, names, listing="icdctl list methods")
    return methods.check_settings(method, given)


def _given(value: str | None, default: str) -> str:
    """The given value, even if it is empty: that is a mistake to report, not the default."""
    return default if value is None else value


def _attempt(problems: list[IcdctlError], function: Callable[[G], T], given: G) -> T | None:
    """The result of `function` for a value; None, and one more problem, if it fails."""
    try:
        return function(given)
    except IcdctlError as error:
        problems.append(error)
        return None


def _fill_warmup(settings: dict[str, float | str], given: Mapping[str, object], recipe: Recipe, epochs: int) -> None:
    """The recipe's distillation warm-up, for a method that has one and where none was given."""
    share = recipe.distillation_warmup_share
    for key, value in settings.items():
        is_warmup = key.rpartition(".")[2] == "warmup_epochs"  # a sum of methods has one for each part
        if share is not None and is_warmup and key not in given and value:
            settings[key] = float(max(1, int(epochs * share)))


def _scales(given: object) -> tuple[int, ...]:
    """`1,2,4`, `[1, 2, 4]` or numbers, in order.

    Raises:
        UsageError: they are not whole numbers, or not scales of patches.
    """
    if given is None:
        return SCALES
    text = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
    return methods.parse_scales(text)


def _default_folder(config: RunConfig) -> Path:
    """`runs/<data set>/<name>` in the project, with the name of a folder of images."""
    name = data.DatasetName.parse(config.dataset).public
    place = name.kind if name.folder is None else f"{name.kind}-{name.folder}"
    return files.project_root() / "runs" / place / default_run_name(config)


def default_run_name(config: RunConfig) -> str:
    """`<teacher>-<student>-<method>-s<seed>`, then what differs from the recipe, e.g. `-gamma8`."""
    recipe = RECIPES[config.recipe]
    kind = data.DatasetName.parse(config.dataset).kind
    parts = [models.short_label(config.teacher)] if config.teacher else []
    parts += [models.short_label(config.student), config.method, f"s{config.seed}"]
    usual = {
        **recipe.numbers(config.student),
        **{each.name: each.default for each in _named_by_default()},
        **{key: SETTINGS[key].setting.datasets.get(kind) for key in names_owned_by(Owner.DATASET)},
    }
    for key, value in usual.items():
        if getattr(config, key) != value:
            parts.append(f"{key.replace('_', '')}{_short(getattr(config, key))}")
    if methods.get(config.method).needs_patches and config.scales != SCALES:
        parts.append("scales" + "".join(map(str, config.scales)))
    normal = methods.check_settings(config.method, {})
    _fill_warmup(normal, {}, recipe, config.epochs)
    parts += [f"{key.replace('_', '')}{_short(v)}" for key, v in config.settings.items() if v != normal[key]]
    return "-".join(parts)


def _named_by_default() -> list[Declared]:
    """Other settings in the default name of a run folder. `max_steps` is first, as in the names of earlier runs."""
    return sorted((each for each in SETTINGS.values() if each.setting.in_run_name), key=lambda x: x.name != "max_steps")


def _short(value: object) -> str:
    """A value as part of a file name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")
