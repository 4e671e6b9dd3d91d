"""The steps of students that see the same images in the same order: host-driven, or device-driven."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from icdctl.data import Views
from icdctl.engine.device import wait_for
from icdctl.engine.device_loop import DeviceLoop
from icdctl.engine.shared_data import SharedData
from icdctl.engine.student_run import NotFiniteError, StudentRun
from icdctl.engine.teacher import Answer, Answers, Teacher

Guard = Callable[[StudentRun], AbstractContextManager[object]]
"""A context around each student's share of a host-driven step."""


def unguarded(student: StudentRun) -> AbstractContextManager[object]:
    """A `Guard` that lets every failure through."""
    return nullcontext()


class Stepping:
    """Steps of students of one data stream, epoch after epoch."""

    def __init__(
        self, shared: SharedData, teacher: Teacher | None, message: Callable[[str], None], *, num_views: int
    ) -> None:
        """
        Args:
            shared: the images.
            teacher: the teacher of those students that have one.
            message: receives a warning where steps can't be captured in a graph.
            num_views: number of views of each image in a step.
        """
        self._shared, self._teacher, self._message = shared, teacher, message
        self._num_views, self._batch_size = num_views, num_views * shared.batch_size
        self._loop: DeviceLoop | None = None
        self._views: Views | None = None
        self._answers: Answers | None = None

    @property
    def captures(self) -> bool:
        """Whether a step is one CUDA graph."""
        return self._loop is not None and self._loop.captures

    def start_epoch(self, *, seed: int, epoch: int, first_step: int = 0) -> Views:
        """Go to the first step of an epoch.

        Args:
            seed: the seed of the runs.
            epoch: counted from 1.
            first_step: number of the step to go to, where an epoch is continued.

        Returns:
            The views of the epoch, on the CPU.
        """
        shared = self._shared
        drawn = shared.store.epoch_of_many(
            seed=seed, epoch=epoch, num_views=self._num_views, batch_size=shared.batch_size
        )
        # Random augmentation is drawn on the CPU, step by step.
        if shared.device_driven and drawn.key is None:
            if self._loop is None:
                self._loop = DeviceLoop(shared.store, shared.labels, self._batch_size, self._teacher, self._message)
            self._loop.start_epoch(drawn, first_step=first_step)
            return drawn
        self._views = drawn.to(shared.device)
        self._answers = None if self._teacher is None else self._teacher.epoch(self._views, self._batch_size)
        return drawn

    def step(self, index: int, students: Sequence[StudentRun], guard: Guard = unguarded) -> int:
        """Run one step of those students whose epoch has so many; the host does not wait for the device.

        Args:
            index: number of the step in its epoch, from 0; one more than at the last call.
            students: the students that learn.
            guard: decides what a student's failure leads to.

        Returns:
            Number of images that they saw together.
        """
        learning = [student for student in students if student.first_step <= index < student.steps_of_epoch]
        if not learning:
            return 0
        if self._loop is not None:
            size = min(self._shared.batch_size, self._shared.num_images - index * self._shared.batch_size)
            for student in learning:
                student.set_learning_rate(index)
            self._loop.step(index, [student.step for student in learning], size * self._num_views)
            return size * len(learning)
        part, images, labels, answer = self._batch(index)
        for student in learning:
            with guard(student):
                try:
                    student.train(index, part, images, labels, answer)
                except NotFiniteError:
                    student.keep_replay(index, part, answer)
                    raise
        return len(part) // self._num_views * len(learning)

    def _batch(self, index: int) -> tuple[Views, Tensor, Tensor, Answer | None]:
        """Views, pixels, labels and the teacher's answer of a host-driven step."""
        shared = self._shared
        assert self._views is not None
        part = self._views[index * self._batch_size : (index + 1) * self._batch_size]
        images, labels = shared.store.inputs(part), shared.labels[part.index]
        answer = None if self._answers is None else self._answers(index, part, images)
        return part, images, labels, answer

    def batch_again(self, index: int, drawn: Views) -> tuple[Views, Answer | None]:
        """The views of a step that is over, and the teacher's answer where it can be computed a second time."""
        shared = self._shared
        views = drawn.to(shared.device)
        part = views[index * self._batch_size : (index + 1) * self._batch_size]
        if self._teacher is None:
            return part, None
        try:
            return part, self._teacher.epoch(views, self._batch_size)(index, part, shared.store.inputs(part))
        except RuntimeError:
            return part, None

    def finish_epoch(self) -> None:
        """Wait for the device."""
        if self._loop is not None:
            wait_for(self._shared.device)

    def forget(self, student: StudentRun) -> None:
        """Release what is held for a student that is done or has failed."""
        if self._loop is not None:
            self._loop.forget(student.step)
