"""The tensors that methods read of a model's pass, by name, and one reader of them for students and teachers.

Shapes: B images, K classes, C channels, H rows, W columns.

| name | tensor |
|---|---|
| `logits` | [B, K], before softmax |
| `regions` | [B, K, 4, 4], the logits of the regions of the 4 x 4 grid; those of coarser patches follow from them |
| `regions.S` | [B, K, S, S], the same of an S x S grid that 4 x 4 regions can't give, e.g. 3 x 3 |
| `class_maps` | [B, K, 4, 4], the same regions' logits without the classifier's bias: class activation maps |
| `pooled` | [B, C], what the head reads |
| `feature_map` | [B, C, H, W], whose average over the image is `pooled` |
| `stages.I` | [B, C, H, W], the output of stage I; 0 is the stem |
| `preactivations.I` | [B, C, H, W], the same before its last ReLU |
| `image_numbers` | [B] int64, which training images the rows are; the engine gives them, with the student's tensors |

Stages are counted from the stem, or from the last one: `stages.-1` is the deepest. `stages.*` and `preactivations.*`
stand for all stages after the stem, however many a model has; each is then read under its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from icdctl.errors import UsageError
from icdctl.methods.patch import FINEST, SCALES, region_logits

LOGITS = "logits"
REGIONS = "regions"
CLASS_MAPS = "class_maps"
POOLED = "pooled"
FEATURE_MAP = "feature_map"
IMAGE_NUMBERS = "image_numbers"
STAGES = "stages.*"
PREACTIVATIONS = "preactivations.*"
SMALL_READS = frozenset({LOGITS, REGIONS, CLASS_MAPS, POOLED})
"""Tensors whose size does not grow with the image: a teacher's answers of these can be kept for every view."""


def stage(index: int) -> str:
    """The name of a stage's output."""
    return f"stages.{index}"


def regions_of(scale: int) -> str:
    """The name of the logits of a grid's regions."""
    return REGIONS if scale in SCALES else f"{REGIONS}.{scale}"


def preactivation(index: int) -> str:
    """The name of a stage's output before its last ReLU."""
    return f"preactivations.{index}"


class PassOutputs(Protocol):
    """One pass through a model; `icdctl.models.Outputs` has these properties."""

    @property
    def logits(self) -> Tensor:
        """[B, K]."""

    @property
    def pooled(self) -> Tensor:
        """[B, C]."""

    @property
    def feature_map(self) -> Tensor:
        """[B, C, H, W]."""

    @property
    def stages(self) -> Sequence[Tensor]:
        """[B, C, H, W] each, shallow to deep."""

    @property
    def preactivations(self) -> Sequence[Tensor]:
        """[B, C, H, W] each, shallow to deep; empty for a model that has none."""


def read(outputs: PassOutputs, head: Callable[[Tensor], Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors of one pass, in the alphabetical order of their names.

    Args:
        outputs: the pass.
        head: the model's classifier, [N, C] -> [N, K].
        names: see the module's table.

    Raises:
        UsageError: the model has no such stage.
    """
    return {name: _tensor(outputs, head, name) for name in sorted(set(_single(outputs, names)))}


def _single(outputs: PassOutputs, names: Iterable[str]) -> list[str]:
    """The names, in their order, with those of single tensors in place of `stages.*` and `preactivations.*`."""
    found = []
    for name in names:
        group, _, index = name.partition(".")
        if index != "*":
            found.append(name)
            continue
        count = len(outputs.stages if group == "stages" else outputs.preactivations)
        if count < 2:
            raise _no_such(name, group, count)
        found += [f"{group}.{number}" for number in range(1, count)]
    return found


def _no_such(name: str, group: str, count: int) -> UsageError:
    return UsageError(
        f"the model has no `{name}`: it has {count} {group}",
        hint="choose a stage that it has, or a method that reads logits alone: `icdctl list methods`",
    )


def _tensor(outputs: PassOutputs, head: Callable[[Tensor], Tensor], name: str) -> Tensor:
    if name == REGIONS:
        return region_logits(outputs.feature_map, head)
    if name == CLASS_MAPS:
        # The bias is what the classifier says of nothing; its own gradient cancels out.
        bias = head(outputs.pooled.new_zeros(1, outputs.pooled.shape[1]))
        return region_logits(outputs.feature_map, head) - bias[:, :, None, None]
    if name in (LOGITS, POOLED, FEATURE_MAP):
        found: Tensor = getattr(outputs, name)
        return found
    group, _, index = name.partition(".")
    if group == REGIONS:
        return region_logits(outputs.feature_map, head, int(index))
    maps: Sequence[Tensor] = outputs.stages if group == "stages" else outputs.preactivations
    if not -len(maps) <= int(index) < len(maps):
        raise _no_such(name, group, len(maps))
    return maps[int(index)]


class ModelProbe:
    """A model that a method is built for: it gives the shape of each tensor that can be read."""

    def __init__(self, model: nn.Module, image_size: tuple[int, int]) -> None:
        """
        Args:
            model: an `icdctl.models.Classifier`; it is used, not copied.
            image_size: height and width of its images.
        """
        self.model = model
        self._image_size = image_size

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of one image, without the batch dimension.

        Raises:
            UsageError: the model has no such stage.
        """
        head = self._head
        if name in SMALL_READS:  # known without running the model
            num_classes, channels = head.out_features, head.in_features
            grid = (num_classes, FINEST, FINEST)
            return {LOGITS: (num_classes,), REGIONS: grid, CLASS_MAPS: grid, POOLED: (channels,)}[name]
        with self._named():
            return tuple(read(self._seen, head, (name,))[name].shape[1:])

    def names(self, names: Iterable[str]) -> list[str]:
        """The names, in their order, with those of single tensors in place of `stages.*` and `preactivations.*`.

        Raises:
            UsageError: the model has no stages after the stem.
        """
        names = list(names)
        if not any(name.endswith("*") for name in names):  # known without running the model
            return names
        with self._named():
            return _single(self._seen, names)

    def preactivation_norms(self) -> list[nn.BatchNorm2d]:
        """The batch norms whose outputs are the last pre-activations, shallow to deep; empty where half of a
        pre-activation does not come from one, and for a module from outside.
        """
        listed = getattr(self.model, "preactivation_norms", list)
        norms = [self.model.get_submodule(name) for name in listed()]
        return [norm for norm in norms if isinstance(norm, nn.BatchNorm2d)]

    @property
    def label(self) -> str:
        """The model's name, for messages."""
        return getattr(self.model, "name", "") or type(self.model).__name__

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors that say which model it is."""
        try:
            yield
        except UsageError as error:
            raise UsageError(error.message.replace("the model", f"`{self.label}`"), hint=error.hint) from error

    @property
    def _head(self) -> nn.Linear:
        head = self.model.head
        assert isinstance(head, nn.Linear)
        return head

    @cached_property
    def _seen(self) -> PassOutputs:
        """One pass on a black image, in eval mode: batch norms learn nothing from it."""
        parameter = next(self.model.parameters())
        image = torch.zeros((1, 3, *self._image_size), dtype=parameter.dtype, device=parameter.device)
        was_training = self.model.training
        try:
            with torch.no_grad():
                outputs: PassOutputs = self.model.eval().outputs(image)  # type: ignore[operator]  # of a Classifier
        finally:
            self.model.train(was_training)
        return outputs
