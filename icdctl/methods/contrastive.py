"""CRD, contrastive representation distillation: an image's two embeddings belong together, those of others do not.

Shapes: B images of a batch, N images of the training set, D numbers of an embedding, S negatives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icdctl.errors import UsageError
from icdctl.methods.connectors import Embedding
from icdctl.methods.logit import UNLABELED
from icdctl.methods.method import Method, Objective, Supervision, at_least_float32
from icdctl.methods.method_settings import Settings
from icdctl.methods.reads import IMAGE_NUMBERS, POOLED, ModelProbe

_EPSILON = 1e-7
"""The reference code's addition to the denominators."""
_LOW = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Contrastive(Method):
    """CRD, with negatives of other classes than the image's own: the `exact` mode of RepDistiller.

    Images are drawn by a hash of the run's seed, the number of the step and the place in the batch, so that a resumed
    run draws what it would have drawn. The paper's own comparison has no term of KD beside this one, nor has this.

    Source: Tian et al. 2020, section 3, https://arxiv.org/abs/1910.10699
    """

    def teacher_reads(self, settings: Settings) -> frozenset[str]:
        """See `Method`."""
        return frozenset({POOLED})

    def student_reads(self, settings: Settings) -> frozenset[str]:
        """See `Method`: the images' numbers too."""
        return super().student_reads(settings) | {IMAGE_NUMBERS}

    def build(
        self,
        student: ModelProbe,
        teacher: ModelProbe | None,
        settings: Settings,
        *,
        scales: tuple[int, ...],
        supervision: Supervision,
    ) -> ContrastiveObjective:
        """See `Method`; refused without training images of two classes."""
        assert teacher is not None
        return ContrastiveObjective(student.shape(POOLED)[0], teacher.shape(POOLED)[0], settings, supervision)


class ContrastiveObjective(Objective):
    """See `Contrastive`: both models' embeddings, the banks of all images' embeddings, and the draw of negatives."""

    term_names = ("ce", "feature")

    def __init__(self, student_width: int, teacher_width: int, settings: Settings, supervision: Supervision) -> None:
        """
        Args:
            student_width: C of the student's pooled features.
            teacher_width: C of the teacher's.
            settings: from `check_settings`.
            supervision: how labels are used, and those of all training images.

        Raises:
            UsageError: an image has no negatives.
        """
        super().__init__(settings, supervision)
        if supervision.train_labels is None:
            raise UsageError(
                "`crd` needs the labels of the training images",
                hint="pass them as `Supervision(train_labels=...)`; `icdctl distill` does that by itself",
            )
        width = int(settings["feat_dim"])
        self._weight = float(settings["feature_weight"])
        self.embed_s, self.embed_t = Embedding(student_width, width), Embedding(teacher_width, width)
        self.negatives = Negatives(supervision.train_labels.cpu(), int(settings["nce_k"]))
        self.banks = Banks(
            len(supervision.train_labels),
            width,
            temperature=float(settings["nce_t"]),
            momentum=float(settings["nce_m"]),
        )

    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        """See `Objective`: `feature`, a scalar."""
        images = student[IMAGE_NUMBERS]
        candidates = torch.cat([images[:, None], self.negatives(images)], dim=1)
        student_vectors = F.normalize(self.embed_s(at_least_float32(student[POOLED])), dim=1)
        teacher_vectors = F.normalize(self.embed_t(teacher[POOLED]), dim=1)
        return {"feature": self._weight * self.banks(student_vectors, teacher_vectors, candidates)}


class Banks(nn.Module):
    """The embeddings of all training images by both models, as they were when each image was last seen.

    Each bank is compared with the other model's embeddings of the batch, then it follows its own model.
    """

    memory_v1: Tensor
    """[N, D], of the student."""
    memory_v2: Tensor
    """[N, D], of the teacher."""
    log_normalizers: Tensor
    """[2], of the student's and of the teacher's embeddings: fixed by the first batch, as in the reference code."""
    is_fresh: Tensor
    """Whether no batch has been seen: a scalar."""

    def __init__(self, num_images: int, width: int, *, temperature: float, momentum: float) -> None:
        """
        Args:
            num_images: N.
            width: D.
            temperature: of the similarities.
            momentum: share of the old embedding that an image keeps.
        """
        super().__init__()
        bound = math.sqrt(3 / width)
        for name in ("memory_v1", "memory_v2"):
            self.register_buffer(name, torch.empty(num_images, width).uniform_(-bound, bound))
        self.register_buffer("log_normalizers", torch.zeros(2))
        self.register_buffer("is_fresh", torch.ones((), dtype=torch.bool))
        self._temperature, self._momentum = temperature, momentum

    def forward(self, student: Tensor, teacher: Tensor, candidates: Tensor) -> Tensor:
        """The contrastive loss of both models, after which the images' embeddings are updated.

        Args:
            student: [B, D], of unit length, with gradient.
            teacher: [B, D], of unit length, with gradient: its embedding is trained too.
            candidates: [B, 1 + S] int64, the image of each row, then its negatives.

        Returns:
            A scalar.
        """
        num_images = len(self.memory_v1)
        logits = [
            self._logits(vectors, bank, candidates)
            for vectors, bank in ((student, self.memory_v2), (teacher, self.memory_v1))
        ]
        with torch.no_grad():
            found = [values.flatten().logsumexp(0) + math.log(num_images / values.numel()) for values in logits]
            self.log_normalizers.copy_(torch.where(self.is_fresh, torch.stack(found), self.log_normalizers))
            self.is_fresh.zero_()
        # The normalisers are read here, not kept: a buffer that changes must not be part of what is derived.
        normalizers = self.log_normalizers.clone()
        losses = [
            contrastive_loss(values - normalizers[place], num_images=num_images) for place, values in enumerate(logits)
        ]
        self._update(self.memory_v1, student, candidates[:, 0])
        self._update(self.memory_v2, teacher, candidates[:, 0])
        return losses[0] + losses[1]

    def _logits(self, vectors: Tensor, bank: Tensor, candidates: Tensor) -> Tensor:
        """[B, D], [N, D], [B, 1 + S] -> [B, 1 + S].

        Products with the whole bank are far less memory than the [B, 1 + S, D] candidates. The copy is what the
        gradient is computed from, since the bank itself is updated before that.
        """
        return (vectors @ bank.clone().T / self._temperature).gather(1, candidates)

    @torch.no_grad()
    def _update(self, bank: Tensor, vectors: Tensor, images: Tensor) -> None:
        """Move the images' embeddings to the batch's; an image with several rows follows the first one alone, so that
        the order of writing does not matter.
        """
        first = (images[:, None] == images).to(torch.uint8).argmax(dim=1)
        moved = self._momentum * bank[images] + (1 - self._momentum) * vectors[first]
        bank.index_copy_(0, images, F.normalize(moved, dim=1))


def contrastive_loss(logits: Tensor, *, num_images: int) -> Tensor:
    """Noise contrastive estimation: is a candidate the image itself, or one of S that were drawn uniformly?

    With q = exp(logit), P = 1 / N and c = S P + epsilon it is -log(q / (q + c)) of the image itself, and
    -log(S P / (q + c)) of each negative; here the logarithms are taken of sums of exponentials, so nothing overflows.

    Args:
        logits: [B, 1 + S], logarithms of normalised similarities, the image itself first.
        num_images: N.

    Returns:
        The sum over the candidates, averaged over the images: a scalar.

    Source: Tian et al. 2020, section 3.2, https://arxiv.org/abs/1910.10699
    """
    noise = (logits.shape[1] - 1) / num_images
    total = torch.logaddexp(logits, torch.full_like(logits, math.log(noise + _EPSILON)))
    right = total[:, 0] - logits[:, 0]
    wrong = (total[:, 1:] - math.log(noise)).sum(dim=1)
    return (right + wrong).mean()


class Negatives(nn.Module):
    """Draws images of other classes, each equally likely, by a hash that counts its own steps.

    An image without a label is never drawn for a labelled one, which may be of its class; for it, all other images are
    drawn. The tables are computed once, and only the counter and the seed are part of a checkpoint.
    """

    order: Tensor
    """[N] int64, the images by class, those without a label at the end."""
    first: Tensor
    """[N] int64: the place in that order where what an image must not draw begins."""
    skipped: Tensor
    """[N] int64: how many places these are: its class, or itself."""
    choices: Tensor
    """[N] int64: how many images it may draw."""
    num_drawn: Tensor
    """Number of batches so far: an int64 scalar."""
    seed: Tensor
    """An int64 scalar."""

    def __init__(self, labels: Tensor, count: int) -> None:
        """
        Args:
            labels: [N] int64, on the CPU; -1 for an image that has none.
            count: S.

        Raises:
            UsageError: an image has nothing to draw.
        """
        super().__init__()
        is_labelled = labels != UNLABELED
        num_images, num_labelled = len(labels), int(is_labelled.sum())
        order = torch.where(is_labelled, labels, labels.max() + 1).argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(num_images)
        counts = torch.bincount(labels[is_labelled], minlength=1)
        starts = counts.cumsum(0) - counts
        known = labels.clamp(min=0)
        skipped = torch.where(is_labelled, counts[known], 1)
        choices = torch.where(is_labelled, num_labelled, num_images) - skipped
        if choices.min() < 1:
            raise UsageError(
                "`crd` compares images of different classes, and the training images are of one class",
                hint="train on images of two classes or more, or choose another method: `icdctl list methods`",
            )
        tables = {"order": order, "skipped": skipped, "choices": choices}
        tables["first"] = torch.where(is_labelled, starts[known], place)
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("num_drawn", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.randint(2**62, ()))
        self._count = count

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B] int64 -> [B, S] int64, other ones at each call."""
        places = torch.arange(len(images) * self._count, device=images.device).view(len(images), self._count)
        numbers = hashed(places + hashed(self.num_drawn + hashed(self.seed)))
        self.num_drawn += 1
        # 32 random bits times the number of choices, without the lowest 32 bits: uniform to 1 part in 2^32 / choices.
        choice = ((numbers & _LOW) * self.choices[images, None]) >> 32
        choice = choice + (choice >= self.first[images, None]) * self.skipped[images, None]
        drawn: Tensor = self.order[choice]
        return drawn


def hashed(numbers: Tensor) -> Tensor:
    """A permutation of the 64-bit integers that looks random: the output function of SplitMix64.

    Source: Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195
    """
    numbers = numbers + -0x61C8864680B583EB
    numbers = (numbers ^ _shifted(numbers, 30)) * -0x40A7B892E31B1A47
    numbers = (numbers ^ _shifted(numbers, 27)) * -0x6B2FB644ECCEEE15
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Bits moved to the right, zeros from the left, where `>>` repeats the sign."""
    moved: Tensor = (numbers >> bits) & (2 ** (64 - bits) - 1)
    return moved
