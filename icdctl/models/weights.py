"""Weight files: safetensors, and for reading also the .pth files of CRD, mdistiller and iCD.

Code in a file is never run. Only this module calls `torch.load`, always with `weights_only=True`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from icdctl.errors import ArtifactError, UsageError
from icdctl.files import LARGEST_FOREIGN_BYTES, parse_json, read_foreign, sha256_bytes, write_bytes
from icdctl.files.pickles import PickleRefusedError
from icdctl.models.outputs import Classifier
from icdctl.models.pickles import check_pickles

_METADATA_KEY = "icdctl"
_AGAIN_HINT = "download or copy it again from its source"
_SAVE_HINT = "save it again as `model.state_dict()`, with the program that made it; icdctl never runs code from a file"

# Old checkpoints hold more than tensors: the options of the run and a NumPy number (the best accuracy), whose
# constructor had another module name in NumPy 1. Rebuilding anything in this list runs no code from the file.
_numpy_scalar = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
]


@dataclass(frozen=True)
class Weights:
    """The content of a weight file."""

    tensors: dict[str, Tensor]
    """The state_dict of one model, in the file's order, on the CPU, with the file's dtypes."""
    metadata: dict[str, Any]
    """The metadata that `save_weights` was given, a JSON object; empty for files of other programs."""
    sha256: str
    """Hash of the whole file."""
    format: str
    """The file's format: "safetensors" or "pickle"."""


def read_weights(path: Path | str) -> Weights:
    """Read the tensors of a weight file; the content decides the format, not the file's name.

    A checkpoint of CRD or mdistiller gives its model (`["model"]`), one of a whole distiller its student; the prefixes
    `module.` and `student.` are removed. No code in the file is run, and files of more than 2 GiB are refused.

    Raises:
        ArtifactError: the file is missing, broken, unsafe, or holds no weights.
    """
    path = Path(path)
    content = read_foreign(path, what="weight file", example="student.safetensors", again=_AGAIN_HINT)
    loaded: object
    if content[8:9] == b"{":
        loaded, metadata = _read_safetensors(path, content)
        file_format = "safetensors"
    else:
        loaded, metadata = _read_pickle(path, content), {}
        file_format = "pickle"
    state = _student_state(path, loaded)
    _check_tensors(path, state)
    return Weights(state, metadata, sha256_bytes(content), file_format)


def load_weights(model: nn.Module, path: Path | str) -> Weights:
    """Copy the weights of a file into `model`, all of them or none.

    Keys, shapes and number types are compared before anything is copied; half precision is cast to the model's dtype.

    Returns:
        The file's content, with its metadata and hash.

    Raises:
        ArtifactError: as for `read_weights`; or the weights don't fit the model or are not finite. The model is then
            unchanged.
    """
    weights = read_weights(path)
    own = model.state_dict()
    _check_fit(model, own, weights.tensors, Path(path))
    cast = {key: tensor.to(own[key].dtype) for key, tensor in weights.tensors.items()}
    for key, tensor in cast.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(
                f"weights in `{path}` are not finite: `{key}` holds NaN or infinity",
                hint="the training run that wrote them diverged; take an earlier checkpoint",
            )
    model.load_state_dict(cast)
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


def hash_weights(model: nn.Module) -> str:
    """sha256, hex, of the file that `save_weights` would write for a module without metadata."""
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
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = parse_json((header.get("__metadata__") or {}).get(_METADATA_KEY, "{}"))
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


def _student_state(path: Path, loaded: object) -> dict[str, Tensor]:
    """The state_dict in what was loaded: that of the only model, or of the student where there is a teacher too."""
    state = loaded
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    if not isinstance(state, Mapping) or not state:
        raise ArtifactError(f"`{path}` holds no weights, only a {type(state).__name__}", hint=_SAVE_HINT)
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ArtifactError(
                f"`{path}` is not a state_dict: {_quoted(key)} is a {type(value).__name__}, not a tensor",
                hint=_SAVE_HINT,
            )
    # A distiller's state_dict, with or without DataParallel around it or around its student.
    state = _without_prefix(state, "module.")
    student = {key: tensor for key, tensor in state.items() if key.startswith("student.")}
    return _without_prefix(_without_prefix(student or state, "student."), "module.")


def _without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not all(key.startswith(prefix) for key in state):
        return dict(state)
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that claim more memory than the file has: a small file can hold a view of 10^12 elements."""
    total = 0
    for key, tensor in state.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise _refused(path, f"{_quoted(key)} is not a plain tensor")
        num_bytes = tensor.numel() * tensor.element_size()
        total += num_bytes
        if num_bytes > tensor.untyped_storage().nbytes():
            raise _refused(path, f"{_quoted(key)} claims {num_bytes} bytes, more than the file holds for it")
    if total > LARGEST_FOREIGN_BYTES:
        raise _refused(path, "its tensors are larger than 2 GiB")


def _check_fit(model: nn.Module, own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], path: Path) -> None:
    problems = [f"`{key}` is missing" for key in own if key not in loaded]
    problems += [f"{_quoted(key)} is not part of the model" for key in loaded if key not in own]
    hint = "they belong to another model; check `--student` or `--teacher`"
    if not problems:
        hint = "check the model (`--student` or `--teacher`) and the `--dataset` that they were trained for"
        for key, expected in own.items():
            found = loaded[key]
            if found.shape != expected.shape:
                problems.append(f"`{key}` is {list(found.shape)}, expected {list(expected.shape)}")
            elif found.is_floating_point() != expected.is_floating_point() or found.is_complex():
                problems.append(f"`{key}` is {_kind(found)}, expected {_kind(expected)}")
        hint = _classes_hint(model, own, loaded) or hint
    if problems:
        name = getattr(model, "name", "") or type(model).__name__
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(f"weights in `{path}` do not fit `{name}`: {problems[0]}{others}", hint=hint)


def _classes_hint(model: nn.Module, own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str | None:
    """The hint where only the number of classes differs; None where more differs."""
    if not isinstance(model, Classifier):
        return None
    key = next(name for name, parameter in model.named_parameters() if parameter is model.head.weight)
    found, expected = loaded[key].shape, own[key].shape
    if len(found) != 2 or found[0] == expected[0] or found[1] != expected[1]:
        return None
    dataset = {100: "cifar100", 200: "cub200"}.get(found[0])
    advice = f"pass `--dataset {dataset}`" if dataset else "pass the `--dataset` that they were trained on"
    return f"they were trained on {found[0]} classes; {advice}"


def _quoted(key: object) -> str:
    """A key from an untrusted file, shortened and escaped so that a terminal can show it."""
    return f"`{str(key)[:80].encode('unicode_escape').decode('ascii')}`"


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refused(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"`{path}` is refused: {reason}", hint=_SAVE_HINT)
