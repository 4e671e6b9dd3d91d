"""One frozen description of a run, and how it comes about.

Every value comes from the first of these that has it: a flag (or keyword), `--config FILE`, the environment
(`ICDCTL_LR`, ...), the `train` section of the project's `params.yaml`, the recipe, the default here. All problems of a
configuration are reported at once. Nothing later reads a flag, a variable or a file of settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from icdctl import data, files, methods, models, recipes
from icdctl.errors import IcdctlError, UsageError, combine, unknown_name
from icdctl.methods import SCALES
from icdctl.recipes import RECIPES, Recipe, Schedule

Precision = Literal["auto", "fp32", "tf32", "bf16"]
TeacherMode = Literal["auto", "inline", "cache"]

T = TypeVar("T")

_VARIABLE_PREFIX = "ICDCTL_"
_WITHOUT_FLAG = frozenset(
    {
        "clip_norm",
        "crop_padding",
        "drop_last",
        "flip",
        "lr_decay_epochs",
        "lr_decay_rate",
        "lr_warmup_share",
        "momentum",
        "nesterov",
        "schedule",
        "teacher_sha256",
        "weight_decay",
    }
)
"""Options for files, variables and keywords alone."""
_LONGEST_SHOWN = 80
_MOST_TOLD = 10

DEFAULT_DATASET = "cifar100"

CUSTOM_MODEL = "custom"
"""The name of a student or teacher that was handed over as an nn.Module."""


class RunConfig(BaseModel):
    """Everything that decides a run. `config.json` is this, whole."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    command: Literal["train", "distill"]
    method: str
    dataset: str
    student: str
    """The model that is trained, for `train` too."""
    teacher: str | None
    """The frozen model; None for `train`."""
    teacher_weights: str | None
    """File of the teacher's weights."""
    teacher_sha256: str | None
    """Of that file."""
    scales: tuple[int, ...]
    """Of the patches; none for a method that reads none."""
    settings: dict[str, float | str]
    """The method's own."""
    recipe: str
    seed: int = Field(ge=0, lt=2**31)
    epochs: int = Field(ge=1, le=100_000)
    batch_size: int = Field(ge=2, le=1_000_000)
    lr: float = Field(gt=0)
    optimizer: Literal["sgd", "adamw"]
    momentum: float = Field(ge=0, lt=1)
    nesterov: bool
    weight_decay: float = Field(ge=0)
    clip_norm: float = Field(gt=0)
    schedule: Schedule
    lr_decay_epochs: tuple[int, ...]
    lr_decay_rate: float = Field(gt=0, le=1)
    lr_warmup_share: float = Field(ge=0, lt=1)
    crop_padding: int = Field(ge=0, le=64)
    flip: bool
    drop_last: bool
    train_images: int | None = Field(ge=1, le=1_000_000)
    """How many images `digits100` makes; None for data sets of a fixed size."""
    test_images: int | None = Field(ge=1, le=1_000_000)
    """Likewise, for testing."""
    data_dir: str | None
    device: str
    precision: Precision
    teacher_mode: TeacherMode
    deterministic: bool
    max_steps: int | None = Field(ge=1)
    """Stop after this many steps in all."""
    time_limit_seconds: float | None = Field(gt=0)
    """Stop at the first end of an epoch after which the next would not fit."""
    out: str
    """The run folder."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that changes the numbers, and the run folder."""
        held = self.model_dump(mode="json", exclude={"data_dir", "device", "teacher_weights", "time_limit_seconds"})
        return held | {"out": str(Path(self.out).resolve())}

    @property
    def fingerprint(self) -> str:
        """Of `identity`: runs with equal ones may continue each other."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:20]


class Options(BaseSettings):
    """What a person gave, by flag, file or variable; None where nothing was given. `RunConfig` checks the values."""

    model_config = SettingsConfigDict(env_prefix=_VARIABLE_PREFIX, extra="forbid", frozen=True)

    method: str | None = None
    dataset: str | None = None
    student: str | None = None
    teacher: str | None = None
    teacher_sha256: str | None = None
    """What the teacher's weights must have, where a configuration is repeated."""
    scales: tuple[int, ...] | str | None = None
    settings: dict[str, Any] | None = None
    recipe: str | None = None
    seed: Any = None
    epochs: Any = None
    batch_size: Any = None
    lr: Any = None
    optimizer: Any = None
    momentum: Any = None
    nesterov: Any = None
    weight_decay: Any = None
    clip_norm: Any = None
    schedule: Any = None
    lr_decay_epochs: tuple[int, ...] | None = None
    lr_decay_rate: Any = None
    lr_warmup_share: Any = None
    crop_padding: Any = None
    flip: Any = None
    drop_last: Any = None
    train_images: Any = None
    test_images: Any = None
    data_dir: str | None = None
    device: str | None = None
    precision: Any = None
    teacher_mode: Any = None
    deterministic: Any = None
    max_steps: Any = None
    time_limit: Any = None
    out: str | None = None

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def origin(self, key: str) -> str:
        """What to change where a value is wrong: a flag, a variable or a file."""
        return self._origins.get(key, f"`{key}`")


def gather(given: Mapping[str, Any], *, config_file: Path | None = None, command: str | None = None) -> Options:
    """The options of a run from keywords, a config.json, the environment and params.yaml.

    Args:
        given: by flag or keyword; None means not given.
        config_file: a run's `config.json`, to repeat it.
        command: "train" or "distill", which the file must be of.

    Raises:
        UsageError: an unknown key, an empty value, or one of the wrong shape, from any of them.
        ArtifactError: a file can't be read.
    """
    keywords = {key: value for key, value in given.items() if value is not None}
    _refuse_unknown(keywords, "option")
    for key in ("out", "data_dir"):
        if keywords.get(key) == "":
            raise UsageError(f"{_flag(key)} is empty", hint="name a folder, or leave it out")
    stated = _from_config_file(config_file, command) if config_file is not None else {}
    if "teacher" in keywords:
        stated.pop("teacher_sha256", None)
    if "settings" in keywords:
        keywords["settings"] = {**(stated.get("settings") or {}), **keywords["settings"]}
    variables = {key for key in Options.model_fields if f"{_VARIABLE_PREFIX}{key.upper()}" in os.environ}
    tracked = _params_yaml()
    origins = {key: f"`{key}` in `params.yaml`" for key in tracked}
    origins |= {key: f"the variable `{_VARIABLE_PREFIX}{key.upper()}`" for key in variables}
    origins |= {key: f"`{key}` in `{config_file}`" for key in stated}
    origins |= {key: _flag(key) for key in keywords}
    values = {**{key: value for key, value in tracked.items() if key not in variables}, **stated, **keywords}
    try:
        options = Options(**values)
    except ValidationError as error:
        raise from_validation(error, lambda key: origins.get(key, f"`{key}`")) from error
    except SettingsError as error:  # a variable that should hold JSON
        raise UsageError(str(error), hint=f"write the `{_VARIABLE_PREFIX}...` variable as JSON") from error
    options._origins.update(origins)
    return options


def _flag(key: str) -> str:
    """How a keyword is written: as a flag where there is one."""
    if key in _WITHOUT_FLAG:
        return f"`{key}`"
    return "`--set`" if key == "settings" else f"`--{key.replace('_', '-')}`"


def _refuse_unknown(options: Mapping[str, Any], kind: str) -> None:
    unknown = [key for key in options if key not in Options.model_fields]
    if unknown:
        listing = "icdctl distill --dry-run"
        raise combine([unknown_name(kind, key, Options.model_fields, listing=listing) for key in unknown])


def _params_yaml() -> dict[str, Any]:
    """The `train` section of the project's params.yaml; the file's other sections are the pipeline's."""
    path = files.project_root() / "params.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        first_line = str(error).splitlines()[0]
        raise UsageError(f"`{path}` can't be read as YAML: {first_line}", hint=f"mend `{path}`") from error
    section = content.get("train") if isinstance(content, dict) else content
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UsageError(
            f"`{path}` holds no mapping `train`, found {type(section).__name__}",
            hint="write e.g. `train: {epochs: 240}` in it",
        )
    _refuse_unknown({str(key): value for key, value in section.items()}, f"key of `{path}`")
    return {key: value for key, value in section.items() if value is not None}


def _from_config_file(path: Path, command: str | None) -> dict[str, Any]:
    """The options that a config.json states; its run folder is not taken over, for it is in use."""
    hint = "pass the `config.json` of a run folder"
    stated = files.read_json(path, what="config", hint=hint)
    if not isinstance(stated, dict):
        raise UsageError(f"`{path}` holds no JSON object", hint=hint)
    if command is not None and stated.get("command", command) != command:
        other = stated["command"]
        raise UsageError(
            f"`{path}` is a configuration of `icdctl {other}`", hint=f"run `icdctl {other} --config {path}`"
        )
    options = options_of(stated)
    options.pop("out", None)
    _refuse_unknown(options, f"key of `{path}`")
    return options


def options_of(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The options that lead to a resolved configuration, from its fields."""
    options = {key: value for key, value in stated.items() if key != "command" and value is not None}
    if not options.get("scales"):
        options.pop("scales", None)
    if weights := options.pop("teacher_weights", None):
        options["teacher"] = weights
    if (seconds := options.pop("time_limit_seconds", None)) is not None:
        options["time_limit"] = seconds
    return options


def build(
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
    recipe = _attempt(found, recipes.resolve, _given(options.recipe, recipes.default_for(dataset)))
    recipe = recipe or recipes.default_for(dataset)
    scales = _attempt(found, _scales, options.scales) or SCALES
    settings: dict[str, float | str] = {}
    if not found:  # a wrong method would make every setting wrong
        settings = _attempt(found, partial(methods.check_settings, method), options.settings or {}) or {}
    device = _given(options.device, "auto")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        found.append(UsageError(f"unknown device `{device}`", hint="choose `auto`, `cpu`, `cuda` or `cuda:N`"))

    values = _values(options, RECIPES[recipe], student)
    row = data.DATASETS[dataset]
    sizes = {"train_images": options.train_images, "test_images": options.test_images}
    if not row.embedded and any(size is not None for size in sizes.values()):
        found.append(
            UsageError(
                f"`--train-images` or `--test-images` is given, but `{dataset}` has a fixed size",
                hint="leave it out, or use `--dataset digits100`",
            )
        )
    for key, size in sizes.items():
        values[key] = size if size is not None or not row.embedded else getattr(row, key)
    name, weights, sha256 = teacher or (None, None, None)
    values.update(
        command=command,
        method=method,
        dataset=dataset,
        student=student,
        teacher=name,
        teacher_weights=weights,
        teacher_sha256=sha256,
        scales=scales if methods.METHODS[method].needs_patches else (),
        settings=settings,
        recipe=recipe,
        time_limit_seconds=_attempt(found, parse_duration, options.time_limit),
        out=options.out or "",
    )
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        found.append(from_validation(error, options.origin))
    if found:
        raise combine(found)
    _fill_warmup(settings, options, RECIPES[recipe], config.epochs)
    config = config.model_copy(update={"settings": settings})
    if not config.out:
        out = files.project_root() / "runs" / dataset / default_run_name(config)
        config = config.model_copy(update={"out": str(out)})
    return config


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
    "data_dir": None,
    "device": "auto",
    "precision": "auto",
    "teacher_mode": "auto",
    "deterministic": False,
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
    expected["max_steps"] = None
    row = data.DATASETS[config.dataset]
    for key in ("train_images", "test_images"):
        expected[key] = getattr(row, key) if row.embedded else None
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


def parse_duration(given: str | float | None) -> float | None:
    """`90m`, `2h`, `45s`, `1h30m` or a number of seconds, in seconds.

    Raises:
        UsageError: it is none of these, or not above 0.
    """
    if given is None:
        return None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", str(given).strip())
    seconds = 0.0
    if match:
        hours, minutes, rest = (float(part or 0) for part in match.groups())
        seconds = hours * 3600 + minutes * 60 + rest
    if seconds <= 0:
        raise UsageError(
            f"time limit `{given}` is no duration above 0", hint="e.g. `--time-limit 90m`, `1h30m` or `45s`"
        )
    return seconds


def from_validation(error: ValidationError, origin: Callable[[str], str] = lambda key: f"`{key}`") -> UsageError:
    """All that pydantic found wrong, a line a key.

    Args:
        error: of a validation.
        origin: what to change, by key.
    """
    problems: dict[str, IcdctlError] = {}
    for item in error.errors():
        key = str(item["loc"][0]) if item["loc"] else "configuration"
        if key in problems:
            continue
        if item["type"] == "extra_forbidden":
            problems[key] = unknown_name("key", key, RunConfig.model_fields, listing="icdctl distill --dry-run")
        elif item["type"] == "missing":
            problems[key] = UsageError(f"`{key}` is missing", hint=f"give {origin(key)}")
        else:
            value = str(item["input"])
            shown = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}..."
            message = item["msg"][0].lower() + item["msg"][1:]
            problems[key] = UsageError(f"`{key}` is `{shown}`: {message}", hint=f"change {origin(key)}")
    told = combine(list(problems.values())[:_MOST_TOLD])
    return UsageError(told.message, hint=told.hint)
