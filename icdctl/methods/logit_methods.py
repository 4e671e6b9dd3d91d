"""Methods on logits: a loss per row of logits, with or without scale decoupling (SDD) and the cluster term (iCD).

Shapes: B images, K classes, P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from icdctl.errors import UsageError
from icdctl.methods.logit import dkd_loss, kd_loss, nkd_loss
from icdctl.methods.method import Method, Objective, Supervision, at_least_float32, warmup_factor
from icdctl.methods.method_settings import Settings, is_corrected
from icdctl.methods.newer_logit import (
    abkd_loss,
    entropy_weights,
    gdkd_loss,
    ldrld_loss,
    normkd_loss,
    rld_loss,
    standardise,
    ttm_loss,
)
from icdctl.methods.patch import SCALES, cluster_loss, pool_regions, scale_decoupled_loss
from icdctl.methods.reads import FEATURE_MAP, LOGITS, REGIONS, ModelProbe, regions_of

PATCHES = "patches"
"""[B, K, P], patch logits that a caller has pooled itself, in the place of regions."""

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
    modified: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Modifier -> the defaults that differ with it."""
    published_entropy: tuple[float | None, float] = (None, 0.0)
    """What `ea` takes in the published variant for `largest_entropy` and `added`, see `entropy_weights`."""
    shares_patch_weight: bool = False
    """Whether standardised patches all have the batch's mean weight in the published variant, as in DSKD's code."""
    no_modifiers: str = ""
    """Why modifiers make no sense; empty where they do."""


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


def _rld_rows(settings: Settings) -> RowLoss:
    alpha, beta, temperature, of_confidence = (
        float(settings[key]) for key in ("alpha", "beta", "temperature", "confidence_temperature")
    )
    return lambda student, teacher, labels: rld_loss(
        student,
        teacher,
        labels,
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        confidence_temperature=of_confidence,
    )


def _gdkd_rows(settings: Settings) -> RowLoss:
    split, top, rest, temperature = (
        float(settings[key]) for key in ("split_weight", "top_weight", "rest_weight", "temperature")
    )
    num_top = int(settings["top_classes"])
    return lambda student, teacher, labels: gdkd_loss(
        student,
        teacher,
        num_top=num_top,
        split_weight=split,
        top_weight=top,
        rest_weight=rest,
        temperature=temperature,
    )


def _ldrld_rows(settings: Settings) -> RowLoss:
    alpha, beta, temperature = (float(settings[key]) for key in ("alpha", "beta", "temperature"))
    num_top, corrected = int(settings["ranked_classes"]), is_corrected(settings)
    return lambda student, teacher, labels: ldrld_loss(
        student, teacher, num_top=num_top, alpha=alpha, beta=beta, temperature=temperature, corrected=corrected
    )


def _ttm_rows(settings: Settings) -> RowLoss:
    power = float(settings["teacher_power"])
    return lambda student, teacher, labels: ttm_loss(student, teacher, power=power, weighted=False)


def _wttm_rows(settings: Settings) -> RowLoss:
    power = float(settings["teacher_power"])
    return lambda student, teacher, labels: ttm_loss(student, teacher, power=power, weighted=True)


def _abkd_rows(settings: Settings) -> RowLoss:
    alpha, beta, temperature = (float(settings[key]) for key in ("ab_alpha", "ab_beta", "temperature"))
    corrected = is_corrected(settings)
    return lambda student, teacher, labels: abkd_loss(
        student, teacher, alpha=alpha, beta=beta, temperature=temperature, corrected=corrected
    )


def _normkd_rows(settings: Settings) -> RowLoss:
    temperature = float(settings["temperature"])
    return lambda student, teacher, labels: normkd_loss(student, teacher, temperature=temperature)


KD = LogitLoss(
    "kd",
    {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9, "warmup_epochs": 0.0},
    _kd_rows,
    "https://arxiv.org/abs/1503.02531",
    modified={"ls": {"temperature": 2.0, "kd_weight": 9.0}},
    published_entropy=(100.0, 1e-10),
)
DKD = LogitLoss(
    "dkd",
    {"temperature": 4.0, "alpha": 1.0, "beta": 2.0, "ce_weight": 1.0, "kd_weight": 1.0, "warmup_epochs": 20.0},
    _dkd_rows,
    "https://arxiv.org/abs/2203.08679",
    modified={"ls": {"temperature": 2.0, "beta": 8.0, "kd_weight": 9.0}, "ea": {"beta": 8.0}},
    published_entropy=(100.0, 0.0),
    shares_patch_weight=True,
)
NKD = LogitLoss(
    "nkd",
    {"temperature": 1.0, "beta": 1.5, "ce_weight": 1.0, "kd_weight": 1.0, "warmup_epochs": 20.0},
    _nkd_rows,
    "https://arxiv.org/abs/2303.13005",
)
_ONE_EACH = {"ce_weight": 1.0, "kd_weight": 1.0}
RLD = LogitLoss(
    "rld",
    {
        "temperature": 4.0,
        "alpha": 1.0,
        "beta": 8.0,
        "confidence_temperature": 1.0,
        **_ONE_EACH,
        "warmup_epochs": 20.0,
    },
    _rld_rows,
    "https://arxiv.org/abs/2408.07703",
    modified={"ls": {"temperature": 2.0, "confidence_temperature": 2.0, "kd_weight": 9.0}},
)
GDKD = LogitLoss(
    "gdkd",
    {
        "temperature": 4.0,
        "top_classes": 5.0,
        "split_weight": 1.0,
        "top_weight": 2.0,
        "rest_weight": 8.0,
        **_ONE_EACH,
        "warmup_epochs": 20.0,
    },
    _gdkd_rows,
    "https://arxiv.org/abs/2512.04625",
)
LDRLD = LogitLoss(
    "ldrld",
    {"temperature": 4.0, "ranked_classes": 7.0, "alpha": 10.5, "beta": 7.0, **_ONE_EACH, "warmup_epochs": 0.0},
    _ldrld_rows,
    "https://arxiv.org/abs/2507.15911",
)
TTM = LogitLoss(
    "ttm",
    {"teacher_power": 0.1, "ce_weight": 1.0, "kd_weight": 100.0, "warmup_epochs": 0.0},
    _ttm_rows,
    "https://arxiv.org/abs/2402.11148",
)
WTTM = LogitLoss(
    "wttm",
    {"teacher_power": 0.1, "ce_weight": 1.0, "kd_weight": 3.0, "warmup_epochs": 0.0},
    _wttm_rows,
    "https://arxiv.org/abs/2402.11148",
)
ABKD = LogitLoss(
    "abkd",
    {
        "temperature": 4.0,
        "ab_alpha": 0.8,
        "ab_beta": 0.3,
        "ce_weight": 1.0,
        "kd_weight": 32.0,
        "warmup_epochs": 0.0,
    },
    _abkd_rows,
    "https://arxiv.org/abs/2505.04560",
    # Its code has a factor T^2 with standardised logits, and none without: 9 x 2^2.
    modified={"ls": {"temperature": 2.0, "ab_alpha": 0.9, "ce_weight": 0.1, "kd_weight": 36.0}},
)
NORMKD = LogitLoss(
    "normkd",
    {"temperature": 2.0, "ce_weight": 0.1, "kd_weight": 0.9, "warmup_epochs": 0.0},
    _normkd_rows,
    "https://arxiv.org/abs/2308.00520",
    no_modifiers="its own temperatures follow each row's deviation, so with standardised logits it is `kd+ls`",
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
    standardised: bool = False
    """Whether rows are standardised before the loss (`ls`, LSKD)."""
    entropy_weighted: bool = False
    """Whether rows weigh as much as both models are unsure of them (`ea`, EA-KD)."""

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
        """See `Method`; the models are looked at for scales other than 1, 2 and 4 alone."""
        for scale in scales if self.needs_patches else ():
            if scale not in SCALES:
                for model in (student, *([] if teacher is None else [teacher])):
                    _check_fits(scale, model)
        return LogitObjective(self, settings, scales, supervision)


def _check_fits(scale: int, model: ModelProbe) -> None:
    height, width = model.shape(FEATURE_MAP)[1:]
    if scale > min(height, width):
        raise UsageError(
            f"scale {scale} is finer than the {height} x {width} feature map of `{model.label}`: patches would repeat",
            hint="leave it out, e.g. `--scales 1,2`",
        )


class LogitObjective(Objective):
    """See `LogitMethod`."""

    def __init__(
        self, method: LogitMethod, settings: Settings, scales: tuple[int, ...], supervision: Supervision
    ) -> None:
        super().__init__(settings, supervision)
        self._rows = modified_rows(method, settings)
        self._needs_patches = method.needs_patches
        self._scales = scales
        self._kd_weight = float(settings["kd_weight"])
        self._warmup_epochs = float(settings["warmup_epochs"])
        self._gamma = float(settings["gamma"]) if method.cluster else None
        self._corrected = is_corrected(settings)
        self._shares_weight = method.standardised and method.loss.shares_patch_weight and not self._corrected
        self.term_names = ("ce", "kd", *(("cluster",) if method.cluster else ()))

    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        """See `Objective`: `kd`, and `cluster` where the method has it."""
        student_logits, teacher_logits = student[LOGITS], teacher[LOGITS]
        patches = (self._patches_of(student), self._patches_of(teacher)) if self._needs_patches else None
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

    def _patches_of(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """[B, K, P], the patch logits of one model."""
        if PATCHES in outputs:
            return outputs[PATCHES]
        finer = {scale: outputs[regions_of(scale)] for scale in self._scales if scale not in SCALES}
        return at_least_float32(pool_regions(outputs[REGIONS], self._scales, finer))

    def _over_patches(
        self, teacher_logits: Tensor, student_patches: Tensor, teacher_patches: Tensor, labels: Tensor
    ) -> Tensor:
        """The loss of every patch, complementary ones twice: [B]."""
        # Without the 1x1 patch the whole image's prediction comes from the logits themselves.
        global_logits = teacher_patches[:, :, 0] if self._scales[0] == 1 else teacher_logits
        prediction = global_logits.argmax(dim=1)
        return scale_decoupled_loss(
            self._rows, student_patches, teacher_patches, labels, prediction, shared_weight=self._shares_weight
        )


def modified_rows(method: LogitMethod, settings: Settings) -> RowLoss:
    """A method's loss per row, with what its modifiers do before and after it."""
    loss = method.loss.rows(settings)
    if not (method.standardised or method.entropy_weighted):
        return loss
    corrected = is_corrected(settings)
    largest_entropy, added = (None, 0.0) if corrected else method.loss.published_entropy

    def rows(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        pair = at_least_float32(student), at_least_float32(teacher)
        seen = pair
        if method.standardised:
            pair = standardise(pair[0], corrected=corrected), standardise(pair[1], corrected=corrected)
        losses = loss(*pair, labels)
        if not method.entropy_weighted:
            return losses
        # As published, the entropies are those of what is compared; EA-KD's other file takes the raw logits'.
        return losses * entropy_weights(
            *(seen if corrected else pair),
            temperature=float(settings["ea_temperature"]),
            largest_entropy=largest_entropy,
            added=added,
        )

    return rows


def plain(loss: LogitLoss) -> LogitMethod:
    """The method that applies a loss to whole images."""
    return LogitMethod(loss=loss, defaults=loss.defaults, source=loss.source, family=loss.name)


def variants(loss: LogitLoss, sdd_defaults: Mapping[str, float]) -> dict[str, LogitMethod]:
    """Three methods of a loss: by itself, on decoupled patches, and with the cluster term."""
    whole = plain(loss)
    decoupled = replace(whole, defaults={**loss.defaults, **sdd_defaults}, source=_SDD_PAPER, patches=True)
    clustered = replace(decoupled, defaults={**decoupled.defaults, "gamma": 2.0}, source=_ICD_PAPER, cluster=True)
    return {loss.name: whole, f"sdd_{loss.name}": decoupled, f"cd_sdd_{loss.name}": clustered}


LOGIT_METHODS: dict[str, Method] = {
    "ce": CrossEntropy(defaults={"ce_weight": 1.0}, source="cross-entropy with the labels, no teacher", family="ce"),
    **variants(KD, {}),
    **variants(DKD, {}),
    **variants(NKD, {"temperature": 4.0, "beta": 2.0}),
    **{loss.name: plain(loss) for loss in (RLD, GDKD, LDRLD, TTM, WTTM, ABKD, NORMKD)},
}
