"""Methods on logits: a loss per row of logits, with or without scale decoupling (SDD) and the cluster term (iCD).

Shapes: B images, K classes, P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from icdctl.methods.logit import dkd_loss, kd_loss, nkd_loss
from icdctl.methods.method import Method, Objective, Supervision, at_least_float32, warmup_factor
from icdctl.methods.method_settings import Settings, is_corrected
from icdctl.methods.patch import cluster_loss, pool_regions, scale_decoupled_loss
from icdctl.methods.reads import LOGITS, REGIONS, ModelProbe

RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(student [N, K], teacher [N, K], labels [N]) -> [N]."""


@dataclass(frozen=True)
class LogitLoss:
    """A loss per row of logits, as a building block of methods."""

    name: str
    defaults: Mapping[str, float]
    """Its settings and the values of the reference code's configuration."""
    rows: Callable[[Settings], RowLoss]
    """The loss with its settings filled in."""
    source: str


def _kd_rows(settings: Settings) -> RowLoss:
    temperature = float(settings["temperature"])
    return lambda student, teacher, labels: kd_loss(student, teacher, temperature=temperature)


def _dkd_rows(settings: Settings) -> RowLoss:
    alpha, beta, temperature = (float(settings[key]) for key in ("alpha", "beta", "temperature"))
    return lambda student, teacher, labels: dkd_loss(
        student, teacher, labels, alpha=alpha, beta=beta, temperature=temperature
    )


def _nkd_rows(settings: Settings) -> RowLoss:
    beta, temperature = float(settings["beta"]), float(settings["temperature"])
    drop_target = is_corrected(settings)
    return lambda student, teacher, labels: nkd_loss(
        student, teacher, labels, gamma=beta, temperature=temperature, drop_target=drop_target
    )


KD = LogitLoss(
    "kd",
    {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9, "warmup_epochs": 0.0},
    _kd_rows,
    "https://arxiv.org/abs/1503.02531",
)
DKD = LogitLoss(
    "dkd",
    {"temperature": 4.0, "alpha": 1.0, "beta": 2.0, "ce_weight": 1.0, "kd_weight": 1.0, "warmup_epochs": 20.0},
    _dkd_rows,
    "https://arxiv.org/abs/2203.08679",
)
NKD = LogitLoss(
    "nkd",
    {"temperature": 1.0, "beta": 1.5, "ce_weight": 1.0, "kd_weight": 1.0, "warmup_epochs": 20.0},
    _nkd_rows,
    "https://arxiv.org/abs/2303.13005",
)
_SDD_PAPER = "https://arxiv.org/abs/2403.13512"
_ICD_PAPER = "https://arxiv.org/abs/2509.12553"


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Method):
    """The cross-entropy with the labels alone."""

    @property
    def needs_teacher(self) -> bool:
        """See `Method`."""
        return False

    def teacher_reads(self, settings: Settings) -> frozenset[str]:
        """See `Method`; it reads nothing."""
        return frozenset()

    def build(
        self,
        student: ModelProbe,
        teacher: ModelProbe | None,
        settings: Settings,
        *,
        scales: tuple[int, ...],
        supervision: Supervision,
    ) -> Objective:
        """See `Method`."""
        return CrossEntropyObjective(settings, supervision)


class CrossEntropyObjective(Objective):
    """See `CrossEntropy`."""

    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        """See `Objective`; there are none."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LogitMethod(Method):
    """A loss per row of logits, applied to the whole image's logits or to those of its patches."""

    loss: LogitLoss
    """Compares two rows of logits."""

    def teacher_reads(self, settings: Settings) -> frozenset[str]:
        """See `Method`."""
        return frozenset({LOGITS, REGIONS}) if self.needs_patches else frozenset({LOGITS})

    def build(
        self,
        student: ModelProbe,
        teacher: ModelProbe | None,
        settings: Settings,
        *,
        scales: tuple[int, ...],
        supervision: Supervision,
    ) -> LogitObjective:
        """See `Method`; the models are not looked at."""
        return LogitObjective(self, settings, scales, supervision)


class LogitObjective(Objective):
    """See `LogitMethod`."""

    def __init__(
        self, method: LogitMethod, settings: Settings, scales: tuple[int, ...], supervision: Supervision
    ) -> None:
        super().__init__(settings, supervision)
        self._rows = method.loss.rows(settings)
        self._needs_patches = method.needs_patches
        self._scales = scales
        self._kd_weight = float(settings["kd_weight"])
        self._warmup_epochs = float(settings["warmup_epochs"])
        self._gamma = float(settings["gamma"]) if method.cluster else None
        self._corrected = is_corrected(settings)
        self.term_names = ("ce", "kd", *(("cluster",) if method.cluster else ()))

    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        patches = None
        if self._needs_patches:
            patches = (
                at_least_float32(pool_regions(student[REGIONS], self._scales)),
                pool_regions(teacher[REGIONS], self._scales),
            )
        return self.terms_of(student[LOGITS], teacher[LOGITS], patches, labels, epoch)

    def terms_of(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        patches: tuple[Tensor, Tensor] | None,
        labels: Tensor,
        epoch: int | Tensor,
    ) -> dict[str, Tensor]:
        """`kd`, and `cluster` where the method has it.

        Args:
            student_logits: [B, K].
            teacher_logits: [B, K], without gradient.
            patches: [B, K, P] of the student and of the teacher, for a method that reads them.
            labels: [B] int64.
            epoch: counted from 1.
        """
        labels = self.with_teacher_labels(labels, teacher_logits)
        kd_factor = self._kd_weight * warmup_factor(epoch, self._warmup_epochs)
        # As in the reference, logits are compared where the whole image is the only patch.
        if patches is None or self._scales == (1,):
            terms = {"kd": kd_factor * self._rows(student_logits, teacher_logits, labels).mean()}
        else:
            terms = {"kd": kd_factor * self._over_patches(teacher_logits, *patches, labels).mean()}
        if self._gamma is not None and patches is not None:
            cluster = cluster_loss(*patches, scales=self._scales, corrected=self._corrected)
            terms["cluster"] = self._gamma * cluster.mean()
        return terms

    def _over_patches(
        self, teacher_logits: Tensor, student_patches: Tensor, teacher_patches: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss of every patch, complementary ones twice: [B]."""
        # Without the 1x1 patch the whole image's prediction comes from the logits themselves.
        global_logits = teacher_patches[:, :, 0] if self._scales[0] == 1 else teacher_logits
        prediction = global_logits.argmax(dim=1)
        return scale_decoupled_loss(self._rows, student_patches, teacher_patches, labels, prediction)


def variants(loss: LogitLoss, sdd_defaults: Mapping[str, float]) -> dict[str, LogitMethod]:
    """Three methods of a loss: by itself, on decoupled patches, and with the cluster term."""
    plain = LogitMethod(loss=loss, defaults=loss.defaults, source=loss.source, family=loss.name)
    decoupled = replace(plain, defaults={**loss.defaults, **sdd_defaults}, source=_SDD_PAPER, patches=True)
    clustered = replace(decoupled, defaults={**decoupled.defaults, "gamma": 2.0}, source=_ICD_PAPER, cluster=True)
    return {loss.name: plain, f"sdd_{loss.name}": decoupled, f"cd_sdd_{loss.name}": clustered}


LOGIT_METHODS: dict[str, Method] = {
    "ce": CrossEntropy(defaults={"ce_weight": 1.0}, source="cross-entropy with the labels, no teacher", family="ce"),
    **variants(KD, {}),
    **variants(DKD, {}),
    **variants(NKD, {"temperature": 4.0, "beta": 2.0}),
}
