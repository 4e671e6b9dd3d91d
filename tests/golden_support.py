"""Where the golden numbers lie, how their weights are made, and the count of what was compared.

`ICDCTL_GOLDEN` names another folder of the same format; the tests derive everything from what they find there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

FOLDER = Path(os.environ.get("ICDCTL_GOLDEN") or Path(__file__).parent / "golden")

_checked: Counter[str] = Counter()
_skipped: dict[str, Counter[str]] = {}


def read(name: str) -> dict[str, Any]:
    """A JSON file of the folder.

    Raises:
        FileNotFoundError: the folder, or the file in it, is missing. Without them nothing would be compared.
    """
    path = FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(
            f"golden data are missing: `{path}` does not exist (ICDCTL_GOLDEN names another folder)"
        )
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def read_arrays(name: str) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file of the folder."""
    with np.load(FOLDER / name) as arrays:
        return dict(arrays)


def record(section: str, *, checked: int = 0, skipped_rule: str | None = None, skipped: int = 1) -> None:
    """Count comparisons made in a section of the golden data, or ones left out and the rule that says so."""
    _checked[section] += checked
    if skipped_rule is not None:
        _skipped.setdefault(section, Counter())[skipped_rule] += skipped


def summary_lines() -> list[str]:
    """What was compared and what was not, one line a section and one a rule; for the end of the test run."""
    lines = []
    for section in sorted(_checked | {name: 0 for name in _skipped}):
        rules = _skipped.get(section, Counter())
        lines.append(f"golden {section}: {_checked[section]} checked, {sum(rules.values())} skipped")
        lines += [f"  skipped {count}: {rule}" for rule, count in sorted(rules.items())]
    return lines


def filled_value(key: str, shape: tuple[int, ...], *, fill_seed: int, gain: float) -> NDArray[Any]:
    """The golden value of one state_dict entry, from its key alone (README of the golden data, section 2)."""
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    rng = np.random.RandomState((zlib.crc32(key.encode("utf-8")) + fill_seed) % 2**32)
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        value = rng.uniform(0.5, 1.5, size=shape)
    elif leaf in ("running_mean", "bias"):
        value = 0.1 * rng.standard_normal(size=shape)
    else:
        assert leaf == "weight", key
        value = rng.standard_normal(size=shape) * math.sqrt(gain / math.prod(shape[1:]))
    return value.astype(np.float32)


def fill(model: nn.Module, *, fill_seed: int, gain: float) -> None:
    """Give every entry of the state_dict its golden value, in the model's dtype."""
    state = {
        key: torch.from_numpy(filled_value(key, tuple(tensor.shape), fill_seed=fill_seed, gain=gain))
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)


def normal_input(spec: dict[str, Any]) -> Tensor:
    """The float32 images of an entry: standard normal numbers from its seed."""
    values = np.random.RandomState(spec["seed"]).standard_normal(size=spec["shape"]).astype(np.float32)
    if "sha256" in spec:
        assert hashlib.sha256(values.tobytes()).hexdigest() == spec["sha256"]
    return torch.from_numpy(values)


def scales_of(text: str) -> tuple[int, ...]:
    """(1, 2, 4) from "[1,2,4]" or from "train_step_sdd_124"."""
    return tuple(int(digit) for digit in re.findall(r"\d", text))


def assert_near(actual: Tensor, expected: NDArray[Any], *, tolerance: float, what: str) -> None:
    """Largest absolute error over max(1, largest magnitude) within the tolerance."""
    wanted = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    assert tuple(actual.shape) == tuple(wanted.shape), what
    error = (actual.detach().double() - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
    assert error <= tolerance, f"{what}: {error:.2e} is above {tolerance:.0e}"


def assert_summary(actual: Tensor, expected: dict[str, Any], *, tolerance: float, what: str) -> None:
    """A tensor against the shape, mean, deviation, magnitude and first values that the golden data keep of it."""
    values = actual.detach().double()
    assert list(values.shape) == expected["shape"], what
    room = tolerance * max(1.0, expected["abs_max"])
    found = {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "abs_max": values.abs().max().item(),
    }
    for name, number in found.items():
        assert abs(number - expected[name]) <= room, f"{what}: {name} is {number}, expected {expected[name]}"
    first = values.flatten()[: len(expected["first"])].tolist()
    for number, wanted in zip(first, expected["first"], strict=True):
        assert abs(number - wanted) <= room, f"{what}: {number}, expected {wanted}"
