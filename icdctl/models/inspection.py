"""What one forward pass through any torch module shows: its logits, its head, its last feature map and its stages.

Shapes: B images, K classes, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icdctl.errors import UsageError, is_out_of_memory

LINEAR_HEAD = "linear_head"
"""The argument that puts one linear layer in the place of all that another library has behind the global average."""
_PROBE_IMAGES = 2
_LOOKED_INTO = 2.5
"""Factor by which a module may shrink its map and still count as one stage, or as a part of one."""
_ONE_STAGE = 1.5
"""Factor between the sizes of two stages, at least."""
_TOLERANCE = 1e-4
MUST_MAP = "a model must map [B, 3, H, W] to logits [B, K]"
_LINEAR_LAST = f"{MUST_MAP}, with an `nn.Linear` last; `sdd_` and `cd_` methods need a global average before it"


def check_logits(name: str, logits: object) -> Tensor:
    """The output of a model, where it is logits.

    Args:
        name: the model, for messages.
        logits: what it gave for a batch.

    Raises:
        UsageError: it is no tensor, not [B, K], or it holds probabilities.
    """
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"`{name}` gives a {type(logits).__name__}, expected a tensor of logits [B, K]",
            hint="pass a module whose `forward` returns the logits alone, e.g. one that calls it and takes `[0]`",
        )
    if logits.dim() != 2 or not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise UsageError(f"`{name}` gives {kind} {list(logits.shape)}, expected logits [B, K]", hint=MUST_MAP)
    sums = logits.double().sum(dim=1)
    if logits.shape[0] and logits.min() >= 0 and bool(((sums - 1).abs() <= _TOLERANCE).all()):
        raise UsageError(
            f"`{name}` gives probabilities, each row of which sums to 1, expected logits",
            hint="leave out its softmax: losses and metrics compute it themselves",
        )
    return logits


def linear_head_hint(name: str) -> str:
    """How to get one linear layer behind a global average; empty for a module that is not built by its name."""
    if ":" not in name or LINEAR_HEAD in name:
        return ""
    return f'build it with the argument `{{"{LINEAR_HEAD}": true}}`: one linear layer behind a global average'


def probed(module: nn.Module, image_size: tuple[int, int], name: str = "", hint: str = MUST_MAP) -> object:
    """What a module gives for two images in eval mode.

    Raises:
        UsageError: it fails.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((_PROBE_IMAGES, 3, *image_size), generator=generator)
    was_training = module.training
    try:
        output: object = module.eval()(images.to(next(module.parameters(), images)))
        return output
    except Exception as error:  # a custom module can raise any exception
        if is_out_of_memory(error):
            raise
        size = f"{image_size[0]} x {image_size[1]}"
        raise UsageError(f"`{name or type(module).__name__}` fails on images of {size}: {error}", hint=hint) from error
    finally:
        module.train(was_training)


@dataclass(frozen=True)
class _Map:
    """A map that a module gives in one pass."""

    tensor: Tensor
    input_height: int | None
    """Height of the map that it reads; None where it reads no map."""


@dataclass(frozen=True)
class Found:
    """What one pass through a module shows."""

    head: str
    feature_map: str | None
    stages: tuple[str, ...]
    num_classes: int
    has_small_map: bool


def inspect_module(inner: nn.Module, image_size: tuple[int, int], label: str, hint: str) -> Found:
    """The names of head, feature map and stages, and K, from one pass in eval mode; arguments as for `Adapted`."""
    linear: list[tuple[str, Tensor, Tensor]] = []
    maps: dict[str, _Map] = {}
    """By the name of the module, in the order in which they end."""
    repeated: set[str] = set()
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def see(layer: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            if isinstance(layer, nn.Linear) and isinstance(output, Tensor) and output.dim() == 2:
                linear.append((name, inputs[0], output))
            elif isinstance(output, Tensor) and output.dim() == 4 and not linear:
                if maps.pop(name, None) is not None:
                    repeated.add(name)
                given = inputs[0] if inputs else None
                height = given.shape[2] if isinstance(given, Tensor) and given.dim() == 4 else None
                maps[name] = _Map(output, height)

        handles.append(module.register_forward_hook(see))

    for name, module in inner.named_modules():
        if name:
            watch(name, module)
    try:
        with torch.no_grad():
            output = probed(inner, image_size, label, hint)
    finally:
        for handle in handles:
            handle.remove()
    logits = check_logits(label, output)
    if not linear:
        raise UsageError(f"no `nn.Linear` of `{label}` gives its logits", hint=linear_head_hint(label) or _LINEAR_LAST)
    head_name, pooled, last = linear[-1]
    # What follows the head, such as a sigmoid, would be missing in the logits of single regions.
    is_last = last.shape == logits.shape and torch.allclose(last, logits, rtol=_TOLERANCE, atol=_TOLERANCE)
    averaged = [name for name, each in maps.items() if is_last and _averages_to(each.tensor, pooled)]
    with_regions = [name for name in averaged if maps[name].tensor.shape[2:].numel() > 1]
    once = {name: each for name, each in maps.items() if name not in repeated}
    return Found(
        head_name,
        with_regions[-1] if with_regions else None,
        _stages_of(once, image_size),
        logits.shape[1],
        has_small_map=bool(averaged) and not with_regions,
    )


def _averages_to(candidate: Tensor, pooled: Tensor) -> bool:
    """Whether the average of a map over the image is the head's input."""
    if candidate.shape[:2] != pooled.shape:
        return False
    return torch.allclose(candidate.mean(dim=(2, 3)), pooled, rtol=_TOLERANCE, atol=_TOLERANCE)


def _stages_of(maps: Mapping[str, _Map], image_size: tuple[int, int]) -> tuple[str, ...]:
    """The modules whose outputs are the stages: the last output of each size, the sizes falling.

    A module that shrinks its map to less than half is looked into, any other one counts as a whole: inside of it,
    the first convolution of a block may still run at the size of the stage before. Sizes less than a third apart are
    one stage, as convolutions without padding make them. A single pixel is no stage, because squeezed channels and
    global averages look like it.

    Args:
        maps: the maps of modules that run once in a pass, in the order in which they end.
        image_size: height and width; a map of another shape is none of the image, such as one with channels last.
    """
    height, width = image_size
    rounding = 0 if height == width else max(height, width)
    shaped = {
        name: each
        for name, each in maps.items()
        if len(each.tensor) == _PROBE_IMAGES
        and abs(each.tensor.shape[2] * width - each.tensor.shape[3] * height) <= rounding
    }
    units: set[str] = set()
    for name in sorted(shaped, key=lambda name: name.count(".")):
        parts = name.split(".")
        if any(".".join(parts[:depth]) in units for depth in range(1, len(parts))):
            continue
        given, own = shaped[name].input_height, shaped[name].tensor.shape[2]
        shrinks = given is None or given > _LOOKED_INTO * own
        if not shrinks or not any(other.startswith(f"{name}.") for other in shaped):
            units.add(name)
    stages: list[str] = []
    side = height * _ONE_STAGE + 1
    for name, each in shaped.items():
        own = each.tensor.shape[2]
        if name not in units or own == 1:
            continue
        if own * _ONE_STAGE <= side:
            stages.append(name)
            side = own
        elif own <= side:
            stages[-1], side = name, own
    return tuple(stages)
