"""Runs: from frozen configurations to run folders. Many students may share a process, a data stream and a teacher."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from icdctl import methods
from icdctl.config.run_config import RunConfig
from icdctl.data import Dataset, Views
from icdctl.engine.compiled import Compiler
from icdctl.engine.device import backend_settings, resolve_device, resolve_precision
from icdctl.engine.observer import Observer, SilentObserver
from icdctl.engine.run_folder import claimed
from icdctl.engine.run_output import RunResult
from icdctl.engine.run_state import RunInputs, RunState
from icdctl.engine.shared_data import SharedData, make_shared_data
from icdctl.engine.stepping import Stepping
from icdctl.engine.student_run import NotFiniteError, StudentRun
from icdctl.engine.teacher import Teacher
from icdctl.engine.teacher_choice import choose_teacher
from icdctl.errors import IcdctlError, UsageError
from icdctl.models import Classifier

_SHARED = (
    "command",
    "batch_size",
    "drop_last",
    "device",
    "precision",
    "deterministic",
    "time_limit_seconds",
    "checkpoint_every",
)
_SHARED_TEACHER = ("teacher", "teacher_sha256", "teacher_mode", "teacher_precision")


@dataclass(frozen=True)
class Failure:
    """A student whose training failed, while the others continued."""

    config: RunConfig
    error: IcdctlError


class Interrupted(IcdctlError):
    """The user or the system stopped the run; its state is saved."""


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
    """Train many students in one process: each as if it were alone, with its own run folder.

    Students of the same seed see the same images in the same order, which are prepared once and shown to the teacher
    once. One that fails is stopped, and the others continue.

    Args:
        configs: the configurations of the runs, which `check_together` accepts.
        dataset: the data that they name.
        teacher: the trained teacher, for methods that have one.
        teacher_origin: source and licence of its weights, for metrics.json.
        students: custom modules in place of the models that the configurations name; None for those.
        resume: continue each run from its last checkpoint, or start it; a finished run returns at once.
        wait: wait for other processes that are at work in the run folders, rather than fail.
        observer: receives the progress.

    Returns:
        A result or a failure for each configuration, in order. One that fails before its first epoch is over leaves no
        run folder.

    Raises:
        UsageError, ArtifactError: the configurations can't be trained together, or a run folder is in use.
    """
    check_together(configs)
    device = resolve_device(configs[0].device)
    precision = resolve_precision(configs[0].precision, device)
    observer = observer or SilentObserver()
    modules = students or [None] * len(configs)
    states: dict[str, RunState] = {}
    with ExitStack() as stack:
        # In the same order in every process: two that wait could otherwise wait for each other.
        for config, module in sorted(zip(configs, modules, strict=True), key=lambda pair: pair[0].out):
            waiting = observer.message if wait else None
            inputs = RunInputs(dataset.sha256, module)
            claim = claimed(config, inputs, resume=resume, waiting=waiting, message=observer.message)
            states[config.out] = stack.enter_context(claim)
        stack.enter_context(backend_settings(device, precision, deterministic=configs[0].deterministic))
        shared = make_shared_data(configs[0], dataset, device, precision)
        session = _Session(configs, shared, teacher, modules, [states[config.out] for config in configs], observer)
        return session.train(teacher_origin or {})


def check_together(configs: Sequence[RunConfig]) -> None:
    """Check that runs can share a process: the same images, augmented alike, one teacher, one device.

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
        if _teacher_in_eval_mode(config) != _teacher_in_eval_mode(learning[0]):
            raise UsageError(
                f"`{learning[0].method}` and `{config.method}` want the teacher in different modes",
                hint="start them one by one",
            )
    folders = [config.out for config in configs]
    twice = next((out for out in folders if folders.count(out) > 1), None)
    if twice is not None:
        raise UsageError(f"two runs would write to `{twice}`", hint="name each method, seed and value once")


def together_key(config: RunConfig) -> tuple[Any, ...]:
    """Equal for runs that `check_together` accepts; a run without a teacher goes with others of its kind."""
    shared = [getattr(config, key) for key in (*_SHARED, *_SHARED_TEACHER, "images", "augmentation")]
    return (*shared, _teacher_in_eval_mode(config))


def _teacher_in_eval_mode(config: RunConfig) -> bool:
    return methods.get(config.method).has_eval_mode_teacher(config.settings)


def _check_same(key: str, first: RunConfig, other: RunConfig) -> None:
    if getattr(first, key) != getattr(other, key):
        raise UsageError(
            f"runs with `{key}` {getattr(first, key)} and {getattr(other, key)} can't be trained together",
            hint="start them one by one",
        )


class _Session:
    """One attempt to train some runs."""

    def __init__(
        self,
        configs: Sequence[RunConfig],
        shared: SharedData,
        teacher: Classifier | None,
        students: Sequence[Classifier | None],
        states: Sequence[RunState],
        observer: Observer,
    ) -> None:
        self.shared, self.observer = shared, observer
        self.teacher_model = teacher
        compiler = Compiler(observer.message)
        self.runs = [
            StudentRun(config, shared, student, teacher, compiler, state=state, message=observer.message)
            for config, student, state in zip(configs, students, states, strict=True)
        ]
        notes = [note for run in self.runs if run.first_weights is not None for note in run.first_weights.notes]
        for note in dict.fromkeys(notes):
            observer.message(note)
        self.failures: dict[int, Failure] = {}
        self._checkpoints = _CheckpointTimer(configs[0])

    def train(self, teacher_origin: Mapping[str, str | None]) -> list[RunResult | Failure]:
        """Train all epochs that are left, then return the results."""
        try:
            teacher = self._teacher()
            for run in self.runs:
                run.begin()
            self._say_where_it_goes_on()
            waiting = self._waiting()
            if waiting:
                self.observer.begin("training", sum(run.images_left for run in waiting))
            is_in_time = self._train_all(teacher)
        except KeyboardInterrupt as interrupt:
            run = min(self.runs, key=lambda run: (run.progress.epoch, run.progress.step_in_epoch))
            raise _interrupted(interrupt, run, num_runs=len(self.runs)) from interrupt
        finally:
            for run in self.runs:
                with self._given_up(run, []):
                    run.output.writer.wait()
        if not is_in_time and self._waiting():
            done = min(run.progress.epoch for run in self._waiting())
            self.observer.message(f"time limit: stopped after epoch {done}; continue with `--resume`")
        return [self._result(number, teacher_origin) for number in range(len(self.runs))]

    def _result(self, number: int, teacher_origin: Mapping[str, str | None]) -> RunResult | Failure:
        """The result of a student; a file that can't be written is that student's failure."""
        run = self.runs[number]
        if number not in self.failures:
            if not run.progress.done:
                return run.unfinished()
            with self._given_up(run, []):
                origin = teacher_origin if run.config.teacher else {}
                return run.finish(origin, num_students=len(self.runs))
        return self.failures[number]

    def _waiting(self) -> list[StudentRun]:
        """Students that have not failed and are not done."""
        failed = set(self.failures)
        return [run for number, run in enumerate(self.runs) if number not in failed and not run.progress.done]

    def _say_where_it_goes_on(self) -> None:
        for run in self.runs:
            progress, config = run.progress, run.config
            if progress.has_begun and not progress.done:
                name = "" if len(self.runs) == 1 else f"`{run.out.name}`: "
                self.observer.message(f"{name}continuing after {progress.shown(config)}")

    def _train_all(self, teacher: Teacher | None) -> bool:
        """Train epoch after epoch, students that lag behind first; return False if the time is up before the end."""
        started = time.perf_counter()
        limit = self.runs[0].config.time_limit_seconds
        steppings = {
            number: Stepping(self.shared, teacher, self.observer.message, num_views=number)
            for number in {run.num_views for run in self.runs}
        }
        while waiting := self._waiting():
            epoch_started = time.perf_counter()
            epoch = min(run.progress.epoch for run in waiting)
            due = [run for run in waiting if run.progress.epoch == epoch]
            for stream in dict.fromkeys(_stream_of(run) for run in due):
                self._stream([run for run in due if _stream_of(run) == stream], epoch + 1, steppings)
            now = time.perf_counter()
            if self._waiting() and limit is not None and 2 * now - started - epoch_started > limit:
                return False
        return True

    def _stream(self, runs: list[StudentRun], epoch: int, steppings: Mapping[int, Stepping]) -> None:
        """One epoch of the students that see the same images in the same order; one that fails is stopped."""
        started = time.perf_counter()
        seed, num_views = _stream_of(runs[0])
        stepping = steppings[num_views]
        for run in runs:
            run.start_epoch()
        running = list(runs)
        first_step = min(run.first_step for run in runs)
        drawn = stepping.start_epoch(seed=seed, epoch=epoch, first_step=first_step)

        def seconds() -> float:
            return (time.perf_counter() - started) / len(runs)

        for index in range(first_step, max(run.steps_of_epoch for run in runs)):
            self.observer.advance(stepping.step(index, running, lambda run: self._given_up(run, running)))
            if self._checkpoints.is_due(index + 1):
                for run in list(running):
                    with self._given_up(run, running), _replay_kept(run, stepping, drawn):
                        run.save_within_epoch(index + 1, drawn.index, seconds())
                self._checkpoints.saved()
        stepping.finish_epoch()
        taken = seconds()
        for run in list(running):
            with self._given_up(run, running), _replay_kept(run, stepping, drawn):
                self.observer.epoch(run.end_epoch(drawn.index, taken), run.config.epochs)
        self._checkpoints.saved()
        for run in runs:
            if run.progress.done or run not in running:
                stepping.forget(run)

    @contextmanager
    def _given_up(self, run: StudentRun, running: list[StudentRun]) -> Iterator[None]:
        """Keep a student's failure from stopping the others."""
        try:
            yield
        except IcdctlError as error:
            self.failures[self.runs.index(run)] = Failure(run.config, error)
            if run in running:
                running.remove(run)

    def _teacher(self) -> Teacher | None:
        """The teacher in the mode and the precision that were decided, now or when the runs began.

        What `auto` decides depends on all runs of the command, not on those that are left: an interruption changes
        nothing.
        """
        learning = [run for run in self.runs if methods.get(run.config.method).needs_teacher]
        waiting = [run for run in self._waiting() if run in learning]
        if self.teacher_model is None or not waiting:
            return None
        wanted = {key: _decided(key, waiting) for key in ("teacher_precision", "teacher_mode")}
        teacher, decided = choose_teacher(
            self.teacher_model,
            [run.config for run in learning],
            self.shared,
            num_images=max(self.shared.images_of(run.limit_steps) for run in learning),
            wanted_mode=wanted["teacher_mode"],
            wanted_precision=wanted["teacher_precision"],
            observer=self.observer,
        )
        for run in waiting:
            run.config = run.config.model_copy(update=decided)
        return teacher


class _CheckpointTimer:
    """Says when the states of all students are to be saved within an epoch."""

    def __init__(self, config: RunConfig) -> None:
        self._steps, self._seconds = config.checkpoint_steps, config.checkpoint_seconds
        self._last = time.perf_counter()

    def is_due(self, num_steps: int) -> bool:
        """Whether to save after so many steps of the epoch."""
        if self._steps is not None:
            return num_steps % self._steps == 0
        return time.perf_counter() - self._last >= self._seconds

    def saved(self) -> None:
        """Called after a save."""
        self._last = time.perf_counter()


@contextmanager
def _replay_kept(run: StudentRun, stepping: Stepping, drawn: Views) -> Iterator[None]:
    """Keep the batch of a step that turns out not to have been finite."""
    try:
        yield
    except NotFiniteError as error:
        run.keep_replay(error.index, *stepping.batch_again(error.index, drawn))
        raise


def _stream_of(run: StudentRun) -> tuple[int, int]:
    """What decides the batches of a run: its seed, and the number of views of each image."""
    return run.config.seed, run.num_views


def _decided(key: str, runs: Sequence[StudentRun]) -> str:
    """The value that is wanted, or the one that was decided when one of the runs began, which is kept to the end.

    Raises:
        UsageError: the value is not the one that a run began with.
    """
    wanted = str(getattr(runs[0].config, key))
    begun = [run for run in runs if run.progress.has_begun or wanted == "auto"]
    held = {str(getattr(run.progress, key)) for run in begun} - {"auto"}
    if not held:
        return wanted
    if len(held) > 1 or wanted not in ("auto", *held):
        flag = f"--{key.replace('_', '-')}"
        raise UsageError(
            f"these runs began with `{flag} {' and '.join(sorted(held))}`, but now `{wanted}` is given",
            hint=f"leave `{flag}` out" if len(held) == 1 else "continue them one by one",
        )
    return held.pop()


def _interrupted(interrupt: KeyboardInterrupt, run: StudentRun, *, num_runs: int) -> Interrupted:
    """The error when runs are stopped from outside; it names the run with the fewest epochs done."""
    progress, config = run.progress, run.config
    state = f"the state after {progress.shown(config)} is saved" if progress.has_begun else "no epoch was finished"
    again = f"`--resume --out {config.out}`" if num_runs == 1 else "`--resume`"
    error = Interrupted(f"interrupted; {state}", hint=f"continue with the same command and {again}")
    error.exit_code = 143 if interrupt.args else 130
    return error
