"""Adapter that makes any torch module a `Classifier`: one forward pass finds its head and its last feature map.

Shapes: B images, K classes, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from icdctl.errors import UsageError
from icdctl.models.outputs import Classifier, Features, Outputs
from icdctl.models.weights import check_state

CUSTOM_MODEL = "custom"
"""The name, in configurations and weight files, of a custom module that the user passed as an nn.Module."""

_PROBE_IMAGES = 2
_TOLERANCE = 1e-4


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


def adapt(module: nn.Module, *, image_size: tuple[int, int], num_classes: int, needs_patches: bool) -> Classifier:
    """The module itself where it is a `Classifier`, else the module in an adapter.

    Args:
        module: maps images [B, 3, H, W] to logits [B, K].
        image_size: height and width of its images.
        num_classes: the K that its logits must have.
        needs_patches: whether the method reads patch logits.

    Raises:
        UsageError: its state holds more than tensors, K differs, or it has no feature map and patches are needed.
    """
    check_state(module.state_dict())
    classifier = module if isinstance(module, Classifier) else Adapted(module, image_size=image_size)
    name = type(module).__name__
    if classifier.head.out_features != num_classes:
        raise UsageError(
            f"`{name}` gives {classifier.head.out_features} logits, the data set has {num_classes} classes",
            hint=f"build it with {num_classes} classes",
        )
    if needs_patches and isinstance(classifier, Adapted) and not classifier.has_feature_map:
        raise UsageError(
            f"`{name}` has no feature map whose average its head reads, so there are no logits of single regions",
            hint="use a method without patches: `kd`, `dkd` or `nkd`",
        )
    return classifier


def _inspect(inner: nn.Module, image_size: tuple[int, int]) -> tuple[str, str | None, int]:
    """Names of the head and of the feature map (None without one), and K, from one forward pass in eval mode."""
    linear: list[tuple[str, Tensor]] = []
    maps: list[tuple[str, Tensor]] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def see(layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            if isinstance(layer, nn.Linear) and inputs[0].dim() == 2:
                linear.append((name, inputs[0]))
            elif isinstance(output, Tensor) and output.dim() == 4 and not linear:
                maps.append((name, output))

        handles.append(module.register_forward_hook(see))

    for name, module in inner.named_modules():
        if name:
            watch(name, module)
    parameter = next(inner.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((_PROBE_IMAGES, 3, *image_size), generator=generator).to(parameter)
    was_training = inner.training
    try:
        with torch.no_grad():
            logits = inner.eval()(images)
    except Exception as error:  # a custom module can raise any exception
        raise UsageError(
            f"`{type(inner).__name__}` fails on images of {image_size[0]} x {image_size[1]}: {error}",
            hint="a model must map [B, 3, H, W] to logits [B, K]",
        ) from error
    finally:
        inner.train(was_training)
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not linear:
        raise UsageError(
            f"`{type(inner).__name__}` gives no logits [B, K] from a linear head",
            hint="a model must map [B, 3, H, W] to logits [B, K], with an `nn.Linear` last",
        )
    head_name, pooled = linear[-1]
    return head_name, _map_of(pooled, maps), logits.shape[1]


def _map_of(pooled: Tensor, maps: list[tuple[str, Tensor]]) -> str | None:
    """Name of the last map larger than 1 x 1 whose average is the head's input; None without one."""
    for name, candidate in reversed(maps):
        fits = candidate.shape[:2] == pooled.shape and candidate.shape[2] * candidate.shape[3] > 1
        if fits and torch.allclose(candidate.mean(dim=(2, 3)), pooled, rtol=_TOLERANCE, atol=_TOLERANCE):
            return name
    return None
