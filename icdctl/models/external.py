"""Adapter that makes any torch module a `Classifier`: one forward pass finds its head and its last feature map.

Shapes: B images, K classes, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from icdctl.errors import IcdctlError, UsageError, is_out_of_memory
from icdctl.models.outputs import Classifier, Features, Outputs
from icdctl.models.weights import check_state

CUSTOM_MODEL = "custom"
"""The name, in configurations and weight files, of a custom module that the user passed as an nn.Module."""

_PROBE_IMAGES = 2
_TOLERANCE = 1e-4
_MUST_MAP = "a model must map [B, 3, H, W] to logits [B, K]"
_LINEAR_LAST = f"{_MUST_MAP}, with an `nn.Linear` last; `sdd_` and `cd_` methods need a global average before it"


class Adapted(Classifier):
    """A custom module that maps images [B, 3, H, W] to logits [B, K], with the outputs that distillation reads.

    Its head is the last linear layer that runs. Its feature map is the last four-dimensional tensor whose average over
    the image is the head's input. Losses on patches need such a map: only then are the logits of a region the head
    applied to the region's mean.
    """

    def __init__(self, inner: nn.Module, *, image_size: tuple[int, int]) -> None:
        """
        Args:
            inner: the module, trained or not; it is used, not copied.
            image_size: height and width of the images for the forward pass.

        Raises:
            UsageError: the module does not give logits for such images, or has no linear head.
        """
        super().__init__()
        self.inner = inner
        self._head_name, self._map_name, self.num_classes = _inspect(inner, image_size)
        self.name = type(inner).__name__

    @property
    def has_feature_map(self) -> bool:
        """Whether a feature map was found, which methods on patches need."""
        return self._map_name is not None

    @property
    def head(self) -> nn.Linear:
        """See `Classifier`."""
        layer = self.inner.get_submodule(self._head_name)
        assert isinstance(layer, nn.Linear)
        return layer

    def features(self, images: Tensor) -> Features:
        """See `Classifier`; there are no stages, since a custom module does not name them."""
        feature_map = self.outputs(images).feature_map
        return Features((), (), feature_map)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K]: the module's own forward pass, which an exporter can trace."""
        logits: Tensor = self.inner(images)
        return logits

    def outputs(self, images: Tensor) -> Outputs:
        """See `Classifier`; without a feature map in the module, `feature_map` is the head's input as [B, C, 1, 1]."""
        captured: dict[str, Tensor] = {}

        def keep_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured["pooled"] = inputs[0]

        def keep_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            captured["map"] = output

        handles = [self.head.register_forward_pre_hook(keep_input)]
        if self._map_name is not None:
            handles.append(self.inner.get_submodule(self._map_name).register_forward_hook(keep_output))
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
        pooled = captured["pooled"]
        return Outputs(logits, (), captured.get("map", pooled[:, :, None, None]), pooled)

    def conv_bn_pairs(self) -> list[tuple[str, str]]:
        """An empty list: which layers read a custom module's convolutions is not known."""
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
    if needs_patches and isinstance(classifier, Adapted) and not classifier.has_feature_map:
        raise UsageError(
            f"`{name}` has no feature map whose average its head reads, so there are no logits of single regions",
            hint="use a method without patches: `kd`, `dkd` or `nkd`; or end the module with a global average and an "
            "`nn.Linear`, and nothing after it",
        )
    return classifier


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


def _probed(module: nn.Module, image_size: tuple[int, int]) -> object:
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
        raise UsageError(
            f"`{type(module).__name__}` fails on images of {image_size[0]} x {image_size[1]}: {error}", hint=_MUST_MAP
        ) from error
    finally:
        module.train(was_training)


def _inspect(inner: nn.Module, image_size: tuple[int, int]) -> tuple[str, str | None, int]:
    """Names of the head and of the feature map (None without one), and K, from one forward pass in eval mode."""
    linear: list[tuple[str, Tensor, Tensor]] = []
    maps: list[tuple[str, Tensor]] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def see(layer: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            if isinstance(layer, nn.Linear) and isinstance(output, Tensor) and output.dim() == 2:
                linear.append((name, inputs[0], output))
            elif isinstance(output, Tensor) and output.dim() == 4 and not linear:
                maps.append((name, output))

        handles.append(module.register_forward_hook(see))

    for name, module in inner.named_modules():
        if name:
            watch(name, module)
    try:
        with torch.no_grad():
            output = _probed(inner, image_size)
    finally:
        for handle in handles:
            handle.remove()
    logits = check_logits(type(inner).__name__, output)
    if not linear:
        raise UsageError(f"no `nn.Linear` of `{type(inner).__name__}` gives its logits", hint=_LINEAR_LAST)
    head_name, pooled, last = linear[-1]
    # What follows the head, such as a sigmoid, would be missing in the logits of single regions.
    is_last = last.shape == logits.shape and torch.allclose(last, logits, rtol=_TOLERANCE, atol=_TOLERANCE)
    return head_name, _map_of(pooled, maps) if is_last else None, logits.shape[1]


def _map_of(pooled: Tensor, maps: list[tuple[str, Tensor]]) -> str | None:
    """Name of the last map larger than 1 x 1 whose average is the head's input; None without one."""
    for name, candidate in reversed(maps):
        fits = candidate.shape[:2] == pooled.shape and candidate.shape[2] * candidate.shape[3] > 1
        if fits and torch.allclose(candidate.mean(dim=(2, 3)), pooled, rtol=_TOLERANCE, atol=_TOLERANCE):
            return name
    return None
