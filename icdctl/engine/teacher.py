"""A frozen teacher that answers views of training images with logits.

Whether it computes an answer now or did so long ago is its own business. Shapes: B images, K classes, P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from icdctl import methods
from icdctl.data import ImageStore, Views
from icdctl.models import Classifier, fold_batch_norms

_CACHE_BATCH = 256


class Answer(NamedTuple):
    """What a teacher says of a batch; no gradient leads into it."""

    logits: Tensor
    """[B, K]."""
    patches: Tensor | None
    """[B, K, P], for methods that read patches."""


class Teacher(Protocol):
    """Answers any views of the training images."""

    def answer(self, views: Views, images: Tensor) -> Answer:
        """
        Args:
            views: which images, cropped and flipped how.
            images: [B, 3, H, W], their pixels as the student sees them.
        """


class InlineTeacher:
    """Runs the network on each batch, in eval mode, batch norms folded into the convolutions."""

    def __init__(self, model: Classifier, *, scales: Sequence[int] | None, device: torch.device) -> None:
        """
        Args:
            model: the trained teacher; it is copied, not changed.
            scales: of the patches; None for methods that read none.
            device: where it runs.
        """
        self._model = fold_batch_norms(model).to(device).to(memory_format=torch.channels_last)
        self._scales = scales

    def answer(self, views: Views, images: Tensor) -> Answer:
        """See `Teacher`; `views` are not read."""
        return self(images)

    def __call__(self, images: Tensor) -> Answer:
        """The answer for pixels alone: [B, 3, H, W]."""
        with torch.no_grad():
            outputs = self._model.outputs(images)
            if self._scales is None:
                return Answer(outputs.logits, None)
            return Answer(outputs.logits, methods.patch_logits(outputs.feature_map, self._model.head, self._scales))


class CachedTeacher:
    """Has seen every image once, and looks its answer up: for recipes in which an image has one view only."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def answer(self, views: Views, images: Tensor) -> Answer:
        """See `Teacher`; `images` are not read."""
        patches = self._answer.patches
        return Answer(self._answer.logits[views.index], None if patches is None else patches[views.index])


def cache_answers(teacher: InlineTeacher, store: ImageStore, *, on_images: Callable[[int], None]) -> CachedTeacher:
    """Ask for every image once, as it is.

    Args:
        teacher: runs the network.
        store: the training images, each with one view.
        on_images: told the number of images after each batch.
    """
    views = store.plain()
    answers = []
    for first in range(0, len(views), _CACHE_BATCH):
        part = views[first : first + _CACHE_BATCH].to(store.device)
        answers.append(teacher(store.inputs(part)))
        on_images(len(part))
    patches = [answer.patches for answer in answers if answer.patches is not None]
    return CachedTeacher(
        Answer(torch.cat([answer.logits for answer in answers]), torch.cat(patches) if patches else None)
    )
