"""Trained weights that torchvision and timm have for their models, from the library's own cache or by its download."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from icdctl import files
from icdctl.errors import ArtifactError, UsageError
from icdctl.models.backbone_names import Backbone, parse
from icdctl.models.backbones import WithLinearHead, check_available, timm_package
from icdctl.models.external import Adapted
from icdctl.models.inspection import LINEAR_HEAD
from icdctl.models.weights import hash_weights, read_weights

_CACHE_HINT = (
    "the library's own cache is looked at first: fetch them on a machine with a network, and copy that cache "
    "(`TORCH_HOME`, `HF_HOME`)"
)


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
    timm = timm_package()
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
