"""The training of one student: building, steps, evaluation. `run_output` writes its files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icdctl import methods, models
from icdctl.config.run_config import RunConfig
from icdctl.data import UNLABELED, Views
from icdctl.engine.building import load_first_weights, new_objective, new_student
from icdctl.engine.checkpoint import Progress, load_checkpoint, read_state, read_student
from icdctl.engine.compiled import Compiler
from icdctl.engine.environment import differing_environment
from icdctl.engine.optimizers import make_optimizer
from icdctl.engine.run_output import RunOutput, RunResult, run_metrics
from icdctl.engine.run_state import RunState, state_folder_of
from icdctl.engine.schedule import learning_rate
from icdctl.engine.shared_data import SharedData
from icdctl.engine.step import StepRule, TrainingStep, trained_parameters
from icdctl.engine.teacher import Answer
from icdctl.errors import IcdctlError
from icdctl.evaluation import Evaluation, batch_size_on, evaluate_logits, module_predictor, predict_all
from icdctl.models import Classifier
from icdctl.models.external import Adapted, without_adapter
from icdctl.models.state_dicts import differences
from icdctl.run_files import WEIGHTS_FILE


class NotFiniteError(IcdctlError):
    """A loss term or the gradient of a step is not a number."""

    def __init__(self, message: str, *, hint: str, index: int) -> None:
        super().__init__(message, hint=hint)
        self.index = index
        """Number of the step in its epoch, from 0."""


class StudentRun:
    """The training of one student, alone or beside others."""

    def __init__(
        self,
        config: RunConfig,
        shared: SharedData,
        student: Classifier | None,
        teacher: Classifier | None,
        compiler: Compiler | None = None,
        *,
        state: RunState | None = None,
        message: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            config: the configuration of the run.
            shared: the images.
            student: a custom module in place of the model that the configuration names.
            teacher: the frozen model, for a method that reads one; only its shapes are read.
            compiler: for a run that is to be compiled.
            state: the state that it takes up, or begins; None to begin without looking for one.
            message: called with what the user should read.

        Raises:
            UsageError: the method can't be used for these models.
            ArtifactError: its checkpoint or its first weights can't be read.
        """
        self.config, self.shared = config, shared
        self.student = student if student is not None else new_student(config, shared)
        self.first_weights = None if config.init_weights is None else load_first_weights(self.student, config)
        """What was read of the weights that it starts from."""
        objective = new_objective(config, shared, self.student, teacher)
        for module in (self.student, objective):
            module.to(shared.device).to(memory_format=torch.channels_last)
        self._rate = config.lr
        """The learning rate that the optimiser was last set to."""
        # A custom module runs as it is: what its Python does beside the numbers would be compiled away.
        may_compile = config.compile and not isinstance(self.student, Adapted)
        method = methods.get(config.method)
        self.step = TrainingStep(
            self.student,
            objective,
            method.student_reads(config.settings) | method.reads_of_scales(config.scales),
            make_optimizer(config, trained_parameters(self.student, objective), device_driven=shared.device_driven),
            StepRule(
                config.clip_norm,
                autocast=shared.precision == "bf16",
                skip_nonfinite=config.on_nonfinite == "skip",
                ema_decay=config.ema_decay,
            ),
            steps_per_epoch=shared.num_steps,
            device=shared.device,
            compiler=compiler if may_compile else None,
        )
        self.limit_steps = config.epochs * shared.num_steps
        if config.max_steps is not None:
            self.limit_steps = min(self.limit_steps, config.max_steps)
        self._message = message
        self.output = RunOutput(config, shared, state or RunState(state_folder_of(Path(config.out)), ""))
        self.progress = self._progress(state)
        self._seconds_before = 0.0
        """Training time of the current epoch in earlier attempts."""

    def _progress(self, state: RunState | None) -> Progress:
        """How far the run is; weights and optimiser are put back as they were."""
        if state is not None and state.metrics is not None:
            models.load_weights(without_adapter(self.result_model), self.out / WEIGHTS_FILE)
            return self._new_progress(done=True)
        if state is None:
            return self._new_progress()
        if models.is_backbone(self.config.student):
            self._check_same_network(state.folder)
        found = load_checkpoint(state.folder, self.step, self._message)
        if found is not None:
            return found.model_copy(update={"run": state.run})
        begun = {"run": state.run, "student_sha256": state.student_sha256, **state.decided}
        return self._new_progress().model_copy(update=begun)

    def _check_same_network(self, folder: Path) -> None:
        """Refuse a state of another library's model where the installed version of the library builds another network.

        Raises:
            ArtifactError: names and shapes of the weights differ.
        """
        held, found = read_student(folder), read_state(folder)
        problems = differences(self.student.state_dict(), held) if held else []
        if problems and found is not None:
            versions = found[0].attempts[-1].get("versions") if found[0].attempts else None
            before = versions if isinstance(versions, dict) else {}
            raise models.other_version(self.config.student, before, f"the state of `{self.out}`: {problems[0]}")

    def _new_progress(self, *, done: bool = False) -> Progress:
        sha256 = self.shared.dataset.sha256
        return Progress(epoch=0, steps=0, history=[], seconds=0.0, done=done, dataset_sha256=sha256)

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.output.out

    @property
    def is_compiled(self) -> bool:
        """Whether its forward pass and losses go through torch.compile, up to now."""
        return self.step.compiler is not None and self.step.compiler.is_on

    @property
    def num_views(self) -> int:
        """Views of each image in a step."""
        return methods.get(self.config.method).num_views

    @property
    def images_left(self) -> int:
        """Number of images that it will still see."""
        done = self.progress.steps + self.progress.step_in_epoch
        return self.shared.images_of(self.limit_steps) - self.shared.images_of(done)

    @property
    def first_step(self) -> int:
        """Number of the first step of the next epoch that is not done."""
        return self.progress.step_in_epoch

    @property
    def steps_of_epoch(self) -> int:
        """Number of steps of the next epoch."""
        return min(self.shared.num_steps, self.limit_steps - self.progress.steps)

    def begin(self) -> None:
        """Write what is known before the first step."""
        if self.progress.done:  # everything was decided when the run began, and is stated again
            decided = {key: getattr(self.progress, key) for key in ("teacher_mode", "teacher_precision")}
            self.config = self.config.model_copy(update=decided)
        else:
            self._add_attempt()
        if self.output.state.metrics is None:
            self.output.write_start(self.config, self.progress)

    def _add_attempt(self) -> None:
        """Record where the run is trained from now on, and say what differs from where it was trained up to now."""
        progress = self.progress
        now = self.shared.environment
        if models.is_backbone(self.config.student):
            now = {**now, "versions": {**now["versions"], **models.library_of(self.config.student)}}
        attempts = [each for each in progress.attempts if progress.has_begun]
        changed = differing_environment(attempts[-1], now) if attempts else ()
        if changed:
            self._message(f"note: `{self.out}` began with {', '.join(changed)}: the last digits may differ")
        if attempts and not changed:
            attempts.pop()
        self.progress = progress.model_copy(update={"attempts": [*attempts, now]})

    def start_epoch(self) -> None:
        """Prepare for the next epoch, or for what is left of it."""
        self.student.train()
        self.step.start_epoch(self.progress.epoch + 1, first_step=self.first_step)
        self._seconds_before = self.progress.epoch_seconds

    def save_within_epoch(self, index: int, order: Tensor, seconds: float) -> None:
        """Save the state between two steps.

        Args:
            index: number of the next step of the epoch.
            order: [V * N] images of the epoch's views, on the CPU.
            seconds: this student's share of the time that the epoch has taken in this attempt.

        Raises:
            NotFiniteError: a step was not finite; nothing is saved then.
        """
        if not self.first_step < index < self.steps_of_epoch:
            return
        self._check_finite(self.step.log[:index].cpu(), order, first_index=0)
        decided = {key: getattr(self.config, key) for key in ("teacher_mode", "teacher_precision")}
        within = {"step_in_epoch": index, "epoch_seconds": self._seconds_before + seconds}
        self.progress = self.progress.model_copy(update={**within, **decided})
        self.output.write_state(self.step, self.progress, self.config)

    def train(self, index: int, views: Views, images: Tensor, labels: Tensor, answer: Answer | None) -> None:
        """One step, driven by the host.

        Args:
            index: number of the step in its epoch, from 0.
            views: the views of its images.
            images: [B, 3, H, W], their pixels.
            labels: [B] int64.
            answer: the teacher's answer.

        Raises:
            NotFiniteError: on a CPU, where checking costs nothing; on other devices `end_epoch` checks.
        """
        self.set_learning_rate(index)
        self.step(index, images, labels, answer, views.index)
        if self.shared.device.type == "cpu":
            self._check_finite(self.step.log[index : index + 1], views.index, first_index=index)

    def set_learning_rate(self, index: int) -> None:
        """Give the optimiser the rate of a step, counted in its epoch from 0; a device is not waited for."""
        config, progress = self.config, self.progress
        rate = learning_rate(
            config,
            epoch=progress.epoch + 1,
            step=progress.steps + index,
            total_steps=config.epochs * self.shared.num_steps,
        )
        for group in self.step.optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = rate
            elif rate != self._rate:
                group["lr"].fill_(rate)
        self._rate = rate

    def end_epoch(self, order: Tensor, seconds: float) -> dict[str, float]:
        """Evaluate the epoch, add its row to the history, and save the state.

        Args:
            order: [V * N] images of the epoch's views, on the CPU.
            seconds: this student's share of the time that the epoch has taken so far.

        Returns:
            The epoch's row of history.

        Raises:
            NotFiniteError: a step was not finite; nothing of the epoch is saved then.
        """
        started = time.perf_counter()
        shared, progress, num_steps = self.shared, self.progress, self.steps_of_epoch
        log = self.step.log[:num_steps].cpu()
        self._check_finite(log, order, first_index=0)
        seen = shared.dataset.train_labels[order[: num_steps * shared.batch_size * self.num_views]]
        row = self._row(log, num_labelled=int((seen != UNLABELED).sum()))
        row["seconds"] = self._seconds_before + seconds + time.perf_counter() - started
        steps = progress.steps + num_steps
        self.progress = progress.model_copy(
            update={
                "epoch": progress.epoch + 1,
                "steps": steps,
                "step_in_epoch": 0,
                "epoch_seconds": 0.0,
                "history": [*progress.history, row],
                "seconds": progress.seconds + row["seconds"],
                "done": steps >= self.limit_steps,
                "nonfinite_steps": progress.nonfinite_steps + int((~torch.isfinite(log).all(dim=1)).sum()),
                "teacher_mode": self.config.teacher_mode,
                "teacher_precision": self.config.teacher_precision,
            }
        )
        self.output.write_state(self.step, self.progress, self.config)
        return row

    def _row(self, log: Tensor, *, num_labelled: int) -> dict[str, float]:
        finite = log[torch.isfinite(log).all(dim=1)]
        if not len(finite):
            raise IcdctlError(
                f"no step of epoch {self.progress.epoch + 1} was finite: there is nothing left to train",
                hint="lower `--lr`, or the weights of the method by `--set`; check the teacher with `icdctl eval`",
            )
        means = finite.double().mean(dim=0).tolist()
        numbers = self.evaluate(self.shared.watched_images, self.shared.watched_labels)
        row: dict[str, float] = {"epoch": self.progress.epoch + 1, "lr": self._rate}
        row |= dict(zip(self.step.objective.term_names, means[:-1], strict=True))
        row["train_top1"] = 100.0 * self.step.num_right.item() / max(num_labelled, 1)
        watched = {"top1": numbers.top1, "top5": numbers.top5, "loss": numbers.loss}
        return row | {f"{self.shared.watched}_{key}": value for key, value in watched.items()}

    @property
    def result_model(self) -> Classifier:
        """The model that is evaluated and kept: the student, or the EMA of its weights."""
        return self.student if self.step.average is None else self.step.average

    def evaluate(self, images: Tensor, labels: Tensor) -> Evaluation:
        """Numbers of `result_model` on images [N, H, W, 3] uint8 and their labels [N]."""
        model = self.result_model.eval()
        predict = module_predictor(model, self.shared.dataset.preprocessing, self.shared.device)
        batch_size = batch_size_on(self.shared.device, images)
        return evaluate_logits(predict_all(predict, images, batch_size=batch_size), labels)

    def _check_finite(self, log: Tensor, order: Tensor, *, first_index: int) -> None:
        """Stop where a loss term or the gradient is not a number: step, term and images are named.

        Args:
            log: [S, terms + 1], the log of S steps.
            order: the images of the epoch; those of the one step where `log` has a single row.
            first_index: number of the first step in the epoch.
        """
        bad = ~torch.isfinite(log)
        if self.config.on_nonfinite == "skip" or not bad.any():
            return
        row, column = (int(position) for position in bad.nonzero()[0])
        index = first_index + row
        names = [*self.step.objective.term_names, "gradient norm"]
        batch = self.shared.batch_size * self.num_views
        images = (
            order if len(log) == 1 and len(order) <= batch else order[index * batch : (index + 1) * batch]
        ).tolist()
        raise NotFiniteError(
            f"training is no longer finite: `{names[column]}` is {log[row, column].item()} in epoch "
            f"{self.progress.epoch + 1}, step {index + 1} of {self.shared.num_steps}; training images of that batch: "
            f"{', '.join(map(str, images))}; the batch is kept in `{self.output.replay_path}`",
            hint="lower `--lr`, or the weights of the method by `--set`; check the teacher with `icdctl eval`; "
            "`--set on_nonfinite=skip` leaves such steps out and counts them",
            index=index,
        )

    def keep_replay(self, index: int, views: Views, answer: Answer | None) -> None:
        """Keep what a step that was not finite saw; arguments as for `train`."""
        epoch = self.progress.epoch + 1
        self.output.keep_replay(self.config, epoch=epoch, index=index, views=views, answer=answer)

    def unfinished(self) -> RunResult:
        """The result of a run that stops before its end."""
        return RunResult(self.out, self.config, {}, False, self.result_model.eval())

    def finish(self, teacher_origin: Mapping[str, str | None], *, num_students: int) -> RunResult:
        """Write weights and metrics of a run whose last epoch is done.

        Args:
            teacher_origin: source and licence of the teacher's weights.
            num_students: number of students that were trained at once.
        """
        model = self.result_model
        kept = self.output.state.metrics
        if kept is not None:
            return RunResult(self.out, self.config, kept, True, model.eval())
        metrics = run_metrics(
            self.shared,
            self.config,
            self.progress,
            accuracy=self._accuracy(self.progress.history),
            num_parameters=sum(parameter.numel() for parameter in self.student.parameters()),
            num_students=num_students,
            compiled=self.is_compiled,
            teacher_origin=teacher_origin,
            head_is_new=self.first_weights is not None and self.first_weights.head_is_new,
        )
        self.output.write_result(self.config, self.progress, model, metrics)
        return RunResult(self.out, self.config, metrics, True, model.eval())

    def _accuracy(self, history: list[dict[str, float]]) -> dict[str, Any]:
        """Numbers of the final weights on the test images, and of the best epoch by the images that were watched.

        Where validation images were watched, the test images are evaluated here for the first and only time.
        """
        watched, last = self.shared.watched, history[-1]
        best = max(history, key=lambda row: row[f"{watched}_top1"])
        if watched == "test":
            final = {f"final_{key}": last[f"test_{key}"] for key in ("top1", "top5", "loss")}
            return {**final, "best_top1": best["test_top1"], "best_epoch": int(best["epoch"])}
        numbers = self.evaluate(self.shared.dataset.test_images, self.shared.dataset.test_labels)
        return {
            "final_top1": numbers.top1,
            "final_top5": numbers.top5,
            "final_loss": numbers.loss,
            "best_top1": None,  # the test images were not watched
            "best_epoch": int(best["epoch"]),
            **{f"final_val_{key}": last[f"val_{key}"] for key in ("top1", "top5", "loss")},
            "best_val_top1": best["val_top1"],
        }
