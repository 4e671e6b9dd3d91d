"""Methods whose loss compares the images of a batch with each other, or maps of classes: nothing of theirs is per row.

Shapes: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from icdctl.errors import UsageError
from icdctl.methods.batch import cat_loss, dist_losses, skd_direction_loss, skd_mask_shares
from icdctl.methods.logit import kd_loss
from icdctl.methods.method import Method, Objective, Supervision, at_least_float32, warmup_factor
from icdctl.methods.method_settings import Settings, is_corrected
from icdctl.methods.patch import FINEST
from icdctl.methods.reads import CLASS_MAPS, LOGITS, ModelProbe

BatchLoss = Callable[[Settings, Tensor, Tensor], dict[str, Tensor]]
"""(settings, student [B, K, ...], teacher [B, K, ...]) -> scalars by the names of their terms, without `kd_weight`."""


@dataclass(frozen=True, kw_only=True)
class BatchMethod(Method):
    """A loss of one tensor of all images of a batch at once."""

    loss: BatchLoss
    terms: tuple[str, ...]
    """Names of the loss's terms."""
    reads: str = LOGITS
    """The tensor that is compared."""
    check: Callable[[Settings], None] = lambda settings: None
    """Raises `UsageError` for settings that can't be used together."""

    def teacher_reads(self, settings: Settings) -> frozenset[str]:
        """See `Method`."""
        return frozenset({self.reads})

    def build(
        self,
        student: ModelProbe,
        teacher: ModelProbe | None,
        settings: Settings,
        *,
        scales: tuple[int, ...],
        supervision: Supervision,
    ) -> Objective:
        """See `Method`; the models are not looked at."""
        self.check(settings)
        return BatchObjective(self, settings, supervision)


class BatchObjective(Objective):
    """See `BatchMethod`."""

    def __init__(self, method: BatchMethod, settings: Settings, supervision: Supervision) -> None:
        super().__init__(settings, supervision)
        self._loss, self._reads, self._settings = method.loss, method.reads, settings
        self._kd_weight = float(settings["kd_weight"])
        self._warmup_epochs = float(settings["warmup_epochs"])
        self.term_names = ("ce", *method.terms)

    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        pair = (at_least_float32(outputs[self._reads]) for outputs in (student, teacher))
        factor = self._kd_weight * warmup_factor(epoch, self._warmup_epochs)
        return {name: factor * term for name, term in self._loss(self._settings, *pair).items()}


def _dist(settings: Settings, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    inter, intra = dist_losses(
        student, teacher, temperature=float(settings["temperature"]), corrected=is_corrected(settings)
    )
    return {"inter": float(settings["inter_weight"]) * inter, "intra": float(settings["intra_weight"]) * intra}


def _skd(settings: Settings, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    corrected = is_corrected(settings)
    divergence = kd_loss(student, teacher, temperature=float(settings["temperature"])).mean()
    direction = skd_direction_loss(
        student, teacher, regularisation=float(settings["regularisation"]), corrected=corrected
    )
    if corrected:
        return {"kd": divergence, "direction": direction}
    of_rows, of_classes = skd_mask_shares(teacher)
    return {"kd": of_rows * divergence, "direction": of_classes * direction}


def _cat(settings: Settings, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    resolution = int(settings["map_resolution"])
    return {"map": cat_loss(student, teacher, resolution=resolution, normalised=settings["map_normalised"] == 1).mean()}


def _check_cat(settings: Settings) -> None:
    resolution = int(settings["map_resolution"])
    if FINEST % resolution:
        raise UsageError(
            f"setting `map_resolution` is {resolution}, which can't be averaged from the {FINEST} x {FINEST} regions",
            hint="choose 1, 2 or 4: `--set map_resolution=2`",
        )


BATCH_METHODS: dict[str, Method] = {
    "dist": BatchMethod(
        loss=_dist,
        terms=("inter", "intra"),
        defaults={
            "temperature": 4.0,
            "inter_weight": 2.0,
            "intra_weight": 2.0,
            "ce_weight": 1.0,
            "kd_weight": 1.0,
            "warmup_epochs": 0.0,
        },
        source="https://arxiv.org/abs/2205.10536",
        family="dist",
    ),
    "skd": BatchMethod(
        loss=_skd,
        terms=("kd", "direction"),
        defaults={
            "temperature": 4.0,
            "regularisation": 0.1,
            "ce_weight": 0.1,
            "kd_weight": 0.9,
            "warmup_epochs": 0.0,
        },
        source="https://github.com/HyunJunSik/StreamLined",
        family="skd",
    ),
    "cat": BatchMethod(
        loss=_cat,
        terms=("map",),
        reads=CLASS_MAPS,
        check=_check_cat,
        defaults={
            "map_resolution": 2.0,
            "map_normalised": 0.0,
            "ce_weight": 1.0,
            "kd_weight": 15.0,
            "warmup_epochs": 0.0,
        },
        source="https://github.com/GzyAftermath/CAT-KD",
        family="cat",
    ),
}
