"""Recipes: how a data set is trained, as one named row of numbers. `RECIPES` is the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from icdctl.errors import UsageError, unknown_name

Schedule = Literal["step", "cosine"]
ClassWeights = Literal["none", "balanced"]


@dataclass(frozen=True)
class Recipe:
    """A row of `icdctl list recipes`. Flags, environment and params.yaml override it field by field."""

    about: str
    source: str
    """Whose numbers they are."""
    dataset: str
    """What it was made for; it is the default of that data set unless another row comes first."""
    epochs: int
    batch_size: int
    lr: float
    """Learning rate for students that `lr_of_student` does not name."""
    lr_of_student: Mapping[str, float] = field(default_factory=dict)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    """On every parameter, biases and batch norm included."""
    clip_norm: float = 40.0
    """The gradient's global L2 norm is scaled down to this."""
    schedule: Schedule = "step"
    lr_decay_epochs: tuple[int, ...] = ()
    """`step`: the rate falls in the epoch after each of these."""
    lr_decay_rate: float = 0.1
    """`step`: by this factor."""
    lr_warmup_share: float = 0.0
    """`cosine`: the share of all steps in which the rate rises linearly from 0."""
    crop_padding: int = 0
    """Zeros on each side before a random crop back to size; 0 for no crop."""
    flip: bool = False
    """Mirror half of the images."""
    crop_scale: tuple[float, float] | None = None
    """Least and greatest share of an image's area that is cut out at random and resized; None for crops of one size."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Least and greatest width by height of such a cut."""
    randaugment_ops: int = 0
    """Random changes of colour and shape an image, one after the other."""
    randaugment_magnitude: int = 9
    """How strong they are, 0 to 30."""
    label_smoothing: float = 0.0
    """Share of the target that the cross-entropy spreads over all classes."""
    class_weights: ClassWeights = "none"
    """`balanced`: the cross-entropy weighs a class by the inverse of its number of images."""
    drop_last: bool = False
    """Leave out an epoch's last batch where it is not full."""
    distillation_warmup_share: float | None = None
    """Distillation warm-up as a share of the epochs, rounded down, at least one epoch, for the methods that have a
    warm-up; None keeps the method's own number of epochs."""


_REFERENCE = "iCD reference, commit 6dbf193:"
_OWN = "icdctl's own choice, not from a paper"
_SLOW_STUDENTS = {"mv2": 0.01, "shuv1": 0.01, "shuv2": 0.01}

RECIPES: dict[str, Recipe] = {
    "cifar100": Recipe(
        about="the reference's CIFAR-100 recipe (CRD, DKD, SDD and iCD share it)",
        source=f"{_REFERENCE} configs/ (epochs, batches, rates), mdistiller/dataset/cifar100.py (crops, flips), "
        "mdistiller/engine/trainer.py (SGD, clipping)",
        dataset="cifar100",
        epochs=240,
        batch_size=64,
        lr=0.05,
        lr_of_student=_SLOW_STUDENTS,
        lr_decay_epochs=(150, 180, 210),
        crop_padding=4,
        flip=True,
    ),
    "cub200": Recipe(
        about="the reference's CUB-200 recipe: crops of 224 x 224 out of 256 x 256",
        source=f"{_REFERENCE} configs/ (epochs, batches, rates), mdistiller/dataset/cub200.py (crops, flips), "
        "mdistiller/engine/trainer.py (SGD, clipping)",
        dataset="cub200",
        epochs=240,
        batch_size=64,
        lr=0.05,
        lr_of_student=_SLOW_STUDENTS,
        lr_decay_epochs=(150, 180, 210),
        flip=True,
        drop_last=True,
    ),
    "imagefolder": Recipe(
        about="own images: cuts of changing size and shape, flips, cosine",
        source=_OWN,
        dataset="imagefolder",
        epochs=100,
        batch_size=64,
        lr=0.05,
        lr_of_student=_SLOW_STUDENTS,
        nesterov=True,
        schedule="cosine",
        lr_warmup_share=0.05,
        crop_scale=(0.35, 1.0),
        flip=True,
        distillation_warmup_share=0.1,
    ),
    "digits100": Recipe(
        about="students on the embedded digits, in seconds; never flipped, for a mirrored digit is another or none",
        source=_OWN,
        dataset="digits100",
        epochs=16,
        batch_size=64,
        lr=0.1,
        nesterov=True,
        schedule="cosine",
        lr_warmup_share=0.15,
        distillation_warmup_share=0.125,
    ),
    "digits100-teacher": Recipe(
        about="teachers on the embedded digits: shifted by up to 2 pixels",
        source=_OWN,
        dataset="digits100",
        epochs=8,
        batch_size=64,
        lr=0.1,
        nesterov=True,
        schedule="cosine",
        lr_warmup_share=0.15,
        crop_padding=2,
        distillation_warmup_share=0.125,
    ),
}


def resolve(name: str) -> str:
    """The name in `RECIPES`.

    Raises:
        UsageError: no such recipe.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES, listing="icdctl list recipes")
    return name


def default_for(dataset: str) -> str:
    """The first recipe that was made for a data set.

    Raises:
        UsageError: none was.
    """
    for name, recipe in RECIPES.items():
        if recipe.dataset == dataset.partition(":")[0]:
            return name
    raise UsageError(f"no recipe was made for `{dataset}`", hint="name one with `--recipe`; see `icdctl list recipes`")
