"""Methods on feature maps and pooled features: what each reads, what it compares, and the table of all.

Losses without parameters are in `feature_losses.py`, those with connectors in `connectors.py`, CRD in `contrastive.py`.
Connectors are trained with the student and thrown away with the objective. Shapes: B images, C channels, H rows, W
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.errors import UsageError
from icdctl.methods import feature_losses as losses
from icdctl.methods.connectors import Boundaries, Connector, Correlations, Factors, Margins, Predictions, Review
from icdctl.methods.contrastive import Contrastive
from icdctl.methods.feature_method import FeatureMethod, Pairs, Untrained, summed
from icdctl.methods.method import Method, Objective, Supervision, at_least_float32
from icdctl.methods.method_settings import Settings, is_corrected
from icdctl.methods.reads import POOLED, PREACTIVATIONS, STAGES, ModelProbe, stage

STEM, DEEPEST = stage(0), stage(-1)


def attention(pairs: Pairs, settings: Settings) -> nn.Module:
    """AT, summed over the stages."""
    power = float(settings["attention_power"])
    return Untrained(summed(lambda student, teacher: losses.attention_loss(student, teacher, power=power)))


def selectivity(pairs: Pairs, settings: Settings) -> nn.Module:
    """NST, summed over the stages."""
    return Untrained(summed(losses.neuron_selectivity_loss))


def similarity(pairs: Pairs, settings: Settings) -> nn.Module:
    """SP, of one stage."""
    return Untrained(summed(losses.similarity_loss))


def probabilities(pairs: Pairs, settings: Settings) -> nn.Module:
    """PKT, of the pooled features."""
    return Untrained(summed(losses.probabilistic_loss))


def relations(pairs: Pairs, settings: Settings) -> nn.Module:
    """RKD, of the pooled features."""
    distance_weight, angle_weight = float(settings["distance_weight"]), float(settings["angle_weight"])

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        distance, angle = losses.relational_losses(student, teacher)
        return distance_weight * distance + angle_weight * angle

    return Untrained(summed(loss))


def singular_vectors(pairs: Pairs, settings: Settings) -> nn.Module:
    """KDSVD, of consecutive stages; refused where widths differ or a model has one stage alone."""
    num_vectors = int(settings["num_vectors"])
    widths = [[shape[2] for shape in shapes] for shapes in (pairs.students, pairs.teachers)]
    if widths[0] != widths[1] or len(widths[0]) < 2:
        raise _unsuitable(
            pairs,
            f"`kdsvd` needs two stages or more with maps as wide as the teacher's: they are {_listed(widths[0])} wide "
            f"in {len(widths[0])} stages of the student, {_listed(widths[1])} in those of the teacher",
        )
    return Untrained(
        lambda students, teachers: losses.singular_vectors_loss(students, teachers, num_vectors=num_vectors)
    )


def flows(pairs: Pairs, settings: Settings) -> nn.Module:
    """FSP, of consecutive stages, the stem among them; refused where numbers of channels differ."""
    channels = [[shape[0] for shape in shapes] for shapes in (pairs.students, pairs.teachers)]
    if channels[0] != channels[1]:
        raise _unsuitable(
            pairs,
            f"`fsp` needs stages with as many channels as the teacher's: the last {len(channels[0])} stages of the "
            f"student have {_listed(channels[0])} channels, those of the teacher {_listed(channels[1])}",
        )
    return Untrained(losses.flow_loss)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _unsuitable(pairs: Pairs, message: str) -> UsageError:
    return UsageError(
        f"{message} (student `{pairs.student_label}`, teacher `{pairs.teacher.label}`)",
        hint="choose a student of the teacher's family, as res8x4 is for res32x4, or the method `at`",
    )


def margins(pairs: Pairs, settings: Settings) -> nn.Module:
    """OFD; refused for a teacher whose pre-activations do not come from batch norms."""
    norms = pairs.teacher.preactivation_norms()
    count = len(pairs.teachers)
    if len(norms) < count:
        raise UsageError(
            f"`ofd` reads the batch norm in front of the last ReLU of {count} stages, and the teacher "
            f"`{pairs.teacher.label}` has {len(norms)} such norms",
            hint="choose another teacher, as res32x4, or the method `at`",
        )
    kernel_size = int(settings["kernel_size"])
    if kernel_size % 2 == 0:
        raise UsageError(f"kernel_size is {kernel_size}, expected an odd number", hint="e.g. `--set kernel_size=3`")
    return Margins(pairs.students, pairs.teachers, norms[-count:], kernel_size=kernel_size)


def boundaries(pairs: Pairs, settings: Settings) -> nn.Module:
    """AB."""
    return Boundaries(pairs.students, pairs.teachers, margin=float(settings["margin"]))


def predictions(pairs: Pairs, settings: Settings) -> nn.Module:
    """VID; the reference code leaves the variances untrained, `corrected` trains them."""
    return Predictions(
        pairs.students,
        pairs.teachers,
        initial_variance=float(settings["initial_variance"]),
        learn_variance=is_corrected(settings),
    )


def correlations(pairs: Pairs, settings: Settings) -> nn.Module:
    """CC, of the pooled features."""
    return Correlations(pairs.students, pairs.teachers, width=int(settings["feat_dim"]))


def factors(pairs: Pairs, settings: Settings) -> nn.Module:
    """FT, of the deepest stage."""
    return Factors(
        pairs.students,
        pairs.teachers,
        ratio=float(settings["factor_ratio"]),
        power=int(settings["factor_power"]),
        distance_power=int(settings["distance_power"]),
    )


def review(pairs: Pairs, settings: Settings) -> nn.Module:
    """ReviewKD."""
    return Review(pairs.students, pairs.teachers, max_width=int(settings["max_mid_channels"]))


@dataclass(frozen=True, kw_only=True)
class Overhaul(FeatureMethod):
    """OFD: the reference code leaves the teacher in training mode, so that it normalises by the batch; `corrected`
    has it in eval mode.
    """

    def has_eval_mode_teacher(self, settings: Settings) -> bool:
        """See `Method`."""
        return is_corrected(settings)


@dataclass(frozen=True, kw_only=True)
class KnowledgeReview(FeatureMethod):
    """ReviewKD: the teacher's pre-activations are imitated by the student's stages, or by its pre-activations."""

    def compared(self, settings: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `FeatureMethod`."""
        return (PREACTIVATIONS if settings["student_preactivations"] else STAGES, POOLED), self.reads


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


def _row(
    name: str,
    comparison: Callable[[Pairs, Settings], nn.Module],
    reads: tuple[str, ...],
    source: str,
    *,
    weight: float,
    kind: type[FeatureMethod] = FeatureMethod,
    has_parameters: bool = False,
    **settings: float,
) -> FeatureMethod:
    """A method whose cross-entropy has weight 1, as in all reference configurations."""
    return kind(
        family=name,
        comparison=comparison,
        reads=reads,
        source=source,
        has_parameters=has_parameters,
        defaults={"ce_weight": 1.0, "feature_weight": weight, **settings},
    )


_PAPER = "https://arxiv.org/abs/"
_ROWS = (
    # Attention and selectivity of all stages, similarities and correlations of a batch.
    _row("at", attention, (STAGES,), _PAPER + "1612.03928", weight=1000.0, attention_power=2.0),
    _row("nst", selectivity, (STAGES,), _PAPER + "1707.01219", weight=50.0),
    _row("sp", similarity, (DEEPEST,), _PAPER + "1907.09682", weight=3000.0),
    _row("cc", correlations, (POOLED,), _PAPER + "1904.01802", has_parameters=True, weight=0.02, feat_dim=128.0),
    _row("pkt", probabilities, (POOLED,), _PAPER + "1803.10837", weight=30_000.0),
    _row("rkd", relations, (POOLED,), _PAPER + "1904.05068", weight=1.0, distance_weight=25.0, angle_weight=50.0),
    # Relations of consecutive stages.
    _row("fsp", flows, (STEM, STAGES), "Yim et al., CVPR 2017", weight=50.0),
    _row("kdsvd", singular_vectors, (STAGES,), _PAPER + "1807.06819", weight=1.0, num_vectors=1.0),
    # Maps that are imitated, through connectors.
    _row("ab", boundaries, (PREACTIVATIONS,), _PAPER + "1811.03233", has_parameters=True, weight=1.0, margin=1.0),
    _row(
        "ofd",
        margins,
        (PREACTIVATIONS,),
        _PAPER + "1904.01866",
        has_parameters=True,
        weight=0.001,
        kind=Overhaul,
        kernel_size=1.0,
    ),
    _row("vid", predictions, (STAGES,), _PAPER + "1904.05835", has_parameters=True, weight=1.0, initial_variance=5.0),
    _row(
        "ft",
        factors,
        (DEEPEST,),
        _PAPER + "1802.04977",
        has_parameters=True,
        weight=200.0,
        factor_ratio=0.5,
        factor_power=2.0,
        distance_power=1.0,
        warmup_epochs=30.0,
    ),
    _row(
        "reviewkd",
        review,
        (PREACTIVATIONS, POOLED),
        _PAPER + "2104.09044",
        has_parameters=True,
        weight=1.0,
        kind=KnowledgeReview,
        student_preactivations=0.0,
        max_mid_channels=512.0,
        warmup_epochs=20.0,
    ),
)
FEATURE_METHODS: dict[str, Method] = {
    "fitnet": FitNet(
        defaults={"hint_stage": 2.0, "ce_weight": 1.0, "feature_weight": 100.0},
        source=_PAPER + "1412.6550",
        family="fitnet",
        has_parameters=True,
    ),
    **{row.family: row for row in _ROWS},
    "crd": Contrastive(
        defaults={
            "ce_weight": 1.0,
            "feature_weight": 0.8,
            "feat_dim": 128.0,
            "nce_k": 16_384.0,
            "nce_t": 0.07,
            "nce_m": 0.5,
        },
        source=_PAPER + "1910.10699",
        family="crd",
        has_parameters=True,
    ),
}
