"""A frozen teacher that answers views of training images with logits.

Whether it computes an answer now, some steps ahead or did so long ago is its own business; `icdctl.engine.answers`
chooses. Shapes: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from icdctl import methods
from icdctl.data import ImageStore, Views
from icdctl.models import Classifier, fold_batch_norms

TeacherPrecision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUPER_BATCH = 256
"""Images that a teacher sees at a time where it need not keep to the student's batches."""
_STEPS_AHEAD = 16
_CPU_CHUNK = 32
"""Images whose activations stay in a CPU's caches from one layer to the next; the answers have the same bits."""


class Answer(NamedTuple):
    """What a teacher says of a batch; no gradient leads into it."""

    logits: Tensor
    """[B, K] float32."""
    cells: Tensor | None
    """[B, K, 4, 4] float32, the logits of the cells of the image, for methods that read patches."""


Answers = Callable[[int, Views, Tensor], Answer]
"""(step of the epoch, its views, their pixels [B, 3, H, W]) -> the answer, asked for in the order of the steps."""


class Teacher(Protocol):
    """Answers any views of the training images."""

    def epoch(self, views: Views, batch_size: int) -> Answers:
        """
        Args:
            views: of the whole epoch, in order, on the device.
            batch_size: how many of them a step has.
        """


class InlineTeacher:
    """Runs the network on each batch, in eval mode, batch norms folded into the convolutions."""

    def __init__(
        self,
        model: Classifier,
        *,
        needs_cells: bool,
        device: torch.device,
        precision: TeacherPrecision = "fp32",
    ) -> None:
        """
        Args:
            model: the trained teacher; it is copied, not changed.
            needs_cells: whether any student's method reads patches.
            device: where it runs.
            precision: of its weights and activations.
        """
        folded = fold_batch_norms(model).to(device).to(memory_format=torch.channels_last)
        self._dtype = None if precision == "fp32" else DTYPES[precision]
        self._model = folded if self._dtype is None else folded.to(self._dtype)
        self.precision = precision
        self.needs_cells = needs_cells

    def epoch(self, views: Views, batch_size: int) -> Answers:
        """See `Teacher`."""
        return lambda index, part, images: self(images)

    def __call__(self, images: Tensor) -> Answer:
        """The answer for pixels alone: [B, 3, H, W]."""
        if images.device.type != "cpu" or len(images) <= _CPU_CHUNK:
            return self._answer(images)
        parts = [self._answer(chunk) for chunk in torch.split(images, _CPU_CHUNK)]
        cells = [part.cells for part in parts if part.cells is not None]
        return Answer(torch.cat([part.logits for part in parts]), torch.cat(cells) if cells else None)

    def _answer(self, images: Tensor) -> Answer:
        with torch.no_grad():
            outputs = self._model.outputs(images if self._dtype is None else images.to(self._dtype))
            cells = methods.cell_logits(outputs.feature_map, self._model.head) if self.needs_cells else None
        if self._dtype is None:
            return Answer(outputs.logits, cells)
        return Answer(outputs.logits.float(), None if cells is None else cells.float())

    def of_views(self, store: ImageStore, views: Views) -> Answer:
        """The answer for many views, a few at a time: the views may be anywhere, the answer is on the device."""
        parts = []
        for first in range(0, len(views), SUPER_BATCH):
            parts.append(self(store.inputs(views[first : first + SUPER_BATCH].to(store.device))))
        cells = [part.cells for part in parts if part.cells is not None]
        return Answer(torch.cat([part.logits for part in parts]), torch.cat(cells) if cells else None)


class AheadTeacher:
    """Runs the network over the views of several coming steps at once, while the students train on the last ones.

    On CUDA it has a stream of its own, one chunk of steps ahead; on a CPU the chunk is computed when its first step is
    due. The answers are those of `InlineTeacher` up to the rounding of another batch size.
    """

    def __init__(self, inline: InlineTeacher, store: ImageStore) -> None:
        self._inline = inline
        self._store = store
        self._stream = (
            torch.cuda.Stream(store.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            if store.device.type == "cuda"
            else None
        )

    def epoch(self, views: Views, batch_size: int) -> Answers:
        """See `Teacher`."""
        chunk = _STEPS_AHEAD * batch_size
        computed: dict[int, tuple[Answer, torch.cuda.Event | None]] = {}

        def compute(number: int) -> None:
            part = views[number * chunk : (number + 1) * chunk]
            if len(part):
                with self._beside():
                    answer = self._inline.of_views(self._store, part)
                    computed[number] = (answer, self._finished())

        def answer(index: int, part: Views, images: Tensor) -> Answer:
            number, step = divmod(index, _STEPS_AHEAD)
            if number not in computed:
                compute(number)
            if step == 0:
                computed.pop(number - 1, None)
                if self._stream is not None:
                    compute(number + 1)
            ready, event = computed[number]
            if event is not None:
                event.wait()
            rows = slice(step * batch_size, step * batch_size + len(part))
            return Answer(ready.logits[rows], None if ready.cells is None else ready.cells[rows])

        return answer

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of its own, after what the students' stream has asked for so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._store.device))
        with torch.cuda.stream(self._stream):
            yield

    def _finished(self) -> torch.cuda.Event | None:
        """A mark behind what was just asked for, which the students' stream can wait for."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record(self._stream)
        return event


class CachedTeacher:
    """Has seen every view of every image once, and looks its answer up."""

    def __init__(self, store: ImageStore, logits: Tensor, cells: Tensor | None) -> None:
        """
        Args:
            store: the training images; its numbers of views are the rows of the tables.
            logits: [V, K], anywhere, in any float type.
            cells: [V, K, 4, 4], or None where no method reads patches.
        """
        self._store = store
        self._logits = logits
        self._cells = cells

    def epoch(self, views: Views, batch_size: int) -> Answers:
        """See `Teacher`."""
        return lambda index, part, images: self.of_views(part)

    def of_views(self, views: Views) -> Answer:
        """The answer for views on the store's device, there too."""
        rows = self._store.numbers(views)
        cells = None if self._cells is None else self._taken(self._cells, rows)
        return Answer(self._taken(self._logits, rows), cells)

    def _taken(self, table: Tensor, rows: Tensor) -> Tensor:
        return table[rows.to(table.device)].to(self._store.device, non_blocking=True).float()
