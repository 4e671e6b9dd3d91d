"""Every setting of a run, declared once: its type and bounds, its help, how it is given and what it is for.

All else follows from here by `icdctl.config.lookup`: recipes, flags, `--set`, files, variables, sweeps, the default
name of a run folder, the identity of a run, `config.json` and docs/settings.md. A new setting is one field, with a
default that leaves earlier runs as they were and `identity=Identity.WHEN_CHANGED`.

Four classes say whose a setting is. Together they are `Settings`, in the order of `config.json`, of `--help` and of the
documentation.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from icdctl.config.declare import Command, Given, Identity, Panel, Setting
from icdctl.config.values import Epochs, Seed, TwoNumbers, interval, none_by_name

CUSTOM_IMAGE_SIZE = 224
"""The default `image_size` for models that are not icdctl's: most are made for it, and some fail on small images."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _without_zero_bytes(cls, value: object) -> object:
        """Refuse text that no path, file or terminal can hold."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("it holds a zero byte")
        return value


class TaskSettings(_Frozen):
    """The task: method, data set, student, teacher and seed."""

    command: Annotated[Command, Setting("The command that trains.", Given.COMPUTED)]
    method: Annotated[
        str,
        Setting(
            "Loss to train with (`kd`, `kd+ls`, `fitnet+kd`), or several with commas between them: `kd,dkd`. "
            "`icdctl list methods` shows all.",
            listed=True,
            commands=("distill",),
            panel=Panel.WHAT,
        ),
    ]
    dataset: Annotated[
        str,
        Setting(
            "Data set to train on: a name that `icdctl list datasets` shows, or `imagefolder:DIR` for your own images.",
            shown_default="cifar100",
        ),
    ]
    student: Annotated[
        str,
        Setting(
            "Model to train, or several with commas between them: `mv2,shuv1`. `icdctl list models` shows all. Also "
            "`torchvision:NAME`, `timm:NAME` or `package.module:callable`, with arguments as JSON in parentheses.",
            swept=True,
            listed=True,
            flag_of_train="--model",
            panel=Panel.WHAT,
        ),
    ]
    teacher: Annotated[
        str | None,
        Setting(
            "Trained model to learn from: a model's name (its registered teacher), `registry:NAME`, a run folder or a "
            "weights file. It stays as it is.",
            commands=("distill",),
            panel=Panel.WHAT,
        ),
    ] = None
    teacher_weights: Annotated[
        str | None, Setting("File of the teacher's weights.", Given.COMPUTED, identity=Identity.NEVER)
    ] = None
    teacher_sha256: Annotated[
        str | None,
        Setting("sha256 of the teacher's weights; another one is refused when a run is repeated.", Given.KEYWORD),
    ] = None
    scales: Annotated[
        tuple[int, ...],
        Setting(
            "Patch grids of the `sdd_` and `cd_sdd_` methods: whole numbers from 1 to 8, with commas between them.",
            swept=True,
            listed=True,
            commands=("distill",),
            shown_default="1,2,4",
        ),
    ] = ()
    settings: Annotated[
        dict[str, float | str],
        Setting(
            "Change a setting of the method (`gamma=8`; `gamma=1,2,4` makes three runs; `icdctl list methods` shows "
            "them) or a setting without a flag (`weight_decay=1e-4`; `--dry-run` shows them). May be repeated.",
            flag="--set",
            metavar="KEY=VALUE",
            shown_default="those of the method",
        ),
    ]
    recipe: Annotated[
        str,
        Setting(
            "Named set of training numbers to start from; other settings override it. `icdctl list recipes` shows all.",
            swept=True,
            shown_default="the data set's",
        ),
    ]
    seed: Annotated[Seed, Setting("Seed of the initial weights and of the order, crops and flips of the images.")] = 0


class RecipeSettings(_Frozen):
    """How it is trained. A recipe has values for these; one without a default must be in every recipe."""

    epochs: Annotated[int, Field(ge=1, le=100_000), Setting("Number of passes over the training images.")]
    batch_size: Annotated[int, Field(ge=2, le=1_000_000), Setting("Number of images in a training step.")]
    lr: Annotated[float, Field(gt=0), Setting("Highest learning rate of the schedule.")]
    optimizer: Annotated[
        Literal["sgd", "adamw", "dot"],
        Setting("Optimiser: `sgd`, `adamw`, or `dot`, SGD whose distillation terms have a momentum of their own."),
    ] = "sgd"
    momentum: Annotated[
        float, Field(ge=0, lt=1), Setting("Momentum of SGD and DOT; AdamW does not read it.", Given.SET)
    ] = 0.9
    dot_delta: Annotated[
        float,
        Field(ge=0, lt=1),
        Setting(
            "With `optimizer=dot`: what the momentum of the cross-entropy lacks and that of the other terms has more.",
            Given.SET,
            identity=Identity.WHEN_CHANGED,
        ),
    ] = 0.075
    nesterov: Annotated[
        bool, Setting("Use Nesterov's momentum with SGD; the other optimisers do not read it.", Given.SET)
    ] = False
    weight_decay: Annotated[
        float, Field(ge=0), Setting("Weight decay of every parameter, biases and batch norm included.", Given.SET)
    ] = 5e-4
    clip_norm: Annotated[
        float, Field(gt=0), Setting("Largest global L2 norm of the gradient; a longer one is scaled down.", Given.SET)
    ] = 40.0
    schedule: Annotated[
        Literal["step", "cosine"],
        Setting(
            "Schedule of the learning rate: `step` lowers it at some epochs, `cosine` little by little.", Given.SET
        ),
    ] = "step"
    lr_decay_epochs: Annotated[
        Epochs, Setting("With `schedule=step`: epochs after which the learning rate falls.", Given.SET)
    ] = ()
    lr_decay_rate: Annotated[
        float, Field(gt=0, le=1), Setting("With `schedule=step`: factor by which the learning rate falls.", Given.SET)
    ] = 0.1
    lr_warmup_share: Annotated[
        float,
        Field(ge=0, lt=1),
        Setting(
            "With `schedule=cosine`: share of all steps in which the learning rate rises linearly from 0.", Given.SET
        ),
    ] = 0.0
    crop_padding: Annotated[
        int,
        Field(ge=0, le=64),
        Setting("Pixels of zeros added on each side before a random crop to the old size; 0 crops nothing.", Given.SET),
    ] = 0
    flip: Annotated[bool, Setting("Mirror half of the training images, drawn at random.", Given.SET)] = False
    crop_scale: Annotated[
        TwoNumbers | None,
        BeforeValidator(none_by_name),
        Setting(
            "Least and greatest share of an image's area that is cut out at random and resized; `none` cuts nothing.",
            Given.SET,
        ),
    ] = None
    crop_ratio: Annotated[
        TwoNumbers, Setting("With `crop_scale`: least and greatest ratio of a cut's width to its height.", Given.SET)
    ] = (0.75, 1.3333)
    randaugment_ops: Annotated[
        int,
        Field(ge=0, le=10),
        Setting("Number of random changes of colour and shape to each training image (RandAugment).", Given.SET),
    ] = 0
    randaugment_magnitude: Annotated[
        int, Field(ge=0, le=30), Setting("With `randaugment_ops`: strength of these changes.", Given.SET)
    ] = 9
    label_smoothing: Annotated[
        float,
        Field(ge=0, lt=1),
        Setting("Share of the target that the cross-entropy spreads evenly over all classes.", Given.SET),
    ] = 0.0
    class_weights: Annotated[
        Literal["none", "balanced"],
        Setting("`balanced` weighs each class in the cross-entropy by the inverse of its number of images.", Given.SET),
    ] = "none"
    drop_last: Annotated[bool, Setting("Leave out the last batch of an epoch where it is not full.", Given.SET)] = False

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


class DatasetSettings(_Frozen):
    """Choice of the images. A setting that only some data sets have is None for the others."""

    train_images: Annotated[
        int | None,
        Field(ge=1, le=1_000_000),
        Setting("Number of training images that `digits100` draws.", swept=True, datasets={"digits100": 4000}),
    ] = None
    test_images: Annotated[
        int | None,
        Field(ge=1, le=1_000_000),
        Setting("Number of test images that `digits100` draws.", datasets={"digits100": 2000}),
    ] = None
    image_size: Annotated[
        int | None,
        Field(ge=8, le=1024),
        Setting(
            "Side of the square, in pixels, that images of an `imagefolder` are resized to.",
            swept=True,
            metavar="SIDE",
            datasets={"imagefolder": 32},
            shown_default=f"32; {CUSTOM_IMAGE_SIZE} for a custom model or one of another library",
        ),
    ] = None
    test_split: Annotated[
        float | None,
        Field(gt=0, lt=1),
        Setting(
            "Share of each class of an `imagefolder` to hold out for testing where it has no `val/` or `test/`.",
            swept=True,
            metavar="SHARE",
            datasets={"imagefolder": 0.2},
        ),
    ] = None
    skip_broken: Annotated[
        bool | None,
        Setting(
            "Leave out images of an `imagefolder` that can't be decoded, and print how many. Otherwise the run fails.",
            datasets={"imagefolder": False},
        ),
    ] = None
    val_split: Annotated[
        float,
        Field(ge=0, lt=1),
        Setting(
            "Share of each class's training images to hold out and evaluate after each epoch; the test images are then "
            "evaluated once, at the end.",
            swept=True,
            in_run_name=True,
            metavar="SHARE",
            shown_default="0: the test images are evaluated after each epoch",
        ),
    ] = 0.0
    split_seed: Annotated[
        Seed,
        Setting("Seed that draws the held-out images; it does not depend on `--seed`.", in_run_name=True),
    ] = 0


class ExecutionSettings(_Frozen):
    """How the run is carried out: what it starts from and stops at, where and how it computes."""

    data_dir: Annotated[
        str | None,
        Setting(
            "Folder that holds the folders of the data sets.",
            identity=Identity.NEVER,
            panel=Panel.WHERE,
            metavar="DIR",
            shown_default="$ICDCTL_DATA or .icdctl/data",
        ),
    ] = None
    device: Annotated[
        str,
        Setting("Device to run on: `auto`, `cpu`, `cuda` or `cuda:N`.", identity=Identity.NEVER, panel=Panel.WHERE),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16"],
        Setting(
            "Precision of training: `fp32`, `tf32` (CUDA alone) or `bf16` (the student runs in autocast).",
            swept=True,
            panel=Panel.WHERE,
            shown_default="auto: tf32 on CUDA, else fp32",
        ),
    ] = "auto"
    teacher_mode: Annotated[
        Literal["auto", "inline", "ahead", "cache"],
        Setting(
            "When the teacher runs: `inline` on each batch; `ahead` on the batches of several steps at once; `cache` "
            "once on every crop and flip of every image.",
            identity=Identity.NEVER,
            commands=("distill",),
            panel=Panel.WHERE,
            shown_default="auto: cache where it is less work and fits, else ahead on CUDA, else inline",
        ),
    ] = "auto"
    teacher_precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Setting(
            "Precision of the teacher: `fp32`, `bf16` or `fp16`.",
            identity=Identity.NEVER,
            commands=("distill",),
            panel=Panel.WHERE,
            shown_default="auto: half where it saves seconds and its logits agree",
        ),
    ] = "auto"
    deterministic: Annotated[
        bool, Setting("Use only algorithms that give the same bits each time; slower on CUDA.", panel=Panel.WHERE)
    ] = False
    compile: Annotated[
        bool,
        Setting(
            "Let torch.compile fuse the student's kernels: the first step takes minutes, numbers round differently. "
            "Never tried on a GPU.",
            identity=Identity.WHEN_CHANGED,
            negative=True,
            panel=Panel.WHERE,
            shown_default="no",
        ),
    ] = False
    on_nonfinite: Annotated[
        Literal["stop", "skip"],
        Setting(
            "What a loss or gradient that is not finite does: `stop` ends the run, `skip` leaves out the step.",
            Given.SET,
            swept=True,
        ),
    ] = "stop"
    ema_decay: Annotated[
        float,
        Field(ge=0, lt=1),
        Setting(
            "Decay of the EMA of the weights, which is then evaluated and kept; 0 disables it.", Given.SET, swept=True
        ),
    ] = 0.0
    init_weights: Annotated[
        str | None,
        Setting(
            "Weights that the student starts from: a run folder, a weights file or `registry:NAME`. Those of another "
            "number of classes give all but the head, which is then drawn from the seed.",
            identity=Identity.NEVER,
            metavar="PATH",
            shown_default="drawn from the seed",
        ),
    ] = None
    init_sha256: Annotated[
        str | None,
        Setting("sha256 of the file of `init_weights`; another one is refused when a run is repeated.", Given.KEYWORD),
    ] = None
    pretrained: Annotated[
        bool,
        Setting(
            "Start from the trained weights that torchvision or timm has for its model, all but the head; the library "
            "downloads them into its own cache.",
            identity=Identity.WHEN_CHANGED,
        ),
    ] = False
    pretrained_sha256: Annotated[
        str | None,
        Setting(
            "sha256 of these weights, set when the run begins; others are refused when it is repeated or continued.",
            Given.KEYWORD,
            identity=Identity.WHEN_CHANGED,
        ),
    ] = None
    max_steps: Annotated[
        int | None,
        Field(ge=1),
        Setting("Stop after this many steps in all.", swept=True, in_run_name=True, panel=Panel.WHERE),
    ] = None
    time_limit_seconds: Annotated[
        float | None,
        Field(gt=0),
        Setting(
            "Stop after this time (`90m`, `1h30m`, `45s`), save the state and exit with 0; `--resume` continues.",
            option="time_limit",
            identity=Identity.NEVER,
            panel=Panel.WHERE,
            metavar="90m",
        ),
    ] = None
    checkpoint_every: Annotated[
        str,
        BeforeValidator(str),
        AfterValidator(interval),
        Setting(
            "Save the state after so much time (`30s`, `5m`) or so many steps (`500`), and after each epoch.",
            identity=Identity.NEVER,
            panel=Panel.WHERE,
            metavar="45s",
        ),
    ] = "45s"
    out: Annotated[
        str,
        Setting(
            "Run folder to create; for several runs, the folder that will hold theirs.",
            identity=Identity.NEVER,
            panel=Panel.WHERE,
            metavar="DIR",
            shown_default="runs/<dataset>/<what differs from the recipe>",
        ),
    ]


class Settings(ExecutionSettings, DatasetSettings, RecipeSettings, TaskSettings):
    """All settings of a run. Pydantic takes the fields of the last base first."""
