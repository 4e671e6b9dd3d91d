"""The training loop of a CUDA device: a step of all students is one CUDA graph, and the host only launches it.

Everything that a step reads or changes lies in memory that stays: the images, the epoch's views, the counter that says
which batch is due, the teacher's weights or answers, learning rates, weights, optimisers' states and logs. So the step
is an ordinary function of no arguments. It is captured once for each set of students and size of batch, and where that
fails it is called instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from icdctl.data import ImageStore, Views
from icdctl.engine.device import beside, is_device_driven, join, side_stream
from icdctl.engine.feed import Feed
from icdctl.engine.step import TrainingStep
from icdctl.engine.teacher import Teacher
from icdctl.models.external import Adapted

_REHEARSALS = 3
"""Steps that run before a capture, in which libraries choose their algorithms and take their workspaces."""


class DeviceLoop:
    """Steps of students that see the same images in the same order.

    Where a capture fails, compiled students become plain ones; where it fails again, graphs become plain calls.
    """

    def __init__(
        self,
        store: ImageStore,
        labels: Tensor,
        batch_size: int,
        teacher: Teacher | None,
        message: Callable[[str], None],
    ) -> None:
        """
        Args:
            store: the training images.
            labels: [N] int64 on the device.
            batch_size: images of a full batch.
            teacher: the teacher of those students that have one.
            message: receives one warning where steps can't be captured.
        """
        self._store, self._labels, self._message = store, labels, message
        self._feed = Feed(batch_size, store.device)
        self._answers = None if teacher is None else teacher.device_driven(self._feed)
        self._can_capture = is_device_driven(store.device)
        self._stream = side_stream(store.device)
        self._branches: list[torch.cuda.Stream | None] = []
        # Graphs share their memory: they run one after the other, and nothing in it outlives a step.
        self._pool = self._new_pool()
        self._steps: dict[tuple[tuple[int, ...], int], Callable[[], object]] = {}

    @property
    def captures(self) -> bool:
        """Whether steps become graphs: False once a capture has failed."""
        return self._can_capture

    def start_epoch(self, drawn: Views, *, first_step: int = 0) -> None:
        """Go to the first step of an epoch; arguments as for `Feed.load`."""
        self._feed.load(drawn, first_step=first_step)

    def step(self, index: int, students: Sequence[TrainingStep], size: int) -> None:
        """Run the step that is due for all these students.

        Args:
            index: number of the step in its epoch, from 0; one more than at the last call.
            students: the students that learn.
            size: number of images of the batch: a full one, or what is left of the epoch.
        """
        if self._answers is not None:
            self._answers.prepare(index)
        key = (tuple(id(student) for student in students), size)
        if key not in self._steps:
            self._steps[key] = self._made(list(students), size)
        self._steps[key]()

    def forget(self, student: TrainingStep) -> None:
        """Release the graphs of a student that is done or has failed."""
        self._steps = {key: step for key, step in self._steps.items() if id(student) not in key[0]}
        self._pool = self._new_pool()

    def _new_pool(self) -> Any:
        """Torch's name for memory that no graph has yet; one that no graph uses any more can't be captured into."""
        return None if self._stream is None else torch.cuda.graph_pool_handle()

    def _made(self, students: list[TrainingStep], size: int) -> Callable[[], object]:
        """The step as a function: a graph's replay, or the plain function.

        A module from outside runs as it is: its Python may do another thing at each call, and a graph would repeat the
        first.
        """
        plain = partial(self._run, students, size, [None] * len(students))
        if not self._can_capture or any(isinstance(student.student, Adapted) for student in students):
            return plain
        while len(self._branches) < len(students):
            self._branches.append(side_stream(self._store.device))
        branches = self._branches[: len(students)] if len(students) > 1 else [None]
        step = partial(self._run, students, size, branches)
        state = [self._feed.position, *(tensor for student in students for tensor in student.state)]
        try:
            try:
                with beside(self._stream):
                    rehearse(step, state)
            finally:
                join(self._stream)
            return record(step, self._stream, self._pool)
        except RuntimeError as error:
            compilers = {student.compiler for student in students if student.compiler is not None}
            compilers = {compiler for compiler in compilers if compiler.is_on}
            if not compilers:
                self._can_capture = False
                reason = (str(_cause(error)).splitlines() or ["no reason given"])[0]
                self._message(f"warning: steps run without a CUDA graph, slower, with the same numbers: {reason}")
                return plain
            for compiler in compilers:
                compiler.give_up(_cause(error))
        # Try again without torch.compile: what was compiled may be what can't be captured.
        self._pool = self._new_pool()
        return self._made(students, size)

    def _run(self, students: list[TrainingStep], size: int, branches: Sequence[torch.cuda.Stream | None]) -> None:
        """One step: the batch and the teacher's answer, then each student on its branch; nothing looks at a value."""
        views = self._feed.batch(size)
        images, labels = self._store.inputs(views), self._labels[views.index]
        answer = None if self._answers is None else self._answers(views, images)
        try:
            for student, branch in zip(students, branches, strict=True):
                with beside(branch):
                    student(self._feed.position, images, labels, answer, views.index)
        finally:  # where one fails, the work of the others must be undone too, and only after its end
            for branch in branches:
                join(branch)
        self._feed.position += 1


def _cause(error: Exception) -> Exception:
    """The first error of a capture: after it, everything on its streams fails too, until the capture ends."""
    while "previous error during capture" in str(error) and isinstance(error.__context__, Exception):
        error = error.__context__
    return error


@torch.no_grad()
def _restore(state: list[Tensor], saved: list[Tensor]) -> None:
    for tensor, before in zip(state, saved, strict=True):
        tensor.copy_(before)


def rehearse(step: Callable[[], None], state: list[Tensor]) -> None:
    """Run a step several times, and undo it each time: the next one starts from the same state.

    Args:
        step: the function.
        state: every tensor that it changes and then reads again.
    """
    saved = [tensor.detach().clone() for tensor in state]
    for _ in range(_REHEARSALS):
        try:
            step()
        finally:
            _restore(state, saved)  # each time, because after an epoch's last step there is no next batch


def record(step: Callable[[], None], stream: torch.cuda.Stream | None, pool: Any) -> Callable[[], object]:
    """Capture a rehearsed step without running it, and return what replays it on the current stream.

    Args:
        step: launches on the stream that is current, or on others between a fork from it and a join.
        stream: where it was rehearsed.
        pool: torch's name for memory that the step may use for what it makes.

    Raises:
        RuntimeError: something in it can't be captured, or there is no CUDA.
    """
    graph = torch.cuda.CUDAGraph()
    # Around it the stream once more: where a capture fails, torch before 2.15 leaves its stream the current one.
    # Other threads (a checkpoint being written) may call the driver meanwhile: that does not concern this capture.
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        step()
    return graph.replay
