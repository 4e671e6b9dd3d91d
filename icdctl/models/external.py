"""Adapter that makes any torch module a `Classifier`: one forward pass finds its head and its last feature map.

Shapes: B images, K classes, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icdctl.errors import IcdctlError, UsageError, is_out_of_memory
from icdctl.models.outputs import Classifier, Features, Outputs
from icdctl.models.weights import check_state

CUSTOM_MODEL = "custom"
"""The name, in configurations and weight files, of a custom module that the user passed as an nn.Module."""

LINEAR_HEAD = "linear_head"
"""The argument that puts one linear layer in the place of all that another library has behind the global average."""

_PROBE_IMAGES = 2
_LOOKED_INTO = 2.5
"""Factor by which a module may shrink its map and still count as one stage, or as a part of one."""
_ONE_STAGE = 1.5
"""Factor between the sizes of two stages, at least."""
_TOLERANCE = 1e-4
_MUST_MAP = "a model must map [B, 3, H, W] to logits [B, K]"
_END_SO = "end the module with a global average and an `nn.Linear`, and nothing after it"
_LINEAR_LAST = f"{_MUST_MAP}, with an `nn.Linear` last; `sdd_` and `cd_` methods need a global average before it"


class Adapted(Classifier):
    """A module of the user's or of another library that maps images [B, 3, H, W] to logits [B, K], with the outputs
    that distillation reads.

    Its head is the last linear layer that runs. Its feature map is the last four-dimensional tensor whose average over
    the image is the head's input. Losses on patches need such a map: only then are the logits of a region the head
    applied to the region's mean. Its stages are found by their size, see `_stages_of`.
    """

    def __init__(self, inner: nn.Module, *, image_size: tuple[int, int], name: str = "", hint: str = "") -> None:
        """
        Args:
            inner: the module, trained or not; it is used, not copied.
            image_size: height and width of the images for the forward pass.
            name: its name in messages and files; by default that of its class.
            hint: what to do where it does not run on such images; by default what any module must do.

        Raises:
            UsageError: the module does not give logits for such images, or has no linear head.
        """
        super().__init__()
        self.inner = inner
        self.name = name or type(inner).__name__
        found = _inspect(inner, image_size, self.name, hint or _MUST_MAP)
        self.head_name = found.head
        """The name of its head among its modules."""
        self._map_name, self._stage_names = found.feature_map, found.stages
        self.has_small_map = found.has_small_map
        """Whether its only map is a single pixel for images of this size, so that larger ones would have regions."""
        self.num_classes = found.num_classes

    @property
    def has_feature_map(self) -> bool:
        """Whether a feature map was found, which methods on patches need."""
        return self._map_name is not None

    @property
    def num_stages(self) -> int:
        """Number of its stages; a transformer without a pyramid has one."""
        return len(self._stage_names)

    @property
    def head(self) -> nn.Linear:
        """See `Classifier`."""
        layer = self.inner.get_submodule(self.head_name)
        assert isinstance(layer, nn.Linear)
        return layer

    def replace_head(self, num_classes: int) -> None:
        """Put a new head with random weights in the place of the old one."""
        old = self.head
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
        parent, _, child = self.head_name.rpartition(".")
        setattr(self.inner.get_submodule(parent), child, new)
        self.num_classes = num_classes

    def features(self, images: Tensor) -> Features:
        """See `Classifier`; there are no pre-activations, since the module does not name them."""
        outputs = self.outputs(images)
        return Features(outputs.stages, (), outputs.feature_map)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]: the module's own forward pass, which an exporter can trace."""
        logits: Tensor = self.inner(images)
        return logits

    def outputs(self, images: Tensor) -> Outputs:
        """See `Classifier`; without a feature map in the module, `feature_map` is the head's input as [B, C, 1, 1]."""
        captured: dict[str, Tensor] = {}

        def keep_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured[""] = inputs[0]

        def keep_output(name: str, module: nn.Module) -> Any:
            def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                captured[name] = output

            return module.register_forward_hook(keep)

        watched = {*self._stage_names, *([] if self._map_name is None else [self._map_name])}
        handles = [self.head.register_forward_pre_hook(keep_input)]
        handles += [keep_output(name, self.inner.get_submodule(name)) for name in sorted(watched)]
        try:
            logits = self.inner(images)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(logits, Tensor):  # some modules give more than logits, but only in training mode
            raise UsageError(
                f"`{self.name}` gives a {type(logits).__name__} in training mode, expected logits [B, K]",
                hint="build it without auxiliary heads, e.g. `aux_logits=False` for torchvision's models",
            )
        missing = next((name for name in sorted(watched) if name not in captured), None)
        if missing is not None:
            raise UsageError(
                f"`{missing}` of `{self.name}` runs in eval mode and not in training mode",
                hint="pass a module that runs the same layers in both modes",
            )
        pooled = captured[""]
        feature_map = pooled[:, :, None, None] if self._map_name is None else captured[self._map_name]
        return Outputs(logits, tuple(captured[name] for name in self._stage_names), feature_map, pooled)

    def conv_bn_pairs(self) -> list[tuple[str, str]]:
        """An empty list: which layers read the module's convolutions is not known, so nothing is folded."""
        return []


def without_adapter(model: Classifier) -> nn.Module:
    """The custom module inside an adapter, whose own keys name the weights in files; any other model unchanged."""
    return model.inner if isinstance(model, Adapted) else model


def check_module(module: nn.Module) -> None:
    """Check that a module can be a teacher or a student, before its images are known and before it is hashed.

    Raises:
        UsageError: as for `check_weights`; its state holds more than tensors, or its layers can't be watched.
    """
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError(
            f"`{name}` is a TorchScript module, whose layers can't be watched",
            hint="pass the module that it was made from",
        )
    check_weights(module)
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_inference():
            raise UsageError(
                f"`{key}` of `{name}` was made in inference mode, so that nothing can be learned with it",
                hint="build the module outside `torch.inference_mode()`",
            )
    check_state(module.state_dict())


def check_weights(module: nn.Module) -> None:
    """Check that a module has weights, in float32.

    Raises:
        UsageError: a lazy layer has no size yet, it is on the device `meta`, or its weights are of another type.
    """
    name = type(module).__name__
    held: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    for key, tensor in held:
        if nn.parameter.is_lazy(tensor):
            raise UsageError(
                f"`{key}` of `{name}` has no size yet: its layer is lazy",
                hint="run the module once on images before it is passed: `module(torch.zeros(2, 3, 32, 32))`",
            )
        if tensor.is_meta:
            raise UsageError(
                f"`{key}` of `{name}` has no values: it is on the device `meta`", hint="load its weights first"
            )
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float32:
            raise UsageError(
                f"`{key}` of `{name}` is {str(tensor.dtype).removeprefix('torch.')}, expected float32",
                hint="pass `module.float()`; `--precision bf16` and `--teacher-precision half` decide what is computed",
            )


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
        raise UsageError(f"`{name}` gives {kind} {list(logits.shape)}, expected logits [B, K]", hint=_MUST_MAP)
    sums = logits.double().sum(dim=1)
    if logits.shape[0] and logits.min() >= 0 and bool(((sums - 1).abs() <= _TOLERANCE).all()):
        raise UsageError(
            f"`{name}` gives probabilities, each row of which sums to 1, expected logits",
            hint="leave out its softmax: losses and metrics compute it themselves",
        )
    return logits


@contextmanager
def module_errors_reported() -> Iterator[None]:
    """Raise a UsageError in place of what a custom module's own code raises, which stays its cause."""
    try:
        yield
    except Exception as error:
        name = None if isinstance(error, IcdctlError) or is_out_of_memory(error) else _failed_module(error)
        if name is None:
            raise
        raise UsageError(
            f"`{name}` fails: {type(error).__name__}: {error}",
            hint=f"{_MUST_MAP}, in training mode too; the exception's cause shows where it fails",
        ) from error


def _failed_module(error: Exception) -> str | None:
    """Name of the custom module whose code raised an exception; None where other code did."""
    calls = {Adapted.outputs.__code__, Adapted.forward.__code__}
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_code in calls and place.tb_next is not None:
            return str(place.tb_frame.f_locals["self"].name)
        place = place.tb_next
    return None


def adapt(
    module: nn.Module, *, image_size: tuple[int, int], num_classes: int, needs_patches: bool, is_trained: bool = False
) -> Classifier:
    """The module itself where it is a `Classifier`, else the module in an adapter.

    Args:
        module: maps images [B, 3, H, W] to logits [B, K].
        image_size: height and width of its images.
        num_classes: the K that its logits must have.
        needs_patches: whether the method reads patch logits.
        is_trained: whether it is the student.

    Raises:
        UsageError: as for `check_module`; it gives no logits of this K from a linear head; it is the student, and
            nothing of it can be trained; or it has no feature map and patches are needed.
    """
    check_module(module)
    classifier = module if isinstance(module, Classifier) else Adapted(module, image_size=image_size)
    if is_trained:
        _check_trainable(module, image_size)
    name = type(module).__name__
    if classifier.head.out_features != num_classes:
        raise UsageError(
            f"`{name}` gives {classifier.head.out_features} logits, the data set has {num_classes} classes",
            hint=f"build it with {num_classes} classes",
        )
    if needs_patches:
        check_patches(classifier)
    return classifier


def check_patches(model: Classifier) -> None:
    """Check that a model has logits of single regions: that its head and the average over the image can change places.

    Raises:
        UsageError: it has none.
    """
    if not isinstance(model, Adapted) or model.has_feature_map:
        return
    if model.has_small_map:
        raise UsageError(
            f"the last feature map of `{model.name}` is a single pixel for these images: it has no regions",
            hint="larger images: `--image-size 64` or more; or a method without patches: `kd`, `dkd` or `nkd`",
        )
    linear = _linear_head_hint(model.name) if model.num_stages > 1 else ""
    raise UsageError(
        f"`{model.name}` has no feature map whose average its head reads, so there are no logits of single regions",
        hint=f"use a method without patches: `kd`, `dkd` or `nkd`; or {linear or _END_SO}",
    )


def _linear_head_hint(name: str) -> str:
    """How to get one linear layer behind a global average; empty for a module that is not built by its name."""
    if ":" not in name or LINEAR_HEAD in name:
        return ""
    return f'build it with the argument `{{"{LINEAR_HEAD}": true}}`: one linear layer behind a global average'


def _check_trainable(module: nn.Module, image_size: tuple[int, int]) -> None:
    name = type(module).__name__
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError(
            f"nothing of `{name}` can be trained: all of its parameters are frozen",
            hint="`module.requires_grad_(True)` first, or pass it as the teacher",
        )
    with torch.enable_grad():
        logits = _probed(module, image_size)
    if isinstance(logits, Tensor) and not logits.requires_grad:
        raise UsageError(
            f"nothing of `{name}` can be trained: no gradient reaches its parameters",
            hint="leave out `detach`, `torch.no_grad` and the like in its `forward`",
        )


def _probed(module: nn.Module, image_size: tuple[int, int], name: str = "", hint: str = _MUST_MAP) -> object:
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
class _Found:
    """What one pass through a module shows."""

    head: str
    feature_map: str | None
    stages: tuple[str, ...]
    num_classes: int
    has_small_map: bool


def _inspect(inner: nn.Module, image_size: tuple[int, int], label: str, hint: str) -> _Found:
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
            output = _probed(inner, image_size, label, hint)
    finally:
        for handle in handles:
            handle.remove()
    logits = check_logits(label, output)
    if not linear:
        raise UsageError(f"no `nn.Linear` of `{label}` gives its logits", hint=_linear_head_hint(label) or _LINEAR_LAST)
    head_name, pooled, last = linear[-1]
    # What follows the head, such as a sigmoid, would be missing in the logits of single regions.
    is_last = last.shape == logits.shape and torch.allclose(last, logits, rtol=_TOLERANCE, atol=_TOLERANCE)
    averaged = [name for name, each in maps.items() if is_last and _averages_to(each.tensor, pooled)]
    with_regions = [name for name in averaged if maps[name].tensor.shape[2:].numel() > 1]
    once = {name: each for name, each in maps.items() if name not in repeated}
    return _Found(
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
