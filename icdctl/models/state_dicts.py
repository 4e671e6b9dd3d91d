"""The state_dict in a checkpoint of any program, and its keys without what wrappers of the model added.

A checkpoint holds one model's tensors, alone or among the other things of a training run, under a key of any name.
DataParallel, torch.compile, AveragedModel and Lightning put prefixes before the keys, profilers add counters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from icdctl.errors import ArtifactError

SAVE_HINT = "save it again as `model.state_dict()`, with the program that made it; icdctl never runs code from a file"

_USUAL = ("model", "state_dict", "model_state_dict", "state_dict_model", "net", "network", "student", "weights")
"""Keys that hold the model beside other tensors, such as those of a loss."""
_AVERAGE = re.compile(r"ema|averag|swa|shadow")
_NO_MODEL = re.compile(r"optim|sched|scaler|rng")
_DEEPEST = 3
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_COUNTERS = {"total_ops", "total_params"}
_AVERAGED = "n_averaged"
_BATCHES = "num_batches_tracked"


@dataclass(frozen=True)
class FoundState:
    """The weights of one model in a checkpoint."""

    tensors: dict[str, Tensor]
    """The state_dict, with the keys that the model has without wrappers, in the file's order."""
    notes: tuple[str, ...]
    """What a user should know of the choice: other weights in the file, what was left out."""


def find_state(path: Path, loaded: object, *, part: str | None = None) -> FoundState:
    """Find the state_dict of the model, or of the student where there is a teacher too.

    Args:
        path: the file, for messages.
        loaded: what the file holds.
        part: the key, or keys joined by dots, of the state_dict in it; None for the only one.

    Raises:
        ArtifactError: there is none, or more than one; the message names them.
    """
    sets = _sets(loaded)
    if part is not None and part not in sets:
        known = f"; it holds {_listed(sets)}" if any(sets) else ""
        raise ArtifactError(f"`{path}` holds no weights under {quoted(part)}{known}", hint=SAVE_HINT)
    if part is None:
        if not sets:
            raise _no_weights(path, loaded)
        part = _chosen(path, sets)
    notes = []
    others = [name for name in sets if name != part]
    if others or _AVERAGE.search(part.lower()):
        beside = f"; it also holds {_listed(others)}" if others else ""
        notes.append(f"`{path}`: taken are the weights under {quoted(part)}{beside}")
    tensors, left_out = _unwrapped(sets[part])
    student = {key: tensor for key, tensor in tensors.items() if key.startswith("student.")}
    if student:  # of a distiller, with or without wrappers around it or around its student
        tensors, more = _unwrapped({key.removeprefix("student."): tensor for key, tensor in student.items()})
        left_out += more
    if left_out:
        notes.append(f"`{path}`: left out are counters that are no weights: {_listed(left_out)}")
    return FoundState(tensors, tuple(notes))


def split_part(path: Path | str) -> tuple[Path, str | None]:
    """The file and the key of a name like `checkpoint.pth:state_dict_ema`, which names one of several sets of weights.

    A path that exists, or that has no such ending, is a file as it is.
    """
    whole = Path(path)
    file, colon, part = str(path).rpartition(":")
    if not colon or not part or whole.exists() or not Path(file).is_file():
        return whole, None
    return Path(file), part


def plain_keys(keys: Iterable[str]) -> dict[str, str]:
    """Each key without what wrappers add -> the key itself; counters have no plain key."""
    held = {key: key for key in keys}
    while True:
        held = {plain: key for plain, key in held.items() if not _is_counter(plain)}
        shorter = {plain.replace("_orig_mod.", ""): key for plain, key in held.items()}
        prefix = next((each for each in _WRAPPERS if held and all(plain.startswith(each) for plain in held)), None)
        if len(shorter) == len(held) and shorter.keys() != held.keys():
            held = shorter
        elif prefix is not None:
            held = {plain.removeprefix(prefix): key for plain, key in held.items()}
        else:
            return held


def may_be_missing(key: str) -> bool:
    """Whether a checkpoint may lack this key: counters, and the batches that PyTorch 0.4.0 did not count yet."""
    return _is_counter(key) or key.rpartition(".")[2] == _BATCHES


def has_same_keys(own: Iterable[str], found: Iterable[str]) -> bool:
    """Whether a file has the plain keys of a model, but for those that may be missing."""
    ours, theirs = set(own), set(found)
    return theirs <= ours and all(may_be_missing(key) for key in ours - theirs)


def differences(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What keeps the tensors of a file from fitting a model, both with plain keys; empty where they fit.

    Args:
        own: the model's.
        found: the file's.
    """
    if not has_same_keys(own, found):
        missing = [f"`{key}` is missing" for key in own if key not in found and not may_be_missing(key)]
        return missing + [f"{quoted(key)} is not part of the model" for key in found if key not in own]
    problems = []
    # In the order of the model: a file of safetensors has its tensors in any order.
    for key, expected in own.items():
        tensor = found.get(key, expected)
        if tensor.shape != expected.shape:
            problems.append(f"`{key}` is {list(tensor.shape)}, expected {list(expected.shape)}")
        elif tensor.is_floating_point() != expected.is_floating_point() or tensor.is_complex():
            problems.append(f"`{key}` is {_kind(tensor)}, expected {_kind(expected)}")
    return problems


def quoted(key: object) -> str:
    """A key from an untrusted file, shortened and escaped so that a terminal can show it."""
    return f"`{str(key)[:80].encode('unicode_escape').decode('ascii')}`"


def _sets(loaded: object, depth: int = 0) -> dict[str, Mapping[str, Tensor]]:
    """Dotted key -> tensors, of all that may be a state_dict; the key of what was loaded itself is empty."""
    if not isinstance(loaded, Mapping):
        return {}
    if _is_state(loaded):
        return {"": loaded}
    found: dict[str, Mapping[str, Tensor]] = {}
    for key, value in loaded.items():
        if isinstance(key, str) and isinstance(value, Mapping) and not _NO_MODEL.search(key.lower()):
            inner = _sets(value, depth + 1) if depth < _DEEPEST else {}
            found |= {f"{key}.{name}".rstrip("."): each for name, each in inner.items()}
    return found


def _is_state(value: Mapping[object, object]) -> bool:
    return bool(value) and all(isinstance(key, str) and isinstance(each, Tensor) for key, each in value.items())


def _chosen(path: Path, sets: Mapping[str, Mapping[str, Tensor]]) -> str:
    """The only set of weights, or the one under a usual name where no average of it is there too."""
    averages = [name for name in sets if _AVERAGE.search(name.lower())]
    trained = [name for name in sets if name not in averages]
    usual = [name for name in trained if name.rpartition(".")[2] in _USUAL]
    candidates = averages + (usual or trained)
    if len(candidates) == 1:
        return candidates[0]
    raise ArtifactError(
        f"`{path}` holds several sets of weights: {_listed(candidates)}",
        hint=f"name one of them after a colon, e.g. `{path}:{candidates[0]}`",
    )


def _no_weights(path: Path, loaded: object) -> ArtifactError:
    if isinstance(loaded, Mapping):
        for wrapper in ("model", "state_dict"):
            if isinstance(loaded.get(wrapper), Mapping):
                loaded = loaded[wrapper]
                break
    if isinstance(loaded, Mapping):
        for key, value in loaded.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                named = f"{quoted(key)} is a {type(value).__name__}, not a tensor"
                return ArtifactError(f"`{path}` is not a state_dict: {named}", hint=SAVE_HINT)
    return ArtifactError(f"`{path}` holds no weights, only a {type(loaded).__name__}", hint=SAVE_HINT)


def _unwrapped(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state with plain keys, and the keys that were left out."""
    plain = plain_keys(state)
    kept = set(plain.values())
    return {new: state[key] for new, key in plain.items()}, [key for key in state if key not in kept]


def _is_counter(key: str) -> bool:
    return key == _AVERAGED or key.rpartition(".")[2] in _COUNTERS


def _listed(keys: Iterable[str], most: int = 4) -> str:
    names = [quoted(key) for key in keys]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
