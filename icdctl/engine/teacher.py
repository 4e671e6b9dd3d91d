"""A frozen teacher that answers views of training images with the tensors that methods read.

`icdctl.engine.teacher_cache` chooses whether answers are computed now, some steps ahead, or come from a cache.
Shapes: B images, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from icdctl import methods
from icdctl.data import ImageStore, Views
from icdctl.engine.device import beside, join, side_stream
from icdctl.engine.feed import Feed
from icdctl.models import Classifier, fold_batch_norms

TeacherPrecision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUPER_BATCH = 256
"""Images that a teacher sees at a time where it need not keep to the student's batches."""
_STEPS_AHEAD = 16
_CPU_CHUNK = 32
"""Images whose activations stay in a CPU's caches from one layer to the next; the answers have the same bits."""


Answer = Mapping[str, Tensor]
"""The answer of a teacher to a batch: [B, ...] float32 by the names of `icdctl.methods.reads`; without gradient."""

Answers = Callable[[int, Views, Tensor], Answer]
"""(step of the epoch, its views, their pixels [B, 3, H, W]) -> the answer, called in the order of the steps."""


class DeviceDrivenAnswers(Protocol):
    """Answers to the batch that a feed says is due, for steps that a graph may hold."""

    def prepare(self, index: int) -> None:
        """Called by the host before each step, in order; it does not wait for the device."""

    def __call__(self, views: Views, images: Tensor) -> Answer:
        """Called inside the step, with its views and their pixels: the same work at every step, without the host."""


class Teacher(Protocol):
    """Answers any views of the training images."""

    def epoch(self, views: Views, batch_size: int) -> Answers:
        """
        Args:
            views: the views of the whole epoch, in order, on the device.
            batch_size: number of views in a step.
        """

    def device_driven(self, feed: Feed) -> DeviceDrivenAnswers:
        """Answers for steps that read their batches from a feed, for all epochs that will be loaded into it."""


class _AtOnce:
    """Answers that are computed or looked up inside the step."""

    def __init__(self, answer: Callable[[Views, Tensor], Answer]) -> None:
        self._answer = answer

    def prepare(self, index: int) -> None:
        """See `DeviceDrivenAnswers`; nothing to prepare."""

    def __call__(self, views: Views, images: Tensor) -> Answer:
        """See `DeviceDrivenAnswers`."""
        return self._answer(views, images)


class _Buffered:
    """Answers to some steps at once, made beside the students' stream: half of a buffer fills, the other is read."""

    def __init__(self, feed: Feed, of_views: Callable[[Views], Answer], *, from_cpu: bool) -> None:
        """
        Args:
            feed: says what is due.
            of_views: answers many views, on the device.
            from_cpu: `of_views` reads the views on the CPU, not on the device.
        """
        self._feed, self._of_views, self._from_cpu = feed, of_views, from_cpu
        self._stream = side_stream(feed.device)
        self._held: Answer | None = None
        self._chunk = -1
        """Number of the chunk that is being read."""

    def prepare(self, index: int) -> None:
        """See `DeviceDrivenAnswers`."""
        number, step = divmod(index, _STEPS_AHEAD)
        if step and number == self._chunk:
            return
        is_filled = step == 0 and 0 < number == self._chunk + 1
        if not is_filled:  # at the start of an epoch, or where one is continued
            self._fill(number)
        self._chunk = number
        join(self._stream)
        self._fill(number + 1)

    def _fill(self, number: int) -> None:
        """Answer the chunk with this number, once the students are done with the one before the last."""
        chunk = _STEPS_AHEAD * self._feed.batch_size
        part = (self._feed.drawn if self._from_cpu else self._feed.views)[number * chunk : (number + 1) * chunk]
        if not len(part):
            return
        with beside(self._stream):
            answer = self._of_views(part)
            if self._held is None:
                self._held = {name: _halves(tensor, chunk) for name, tensor in answer.items()}
            first = number % 2 * chunk
            for name, tensor in answer.items():
                self._held[name][first : first + len(part)].copy_(tensor)

    def __call__(self, views: Views, images: Tensor) -> Answer:
        """See `DeviceDrivenAnswers`."""
        assert self._held is not None
        rows = self._feed.rows(len(views), cycle=2 * _STEPS_AHEAD)
        return {name: tensor[rows] for name, tensor in self._held.items()}


def _halves(like: Tensor, chunk: int) -> Tensor:
    """Memory for the answers to two chunks."""
    return like.new_zeros((2 * chunk, *like.shape[1:]))


class InlineTeacher:
    """Runs the network on each batch: in eval mode, batch norms folded into the convolutions, unless a method wants
    a teacher that normalises with the statistics of the batch.
    """

    def __init__(
        self,
        model: Classifier,
        *,
        reads: Collection[str],
        device: torch.device,
        precision: TeacherPrecision = "fp32",
        in_eval_mode: bool = True,
    ) -> None:
        """
        Args:
            model: the trained teacher; it is copied, not changed.
            reads: names of the tensors that any student's method reads, see `icdctl.methods.reads`.
            device: where it runs.
            precision: the precision of its weights and activations.
            in_eval_mode: False to normalise with the statistics of each batch; its own ones then change too.
        """
        held = fold_batch_norms(model) if in_eval_mode else copy.deepcopy(model).requires_grad_(False).train()
        held = held.to(device).to(memory_format=torch.channels_last)
        self._dtype = None if precision == "fp32" else DTYPES[precision]
        self._model = held if self._dtype is None else held.to(self._dtype)
        self._in_eval_mode = in_eval_mode
        self.precision = precision
        self.reads = frozenset(reads)

    def epoch(self, views: Views, batch_size: int) -> Answers:
        """See `Teacher`."""
        return lambda index, part, images: self(images)

    def device_driven(self, feed: Feed) -> DeviceDrivenAnswers:
        """See `Teacher`."""
        return _AtOnce(lambda views, images: self(images))

    def __call__(self, images: Tensor) -> Answer:
        """The answer for pixels alone: [B, 3, H, W]."""
        if images.device.type != "cpu" or len(images) <= _CPU_CHUNK or not self._in_eval_mode:
            return self._answer(images)
        return _joined([self._answer(chunk) for chunk in torch.split(images, _CPU_CHUNK)])

    def _answer(self, images: Tensor) -> Answer:
        with torch.no_grad():
            outputs = self._model.outputs(images if self._dtype is None else images.to(self._dtype))
            answer = methods.read(outputs, self._model.head, self.reads)
        return answer if self._dtype is None else {name: tensor.float() for name, tensor in answer.items()}

    def of_views(self, store: ImageStore, views: Views) -> Answer:
        """The answer for many views, a few at a time: the views may be anywhere, the answer is on the device."""
        firsts = range(0, len(views), SUPER_BATCH)
        return _joined([self(store.inputs(views[first : first + SUPER_BATCH].to(store.device))) for first in firsts])


def _joined(parts: Iterable[Answer]) -> Answer:
    """Answers to one batch after the other as one."""
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class AheadTeacher:
    """Runs the network over the views of several coming steps at once.

    On CUDA that happens while the students train on the ones before; on a CPU when the first of the steps is due. The
    answers are those of `InlineTeacher` up to the rounding of another batch size.
    """

    def __init__(self, inline: InlineTeacher, store: ImageStore) -> None:
        self._inline = inline
        self._store = store

    def epoch(self, views: Views, batch_size: int) -> Answers:
        """See `Teacher`."""
        chunk = _STEPS_AHEAD * batch_size
        computed: dict[int, Answer] = {}

        def answer(index: int, part: Views, images: Tensor) -> Answer:
            number, step = divmod(index, _STEPS_AHEAD)
            if number not in computed:
                computed.clear()
                computed[number] = self._inline.of_views(self._store, views[number * chunk : (number + 1) * chunk])
            ready = computed[number]
            rows = slice(step * batch_size, step * batch_size + len(part))
            return {name: tensor[rows] for name, tensor in ready.items()}

        return answer

    def device_driven(self, feed: Feed) -> DeviceDrivenAnswers:
        """See `Teacher`."""
        return _Buffered(feed, lambda views: self._inline.of_views(self._store, views), from_cpu=False)


class CachedTeacher:
    """Looks answers up in a table that was computed once for every view of every image."""

    def __init__(self, store: ImageStore, tables: Mapping[str, Tensor]) -> None:
        """
        Args:
            store: the training images; its numbers of views are the rows of the tables.
            tables: [V, ...] by the names of `icdctl.methods.reads`, in any float type, all on one device.
        """
        self._store = store
        self._tables = dict(tables)

    def epoch(self, views: Views, batch_size: int) -> Answers:
        """See `Teacher`."""
        return lambda index, part, images: self.of_views(part)

    def device_driven(self, feed: Feed) -> DeviceDrivenAnswers:
        """See `Teacher`; a table that is not on the device is read some steps ahead."""
        if all(table.device.type == feed.device.type for table in self._tables.values()):
            return _AtOnce(lambda views, images: self.of_views(views))
        return _Buffered(feed, self.of_views, from_cpu=True)

    def of_views(self, views: Views) -> Answer:
        """The answer for views anywhere, on the store's device."""
        rows = self._store.numbers(views)
        return {name: self._taken(table, rows) for name, table in self._tables.items()}

    def _taken(self, table: Tensor, rows: Tensor) -> Tensor:
        taken = table[rows.to(table.device)]
        if taken.device.type != self._store.device.type:
            taken = taken.pin_memory()  # unpinned, the copy would wait for the device
        return taken.to(self._store.device, non_blocking=True).float()
