"""Runs: from frozen configurations to run folders. Many students may share a process, a data stream and a teacher."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from icdctl.config.run import RunConfig
from icdctl.data import Dataset, Views
from icdctl.engine.compiled import Compiler
from icdctl.engine.device import backend_settings, resolve_device, resolve_precision, wait_for
from icdctl.engine.device_loop import Loop
from icdctl.engine.observer import Observer, SilentObserver
from icdctl.engine.precision import choose_teacher_precision
from icdctl.engine.run_folder import claimed
from icdctl.engine.student_run import Member, NotFiniteError, Place, RunResult, make_place
from icdctl.engine.teacher import Answer, InlineTeacher, Teacher
from icdctl.engine.teacher_cache import Demand, choose_mode, make_teacher, plan_table
from icdctl.errors import IcdctlError, UsageError
from icdctl.methods import METHODS
from icdctl.models import Classifier

_SHARED = ("command", "batch_size", "drop_last", "device", "precision", "deterministic", "time_limit_seconds")
_SHARED_TEACHER = ("teacher", "teacher_sha256", "teacher_mode", "teacher_precision")


@dataclass(frozen=True)
class Failure:
    """A student that did not get through, while the others went on."""

    config: RunConfig
    error: IcdctlError


class Interrupted(IcdctlError):
    """A person or the system stopped the run; its state is saved."""


def run_together(
    configs: Sequence[RunConfig],
    dataset: Dataset,
    *,
    teacher: Classifier | None,
    teacher_origin: Mapping[str, str | None] | None = None,
    students: Sequence[Classifier | None] | None = None,
    resume: bool = False,
    wait: bool = False,
    observer: Observer | None = None,
) -> list[RunResult | Failure]:
    """Train many students in one process: each as if it were alone, with a run folder of its own.

    Students of the same seed see the same images in the same order, which are prepared once and shown to the teacher
    once. One that fails is given up, and the others go on.

    Args:
        configs: of the runs; `check_together` accepts them.
        dataset: the data that they name.
        teacher: the trained teacher, for methods that have one.
        teacher_origin: source and licence of its weights, for metrics.json.
        students: own modules in place of those that the configurations name.
        resume: start, go on, or finish at once, whatever the state of each of them is.
        wait: for other processes that are at work in the run folders, rather than fail.
        observer: told of the progress.

    Returns:
        A result or a failure for each configuration, in order. One that fails before its first epoch is over leaves no
        run folder.

    Raises:
        UsageError, ArtifactError: the configurations can't be trained together, or a run folder can't be had.
    """
    check_together(configs)
    device = resolve_device(configs[0].device)
    precision = resolve_precision(configs[0].precision, device)
    observer = observer or SilentObserver()
    with ExitStack() as stack:
        # In the same order everywhere, or two processes that wait could wait for each other.
        for config in sorted(configs, key=lambda config: config.out):
            waiting = observer.message if wait else None
            stack.enter_context(claimed(config, resume=resume, waiting=waiting))
        stack.enter_context(backend_settings(device, precision, deterministic=configs[0].deterministic))
        place = make_place(configs[0], dataset, device, precision)
        session = _Session(configs, place, teacher, students or [None] * len(configs), observer)
        return session.train(teacher_origin or {})


def check_together(configs: Sequence[RunConfig]) -> None:
    """Whether runs can share a process: the same images, cut alike, one teacher, one device.

    Raises:
        UsageError: they can't, or two of them would write to one folder.
    """
    for config in configs[1:]:
        for key in _SHARED:
            _check_same(key, configs[0], config)
        if (config.images, config.augmentation) != (configs[0].images, configs[0].augmentation):
            raise UsageError("runs that see different images can't be trained together", hint="start them one by one")
    learning = [config for config in configs if config.teacher is not None]
    for config in learning[1:]:
        for key in _SHARED_TEACHER:
            _check_same(key, learning[0], config)
    folders = [config.out for config in configs]
    twice = next((out for out in folders if folders.count(out) > 1), None)
    if twice is not None:
        raise UsageError(f"two runs would write to `{twice}`", hint="name each method, seed and value once")


def together_key(config: RunConfig) -> tuple[Any, ...]:
    """Equal for runs that `check_together` accepts; a run without a teacher goes with others of its kind."""
    return tuple(getattr(config, key) for key in (*_SHARED, *_SHARED_TEACHER, "images", "augmentation"))


def _check_same(key: str, first: RunConfig, other: RunConfig) -> None:
    if getattr(first, key) != getattr(other, key):
        raise UsageError(
            f"runs with `{key}` {getattr(first, key)} and {getattr(other, key)} can't be trained together",
            hint="start them one by one",
        )


class _Session:
    """One attempt at some runs."""

    def __init__(
        self,
        configs: Sequence[RunConfig],
        place: Place,
        teacher: Classifier | None,
        students: Sequence[Classifier | None],
        observer: Observer,
    ) -> None:
        self.place, self.observer = place, observer
        self.teacher_model = teacher
        compiler = Compiler(observer.message)
        self.members = [
            Member(config, place, student, compiler) for config, student in zip(configs, students, strict=True)
        ]
        self.failures: dict[int, Failure] = {}
        self._loop: Loop | None = None

    def train(self, teacher_origin: Mapping[str, str | None]) -> list[RunResult | Failure]:
        """All epochs that are left, then the results."""
        try:
            teacher = self._teacher()
            for member in self.members:
                member.begin()
            self._say_where_it_goes_on()
            waiting = self._waiting()
            if waiting:
                self.observer.begin("training", sum(member.images_left for member in waiting))
            is_in_time = self._train_all(teacher)
        except KeyboardInterrupt as interrupt:
            member = min(self.members, key=lambda member: member.progress.epoch)
            raise _interrupted(interrupt, member, num_runs=len(self.members)) from interrupt
        finally:
            for member in self.members:
                with self._given_up(member, []):
                    member.writer.wait()
        if not is_in_time and self._waiting():
            done = min(member.progress.epoch for member in self._waiting())
            self.observer.message(f"time limit: stopped after epoch {done}; `--resume` goes on")
        return [self._result(number, teacher_origin) for number in range(len(self.members))]

    def _result(self, number: int, teacher_origin: Mapping[str, str | None]) -> RunResult | Failure:
        """What a student leaves; where that can't be written, it is its own failure."""
        member = self.members[number]
        if number not in self.failures:
            if not member.progress.done:
                return member.unfinished()
            with self._given_up(member, []):
                origin = teacher_origin if member.config.teacher else {}
                return member.finish(origin, num_students=len(self.members))
        return self.failures[number]

    def _waiting(self) -> list[Member]:
        """Those that have not failed and are not done."""
        failed = set(self.failures)
        return [
            member for number, member in enumerate(self.members) if number not in failed and not member.progress.done
        ]

    def _say_where_it_goes_on(self) -> None:
        for member in self.members:
            progress, config = member.progress, member.config
            if progress.epoch and not progress.done:
                name = "" if len(self.members) == 1 else f"`{member.out.name}`: "
                self.observer.message(f"{name}going on after epoch {progress.epoch} of {config.epochs}")

    def _train_all(self, teacher: Teacher | None) -> bool:
        """Epoch after epoch, the ones that lag behind first; False where the time is up before the end."""
        started = time.perf_counter()
        limit = self.members[0].config.time_limit_seconds
        while waiting := self._waiting():
            epoch_started = time.perf_counter()
            epoch = min(member.progress.epoch for member in waiting)
            due = [member for member in waiting if member.progress.epoch == epoch]
            for seed in dict.fromkeys(member.config.seed for member in due):
                self._stream([member for member in due if member.config.seed == seed], seed, epoch + 1, teacher)
            now = time.perf_counter()
            if self._waiting() and limit is not None and 2 * now - started - epoch_started > limit:
                return False
        return True

    def _stream(self, members: list[Member], seed: int, epoch: int, teacher: Teacher | None) -> None:
        """One epoch of the students that see the same images in the same order."""
        place, batch_size = self.place, self.place.batch_size
        started = time.perf_counter()
        drawn = place.store.epoch(seed=seed, epoch=epoch)
        for member in members:
            member.start_epoch()
        running = list(members)
        # Random augmentation is drawn on the CPU, step by step.
        if place.by_position and drawn.key is None:
            self._steps_by_position(running, drawn, teacher)
        else:
            self._steps_one_by_one(running, drawn, teacher)
        seconds = (time.perf_counter() - started) / len(members)
        for member in list(running):
            with self._given_up(member, running):
                try:
                    row = member.end_epoch(drawn.index, seconds)
                except NotFiniteError as error:
                    views = drawn.to(place.device)
                    part = views[error.index * batch_size : (error.index + 1) * batch_size]
                    member.keep_replay(error.index, part, _asked_again(teacher, error.index, views, place))
                    raise
                self.observer.epoch(row, member.config.epochs)
        if self._loop is not None:
            for member in members:
                if member.progress.done or member not in running:
                    self._loop.forget(member.step)

    def _steps_one_by_one(self, running: list[Member], drawn: Views, teacher: Teacher | None) -> None:
        """The steps of an epoch, driven by the host; whoever fails leaves `running`."""
        place, batch_size = self.place, self.place.batch_size
        views = drawn.to(place.device)
        answers = None if teacher is None else teacher.epoch(views, batch_size)
        for index in range(max(member.steps_of_epoch for member in running)):
            part = views[index * batch_size : (index + 1) * batch_size]
            images, labels = place.store.inputs(part), place.labels[part.index]
            answer = answers(index, part, images) if answers is not None else None
            for member in [member for member in running if index < member.steps_of_epoch]:
                with self._given_up(member, running):
                    try:
                        member.train(index, part, images, labels, answer)
                    except NotFiniteError:
                        member.keep_replay(index, part, answer)
                        raise
                self.observer.advance(len(part))

    def _steps_by_position(self, members: list[Member], drawn: Views, teacher: Teacher | None) -> None:
        """The steps of an epoch, driven from the device, which is waited for once, at the end."""
        place = self.place
        if self._loop is None:
            self._loop = Loop(place.store, place.labels, place.batch_size, teacher, self.observer.message)
        self._loop.start_epoch(drawn)
        for index in range(max(member.steps_of_epoch for member in members)):
            self.observer.advance(step_by_position(self._loop, members, index))
        wait_for(place.device)

    @contextmanager
    def _given_up(self, member: Member, running: list[Member]) -> Iterator[None]:
        """Let a student's failure be its own, where there are others."""
        try:
            yield
        except IcdctlError as error:
            self.failures[self.members.index(member)] = Failure(member.config, error)
            if member in running:
                running.remove(member)

    def _teacher(self) -> Teacher | None:
        """The teacher in the mode and the precision that were decided, now or when the runs began."""
        waiting = [member for member in self._waiting() if METHODS[member.config.method].needs_teacher]
        if self.teacher_model is None or not waiting:
            return None
        place, config = self.place, waiting[0].config
        wanted = {key: _decided(key, waiting) for key in ("teacher_precision", "teacher_mode")}
        num_streams = len({member.config.seed for member in waiting})
        left = max(member.images_left for member in waiting)
        demand = Demand(
            num_streams=num_streams,
            num_images=num_streams * left,
            needs_cells=any(METHODS[member.config.method].needs_patches for member in waiting),
            num_classes=place.dataset.num_classes,
            deterministic=config.deterministic,
        )
        num_forwards = demand.num_images
        if place.store.num_views is not None and wanted["teacher_mode"] in ("auto", "cache"):
            num_forwards = min(num_forwards, place.num_images * place.store.num_views)
        precision = choose_teacher_precision(
            wanted["teacher_precision"],
            self.teacher_model,
            place.store,
            num_images=num_forwards,
            deterministic=config.deterministic,
        )
        table = plan_table(
            place.store,
            demand,
            place.dataset,
            # Of a module that was handed over the weights are known, but not the code: nothing is kept for it.
            teacher_sha256=(config.teacher_weights and config.teacher_sha256) or "",
            precision=precision,
            teacher=config.teacher or "",
        )
        mode = choose_mode(wanted["teacher_mode"], table, demand, place.device)
        for member in waiting:
            update = {"teacher_mode": mode, "teacher_precision": precision}
            member.config = member.config.model_copy(update=update)
        inline = InlineTeacher(
            self.teacher_model, needs_cells=demand.needs_cells, device=place.device, precision=precision
        )
        return make_teacher(
            mode,
            inline,
            place.store,
            table,
            begin=self.observer.begin,
            advance=self.observer.advance,
            message=self.observer.message,
        )


def step_by_position(loop: Loop, members: Sequence[Member], index: int) -> int:
    """One step of those whose epoch has so many, driven from the device, which is not waited for.

    Args:
        loop: at this step of an epoch.
        members: of one data stream.
        index: of the step in its epoch, from 0.

    Returns:
        How many images they saw together.
    """
    learning = [member for member in members if index < member.steps_of_epoch]
    place = learning[0].place
    size = min(place.batch_size, place.num_images - index * place.batch_size)
    for member in learning:
        member.set_learning_rate(index)
    loop.step(index, [member.step for member in learning], size)
    return size * len(learning)


def _decided(key: str, members: Sequence[Member]) -> str:
    """What was asked for, or what was decided when one of the runs began: it is kept to the end.

    Raises:
        UsageError: another value is asked for than the one that a run began with.
    """
    wanted = str(getattr(members[0].config, key))
    begun = [member for member in members if member.progress.epoch and not member.progress.done]
    held = {str(getattr(member.progress, key)) for member in begun} - {"auto"}
    if not held:
        return wanted
    if len(held) > 1 or wanted not in ("auto", *held):
        flag = f"--{key.replace('_', '-')}"
        raise UsageError(
            f"these runs began with `{flag} {' and '.join(sorted(held))}`, now `{wanted}` is asked for",
            hint=f"leave `{flag}` out" if len(held) == 1 else "go on with them one by one",
        )
    return held.pop()


def _asked_again(teacher: Teacher | None, index: int, views: Views, place: Place) -> Answer | None:
    """The teacher's answer to a batch that is over; None where it can't be had a second time."""
    if teacher is None:
        return None
    part = views[index * place.batch_size : (index + 1) * place.batch_size]
    try:
        return teacher.epoch(views, place.batch_size)(index, part, place.store.inputs(part))
    except RuntimeError:
        return None


def _interrupted(interrupt: KeyboardInterrupt, member: Member, *, num_runs: int) -> Interrupted:
    """What is said when runs are stopped from outside, by the one that is the least far."""
    epoch, config = member.progress.epoch, member.config
    state = f"the state after epoch {epoch} of {config.epochs} is saved" if epoch else "no epoch was finished"
    again = f"`--resume --out {config.out}`" if num_runs == 1 else "`--resume`"
    error = Interrupted(f"interrupted; {state}", hint=f"go on with the same command and {again}")
    error.exit_code = 143 if interrupt.args else 130
    return error
