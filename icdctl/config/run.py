"""One frozen description of a run: the type, and how single values of it are read. `config.json` is this, whole.

Every value comes from the first of these that has it: a flag (or keyword), `--config FILE`, the environment
(`ICDCTL_LR`, ...), the `train` section of the project's `params.yaml`, the recipe, the default.
`icdctl.config.sources` gathers the first four, `icdctl.config.resolving` makes the configuration. Nothing later reads a
flag, a variable or a file of settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from icdctl import data, files, methods
from icdctl.config.recipes import ClassWeights, Schedule
from icdctl.config.sources import NONE
from icdctl.data import Augmentation, Request
from icdctl.errors import UsageError

Precision = Literal["auto", "fp32", "tf32", "bf16"]
TeacherMode = Literal["auto", "inline", "ahead", "cache"]
TeacherPrecision = Literal["auto", "fp32", "bf16", "fp16"]

DATASET_SETTINGS = ("train_images", "test_images", "image_size", "test_split", "skip_broken")
"""Fields that belong to one data set or another."""


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
    """Everything that decides a run."""

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


def check_device(name: str) -> str:
    """The name of a device, which need not be there.

    Raises:
        UsageError: it is none of `auto`, `cpu`, `cuda` and `cuda:N`.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UsageError(f"unknown device `{name}`", hint="choose `auto`, `cpu`, `cuda` or `cuda:N`")
    return name


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
