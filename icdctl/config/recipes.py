"""Recipes: how a data set is trained, as one named row of numbers. `RECIPES` is the table."""

from __future__ import annotations

from collections.abc import Mapping

from icdctl.config.settings import RecipeSettings
from icdctl.data import IMAGE_FOLDER, DatasetName
from icdctl.errors import UsageError, unknown_name


class Recipe(RecipeSettings):
    """A row of `icdctl list recipes`. Flags, environment and params.yaml override it setting by setting.

    Pydantic refuses a row with a name that is not a setting of a recipe, and a value that the setting can't have.
    """

    about: str
    source: str
    """Where the numbers come from."""
    dataset: str
    """The data set that it is for; the first row of a data set is its default."""
    lr_of_student: Mapping[str, float] = {}
    """Learning rate of students that do not use `lr`."""
    distillation_warmup_share: float | None = None
    """Distillation warm-up as a share of the epochs, rounded down, at least one epoch, for the methods that have a
    warm-up; None keeps the method's own number of epochs."""

    def numbers(self, student: str | None = None) -> dict[str, object]:
        """The recipe's value of every setting that a recipe owns.

        Args:
            student: name of the model; None for the learning rate that most have.

        Returns:
            Values by name, the learning rate last: default names of run folders have this order.
        """
        found: dict[str, object] = {key: getattr(self, key) for key in RecipeSettings.model_fields if key != "lr"}
        return {**found, "lr": self.lr_of_student.get(student or "", self.lr)}


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
    IMAGE_FOLDER: Recipe(
        about="your own images: cuts of changing size and shape, flips, cosine",
        source=_OWN,
        dataset=IMAGE_FOLDER,
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
    "finetune": Recipe(
        about="a few epochs from trained weights (`--pretrained`, `--init-weights`): AdamW, warm-up, cosine",
        source=_OWN,
        dataset=IMAGE_FOLDER,
        epochs=20,
        batch_size=64,
        lr=3e-4,
        optimizer="adamw",
        weight_decay=0.02,
        clip_norm=1.0,
        schedule="cosine",
        lr_warmup_share=0.1,
        crop_scale=(0.35, 1.0),
        flip=True,
        distillation_warmup_share=0.1,
    ),
    "digits100": Recipe(
        about="students on the embedded digits, in seconds; never flipped, because mirrored digits mean nothing",
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
    """The first recipe for a data set.

    Raises:
        UsageError: there is none.
    """
    for name, recipe in RECIPES.items():
        if recipe.dataset == DatasetName.parse(dataset).kind:
            return name
    raise UsageError(f"there is no recipe for `{dataset}`", hint="name one with `--recipe`; see `icdctl list recipes`")
