"""Models: one class per architecture, one row per name in `MODELS`, and `Outputs`, which every model returns.

A name such as `torchvision:NAME` is that of another library's model, see `icdctl.models.backbone_names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from icdctl.errors import ArtifactError, UsageError, unknown_name
from icdctl.models import backbone_names, backbones
from icdctl.models.backbone_names import is_backbone, short_label
from icdctl.models.fold import fold_batch_norms
from icdctl.models.mobilenetv2 import MobileNetV2
from icdctl.models.outputs import Classifier, Outputs
from icdctl.models.resnet import narrow_resnet, wide_resnet
from icdctl.models.resnetv2 import res18, res50
from icdctl.models.shufflenetv1 import ShuffleNetV1
from icdctl.models.shufflenetv2 import ShuffleNetV2
from icdctl.models.state_dicts import split_part
from icdctl.models.vgg import VGG
from icdctl.models.weights import (
    DoesNotFitError,
    Weights,
    hash_of_part,
    hash_weights,
    load_weights,
    read_weights,
    save_weights,
)
from icdctl.models.wrn import WideResNet

__all__ = [
    "MODELS",
    "Classifier",
    "DoesNotFitError",
    "Model",
    "Outputs",
    "Weights",
    "check_available",
    "create",
    "fold_batch_norms",
    "hash_of_part",
    "hash_weights",
    "is_backbone",
    "library_of",
    "load_weights",
    "other_version",
    "read_weights",
    "resolve",
    "save_weights",
    "short_label",
    "split_part",
]


class Builder(Protocol):
    """A function that builds a model with a given number of classes, for 32 x 32 images or for large ones."""

    def __call__(self, num_classes: int, *, large_images: bool = ...) -> Classifier: ...


@dataclass(frozen=True)
class Model:
    """One row of `icdctl list models`."""

    build: Builder
    family: str
    num_params: int
    """Number of trainable parameters with 100 classes."""
    aliases: tuple[str, ...]
    """The name in the reference code."""


MODELS: dict[str, Model] = {
    "res8": Model(partial(narrow_resnet, 8), "resnet", 83_892, ("resnet8",)),
    "res14": Model(partial(narrow_resnet, 14), "resnet", 181_108, ("resnet14",)),
    "res20": Model(partial(narrow_resnet, 20), "resnet", 278_324, ("resnet20",)),
    "res32": Model(partial(narrow_resnet, 32), "resnet", 472_756, ("resnet32",)),
    "res44": Model(partial(narrow_resnet, 44), "resnet", 667_188, ("resnet44",)),
    "res56": Model(partial(narrow_resnet, 56), "resnet", 861_620, ("resnet56",)),
    "res110": Model(partial(narrow_resnet, 110), "resnet", 1_736_564, ("resnet110",)),
    "res8x4": Model(partial(wide_resnet, 8), "resnet", 1_233_540, ("resnet8x4",)),
    "res32x4": Model(partial(wide_resnet, 32), "resnet", 7_433_860, ("resnet32x4",)),
    "res18": Model(res18, "resnetv2", 11_220_132, ("ResNet18",)),
    "res50": Model(res50, "resnetv2", 23_705_252, ("ResNet50",)),
    "wrn16_1": Model(partial(WideResNet, 16, 1), "wrn", 180_916, ("wrn_16_1",)),
    "wrn16_2": Model(partial(WideResNet, 16, 2), "wrn", 703_284, ("wrn_16_2",)),
    "wrn40_1": Model(partial(WideResNet, 40, 1), "wrn", 569_780, ("wrn_40_1",)),
    "wrn40_2": Model(partial(WideResNet, 40, 2), "wrn", 2_255_156, ("wrn_40_2",)),
    "vgg8": Model(partial(VGG, 8), "vgg", 3_965_028, ("vgg8",)),
    "vgg11": Model(partial(VGG, 11), "vgg", 9_277_284, ("vgg11",)),
    "vgg13": Model(partial(VGG, 13), "vgg", 9_462_180, ("vgg13",)),
    "vgg16": Model(partial(VGG, 16), "vgg", 14_774_436, ("vgg16",)),
    "vgg19": Model(partial(VGG, 19), "vgg", 20_086_692, ("vgg19",)),
    "mv2": Model(MobileNetV2, "mobilenetv2", 812_836, ("MobileNetV2",)),
    "shuv1": Model(ShuffleNetV1, "shufflenetv1", 949_258, ("ShuffleV1",)),
    "shuv2": Model(ShuffleNetV2, "shufflenetv2", 1_355_528, ("ShuffleV2",)),
}


_LARGE_IMAGE = 128
"""Shorter side, in pixels, from which on a model for large images is built."""


_USUAL_SIZE = (224, 224)
"""Height and width that most models of other libraries are made for."""


def resolve(name: str) -> str:
    """The name in `MODELS` for any spelling: upper or lower case, the reference's name, with or without `_sdd`.

    The name of another library's model is only read: whether the library has it, `check_available` says.

    Raises:
        UsageError: no model has this name.
    """
    if is_backbone(name):
        return str(backbone_names.parse(name))
    folded = name.lower().removesuffix("_sdd")
    for canonical, model in MODELS.items():
        if folded == canonical or folded in (alias.lower() for alias in model.aliases):
            return canonical
    raise unknown_name("model", name, MODELS, listing="icdctl list models")


def check_available(name: str) -> None:
    """Check that a model which `resolve` has named can be built here: that its library is installed and has it.

    Raises:
        UsageError: it can't.
    """
    if is_backbone(name):
        backbones.check_available(backbone_names.parse(name))


def library_of(name: str) -> dict[str, str | None]:
    """The package that builds another library's model, and its installed version; None where it has none."""
    backbone = backbone_names.parse(name)
    return {backbone.package: backbone.version}


def other_version(name: str, before: Mapping[str, object], what: str) -> ArtifactError:
    """The error where an installed library builds another network than the one that weights belong to.

    Args:
        name: for which `is_backbone` holds.
        before: the version of its package when the weights were trained.
        what: what does not fit, and where.
    """
    backbone = backbone_names.parse(name)
    then = before.get(backbone.package)
    stated = f"{backbone.package} {then or 'of a version that is not known'}"
    return ArtifactError(
        f"{backbone.package} {backbone.version or 'without a version'} builds another `{name}` than {stated}, which "
        f"these weights are of: {what}",
        hint=f"`pip install {backbone.package}=={then}`" if then else f"install the {backbone.package} that built it",
    )


def create(
    name: str, num_classes: int, *, dataset: str | None = None, image_size: tuple[int, int] | None = None
) -> Classifier:
    """Build a model with random weights, drawn from torch's global random state.

    Every model has a variant for large images, made for 224 x 224, with a stem of stride 2 (except vgg). The reference
    has seven of these: res32x4, vgg13 and res50 as teachers, mv2, shuv1, vgg8 and res8x4 as students; the others follow
    the rule of their family.

    Args:
        name: a key of `MODELS`, the reference's name, or a name of another library's model.
        num_classes: K, at least 2.
        dataset: "cub200" gives the variant for large images; any other data set, or None, the model for 32 x 32.
        image_size: height and width; 128 x 128 or larger gives the variant for large images too. For another library's
            model, those of the pass that finds its head.

    Raises:
        UsageError: the name is unknown, there are fewer than 2 classes, or another library's model can't be built.
    """
    canonical = resolve(name)
    if num_classes < 2:
        raise UsageError(
            f"`{canonical}` can't classify into {num_classes} classes",
            hint="a classifier needs at least 2 classes; check the data set",
        )
    if is_backbone(canonical):
        return backbones.build(canonical, num_classes, image_size=image_size or _USUAL_SIZE)
    is_large = image_size is not None and min(image_size) >= _LARGE_IMAGE
    model = MODELS[canonical].build(num_classes, large_images=is_large or dataset == "cub200")
    model.name = canonical
    return model
