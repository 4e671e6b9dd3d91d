"""Weight files: safetensors, and for reading also the .pth files of CRD, mdistiller and iCD.

Code in a file is never run. Only this module calls `torch.load`, always with `weights_only=True`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import types
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from icdctl.errors import ArtifactError, UsageError
from icdctl.files import LARGEST_FOREIGN_BYTES, parse_json, read_foreign, sha256_bytes, texts_in, write_bytes
from icdctl.files.pickles import PickleRefusedError
from icdctl.models.outputs import Classifier
from icdctl.models.pickles import check_pickles
from icdctl.models.state_dicts import (
    SAVE_HINT,
    differences,
    find_state,
    has_same_keys,
    plain_keys,
    quoted,
    split_part,
)

_METADATA_KEY = "icdctl"
_AGAIN_HINT = "download or copy it again from its source"
_PATHS = ("pathlib", "pathlib._local")
"""Modules of the classes of paths: before Python 3.13, and from then on."""


class DoesNotFitError(ArtifactError):
    """The weights in a file have other names or shapes than those of the model."""


class _Nothing:
    """Takes the place of built-in types, which a file may only name."""

    def __init__(self, *arguments: object) -> None:
        if arguments:
            raise ValueError("a built-in type is called")


def _plain_dict(factory: object = None) -> dict[object, object]:
    """Takes the place of a defaultdict, whose items torch would refuse to set."""
    return {}


# Checkpoints hold more than tensors: the options of the run, its folder, NumPy numbers (the best accuracy), whose
# constructor had another module name in NumPy 1. Rebuilding anything in this list runs no code from the file: paths
# and the factories of a defaultdict become objects that do nothing.
_numpy_scalar = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    (_plain_dict, "collections.defaultdict"),
    *[(PurePosixPath, f"{module}.{name}") for module in _PATHS for name in ("PosixPath", "PurePosixPath")],
    *[(PureWindowsPath, f"{module}.{name}") for module in _PATHS for name in ("WindowsPath", "PureWindowsPath")],
    *[(_Nothing, f"builtins.{name}") for name in ("bool", "dict", "float", "int", "list", "set", "str", "tuple")],
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *[type(np.dtype(kind)) for kind in ("?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d")],
]


@dataclass(frozen=True)
class Weights:
    """The content of a weight file."""

    tensors: dict[str, Tensor]
    """The state_dict of one model, in the file's order, on the CPU, with the file's dtypes."""
    metadata: dict[str, Any]
    """The metadata that `save_weights` was given, a JSON object; empty for files of other programs."""
    sha256: str
    """Hash of the whole file; for `FILE:KEY`, of that hash and the key."""
    format: str
    """The file's format: "safetensors" or "pickle"."""
    notes: tuple[str, ...] = ()
    """What a user should know of how it was read: other weights in the file, what was left out, a new head."""
    head_is_new: bool = False
    """Whether `load_weights` left the model's head as it was, since the file's has another number of classes."""


def read_weights(path: Path | str) -> Weights:
    """Read the tensors of a weight file; the content decides the format, not the file's name.

    A checkpoint of a training run gives its model, under whatever key, one of a whole distiller its student; prefixes
    of wrappers (`module.`, `_orig_mod.`, `model.`) are removed. Where it holds several sets of weights, such as those
    of an EMA too, `FILE:KEY` names one. No code in the file is run, and files of more than 2 GiB are refused.

    Raises:
        ArtifactError: the file is missing, broken, unsafe, or holds no weights, or several that are not told apart.
    """
    path = Path(path)
    file, part = split_part(path)
    content = read_foreign(file, what="weight file", example="student.safetensors", again=_AGAIN_HINT)
    loaded: object
    if content[8:9] == b"{":
        loaded, metadata = _read_safetensors(file, content)
        file_format = "safetensors"
    else:
        loaded, metadata = _read_pickle(file, content), {}
        file_format = "pickle"
    found = find_state(file, loaded, part=part)
    _check_tensors(file, found.tensors)
    return Weights(found.tensors, metadata, hash_of_part(sha256_bytes(content), part), file_format, found.notes)


def hash_of_part(sha256: str, part: str | None) -> str:
    """The hash that stands for a set of weights in a file with that hash: the file's, unless the set is named."""
    return sha256 if part is None else sha256_bytes(f"{sha256} {part}".encode("utf-8", "surrogateescape"))


def load_weights(model: nn.Module, path: Path | str, *, head: nn.Linear | None = None) -> Weights:
    """Copy the weights of a file into `model`, all of them or none.

    Keys, shapes and number types are compared before anything is copied; half precision is cast to the model's dtype.
    Counters of batches that a file does not have stay as they are.

    Args:
        model: the model.
        path: the file, or `FILE:KEY`.
        head: the layer of the model that stays as it is where the file has another number of classes; by default such
            a file is refused.

    Returns:
        The file's content, with its metadata and hash.

    Raises:
        ArtifactError: as for `read_weights`; or the weights don't fit the model or are not finite. The model is then
            unchanged.
    """
    weights = read_weights(path)
    own = model.state_dict()
    left = [] if head is None else _keys_of_other_head(model, head, weights.tensors)
    loaded = {key: tensor for key, tensor in weights.tensors.items() if key not in left}
    if head is not None and left:
        classes = f"the file has {weights.tensors[left[0]].shape[0]} classes, the data set {head.out_features}"
        note = f"`{path}`: all but the head is taken, which is new: {classes}"
        weights = replace(weights, notes=(*weights.notes, note), head_is_new=True)
    names = _fitted(model, own, loaded, Path(path), without=left)
    cast = {name: loaded[key].to(own[name].dtype) for name, key in names.items()}
    for key, tensor in cast.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(
                f"weights in `{path}` are not finite: `{key}` holds NaN or infinity",
                hint="the training run that wrote them diverged; take an earlier checkpoint",
            )
    model.load_state_dict({**own, **cast})
    return weights


def save_weights(path: Path | str, model: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, object]) -> str:
    """Write a safetensors file atomically; equal content gives equal bytes.

    Floating point numbers are written as float32, others in their own dtype.

    Args:
        path: the file; its folder is created.
        model: a module or its state_dict.
        metadata: a JSON object. It goes into one key, `icdctl`: with two or more keys, their order, and so the bytes,
            would vary from run to run.

    Returns:
        sha256 of the file, hex.

    Raises:
        UsageError: the state_dict holds more than tensors.
        ArtifactError: the file can't be written.
    """
    content = _content(model, metadata)
    write_bytes(Path(path), content)
    return sha256_bytes(content)


def hash_weights(model: nn.Module | Mapping[str, Tensor]) -> str:
    """sha256, hex, of the file that `save_weights` would write for a module, or its state_dict, without metadata."""
    return sha256_bytes(_content(model, {}))


def check_state(state: Mapping[str, object]) -> None:
    """Check that a state_dict can be written to a weights file.

    Raises:
        UsageError: it holds more than tensors.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"`{key}` of the module's state is a {type(value).__name__}, expected tensors alone",
                hint="keep everything but tensors out of its state_dict (`get_extra_state`)",
            )


def _content(model: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    check_state(state)
    tensors = {}
    for key, tensor in state.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        # Cloned, because safetensors refuses tensors that share memory.
        tensors[key] = tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
    text = json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    return safetensors.torch.save(tensors, {_METADATA_KEY: text})


def _read_safetensors(path: Path, content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"`{path}` is not a complete safetensors file: {error}", hint=_AGAIN_HINT) from error
    try:
        metadata = parse_json(texts_in(content).get(_METADATA_KEY, "{}"))
    except ValueError as error:
        raise ArtifactError(f"metadata `icdctl` of `{path}` is not sound: {error}", hint=_AGAIN_HINT) from error
    if not isinstance(metadata, dict):
        raise ArtifactError(f"metadata `icdctl` of `{path}` is not a JSON object", hint=_AGAIN_HINT)
    return tensors, metadata


def _read_pickle(path: Path, content: bytes) -> object:
    """The object in a file of `torch.save`, made of allowed types only."""
    if not content.startswith((b"PK", b"\x80")):
        raise ArtifactError(
            f"`{path}` is neither a safetensors file nor a file of torch.save",
            hint="weight files end in .safetensors, .pth or .pt; if this should be one, the download is broken",
        )
    try:
        check_pickles(content)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual files; this module checks what matters
            loaded: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            return loaded
    except PickleRefusedError as error:
        raise _refused(path, str(error)) from error
    except zipfile.BadZipFile as error:
        raise ArtifactError(f"`{path}` is broken or cut short: {error}", hint=_AGAIN_HINT) from error
    except Exception as error:  # broken files raise anything from EOFError to KeyError
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        if culprit:
            raise _refused(path, f"it asks for `{culprit[1]}`, which is more than plain tensors") from error
        if "WeightsUnpickler" in str(error) or "Weights only load failed" in str(error):
            raise _refused(path, "it holds more than plain tensors") from error
        raise ArtifactError(
            f"`{path}` is broken, cut short or not made by torch.save: {type(error).__name__}", hint=_AGAIN_HINT
        ) from error


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that claim more memory than the file has: a small file can hold a view of 10^12 elements."""
    total = 0
    for key, tensor in state.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise _refused(path, f"{quoted(key)} is not a plain tensor")
        num_bytes = tensor.numel() * tensor.element_size()
        total += num_bytes
        if num_bytes > tensor.untyped_storage().nbytes():
            raise _refused(path, f"{quoted(key)} claims {num_bytes} bytes, more than the file holds for it")
    if total > LARGEST_FOREIGN_BYTES:
        raise _refused(path, "its tensors are larger than 2 GiB")


def _keys_of_other_head(model: nn.Module, head: nn.Linear, loaded: Mapping[str, Tensor]) -> list[str]:
    """The plain keys of a head, where the file's head differs from it in the number of classes alone."""
    keys = _keys_of(model, head)
    found = loaded[keys[0]].shape if keys[0] in loaded else ()
    differs = len(found) == 2 and found[1] == head.in_features and found[0] != head.out_features
    return keys if differs else []


def _keys_of(model: nn.Module, head: nn.Linear) -> list[str]:
    """The plain keys of a linear layer in a model: of its weight, and of its bias where it has one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = {name: key for key, name in plain_keys(model.state_dict()).items()}
    return [plain[names[id(each)]] for each in (head.weight, head.bias) if each is not None]


def _fitted(
    model: nn.Module, own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: Path, *, without: Collection[str]
) -> dict[str, str]:
    """The model's key -> the file's key, for all tensors to copy; the plain keys in `without` stay out of it."""
    names = {plain: name for plain, name in plain_keys(own).items() if plain not in without}
    plain = {key: own[name] for key, name in names.items()}
    problems = differences(plain, loaded)
    if problems:
        hint = "they belong to another model; check `--student` or `--teacher`"
        if has_same_keys(plain, loaded):
            hint = "check the model (`--student` or `--teacher`) and the `--dataset` that they were trained for"
            hint = _classes_hint(model, plain, loaded) or hint
        name = getattr(model, "name", "") or type(model).__name__
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DoesNotFitError(f"weights in `{path}` do not fit `{name}`: {problems[0]}{others}", hint=hint)
    return {names[key]: key for key in loaded}


def _classes_hint(model: nn.Module, own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str | None:
    """The hint where only the number of classes differs; None where more differs."""
    if not isinstance(model, Classifier):
        return None
    key = _keys_of(model, model.head)[0]
    if key not in own:
        return None
    found, expected = loaded[key].shape, own[key].shape
    if len(found) != 2 or found[0] == expected[0] or found[1] != expected[1]:
        return None
    dataset = {100: "cifar100", 200: "cub200"}.get(found[0])
    advice = f"pass `--dataset {dataset}`" if dataset else "pass the `--dataset` that they were trained on"
    return f"they were trained on {found[0]} classes; {advice}"


def _refused(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"`{path}` is refused: {reason}", hint=SAVE_HINT)
