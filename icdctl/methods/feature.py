"""Methods on feature maps, whose connectors are trained with the student and thrown away with the objective.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.errors import UsageError
from icdctl.methods.method import Method, Objective, Supervision, at_least_float32
from icdctl.methods.method_settings import Settings
from icdctl.methods.reads import ModelProbe, stage


@dataclass(frozen=True, kw_only=True)
class FitNet(Method):
    """FitNets: the output of one stage, through a trained connector, imitates the teacher's output of that stage.

    As in the reference code, and unlike the paper, the hint is not a separate training stage: its term is added to
    the cross-entropy in every epoch.

    Source: Romero et al. 2015, section 2.2, https://arxiv.org/abs/1412.6550
    """

    def teacher_reads(self, settings: Settings) -> frozenset[str]:
        """See `Method`: the stage that is imitated."""
        return frozenset({_hint(settings)})

    def build(
        self,
        student: ModelProbe,
        teacher: ModelProbe | None,
        settings: Settings,
        *,
        scales: tuple[int, ...],
        supervision: Supervision,
    ) -> FitNetObjective:
        """See `Method`."""
        assert teacher is not None
        name = _hint(settings)
        return FitNetObjective(student.shape(name), teacher.shape(name), settings, supervision)


def _hint(settings: Settings) -> str:
    """The name of the stage that is imitated."""
    return stage(int(settings["hint_stage"]))


class FitNetObjective(Objective):
    """See `FitNet`: the mean squared error of the stage's outputs, the student's through its connector."""

    term_names = ("ce", "feature")

    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...],
        settings: Settings,
        supervision: Supervision,
    ) -> None:
        """
        Args:
            student_shape: C, H, W of the student's stage.
            teacher_shape: C, H, W of the teacher's.
            settings: from `check_settings`.
            supervision: how labels are used.

        Raises:
            UsageError: no connector leads from one to the other.
        """
        super().__init__(settings, supervision)
        self._name = _hint(settings)
        self._weight = float(settings["feature_weight"])
        self.connector = Connector(student_shape, teacher_shape)

    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        """See `Objective`: `feature`, a scalar."""
        imitated = self.connector(at_least_float32(student[self._name]))
        return {"feature": self._weight * F.mse_loss(imitated, teacher[self._name])}


class Connector(nn.Module):
    """A convolution from the student's map to the size and width of the teacher's, batch norm and ReLU.

    The convolution halves, doubles or keeps the map, or trims it by its kernel, as in the reference code.
    """

    def __init__(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
        """
        Args:
            student_shape: C, H, W.
            teacher_shape: C, H, W.

        Raises:
            UsageError: the student's map is smaller, and not by half.
        """
        super().__init__()
        self.conv = _convolution(student_shape, teacher_shape)
        self.bn = nn.BatchNorm2d(teacher_shape[0])

    def forward(self, feature_map: Tensor) -> Tensor:
        """[B, C, H, W] of the student -> [B, C, H, W] of the teacher."""
        return F.relu(self.bn(self.conv(feature_map)))


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
        hint="imitate another stage: `--set hint_stage=1`",
    )


FEATURE_METHODS: dict[str, Method] = {
    "fitnet": FitNet(
        defaults={"hint_stage": 2.0, "ce_weight": 1.0, "feature_weight": 100.0},
        source="https://arxiv.org/abs/1412.6550",
        family="fitnet",
    )
}
