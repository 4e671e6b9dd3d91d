"""Comparisons of feature maps with parts of their own, which are trained with the student and thrown away after it.

A comparison is called with the student's tensors and as many of the teacher's, shallow to deep, and gives a scalar.
The names of parameters and buffers are those of the reference code. Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.errors import UsageError
from icdctl.methods.feature_losses import (
    boundary_loss,
    correlation_loss,
    factor_loss,
    hierarchical_context_loss,
    margin_loss,
    negative_means,
    to_one_size,
    variational_loss,
)

Shapes = Sequence[tuple[int, ...]]
"""Shapes of tensors without the batch: C, H, W of a map, C of pooled features."""

_ABOUND_SCALE = 3 / 1000
"""RepDistiller's factor of AB's loss."""
_VID_EPSILON = 1e-5
_SLOPE = 0.1
"""Slope of factor transfer's leaky ReLUs below 0."""


class Connector(nn.Module):
    """A convolution from the student's map to the size and width of the teacher's, batch norm and perhaps ReLU.

    The convolution halves, doubles or keeps the map, or trims it by its kernel, as in the reference code.
    """

    def __init__(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], *, relu: bool = True) -> None:
        """
        Args:
            student_shape: C, H, W.
            teacher_shape: C, H, W.
            relu: whether negative results become 0.

        Raises:
            UsageError: the student's map is smaller, and not by half.
        """
        super().__init__()
        self.conv = _convolution(student_shape, teacher_shape)
        self.bn = nn.BatchNorm2d(teacher_shape[0])
        self._relu = relu

    def forward(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] of the student -> [B, C, H, W] of the teacher."""
        found: Tensor = self.bn(self.conv(feature_map))
        return F.relu(found) if self._relu else found


def _convolution(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> nn.Conv2d | nn.ConvTranspose2d:
    channels, height, width = student_shape
    wanted_channels, wanted_height, wanted_width = teacher_shape
    if (height, width) == (2 * wanted_height, 2 * wanted_width):
        return nn.Conv2d(channels, wanted_channels, kernel_size=3, stride=2, padding=1)
    if (2 * height, 2 * width) == (wanted_height, wanted_width):
        return nn.ConvTranspose2d(channels, wanted_channels, kernel_size=4, stride=2, padding=1)
    if height >= wanted_height and width >= wanted_width:
        return nn.Conv2d(channels, wanted_channels, kernel_size=(1 + height - wanted_height, 1 + width - wanted_width))
    raise UsageError(
        f"the student's stage is {height} x {width} and the teacher's {wanted_height} x {wanted_width}: no connector "
        "of the reference leads from one to the other",
        hint="take another student or teacher; `fitnet` can imitate another stage: `--set hint_stage=1`",
    )


class Boundaries(nn.Module):
    """AB: `boundary_loss` of pre-activations, of half the weight at each stage further from the end.

    Maps of equal width and height need no connector; the others get one without ReLU.
    """

    def __init__(self, students: Shapes, teachers: Shapes, *, margin: float) -> None:
        """
        Args:
            students: C, H, W of each stage.
            teachers: as many.
            margin: see `boundary_loss`.

        Raises:
            UsageError: no connector leads from a student's stage to the teacher's.
        """
        super().__init__()
        self.connectors = nn.ModuleList(
            nn.Identity() if ours == theirs else Connector(ours, theirs, relu=False)
            for ours, theirs in zip(students, teachers, strict=True)
        )
        self._margin = margin

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The sum over the stages."""
        return torch.stack(self.losses(students, teachers)).sum()

    def losses(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> list[Tensor]:
        """Of each stage, with its weight and in RepDistiller's scale."""
        weights = _doubling(len(students))
        return [
            weight * _ABOUND_SCALE * boundary_loss(connector(student), teacher, margin=self._margin)
            for weight, connector, student, teacher in zip(weights, self.connectors, students, teachers, strict=True)
        ]


def _doubling(count: int) -> list[float]:
    """..., 1/4, 1/2, 1."""
    return [0.5**place for place in reversed(range(count))]


class Margins(nn.Module):
    """OFD: `margin_loss` of pre-activations, of half the weight at each stage further from the end."""

    def __init__(
        self, students: Shapes, teachers: Shapes, norms: Sequence[nn.BatchNorm2d], *, kernel_size: int
    ) -> None:
        """
        Args:
            students: C, H, W of each stage.
            teachers: as many.
            norms: as many of the teacher, whose outputs are its pre-activations.
            kernel_size: side of the connectors' kernel, an odd number.
        """
        super().__init__()
        self.connectors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(ours[0], theirs[0], kernel_size, padding=kernel_size // 2, bias=False),
                nn.BatchNorm2d(theirs[0]),
            )
            for ours, theirs in zip(students, teachers, strict=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = kernel_size**2 * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        for index, norm in enumerate(norms):
            margin = negative_means(norm.bias.detach(), norm.weight.detach().abs())
            self.register_buffer(f"margin{index}", margin.to(norm.weight.dtype))

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The sum over the stages."""
        losses = [
            weight * margin_loss(*to_one_size(connector(student), teacher), self.get_buffer(f"margin{index}"))
            for index, (weight, connector, student, teacher) in enumerate(
                zip(_doubling(len(students)), self.connectors, students, teachers, strict=True)
            )
        ]
        return torch.stack(losses).sum()


class Predictions(nn.Module):
    """VID: `variational_loss` of three 1 x 1 convolutions that predict the teacher's map, summed over the stages."""

    def __init__(self, students: Shapes, teachers: Shapes, *, initial_variance: float, learn_variance: bool) -> None:
        """
        Args:
            students: C, H, W of each stage.
            teachers: as many.
            initial_variance: of every channel, above 0.00001.
            learn_variance: whether variances are trained.
        """
        super().__init__()
        self.regressors = nn.ModuleList(
            _regressor(ours[0], theirs[0]) for ours, theirs in zip(students, teachers, strict=True)
        )
        spread = initial_variance - _VID_EPSILON
        start = spread + math.log(-math.expm1(-spread))  # the inverse of softplus
        self.log_scales = nn.ParameterList(
            nn.Parameter(torch.full((theirs[0],), start), requires_grad=learn_variance) for theirs in teachers
        )

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The sum over the stages."""
        losses = []
        for regressor, log_scale, student, teacher in zip(
            self.regressors, self.log_scales, students, teachers, strict=True
        ):
            ours, theirs = to_one_size(student, teacher)
            losses.append(variational_loss(regressor(ours), theirs, log_scale, epsilon=_VID_EPSILON))
        return torch.stack(losses).sum()


def _regressor(channels: int, wanted: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, wanted, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(wanted, wanted, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(wanted, wanted, 1, bias=False),
    )


class Embedding(nn.Module):
    """A linear layer on pooled features."""

    def __init__(self, width: int, wanted: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, wanted)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C] -> [B, D]."""
        embedded: Tensor = self.linear(features)
        return embedded


class Correlations(nn.Module):
    """CC: `correlation_loss` of both models' pooled features, through a linear layer each."""

    def __init__(self, students: Shapes, teachers: Shapes, *, width: int) -> None:
        """
        Args:
            students: C.
            teachers: C.
            width: of both layers' results.
        """
        super().__init__()
        self.embed_s, self.embed_t = Embedding(students[0][0], width), Embedding(teachers[0][0], width)

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """[B, C] of each model."""
        return correlation_loss(self.embed_s(students[0]), self.embed_t(teachers[0]))


class Factors(nn.Module):
    """FT: `factor_loss` of a translator of the student's deepest map and a paraphraser of the teacher's."""

    def __init__(self, students: Shapes, teachers: Shapes, *, ratio: float, power: int, distance_power: int) -> None:
        """
        Args:
            students: C, H, W.
            teachers: C, H, W.
            ratio: number of factors divided by that of the teacher's channels.
            power: see `factor_loss`.
            distance_power: see `factor_loss`.
        """
        super().__init__()
        channels = teachers[0][0]
        num_factors = max(int(channels * ratio), 1)
        self.translator = Translator(students[0][0], num_factors)
        self.paraphraser = Paraphraser(channels, num_factors)
        self._powers = {"power": power, "distance_power": distance_power}

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The distance of the factors, with no gradient to the paraphraser, and the paraphraser's own error."""
        factors = self.paraphraser.encoder(teachers[0])
        distance = factor_loss(self.translator(students[0]), factors.detach(), **self._powers)
        return distance, F.mse_loss(self.paraphraser.decoder(factors), teachers[0])


class Translator(nn.Module):
    """Three 3 x 3 convolutions from the student's map to factors."""

    def __init__(self, channels: int, num_factors: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in ((channels, channels), (channels, num_factors), (num_factors, num_factors)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.LeakyReLU(_SLOPE)]
        self.encoder = nn.Sequential(*layers)

    def forward(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, factors, H, W]."""
        factors: Tensor = self.encoder(feature_map)
        return factors


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's map, whose code are the factors."""

    def __init__(self, channels: int, num_factors: int) -> None:
        super().__init__()
        inward: list[nn.Module] = []
        outward: list[nn.Module] = []
        for inner, outer in ((channels, channels), (channels, num_factors), (num_factors, num_factors)):
            # The reference has an empty layer where a batch norm could be, so layers are numbered in threes.
            inward += [nn.Conv2d(inner, outer, 3, padding=1), nn.Identity(), nn.LeakyReLU(_SLOPE)]
        for inner, outer in ((num_factors, num_factors), (num_factors, channels), (channels, channels)):
            outward += [nn.ConvTranspose2d(inner, outer, 3, padding=1), nn.Identity(), nn.LeakyReLU(_SLOPE)]
        self.encoder, self.decoder = nn.Sequential(*inward), nn.Sequential(*outward)


class Review(nn.Module):
    """ReviewKD: the student's stages are fused from the deepest one on, and each fusion imitates a teacher's stage."""

    def __init__(self, students: Shapes, teachers: Shapes, *, max_width: int) -> None:
        """
        Args:
            students: C, H, W of each stage, then C of the pooled features.
            teachers: as many.
            max_width: most channels inside the fusions.
        """
        super().__init__()
        width = min(max_width, students[-1][0])
        fusions = [
            Fusion(ours[0], width, theirs[0], _side(theirs), with_deeper=place < len(students) - 1)
            for place, (ours, theirs) in enumerate(zip(students, teachers, strict=True))
        ]
        self.abfs = nn.ModuleList(fusions[::-1])

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The sum of `hierarchical_context_loss` over the stages."""
        losses = []
        deeper = None
        for fusion, student, teacher in zip(self.abfs, reversed(students), reversed(teachers), strict=True):
            imitated, deeper = fusion(_as_map(student), deeper)
            losses.append(hierarchical_context_loss(imitated, _as_map(teacher)))
        return torch.stack(losses).sum()


def _side(shape: tuple[int, ...]) -> tuple[int, int]:
    """H, W; 1 x 1 of pooled features."""
    return (shape[1], shape[2]) if len(shape) == 3 else (1, 1)


def _as_map(tensor: Tensor) -> Tensor:
    """[B, C, H, W], of pooled features too."""
    return tensor if tensor.dim() == 4 else tensor[:, :, None, None]


class Fusion(nn.Module):
    """ReviewKD's attention based fusion of a stage with what the deeper stages have left."""

    def __init__(self, channels: int, width: int, wanted: int, size: tuple[int, int], *, with_deeper: bool) -> None:
        """
        Args:
            channels: of the student's stage.
            width: channels inside.
            wanted: channels of the teacher's stage.
            size: H, W of the teacher's stage.
            with_deeper: whether there is a deeper stage.
        """
        super().__init__()
        self._size = size
        self.conv1 = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.conv2 = nn.Sequential(nn.Conv2d(width, wanted, 3, padding=1, bias=False), nn.BatchNorm2d(wanted))
        self.att_conv = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if with_deeper else None
        for module in (*self.conv1, *self.conv2):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(self, feature_map: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """
        Args:
            feature_map: [B, C, H, W] of the student's stage.
            deeper: [B, width, H', W'], the second result of the next deeper fusion.

        Returns:
            What imitates the teacher's stage, in its shape, and what the next shallower fusion takes.
        """
        fused: Tensor = self.conv1(feature_map)
        if self.att_conv is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            shares = self.att_conv(torch.cat([fused, deeper], dim=1))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        if fused.shape[2:] != self._size:
            fused = F.interpolate(fused, self._size, mode="nearest")
        return self.conv2(fused), fused
