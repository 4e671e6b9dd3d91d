"""One frozen description of a run, and how it comes about.

Every value comes from the first of these that has it: a flag (or keyword), `--config FILE`, the environment
(`ICDCTL_LR`, ...), the `train` section of the project's `params.yaml`, the recipe, the default here. All problems of a
configuration are reported at once. Nothing later reads a flag, a variable or a file of settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from icdctl import data, files, methods, models, recipes
from icdctl.errors import IcdctlError, UsageError, combine, unknown_name
from icdctl.methods import SCALES
from icdctl.recipes import RECIPES, Recipe, Schedule

Precision = Literal["auto", "fp32", "tf32", "bf16"]
TeacherMode = Literal["auto", "inline", "cache"]

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
    settings: dict[str, float | str]
    """The method's own."""
    recipe: str
    seed: int = Field(ge=0, lt=2**31)
    epochs: int = Field(ge=1, le=100_000)
    batch_size: int = Field(ge=2)
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
    train_images: int | None = Field(ge=1)
    """How many images `digits100` makes; None for data sets of a fixed size."""
    test_images: int | None = Field(ge=1)
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
    def fingerprint(self) -> str:
        """Of all that changes the numbers, and the run folder: runs with equal ones may continue each other."""
        held = self.model_dump(mode="json", exclude={"data_dir", "device", "teacher_weights", "time_limit_seconds"})
        held["out"] = str(Path(self.out).resolve())
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:20]


class Options(BaseSettings):
    """What a person gave, by flag, file or variable; None where nothing was given."""

    model_config = SettingsConfigDict(env_prefix="ICDCTL_", extra="forbid", frozen=True)

    method: str | None = None
    dataset: str | None = None
    student: str | None = None
    teacher: str | None = None
    scales: tuple[int, ...] | str | None = None
    settings: dict[str, float | str] | None = None
    recipe: str | None = None
    seed: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    optimizer: str | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    schedule: str | None = None
    lr_decay_epochs: tuple[int, ...] | None = None
    lr_decay_rate: float | None = None
    lr_warmup_share: float | None = None
    crop_padding: int | None = None
    flip: bool | None = None
    drop_last: bool | None = None
    train_images: int | None = None
    test_images: int | None = None
    data_dir: str | None = None
    device: str | None = None
    precision: str | None = None
    teacher_mode: str | None = None
    deterministic: bool | None = None
    max_steps: int | None = None
    time_limit: str | float | None = None
    out: str | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keywords, then variables, then params.yaml."""
        return (init_settings, env_settings, _ParamsYaml(settings_cls))


class _ParamsYaml(YamlConfigSettingsSource):
    """The `train` section of the project's params.yaml; the file's other sections are the pipeline's."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, yaml_file=files.project_root() / "params.yaml")

    def __call__(self) -> dict[str, Any]:
        section = super().__call__().get("train")
        return section if isinstance(section, dict) else {}


def gather(given: Mapping[str, Any], *, config_file: Path | None = None) -> Options:
    """The options of a run from keywords, a config.json, the environment and params.yaml.

    Args:
        given: by flag or keyword; None means not given.
        config_file: a run's `config.json`, to repeat it.

    Raises:
        UsageError: an unknown key, or a value of the wrong type, from any of them.
        ArtifactError: the file can't be read.
    """
    merged = _from_config_file(config_file) if config_file is not None else {}
    for key, value in given.items():
        if key not in Options.model_fields:
            raise unknown_name("option", key, Options.model_fields, listing="icdctl distill --help")
        if value is not None:
            merged[key] = {**merged.get("settings", {}), **value} if key == "settings" else value
    try:
        return Options(**merged)
    except ValidationError as error:
        raise from_validation(error) from error


def _from_config_file(path: Path) -> dict[str, Any]:
    """The options that a config.json states; its run folder is not taken over, for it is in use."""
    stated = files.read_json(path, what="config", hint="pass the `config.json` of a run folder")
    if not isinstance(stated, dict):
        raise UsageError(f"`{path}` holds no JSON object", hint="pass the `config.json` of a run folder")
    options = {key: value for key, value in stated.items() if key not in ("command", "out", "teacher_sha256")}
    if options.pop("teacher_weights", None):
        options["teacher"] = stated["teacher_weights"]
    if (seconds := options.pop("time_limit_seconds", None)) is not None:
        options["time_limit"] = seconds
    unknown = [key for key in options if key not in Options.model_fields]
    if unknown:
        raise unknown_name(f"key of `{path}`", unknown[0], RunConfig.model_fields, listing="icdctl distill --dry-run")
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
    problems = list(problems or [])

    def attempt(resolve: Any, name: str) -> str:
        try:
            return str(resolve(name))
        except IcdctlError as error:
            problems.append(error)
            return ""

    dataset = attempt(data.resolve, options.dataset or "cifar100")
    method = "ce" if command == "train" else attempt(methods.resolve, options.method or "")
    student = options.student or ""
    if student != CUSTOM_MODEL:
        student = attempt(models.resolve, student)
    recipe_name = attempt(recipes.resolve, options.recipe) if options.recipe else ""
    scales: tuple[int, ...] = SCALES
    settings: dict[str, float | str] = {}
    try:
        scales = _scales(options.scales)
        if method:
            settings = methods.check_settings(method, options.settings or {})
    except IcdctlError as error:
        problems.append(error)
    time_limit = None
    try:
        time_limit = parse_duration(options.time_limit)
    except IcdctlError as error:
        problems.append(error)
    if problems:
        raise combine(problems)

    recipe_name = recipe_name or recipes.default_for(dataset)
    values = _values(options, RECIPES[recipe_name], student)
    _fill_warmup(settings, options, RECIPES[recipe_name], values["epochs"])
    row = data.DATASETS[dataset]
    if not row.embedded and (options.train_images is not None or options.test_images is not None):
        raise UsageError(
            f"`--train-images` or `--test-images` is given, but `{dataset}` has a fixed size",
            hint="leave it out, or use `--dataset digits100`",
        )
    name, weights, sha256 = teacher or (None, None, None)
    values.update(
        command=command,
        method=method,
        dataset=dataset,
        student=student,
        teacher=name,
        teacher_weights=weights,
        teacher_sha256=sha256,
        scales=scales,
        settings=settings,
        recipe=recipe_name,
        time_limit_seconds=time_limit,
        train_images=row.train_images if row.embedded else None,
        test_images=row.test_images if row.embedded else None,
    )
    sizes = {"train_images": options.train_images, "test_images": options.test_images}
    values |= {key: size for key, size in sizes.items() if size is not None}
    values["out"] = options.out or str(files.project_root() / "runs" / dataset / default_run_name(values))
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise from_validation(error) from error


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


def default_run_name(values: Mapping[str, Any]) -> str:
    """`<teacher>-<student>-<method>-s<seed>`, then what differs from the recipe, e.g. `-gamma8`."""
    recipe = RECIPES[values["recipe"]]
    parts = [values["teacher"]] if values["teacher"] else []
    parts += [values["student"], values["method"], f"s{values['seed']}"]
    expected: dict[str, Any] = {key: getattr(recipe, key) for key in _FROM_RECIPE}
    expected["lr"] = recipe.lr_of_student.get(values["student"], recipe.lr)
    expected["max_steps"] = None
    row = data.DATASETS[values["dataset"]]
    for key in ("train_images", "test_images"):
        expected[key] = getattr(row, key) if row.embedded else None
    for key, value in expected.items():
        if values[key] != value:
            parts.append(f"{key.replace('_', '')}{_short(values[key])}")
    if methods.METHODS[values["method"]].needs_patches and values["scales"] != SCALES:
        parts.append("scales" + "".join(map(str, values["scales"])))
    normal = methods.check_settings(values["method"], {})
    if "warmup_epochs" in normal:
        _fill_warmup(normal, Options.model_construct(settings=None), recipe, values["epochs"])
    parts += [f"{key.replace('_', '')}{_short(v)}" for key, v in values["settings"].items() if v != normal[key]]
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


def from_validation(error: ValidationError) -> UsageError:
    """All that pydantic found wrong, a line each."""
    problems = []
    for item in error.errors():
        key = str(item["loc"][0]) if item["loc"] else "configuration"
        if item["type"] == "extra_forbidden":
            problems.append(unknown_name("option", key, Options.model_fields, listing="icdctl distill --help"))
            continue
        message = item["msg"][0].lower() + item["msg"][1:]
        flag = f"--{key.replace('_', '-')}"
        problems.append(UsageError(f"`{key}` is `{item['input']}`: {message}", hint=f"change `{flag}`"))
    unique = list({problem.message.split(":")[0]: problem for problem in problems}.values())
    combined = combine(list(unique))
    return UsageError(combined.message, hint=combined.hint)
