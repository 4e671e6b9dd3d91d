"""Evaluation: from a classifier and labelled images to accuracy, loss and calibration.

The classifier is any function from images to logits, so torch modules and ONNX sessions are measured in the same way.

Shapes: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.data import Preprocessing
from icdctl.errors import IcdctlError

BATCH_SIZE = 500
_LARGE_BATCH_SIZE, _SMALL_SIDE = 2000, 64
_CALIBRATION_BINS = 15
_LARGEST = 1e300
"""Largest number that is read from a file; whole numbers beyond it can't be floats."""

Predict = Callable[[Tensor], Tensor]
"""A classifier: images [B, H, W, 3] uint8 -> logits [B, K]."""


class Bin(NamedTuple):
    """One of 15 ranges of equal width for the probability of the top class, and the images in it."""

    images: int
    confidence: float | None
    """Mean probability of the top class, in percent; None without images."""
    accuracy: float | None
    """Share of images that are classified correctly, in percent; None without images."""

    @property
    def gap(self) -> float:
        """Difference of confidence and accuracy, in points; 0 without images."""
        return 0.0 if self.confidence is None or self.accuracy is None else abs(self.confidence - self.accuracy)


@dataclass(frozen=True)
class Evaluation:
    """How well logits fit labels. Shares are in percent, losses in nats."""

    top1: float
    """Share of images whose highest logit is that of the label."""
    top5: float
    """Share of images whose label is among the min(5, K) highest logits."""
    loss: float
    """Mean cross-entropy."""
    ece: float
    """Expected calibration error of the top class: the mean gap of the bins, weighted by their images."""
    per_class: tuple[float | None, ...]
    """Top-1 within each class; None for a class without images."""
    reliability: tuple[Bin, ...]
    """The bins, from the least to the most certain."""

    def as_json(self) -> dict[str, object]:
        """The JSON object for files and `--json`."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "ece": self.ece,
            "per_class": list(self.per_class),
            "reliability": [list(each) for each in self.reliability],
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Evaluation:
        """Read back what `as_json` gave.

        Raises:
            KeyError, TypeError, ValueError: `value` is not what `as_json` gives.
        """
        top1, top5, loss, ece = (_number(value[key]) for key in ("top1", "top5", "loss", "ece"))
        rows = value["reliability"]
        if len(rows) != _CALIBRATION_BINS:
            raise ValueError(f"{len(rows)} bins, expected {_CALIBRATION_BINS}")
        bins = tuple(
            Bin(int(_number(images)), _share(confidence), _share(accuracy)) for images, confidence, accuracy in rows
        )
        return Evaluation(top1, top5, loss, ece, tuple(_share(share) for share in value["per_class"]), bins)

    @property
    def worst_class(self) -> int:
        """The number of the class with the lowest top-1 among those with images."""
        shares = {number: share for number, share in enumerate(self.per_class) if share is not None}
        return min(shares, key=shares.__getitem__)

    @property
    def untested(self) -> tuple[int, ...]:
        """The numbers of the classes without images."""
        return tuple(number for number, share in enumerate(self.per_class) if share is None)


def _number(value: Any) -> float:
    """A number of a JSON file, and nothing that merely converts to one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"`{value}` is not a number")
    return float(value)


def _share(value: Any) -> float | None:
    return None if value is None else _number(value)


def module_predictor(model: nn.Module, preprocessing: Preprocessing, device: torch.device) -> Predict:
    """A function that gives the logits of a module; the module is in eval mode, on `device`."""
    normalise = preprocessing.normaliser(device)

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(normalise(images.to(device)))
        return logits

    return predict


def batch_size_on(device: torch.device, images: Tensor) -> int:
    """Batch size for evaluating `images` [N, H, W, 3]; larger for small images on CUDA, where launches dominate."""
    is_small = max(images.shape[1:3]) <= _SMALL_SIDE
    return _LARGE_BATCH_SIZE if device.type == "cuda" and is_small else BATCH_SIZE


def predict_all(
    predict: Predict, images: Tensor, *, batch_size: int = BATCH_SIZE, on_batch: Callable[[int], None] | None = None
) -> Tensor:
    """Logits of all images, float32 on the CPU: [N, H, W, 3] uint8 -> [N, K].

    Args:
        predict: the classifier.
        images: [N, H, W, 3] uint8.
        batch_size: images per call of `predict`.
        on_batch: called after each batch with its number of images.
    """
    parts = []
    for first in range(0, images.shape[0], batch_size):
        part = images[first : first + batch_size]
        parts.append(predict(part).to(torch.float32))
        if on_batch is not None:
            on_batch(part.shape[0])
    return torch.cat(parts).cpu()


def evaluate_logits(logits: Tensor, labels: Tensor) -> Evaluation:
    """Compare logits [N, K] with labels [N] int64.

    Raises:
        IcdctlError: there are no images, or a logit is not finite.
    """
    _check_some(labels)
    broken = ~torch.isfinite(logits).all(dim=1)
    if broken.any():
        raise IcdctlError(
            f"logits of {int(broken.sum())} of {len(logits)} test images are not finite: the weights have diverged",
            hint="train again with a lower `--lr`",
        )
    log_probs = F.log_softmax(logits.double(), dim=1)
    num_classes = logits.shape[1]
    ranked = logits.topk(min(5, num_classes), dim=1).indices
    hits = ranked == labels[:, None]
    right = hits[:, 0]
    count = torch.bincount(labels, minlength=num_classes)
    count_right = torch.bincount(labels[right], minlength=num_classes)
    shares = (100.0 * count_right / count.clamp(min=1)).tolist()
    bins = _reliability(log_probs.exp().amax(dim=1), right)
    return Evaluation(
        top1=_percent(right),
        top5=_percent(hits.any(dim=1)),
        loss=F.nll_loss(log_probs, labels).item(),
        ece=sum(each.images * each.gap for each in bins) / len(logits),
        per_class=tuple(share if images else None for share, images in zip(shares, count.tolist(), strict=True)),
        reliability=bins,
    )


def agreement(logits: Tensor, other_logits: Tensor) -> float:
    """Share of images for which both logits [N, K] have the same top class, in percent.

    Raises:
        IcdctlError: there are no images.
    """
    _check_some(logits)
    return _percent(logits.argmax(dim=1) == other_logits.argmax(dim=1))


def fidelity(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Mean KL(teacher || student) of the predictions from logits [N, K], in nats; 0 is a perfect copy.

    Raises:
        IcdctlError: there are no images.

    Source: Stanton et al. 2021, section 3, https://arxiv.org/abs/2106.05945
    """
    _check_some(student_logits)
    student_log_probs = F.log_softmax(student_logits.double(), dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits.double(), dim=1)
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True).item()


def _check_some(rows: Tensor) -> None:
    """Refuse to measure on nothing: a mean over no images is not a number."""
    if not len(rows):
        raise IcdctlError("there are no images to measure on", hint="name a data set with test images: `--dataset`")


def _percent(right: Tensor) -> float:
    return 100.0 * int(right.sum()) / right.shape[0]


def _reliability(confidence: Tensor, right: Tensor) -> tuple[Bin, ...]:
    """Bins by the probability of the top class, `confidence` [N] in [0, 1]; `right` [N] bool."""
    numbers = (confidence * _CALIBRATION_BINS).long().clamp(max=_CALIBRATION_BINS - 1)
    images = torch.bincount(numbers, minlength=_CALIBRATION_BINS)
    sums = torch.zeros(2, _CALIBRATION_BINS, dtype=torch.float64)
    sums[0].index_add_(0, numbers, confidence.double())
    sums[1].index_add_(0, numbers, right.double())
    means = (100.0 * sums / images.clamp(min=1)).tolist()
    rows = zip(images.tolist(), *means, strict=True)
    return tuple(Bin(*row) if row[0] else Bin(0, None, None) for row in rows)
