"""Backbones of other libraries by name: `torchvision:NAME`, `timm:NAME` and `package.module:callable`.

The name is all that is stored of such a model: in config.json, weights, ONNX files and registries. A library is
imported when one of its models is looked up or built, never to read a name. The callable of a package is any code: it
is called only where the user typed its name, or allows its package by the variable `ICDCTL_MODULES`, because a weights
file from elsewhere may name any function.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from icdctl import files
from icdctl.errors import ArtifactError, IcdctlError, UsageError, is_out_of_memory
from icdctl.models.external import LINEAR_HEAD, Adapted, check_module
from icdctl.models.weights import hash_weights, read_weights

MODULES_VARIABLE = "ICDCTL_MODULES"
"""The variable with the packages, with commas between them, whose callables a stored name may call."""

_NAME = re.compile(
    r"(?P<source>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<model>[A-Za-z_][\w.]*)(?:\((?P<arguments>.*)\))?",
    re.ASCII | re.DOTALL,
)
_OTHER_PREFIXES = ("registry", "imagefolder")
_FILE_ENDINGS = ("pth", "pt", "safetensors", "ckpt", "bin", "tar")
"""Ends of `FILE:KEY`, which looks like a callable."""
_RESERVED = {
    "torchvision": ("weights", "weights_backbone", "pretrained", "progress", "num_classes"),
    "timm": (
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "features_only",
        "num_classes",
    ),
}
"""Arguments that icdctl gives itself, or that would read other files."""
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_LONGEST_LABEL = 48
_NO_LINEAR_HEAD = f"leave out `{LINEAR_HEAD}`: a method without patches (`kd`, `dkd` or `nkd`) needs no such head"
_CACHE_HINT = (
    "the library's own cache is looked at first: fetch them on a machine with a network, and copy that cache "
    "(`TORCH_HOME`, `HF_HOME`)"
)

_typed: set[str] = set()
"""Packages whose callables the user named in this process."""


class UnavailableError(UsageError):
    """What builds the model is not installed here, or not allowed to run."""


@dataclass(frozen=True)
class Backbone:
    """The name of a model of another library, taken apart."""

    source: str
    """`torchvision`, `timm` or the module of a callable."""
    model: str
    """The library's name of the model, or the callable's."""
    arguments: Mapping[str, JsonValue] = field(default_factory=dict)
    """Keyword arguments for the library's builder, and `linear_head`."""

    def __str__(self) -> str:
        """The only spelling that is stored: arguments in alphabetical order."""
        given = f"({json.dumps(self.arguments, sort_keys=True)})" if self.arguments else ""
        return f"{self.source}:{self.model}{given}"

    @property
    def is_callable(self) -> bool:
        """Whether it is code of the user's, not a model of a known library."""
        return self.source not in _RESERVED

    @property
    def package(self) -> str:
        """The top-level package that is imported."""
        return self.source.partition(".")[0]

    @property
    def version(self) -> str | None:
        """The installed version of that package; None where it has none."""
        try:
            names = [self.package] if not self.is_callable else metadata.packages_distributions()[self.package]
            return metadata.version(names[0])
        except (metadata.PackageNotFoundError, KeyError):
            return None


def is_backbone(name: str) -> bool:
    """Whether a name has the form of a model of another library, or of a callable."""
    match = _NAME.fullmatch(name.strip())
    if match is None or match["source"] in _OTHER_PREFIXES:
        return False
    return match["source"].rpartition(".")[2] not in _FILE_ENDINGS


def parse(name: str) -> Backbone:
    """The parts of a name for which `is_backbone` holds; no library is imported.

    Raises:
        UsageError: its arguments are no JSON object, or one of them is not the user's to give.
    """
    match = _NAME.fullmatch(name.strip())
    assert match is not None
    source, model = match["source"], match["model"]
    arguments: object = {}
    if (match["arguments"] or "").strip():
        try:
            arguments = files.parse_json(match["arguments"])
        except ValueError as error:
            raise UsageError(
                f"the arguments of `{source}:{model}` are not JSON: {error}", hint=_arguments_hint()
            ) from error
    if not isinstance(arguments, dict):
        raise UsageError(f"the arguments of `{source}:{model}` are not a JSON object", hint=_arguments_hint())
    taken = [key for key in arguments if key in _RESERVED.get(source, ())]
    if taken:
        raise UsageError(
            f"`{taken[0]}` is not an argument that `{source}:{model}` takes here",
            hint="the data set gives the classes, `--pretrained` and `--init-weights` give the first weights",
        )
    return Backbone(source, model, arguments)


def _arguments_hint() -> str:
    return "keyword arguments stand in parentheses, in quotes of the shell: `'timm:resnet18({\"drop_rate\": 0.1})'`"


def allow_typed(name: object) -> None:
    """Allow the callables of a package, one of which a user typed, to be called by this process."""
    if isinstance(name, str) and is_backbone(name):
        _typed.add(parse(name).package)


def short_label(name: str) -> str:
    """A name in the characters of file names: `timm:resnet18({"drop_rate": 0.1})` is `timm_resnet18_drop_rate_0.1`."""
    if not is_backbone(name):
        return name
    label = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")
    if len(label) <= _LONGEST_LABEL:
        return label
    return f"{label[:_LONGEST_LABEL]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def check_available(backbone: Backbone) -> None:
    """Check that the library is installed and has the model.

    Raises:
        UsageError: it is not, or has not; the hint names what is near, or the command that installs it.
    """
    if backbone.is_callable:
        _callable(backbone)
    elif backbone.source == "timm":
        timm = _timm()
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


def load_pretrained(model: Adapted) -> str:
    """Give a model of torchvision or timm the library's own trained weights, all but a head for other classes.

    The library downloads them into its own cache, and takes them from there the next time.

    Returns:
        sha256 of the loaded weights, hex, as of a weights file.

    Raises:
        UsageError: the library has no weights for it, or they do not fit its arguments.
        ArtifactError: they can't be downloaded, or the file in the cache is broken.
    """
    backbone = parse(model.name)
    trained = _pretrained_state(backbone)
    prefix = "inner." if isinstance(model.inner, WithLinearHead) else ""
    own = model.inner.state_dict()
    taken: dict[str, Tensor] = {}
    for key, tensor in own.items():
        found = trained.get(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if found is not None and found.shape == tensor.shape:
            taken[key] = found
        elif key.rpartition(".")[0] != model.head_name:
            raise UsageError(
                f"the weights that {backbone.source} has for `{backbone.model}` do not fit `{backbone}`: `{key}` "
                "differs",
                hint="leave out the arguments that change its layers, or `--pretrained`",
            )
    model.inner.load_state_dict({**own, **taken})
    return hash_weights(trained)


def pretrained_sha256(name: str) -> str:
    """The hash that `load_pretrained` returns for a model; errors as there."""
    return hash_weights(_pretrained_state(parse(name)))


def has_pretrained(name: str) -> bool:
    """Whether `--pretrained` can be asked for: the weights of a callable are its own matter."""
    return is_backbone(name) and not parse(name).is_callable


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
        build = _timm().create_model
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


def _pretrained_state(backbone: Backbone) -> dict[str, Tensor]:
    """The trained weights of a library's model, with the library's own head."""
    check_available(backbone)
    try:
        with torch.random.fork_rng(devices=[]):
            module = _trained_timm(backbone) if backbone.source == "timm" else _trained_torchvision(backbone)
    except (URLError, OSError) as error:
        raise ArtifactError(
            f"the weights of `{backbone}` can't be downloaded by {backbone.source}: {error}", hint=_CACHE_HINT
        ) from error
    return module.state_dict()


def _trained_timm(backbone: Backbone) -> nn.Module:
    timm = _timm()
    config = timm.get_pretrained_cfg(backbone.model)
    if config is None or not config.has_weights:
        tags = [name for name in timm.list_models(f"{backbone.model.partition('.')[0]}.*", pretrained=True)]
        raise _without_weights(backbone, tags)
    arguments = {key: value for key, value in backbone.arguments.items() if key != LINEAR_HEAD}
    try:
        module = timm.create_model(backbone.model, pretrained=True, **arguments)
    except RuntimeError as error:
        raise _broken_weights(backbone, error) from error
    assert isinstance(module, nn.Module)
    return module


def _trained_torchvision(backbone: Backbone) -> nn.Module:
    from torchvision import models as zoo

    known = zoo.get_model_weights(backbone.model)
    if not list(known):
        raise _without_weights(backbone, [])
    arguments = {key: value for key, value in backbone.arguments.items() if key != LINEAR_HEAD}
    weights = known["DEFAULT"]
    _fetch(weights.url)
    try:
        module = zoo.get_model(backbone.model, weights=weights, progress=False, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _broken_weights(backbone, error) from error
    assert isinstance(module, nn.Module)
    return module


def _fetch(url: str) -> None:
    """Bring a file into torch's cache as torch does, and check that it is whole and holds tensors alone.

    torch puts the start of the hash into the file's name, compares it after a download and never again, and loads the
    file as a pickle, which may run code.

    Raises:
        OSError: it can't be downloaded.
        ArtifactError: it is broken, or holds more than tensors.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    stated = re.search(r"-([a-f0-9]{8,64})\.[^.]+$", path.name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), stated[1] if stated else None, progress=False)
        except RuntimeError as error:
            raise ArtifactError(
                f"`{url}` gives another file than its name states: {error}", hint="try again; the file was not kept"
            ) from error
    found = files.sha256_file(path)
    if stated is not None and not found.startswith(stated[1]):
        raise ArtifactError(
            f"`{path}` has sha256 {found[:12]}..., its name states {stated[1]}: it is broken or cut short",
            hint=f"delete `{path}`; the next run downloads it again",
        )
    read_weights(path)


def _broken_weights(backbone: Backbone, error: Exception) -> ArtifactError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ArtifactError(
        f"the weights that {backbone.source} has for `{backbone}` can't be loaded: {reason}",
        hint="a broken download: delete its file in the library's cache. Otherwise leave out the arguments that change "
        "the model's layers",
    )


def _without_weights(backbone: Backbone, tags: list[str]) -> UsageError:
    hint = f"name the weights too, e.g. `timm:{tags[0]}`" if tags else "leave out `--pretrained`"
    return UsageError(f"{backbone.source} has no trained weights for `{backbone.model}`", hint=hint)


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


def _timm() -> Any:
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
