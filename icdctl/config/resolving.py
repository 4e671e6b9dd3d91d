"""Options to a configuration: names looked up, defaults filled in, all that is wrong told at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from icdctl import data, files, methods, models
from icdctl.config import recipes
from icdctl.config.recipes import RECIPES, Recipe
from icdctl.config.run import DATASET_SETTINGS, RunConfig, check_device, parse_duration
from icdctl.config.sources import WITHOUT_FLAG, Options, flag_of, from_validation
from icdctl.errors import ArtifactError, IcdctlError, UsageError, combine, unknown_name
from icdctl.methods import SCALES
from icdctl.models.external import CUSTOM_MODEL

T = TypeVar("T")

DEFAULT_DATASET = "cifar100"
_FOREIGN_IMAGE_SIZE = 224
"""What a model that is not of the CIFAR family most likely expects of an `imagefolder`."""


def make_config(
    command: Literal["train", "distill"],
    options: Options,
    *,
    teacher: tuple[str, str, str] | None = None,
    problems: list[IcdctlError] | None = None,
) -> RunConfig:
    """The frozen configuration of a run.

    Args:
        command: `train` has no teacher.
        options: from `gather`.
        teacher: model name, weights file and its sha256, already resolved.
        problems: what is already known to be wrong; reported together with what is found here.

    Raises:
        UsageError, ArtifactError: all problems at once.
    """
    found = list(problems or [])
    dataset = _attempt(found, data.resolve, _given(options.dataset, DEFAULT_DATASET)) or DEFAULT_DATASET
    method = "ce" if command == "train" else _attempt(found, methods.resolve, options.method or "") or "ce"
    student = options.student or ""
    if student != CUSTOM_MODEL:
        student = _attempt(found, models.resolve, student) or ""
    default_recipe = recipes.default_for(dataset)
    recipe = _attempt(found, recipes.resolve, _given(options.recipe, default_recipe)) or default_recipe
    scales = _attempt(found, _scales, options.scales) or SCALES
    settings: dict[str, float | str] = {}
    if not found:  # a wrong method would make every setting wrong
        settings = _attempt(found, partial(_method_settings, method), options.settings or {}) or {}
    name, weights, sha256 = teacher or (None, None, None)
    values = {
        **_values(options, RECIPES[recipe], student),
        **(_attempt(found, partial(dataset_settings, dataset, student), options) or dict.fromkeys(DATASET_SETTINGS)),
        "command": command,
        "method": method,
        "dataset": dataset,
        "student": student,
        "teacher": name,
        "teacher_weights": weights,
        "teacher_sha256": sha256,
        "scales": scales if methods.METHODS[method].needs_patches else (),
        "settings": settings,
        "recipe": recipe,
        "device": _attempt(found, check_device, _given(options.device, "auto")) or "auto",
        "time_limit_seconds": _attempt(found, parse_duration, options.time_limit),
        "out": options.out or "",
    }
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        found.append(from_validation(error, options.origin))
    values_of_init = _attempt(found, _first_weights, options) if options.init_weights is not None else {}
    if found:
        raise combine(found)
    config = config.model_copy(update=values_of_init or {})
    _fill_warmup(settings, options, RECIPES[recipe], config.epochs)
    config = config.model_copy(update={"settings": settings})
    if not config.out:
        kind, colon, folder = dataset.partition(":")
        place = f"{kind}-{Path(folder).name}" if colon else kind
        out = files.project_root() / "runs" / place / default_run_name(config)
        config = config.model_copy(update={"out": str(out)})
    return config


def dataset_settings(dataset: str, student: str | None, options: Options) -> dict[str, Any]:
    """The settings that the data set alone has: as asked for, or as usual; None for those of others."""
    given = {key: getattr(options, key) for key in DATASET_SETTINGS}
    settings = data.check_settings(dataset, given)
    if settings["image_size"] is not None and given["image_size"] is None and student == CUSTOM_MODEL:
        settings["image_size"] = _FOREIGN_IMAGE_SIZE
    return settings


def _first_weights(options: Options) -> dict[str, str]:
    """The file that a student starts from, and its hash.

    Raises:
        ArtifactError: it can't be read, or is not the one that the configuration pins.
    """
    path = files.user_path(str(options.init_weights)).absolute()
    try:
        state = path.stat()
        sha256 = _sha256_of(path, state.st_mtime_ns, state.st_size, state.st_ino)
    except OSError as error:
        raise ArtifactError(
            f"first weights `{path}` can't be read: {error.strerror}", hint="name a weights file with `--init-weights`"
        ) from error
    if options.init_sha256 not in (None, sha256):
        raise ArtifactError(
            f"first weights `{path}` have sha256 {sha256[:12]}..., the configuration states "
            f"{str(options.init_sha256)[:12]}...",
            hint="name the file with `--init-weights` to use it as it is now",
        )
    return {"init_weights": str(path), "init_sha256": sha256}


@lru_cache(maxsize=64)
def _sha256_of(path: Path, *state: int) -> str:
    """Of a file in that state: many runs may start from one."""
    return files.sha256_file(path)


def _method_settings(method: str, given: Mapping[str, Any]) -> dict[str, float | str]:
    """As `methods.check_settings` gives them; what is no setting of the method may be meant for the recipe."""
    known = methods.check_settings(method, {})
    for key in given:
        if key in known:
            continue
        if key in Options.model_fields:
            hint = f"it is an option of its own: {flag_of(key)}"
            raise UsageError(f"unknown setting of `{method}` `{key}`", hint=hint)
        raise unknown_name(
            f"setting of `{method}`", key, [*known, *sorted(WITHOUT_FLAG)], listing="icdctl list methods"
        )
    return methods.check_settings(method, given)


def _given(value: str | None, default: str) -> str:
    """The value, an empty one too: that is a mistake to report, not a wish for the default."""
    return default if value is None else value


def _attempt(problems: list[IcdctlError], function: Callable[[Any], T], given: Any) -> T | None:
    """What `function` makes of a value, or None and one more problem."""
    try:
        return function(given)
    except IcdctlError as error:
        problems.append(error)
        return None


_OWN_DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "val_split": 0.0,
    "split_seed": 0,
    "data_dir": None,
    "precision": "auto",
    "teacher_mode": "auto",
    "teacher_precision": "auto",
    "deterministic": False,
    "compile": False,
    "on_nonfinite": "stop",
    "ema_decay": 0.0,
    "init_weights": None,
    "init_sha256": None,
    "max_steps": None,
}
_FROM_RECIPE = (
    "epochs",
    "batch_size",
    "optimizer",
    "momentum",
    "nesterov",
    "weight_decay",
    "clip_norm",
    "schedule",
    "lr_decay_epochs",
    "lr_decay_rate",
    "lr_warmup_share",
    "crop_padding",
    "flip",
    "crop_scale",
    "crop_ratio",
    "randaugment_ops",
    "randaugment_magnitude",
    "label_smoothing",
    "class_weights",
    "drop_last",
)


def _values(options: Options, recipe: Recipe, student: str) -> dict[str, Any]:
    """What was given, else the recipe's, else the default."""
    defaults = {key: getattr(recipe, key) for key in _FROM_RECIPE} | _OWN_DEFAULTS
    defaults["lr"] = recipe.lr_of_student.get(student, recipe.lr)
    return {
        key: default if getattr(options, key) is None else getattr(options, key) for key, default in defaults.items()
    }


def _fill_warmup(settings: dict[str, float | str], options: Options, recipe: Recipe, epochs: int) -> None:
    """The recipe's distillation warm-up, for a method that has one and where none was given."""
    share = recipe.distillation_warmup_share
    given = "warmup_epochs" in (options.settings or {})
    if share is not None and not given and settings.get("warmup_epochs"):
        settings["warmup_epochs"] = float(max(1, int(epochs * share)))


def _scales(given: tuple[int, ...] | str | None) -> tuple[int, ...]:
    if given is None:
        return SCALES
    return methods.parse_scales(given) if isinstance(given, str) else methods.check_scales(given)


def default_run_name(config: RunConfig) -> str:
    """`<teacher>-<student>-<method>-s<seed>`, then what differs from the recipe, e.g. `-gamma8`."""
    recipe = RECIPES[config.recipe]
    parts = [config.teacher] if config.teacher else []
    parts += [config.student, config.method, f"s{config.seed}"]
    expected: dict[str, Any] = {key: getattr(recipe, key) for key in _FROM_RECIPE}
    expected["lr"] = recipe.lr_of_student.get(config.student, recipe.lr)
    expected |= {"max_steps": None, "val_split": 0.0, "split_seed": 0}
    expected |= data.check_settings(config.dataset, {})
    for key, value in expected.items():
        if getattr(config, key) != value:
            parts.append(f"{key.replace('_', '')}{_short(getattr(config, key))}")
    if methods.METHODS[config.method].needs_patches and config.scales != SCALES:
        parts.append("scales" + "".join(map(str, config.scales)))
    normal = methods.check_settings(config.method, {})
    _fill_warmup(normal, Options.model_construct(), recipe, config.epochs)
    parts += [f"{key.replace('_', '')}{_short(v)}" for key, v in config.settings.items() if v != normal[key]]
    return "-".join(parts)


def _short(value: Any) -> str:
    """A value as part of a file name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")
