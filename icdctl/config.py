"""One frozen description of a run, and how it comes about.

Every value comes from the first of these that has it: a flag (or keyword), `--config FILE`, the environment
(`ICDCTL_LR`, ...), the `train` section of the project's `params.yaml`, the recipe, the default here. All problems of a
configuration are reported at once. Nothing later reads a flag, a variable or a file of settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from icdctl import data, files, methods, models, recipes
from icdctl.data import Augmentation, Request
from icdctl.errors import ArtifactError, IcdctlError, UsageError, combine, unknown_name
from icdctl.methods import SCALES
from icdctl.recipes import RECIPES, ClassWeights, Recipe, Schedule
from icdctl.sources import NONE, WITHOUT_FLAG, Options, flag_of, from_validation

Precision = Literal["auto", "fp32", "tf32", "bf16"]
TeacherMode = Literal["auto", "inline", "ahead", "cache"]
TeacherPrecision = Literal["auto", "fp32", "bf16", "fp16"]

T = TypeVar("T")

DEFAULT_DATASET = "cifar100"
DATASET_SETTINGS = ("train_images", "test_images", "image_size", "test_split", "skip_broken")
"""Fields that belong to one data set or another."""
_FOREIGN_IMAGE_SIZE = 224
"""What a model that is not of the CIFAR family most likely expects of an `imagefolder`."""


def _listed(value: Any) -> Any:
    """`0.35,1` or `[150, 180, 210]` as a list; anything else as it is."""
    return value.strip("[]() ").split(",") if isinstance(value, str) else value


def _paired(value: Any) -> Any:
    """The same, of exactly two."""
    listed = _listed(value)
    if not isinstance(listed, list | tuple) or len(listed) != 2:
        raise ValueError("expected two numbers, as in `0.35,1`")
    return listed


def _none_by_name(value: Any) -> Any:
    """`none` as None, for a setting of the recipe that can be switched off."""
    return None if value == NONE else value


Pair = Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], BeforeValidator(_paired)]
Epochs = Annotated[tuple[int, ...], BeforeValidator(_listed)]

CUSTOM_MODEL = "custom"
"""The name of a student or teacher that was handed over as an nn.Module."""


_NO_IDENTITY = (
    "data_dir",
    "device",
    "init_weights",
    "teacher_mode",
    "teacher_precision",
    "teacher_weights",
    "time_limit_seconds",
)


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
    lr_decay_epochs: Epochs
    lr_decay_rate: float = Field(gt=0, le=1)
    lr_warmup_share: float = Field(ge=0, lt=1)
    crop_padding: int = Field(ge=0, le=64)
    flip: bool
    crop_scale: Annotated[Pair | None, BeforeValidator(_none_by_name)]
    crop_ratio: Pair
    randaugment_ops: int = Field(ge=0, le=10)
    randaugment_magnitude: int = Field(ge=0, le=30)
    label_smoothing: float = Field(ge=0, lt=1)
    class_weights: ClassWeights
    drop_last: bool
    train_images: int | None
    """How many images `digits100` makes; None for other data sets, as the next four."""
    test_images: int | None
    """Likewise, for testing."""
    image_size: int | None
    """Side of the square that images of an `imagefolder` are resized to."""
    test_split: float | None
    """Share of each class of an `imagefolder` for testing, where it brings no test images."""
    skip_broken: bool | None
    """Leave out images of an `imagefolder` that can't be decoded."""
    val_split: float = Field(ge=0, lt=1)
    """Share of each class's training images that is held out, to be watched in place of the test images."""
    split_seed: int = Field(ge=0, lt=2**31)
    """Which images are held out; the same for runs of different seeds, so that they can be compared."""
    data_dir: str | None
    device: str
    precision: Precision
    teacher_mode: TeacherMode
    teacher_precision: TeacherPrecision
    deterministic: bool
    compile: bool = False
    """Have torch.compile make kernels of the student's forward pass and the losses."""
    on_nonfinite: Literal["stop", "skip"]
    """What a loss or gradient that is not finite leads to."""
    ema_decay: float = Field(ge=0, lt=1)
    """Of a moving average of the weights, which is then evaluated and kept; 0 for none."""
    init_weights: str | None
    """File of the student's first weights; None for those that the seed gives."""
    init_sha256: str | None
    """Of that file, where a configuration is repeated."""
    max_steps: int | None = Field(ge=1)
    """Stop after this many steps in all."""
    time_limit_seconds: float | None = Field(gt=0)
    """Stop at the first end of an epoch after which the next would not fit."""
    out: str
    """The run folder."""

    @model_validator(mode="after")
    def _has_ordered_pairs(self) -> Self:
        for key in ("crop_scale", "crop_ratio"):
            pair = getattr(self, key)
            if pair is not None and pair[0] > pair[1]:
                raise ValueError(f"`{key}` is {pair[0]} to {pair[1]}: the first must not be the larger")
        if self.crop_scale is not None and self.crop_scale[1] > 1:
            raise ValueError(f"`crop_scale` is up to {self.crop_scale[1]}: no cut has more than the whole image")
        if self.crop_scale is not None and self.crop_padding:
            raise ValueError(
                "`crop_scale` and `crop_padding` are two ways to crop: switch one off by `--set crop_scale=none` or "
                "`--set crop_padding=0`"
            )
        return self

    @property
    def augmentation(self) -> Augmentation:
        """How training images are changed."""
        return Augmentation(
            crop_padding=self.crop_padding,
            flip=self.flip,
            crop_scale=self.crop_scale,
            crop_ratio=self.crop_ratio,
            randaugment_ops=self.randaugment_ops,
            randaugment_magnitude=self.randaugment_magnitude,
        )

    @property
    def images(self) -> Request:
        """Which images the run reads, and how they are divided."""
        return data.request(
            self.dataset,
            folder=files.user_path(self.data_dir) if self.data_dir is not None else None,
            val_split=self.val_split,
            split_seed=self.split_seed,
            room_to_crop=self.crop_scale is not None,
            unlabeled=methods.METHODS[self.method].needs_teacher and self.dataset.startswith("imagefolder:"),
            **{key: getattr(self, key) for key in DATASET_SETTINGS},
        )

    @property
    def identity(self) -> dict[str, Any]:
        """All that changes the numbers, and the run folder.

        How the teacher is asked is not part of it: `auto` is decided when the run begins, and the checkpoint keeps it.
        """
        held = self.model_dump(mode="json", exclude=set(_NO_IDENTITY))
        if not self.compile:
            del held["compile"]  # as in runs that began before there was such a field
        return held | {"out": str(Path(self.out).resolve())}

    @property
    def fingerprint(self) -> str:
        """Of `identity`: runs with equal ones may continue each other."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:20]


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


def check_device(name: str) -> str:
    """The name of a device, which need not be there.

    Raises:
        UsageError: it is none of `auto`, `cpu`, `cuda` and `cuda:N`.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UsageError(f"unknown device `{name}`", hint="choose `auto`, `cpu`, `cuda` or `cuda:N`")
    return name


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
