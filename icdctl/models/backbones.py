"""Models of other libraries, built by their names, see `icdctl.models.backbone_names`.

The name is all that is stored of such a model: in config.json, weights, ONNX files and registries. A library is
imported when one of its models is looked up or built, never to read a name. The callable of a package is any code: it
is called only where the user typed its name, or allows its package by the variable `ICDCTL_MODULES`, because a weights
file from elsewhere may name any function.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from icdctl.errors import IcdctlError, UsageError, is_out_of_memory
from icdctl.models.backbone_names import Backbone, is_backbone, parse
from icdctl.models.external import Adapted, check_module
from icdctl.models.inspection import LINEAR_HEAD

MODULES_VARIABLE = "ICDCTL_MODULES"
"""The variable with the packages, with commas between them, whose callables a stored name may call."""

_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_NO_LINEAR_HEAD = f"leave out `{LINEAR_HEAD}`: a method without patches (`kd`, `dkd` or `nkd`) needs no such head"

_typed: set[str] = set()
"""Packages whose callables the user named in this process."""


class UnavailableError(UsageError):
    """What builds the model is not installed here, or not allowed to run."""


def allow_typed(name: object) -> None:
    """Allow the callables of a package, one of which a user typed, to be called by this process."""
    if isinstance(name, str) and is_backbone(name):
        _typed.add(parse(name).package)


def check_available(backbone: Backbone) -> None:
    """Check that the library is installed and has the model.

    Raises:
        UsageError: it is not, or has not; the hint names what is near, or the command that installs it.
    """
    if backbone.is_callable:
        _callable(backbone)
    elif backbone.source == "timm":
        timm = timm_package()
        tagged = timm.list_models(pretrained=True)
        if not timm.is_model(backbone.model) or ("." in backbone.model and backbone.model not in tagged):
            raise _unknown(backbone, [*timm.list_models(), *tagged])
    else:
        names = _torchvision_names()
        if backbone.model not in names:
            raise _unknown(backbone, names)


def build(name: str, num_classes: int, *, image_size: tuple[int, int]) -> Adapted:
    """A model with random weights, drawn from torch's global random state, with a head for these classes.

    Args:
        name: for which `is_backbone` holds.
        num_classes: K.
        image_size: height and width of the images of the pass that finds its head and its maps.

    Raises:
        UsageError: the library or the model is not there, or it can't be built, or takes no such images, or its logits
            do not come from a linear layer.
    """
    backbone = parse(name)
    check_available(backbone)
    module = _made(backbone, num_classes)
    check_module(module)
    if backbone.arguments.get(LINEAR_HEAD):
        module = WithLinearHead(module, num_classes, image_size=image_size, name=str(backbone))
    model = Adapted(module, image_size=image_size, name=str(backbone), hint=_size_hint(backbone))
    if model.head.out_features != num_classes:
        model.replace_head(num_classes)
    return model


class WithLinearHead(nn.Module):
    """The maps of a library's model, their average over the image, and one linear layer.

    Some models have more layers behind their global average, so that the logits of the image are not the average of
    those of its regions. Their place is taken by the linear layer.
    """

    def __init__(self, inner: nn.Module, num_classes: int, *, image_size: tuple[int, int], name: str) -> None:
        """
        Args:
            inner: a module with a method `forward_features` or a module `features`, as timm and torchvision have them.
            num_classes: K.
            image_size: height and width of the images for a first pass; what does not run in it is removed.
            name: its name in messages.

        Raises:
            UsageError: the module has neither, fails on such images, or gives no map of them.
        """
        super().__init__()
        self.inner = inner
        ran: set[str] = set()

        def watch(child_name: str, child: nn.Module) -> Any:
            return child.register_forward_hook(lambda *_: ran.add(child_name))

        handles = [watch(*child) for child in inner.named_children()]
        images = torch.randn((2, 3, *image_size), generator=torch.Generator().manual_seed(0))
        was_training = inner.training
        try:
            with torch.no_grad():
                inner.eval()
                found = self._features(images)
        except Exception as error:  # a module can raise any exception
            if is_out_of_memory(error):
                raise
            raise UsageError(
                f"`{name}` gives no maps of images of {image_size[0]} x {image_size[1]}: {error}", hint=_NO_LINEAR_HEAD
            ) from error
        finally:
            inner.train(was_training)
            for handle in handles:
                handle.remove()
        is_map = found.dim() == 4 and found.shape[2] * image_size[1] == found.shape[3] * image_size[0]
        if not is_map:
            raise UsageError(f"`{name}` gives {list(found.shape)}, no maps [B, C, H, W]", hint=_NO_LINEAR_HEAD)
        for child_name, _ in list(inner.named_children()):
            if child_name not in ran:
                setattr(inner, child_name, nn.Identity())
        self.head = nn.Linear(found.shape[1], num_classes)

    def _features(self, images: Tensor) -> Tensor:
        forward_features = getattr(self.inner, "forward_features", None)
        maps: Tensor = (
            self.inner.get_submodule("features")(images) if forward_features is None else forward_features(images)
        )
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]."""
        logits: Tensor = self.head(self._features(images).mean(dim=(2, 3)))
        return logits


def _made(backbone: Backbone, num_classes: int) -> nn.Module:
    """The library's module, before its head is looked at."""
    arguments: dict[str, Any] = {key: value for key, value in backbone.arguments.items() if key != LINEAR_HEAD}
    build: Callable[..., object]
    if backbone.is_callable:
        build = _callable(backbone)
        if _takes_num_classes(build):
            arguments = {"num_classes": num_classes, **arguments}
    elif backbone.source == "timm":
        arguments |= {"model_name": backbone.model, "num_classes": num_classes}
        build = timm_package().create_model
    else:
        from torchvision import models as zoo

        arguments = {**_usual_of_torchvision(backbone), **arguments}
        arguments |= {"name": backbone.model, "weights": None, "num_classes": num_classes}
        build = zoo.get_model
    module = _built(backbone, build, arguments)
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"`{backbone}` gives a {type(module).__name__}, expected an nn.Module",
            hint="name a class of modules, or a function that builds one",
        )
    return module


def _usual_of_torchvision(backbone: Backbone) -> dict[str, Any]:
    """Arguments of two older models: without a second head, and for the input that their trained weights expect."""
    if backbone.model not in _WITH_AUXILIARY_HEADS:
        return {}
    return {"aux_logits": False, "transform_input": True, "init_weights": True}


def _built(backbone: Backbone, build: Callable[..., object], arguments: Mapping[str, Any]) -> object:
    """The result of a library's builder, whose own errors are the user's arguments."""
    try:
        return build(**arguments)
    except Exception as error:  # a builder can raise any exception
        if isinstance(error, IcdctlError) or is_out_of_memory(error):
            raise
        raise UsageError(
            f"`{backbone}` can't be built: {type(error).__name__}: {error}",
            hint=f"check its arguments against the documentation of {backbone.package}",
        ) from error


def _unknown(backbone: Backbone, names: list[str]) -> UsageError:
    near = difflib.get_close_matches(backbone.model, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(f'`{backbone.source}:{name}`' for name in near)}?" if near else ""
    listing = "timm.list_models()" if backbone.source == "timm" else "torchvision.models.list_models()"
    return UsageError(
        f"{backbone.source} {backbone.version} has no classifier `{backbone.model}`",
        hint=hint or f"`python -c 'import {backbone.source}; print({listing})'` shows all of them",
    )


def _torchvision_names() -> list[str]:
    """The classifiers of torchvision, without its detectors, videos and the like."""
    from torchvision import models as zoo

    names: list[str] = zoo.list_models(module=zoo)
    return names


def timm_package() -> Any:
    """The package timm, an optional one.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"`timm:` needs the package timm, which can't be imported: {error}", hint="`pip install 'icdctl[timm]'`"
        ) from error


def _callable(backbone: Backbone) -> Callable[..., object]:
    """The function or class of the user's that builds a model.

    Raises:
        UnavailableError: nobody allowed to call it, or its module can't be imported.
        UsageError: the module has no such function or class, or has only imported it.
    """
    allowed = {name.strip() for name in os.environ.get(MODULES_VARIABLE, "").split(",")} | _typed
    if backbone.package not in allowed:
        raise UnavailableError(
            f"the model is built by `{backbone.source}:{backbone.model}`, code that a file names and that is not "
            "allowed to run",
            hint=f"if you trust it, set `{MODULES_VARIABLE}={backbone.package}`",
        )
    try:
        module = importlib.import_module(backbone.source)
    except Exception as error:  # code of the user's can raise any exception
        missing = isinstance(error, ModuleNotFoundError)
        raise UnavailableError(
            f"module `{backbone.source}` can't be imported: {type(error).__name__}: {error}",
            hint="install it, or name the folder that holds it: `PYTHONPATH=FOLDER icdctl ...`"
            if missing
            else "the exception's cause shows where it fails",
        ) from error
    found: object = module
    for part in backbone.model.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        near = difflib.get_close_matches(backbone.model, [name for name in dir(module) if name[0] != "_"], n=1)
        raise UsageError(
            f"module `{backbone.source}` has no `{backbone.model}` that can be called",
            hint=f"did you mean `{backbone.source}:{near[0]}`?" if near else "name a function or a class of it",
        )
    # What a module has imported is not its own: `os.system` would come with many a package that is allowed.
    home = str(getattr(found, "__module__", ""))
    if home.partition(".")[0] != backbone.package:
        raise UsageError(
            f"`{backbone.source}:{backbone.model}` is not defined in `{backbone.package}` but in `{home}`",
            hint=f"name it where it is defined, or write a function in `{backbone.source}` that calls it",
        )
    return found


def _takes_num_classes(build: Callable[..., object]) -> bool:
    try:
        return "num_classes" in inspect.signature(build).parameters
    except (TypeError, ValueError):
        return False


def _size_hint(backbone: Backbone) -> str:
    own = {"timm": '({"img_size": 64})', "torchvision": '({"image_size": 64})'}.get(backbone.source, "")
    model = f"{backbone.source}:{backbone.model}"
    other = f", or build it for another, where it has an argument for that: `'{model}{own}'`" if own else ""
    return f"some models take one size, others a smallest one: `--image-size 224` is what most are made for{other}"
