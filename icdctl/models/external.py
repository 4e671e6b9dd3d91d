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
from icdctl.models.inspection import MUST_MAP, inspect_module, linear_head_hint, probed
from icdctl.models.outputs import Classifier, Features, Outputs
from icdctl.models.weights import check_state

CUSTOM_MODEL = "custom"
"""The name, in configurations and weight files, of a custom module that the user passed as an nn.Module."""
_END_SO = "end the module with a global average and an `nn.Linear`, and nothing after it"


class Adapted(Classifier):
    """A module of the user's or of another library that maps images [B, 3, H, W] to logits [B, K], with the outputs
    that distillation reads.

    Its head is the last linear layer that runs. Its feature map is the last four-dimensional tensor whose average over
    the image is the head's input. Losses on patches need such a map: only then are the logits of a region the head
    applied to the region's mean. Its stages are found by their size, see `icdctl.models.inspection`.
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
        found = inspect_module(inner, image_size, self.name, hint or MUST_MAP)
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
            hint=f"{MUST_MAP}, in training mode too; the exception's cause shows where it fails",
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
    linear = linear_head_hint(model.name) if model.num_stages > 1 else ""
    raise UsageError(
        f"`{model.name}` has no feature map whose average its head reads, so there are no logits of single regions",
        hint=f"use a method without patches: `kd`, `dkd` or `nkd`; or {linear or _END_SO}",
    )


def _check_trainable(module: nn.Module, image_size: tuple[int, int]) -> None:
    name = type(module).__name__
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UsageError(
            f"nothing of `{name}` can be trained: all of its parameters are frozen",
            hint="`module.requires_grad_(True)` first, or pass it as the teacher",
        )
    with torch.enable_grad():
        logits = probed(module, image_size)
    if isinstance(logits, Tensor) and not logits.requires_grad:
        raise UsageError(
            f"nothing of `{name}` can be trained: no gradient reaches its parameters",
            hint="leave out `detach`, `torch.no_grad` and the like in its `forward`",
        )
