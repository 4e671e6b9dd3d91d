"""A run: from a frozen configuration to a run folder."""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from icdctl import files, models, registry, targets
from icdctl.config import RunConfig
from icdctl.data import UNLABELED, Dataset, ImageStore
from icdctl.engine.checkpoint import Progress, checkpoint_path, load_checkpoint, save_checkpoint
from icdctl.engine.device import backend_settings, resolve_device, resolve_precision
from icdctl.engine.environment import describe_environment
from icdctl.engine.schedule import learning_rate
from icdctl.engine.step import StepRule, TrainingStep
from icdctl.engine.teacher import InlineTeacher, Teacher, cache_answers
from icdctl.errors import ArtifactError, IcdctlError, UsageError
from icdctl.evaluation import Evaluation, evaluate_logits, module_predictor, predict_all
from icdctl.methods import METHODS
from icdctl.models import Classifier


class Observer(Protocol):
    """Whoever wants to know how a run goes; it never changes the run."""

    def begin(self, what: str, total: int) -> None:
        """A stretch of work starts: `total` images."""

    def advance(self, images: int) -> None:
        """That many more are done."""

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        """An epoch's line of history, of so many."""

    def message(self, text: str) -> None:
        """Something a person should read."""


class SilentObserver:
    """Hears everything and says nothing."""

    def begin(self, what: str, total: int) -> None:
        """See `Observer`."""

    def advance(self, images: int) -> None:
        """See `Observer`."""

    def epoch(self, row: dict[str, float], epochs: int) -> None:
        """See `Observer`."""

    def message(self, text: str) -> None:
        """See `Observer`."""


@dataclass(frozen=True)
class RunResult:
    """What a run left."""

    out: Path
    """The run folder."""
    config: RunConfig
    metrics: dict[str, Any]
    """As in metrics.json; empty where the run stopped before its end."""
    finished: bool
    """False after a time limit: `--resume` goes on."""
    model: Classifier = field(repr=False)
    """The trained student, in eval mode."""

    @property
    def top1(self) -> float:
        """Of the final epoch on the test set, in percent."""
        return float(self.metrics["final_top1"])

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        summary = {"out": str(self.out), "finished": self.finished, "method": self.config.method}
        return {**summary, "student": self.config.student, "teacher": self.config.teacher, **self.metrics}


class Interrupted(IcdctlError):
    """A person or the system stopped the run; its state is saved."""


def run(
    config: RunConfig,
    dataset: Dataset,
    *,
    teacher: Classifier | None,
    teacher_origin: Mapping[str, str | None] | None = None,
    student: Classifier | None = None,
    resume: bool = False,
    observer: Observer | None = None,
) -> RunResult:
    """Train a student as `config` says; leave weights, history, metrics and configuration in the run folder.

    Args:
        config: of the run.
        dataset: the data that it names.
        teacher: the trained teacher, for methods that have one.
        teacher_origin: source and licence of its weights, for metrics.json.
        student: an own module in place of the one that the configuration names.
        resume: start, go on, or finish at once, whatever the state is.
        observer: told of the progress.

    Raises:
        UsageError, ArtifactError, IcdctlError: see the messages; a run that fails before its first epoch is over leaves
            no run folder.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    observer = observer or SilentObserver()
    out = Path(config.out)
    with _claimed(out, config, resume=resume), backend_settings(device, precision, deterministic=config.deterministic):
        session = _Session(config, dataset, teacher, student, device, precision, observer)
        return session.train(out, teacher_origin or {})


@contextmanager
def _claimed(out: Path, config: RunConfig, *, resume: bool) -> Iterator[None]:
    """Hold the run folder for one process; a run that dies before its first checkpoint leaves nothing behind."""
    busy = f"run folder `{out}` is in use by another process"
    with files.locked(lock_path(out), busy=busy, hint="wait for it, or choose another folder with `--out`"):
        existed = out.exists()
        if existed:
            _check_folder(out, config, resume=resume)
        files.make_folder(out)
        try:
            yield
        except BaseException:
            if not checkpoint_path(config.fingerprint).is_file():
                _remove_new(out, existed)
            raise


def lock_path(out: Path) -> Path:
    """The lock of a run folder: beside it, for the folder may turn out to be somebody else's."""
    whole = out.resolve()
    return whole.parent / f".{whole.name}.lock"


def _check_folder(out: Path, config: RunConfig, *, resume: bool) -> None:
    """Refuse a folder that holds something else, or a run without `resume`, or another run with it."""
    if not out.is_dir():
        raise ArtifactError(f"`{out}` is a file, not a run folder", hint="choose another folder with `--out`")
    inside = sorted(path.name for path in out.iterdir())
    stated = out / "config.json"
    if not inside:
        return
    if not stated.is_file():
        raise ArtifactError(
            f"`{out}` is not empty and holds no run (`{inside[0]}`)", hint="choose another folder with `--out`"
        )
    if not resume:
        raise ArtifactError(
            f"run folder `{out}` exists",
            hint="go on with it by `--resume`, or choose another folder with `--out`",
        )
    held = files.read_json(stated, what="config", hint=f"delete `{out}` and start again")
    try:
        earlier = RunConfig(**{**held, "out": config.out})
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"`{stated}` is no configuration of this version", hint=f"delete `{out}` and start again"
        ) from error
    if earlier.fingerprint != config.fingerprint:
        new, old = config.identity, earlier.identity
        changed = [_change(key, old[key], new[key]) for key in new if new[key] != old[key]]
        raise UsageError(
            f"run folder `{out}` holds a run with other settings: {', '.join(changed)}",
            hint="resume with the same settings, or choose another folder with `--out`",
        )


def _change(key: str, old: Any, new: Any) -> str:
    """What changed of one key; of settings, which of them; of hashes, their first digits."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in inner)
    return f"{key} {str(old)[:12]} -> {str(new)[:12]}"


def _remove_new(out: Path, existed: bool) -> None:
    """Take away what this attempt put into a folder, and the folder where this attempt made it."""
    for name in ("config.json", "environment.json"):
        (out / name).unlink(missing_ok=True)
    if not existed and out.is_dir() and not any(out.iterdir()):
        shutil.rmtree(out, ignore_errors=True)


class _Session:
    """One attempt at a run."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        teacher: Classifier | None,
        student: Classifier | None,
        device: torch.device,
        precision: str,
        observer: Observer,
    ) -> None:
        self.config, self.dataset, self.device, self.observer = config, dataset, device, observer
        self.precision = precision
        num_images = dataset.train_images.shape[0]
        self.num_images = num_images
        if config.drop_last and num_images < config.batch_size:
            raise UsageError(
                f"{num_images} training images do not fill one batch of {config.batch_size}, and the recipe drops "
                "batches that are not full",
                hint=f"use `--batch-size {num_images}` or less",
            )
        whole, rest = divmod(num_images, config.batch_size)
        # Batch norm can't learn from a single image, so a rest of one is left out.
        self.num_steps = whole + (1 if rest > 1 and not config.drop_last else 0)
        if self.num_steps == 0:
            raise UsageError("one training image is too few", hint="train on 2 images or more")
        self.student = student if student is not None else self._new_student()
        self.student.to(device).to(memory_format=torch.channels_last)
        self.optimizer = _make_optimizer(config, self.student)
        rule = StepRule(
            config.method,
            config.settings,
            config.scales,
            config.clip_norm,
            autocast=precision == "bf16",
            label_smoothing=config.label_smoothing,
            class_weights=_class_weights(dataset).to(device) if config.class_weights == "balanced" else None,
            has_unlabeled=dataset.has_unlabeled,
        )
        self.step = TrainingStep(self.student, self.optimizer, rule, steps_per_epoch=self.num_steps, device=device)
        self.store = ImageStore(dataset.train_images, dataset.preprocessing, config.augmentation, device=device)
        self.labels = dataset.train_labels.to(device)
        self.watched = "test" if dataset.val_images is None else "val"
        watched_images = dataset.test_images if dataset.val_images is None else dataset.val_images
        self.watched_images = watched_images.to(device)
        self.watched_labels = dataset.test_labels if dataset.val_labels is None else dataset.val_labels
        self.teacher_model = teacher
        self.limit_steps = config.epochs * self.num_steps
        if config.max_steps is not None:
            self.limit_steps = min(self.limit_steps, config.max_steps)

    def _new_student(self) -> Classifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            size = self.dataset.preprocessing.size
            return models.create(self.config.student, self.dataset.num_classes, image_size=size)

    def train(self, out: Path, teacher_origin: Mapping[str, str | None]) -> RunResult:
        """All epochs that are left, then the results."""
        config = self.config
        state_path = checkpoint_path(config.fingerprint)
        progress = load_checkpoint(state_path, self.student, self.optimizer) or Progress(
            epoch=0, steps=0, history=[], seconds=0.0, done=False, dataset_sha256=self.dataset.sha256
        )
        if progress.dataset_sha256 != self.dataset.sha256:
            raise ArtifactError(
                f"the images of `{config.dataset}` have changed since this run began",
                hint=f"bring them back, or delete `{out}` and `{state_path.parent}` and start again",
            )
        files.write_json(out / "config.json", config.model_dump(mode="json"))
        files.write_json(out / "environment.json", describe_environment(self.device, self.precision))
        if progress.epoch and not progress.done:
            self.observer.message(f"going on after epoch {progress.epoch} of {config.epochs}")
        started = time.perf_counter()
        earlier_seconds = progress.seconds
        try:
            if not progress.done:
                teacher = self._teacher()
                self.observer.begin("training", self._images_of(self.limit_steps) - self._images_of(progress.steps))
            while not progress.done:
                epoch_started = time.perf_counter()
                row = self._epoch(progress, teacher)
                now = time.perf_counter()
                row["seconds"] = now - epoch_started
                steps = min(progress.steps + self.num_steps, self.limit_steps)
                progress = Progress(
                    epoch=progress.epoch + 1,
                    steps=steps,
                    history=[*progress.history, row],
                    seconds=earlier_seconds + now - started,
                    done=steps >= self.limit_steps,
                    dataset_sha256=self.dataset.sha256,
                )
                save_checkpoint(state_path, self.student, self.optimizer, progress)
                _write_history(out / "history.csv", progress.history)
                self.observer.epoch(row, config.epochs)
                if not progress.done and self._out_of_time(now - started, now - epoch_started):
                    self.observer.message(f"time limit: stopped after epoch {progress.epoch}; `--resume` goes on")
                    return RunResult(out, config, {}, False, self.student.eval())
        except KeyboardInterrupt as interrupt:
            raise interrupted(interrupt, progress.epoch, config) from interrupt
        return self._finish(out, progress, teacher_origin)

    def _images_of(self, steps: int) -> int:
        """How many images so many steps see, epochs with a smaller last batch included."""
        epochs, rest = divmod(steps, self.num_steps)
        per_epoch = min(self.num_images, self.num_steps * self.config.batch_size)
        return epochs * per_epoch + rest * self.config.batch_size

    def _out_of_time(self, spent: float, last_epoch: float) -> bool:
        limit = self.config.time_limit_seconds
        return limit is not None and spent + last_epoch > limit

    def _teacher(self) -> Teacher | None:
        """The teacher, with all its answers in memory where each image has one view and more than one epoch asks."""
        config = self.config
        if self.teacher_model is None or not METHODS[config.method].needs_teacher:
            return None
        scales = config.scales if METHODS[config.method].needs_patches else None
        inline = InlineTeacher(self.teacher_model, scales=scales, device=self.device)
        num_views = self.store.num_views
        if config.teacher_mode == "cache" and num_views != 1:
            raise UsageError(
                "`--teacher-mode cache` needs a recipe without crops, flips and random changes: here each image has "
                f"{'countless' if num_views is None else num_views} views",
                hint="use `--teacher-mode inline`",
            )
        if config.teacher_mode == "inline" or num_views != 1:
            return inline
        self.observer.begin("asking the teacher", self.num_images)
        return cache_answers(inline, self.store, on_images=self.observer.advance)

    def _epoch(self, progress: Progress, teacher: Teacher | None) -> dict[str, float]:
        """Train one epoch and evaluate: a row of history, without its seconds."""
        config, epoch = self.config, progress.epoch + 1
        drawn = self.store.epoch(seed=config.seed, epoch=epoch)
        views = drawn.to(self.device)
        self.student.train()
        self.step.start_epoch(epoch)
        num_steps = min(self.num_steps, self.limit_steps - progress.steps)
        rate = 0.0
        for index in range(num_steps):
            rate = learning_rate(
                config, epoch=epoch, step=progress.steps + index, total_steps=config.epochs * self.num_steps
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            part = views[index * config.batch_size : (index + 1) * config.batch_size]
            images = self.store.inputs(part)
            answer = teacher.answer(part, images) if teacher is not None else None
            self.step(index, images, self.labels[part.index], answer)
            if self.device.type == "cpu":  # looking costs nothing here; on other devices once an epoch
                self._check_finite(self.step.log[index : index + 1], epoch, index, views.index)
            self.observer.advance(len(part))
        log = self.step.log[:num_steps].cpu()
        self._check_finite(log, epoch, 0, views.index)
        seen = self.dataset.train_labels[drawn.index[: num_steps * config.batch_size]]
        return self._row(epoch, rate, log, num_labelled=int((seen != UNLABELED).sum()))

    def _row(self, epoch: int, rate: float, log: Tensor, *, num_labelled: int) -> dict[str, float]:
        means = log.double().mean(dim=0).tolist()
        numbers = self._evaluated(self.watched_images, self.watched_labels)
        row: dict[str, float] = {"epoch": epoch, "lr": rate}
        row |= dict(zip(self.step.rule.term_names, means[:-1], strict=True))
        row["train_top1"] = 100.0 * self.step.num_right.item() / max(num_labelled, 1)
        watched = {"top1": numbers.top1, "top5": numbers.top5, "loss": numbers.loss}
        return row | {f"{self.watched}_{key}": value for key, value in watched.items()}

    def _evaluated(self, images: Tensor, labels: Tensor) -> Evaluation:
        self.student.eval()
        predict = module_predictor(self.student, self.dataset.preprocessing, self.device)
        return evaluate_logits(predict_all(predict, images), labels)

    def _check_finite(self, log: Tensor, epoch: int, first_index: int, order: Tensor) -> None:
        """Stop where a loss term or the gradient is not a number: step, term and images are named."""
        bad = ~torch.isfinite(log)
        if not bad.any():
            return
        row, column = (int(place) for place in bad.nonzero()[0])
        index = first_index + row
        names = [*self.step.rule.term_names, "gradient norm"]
        batch = self.config.batch_size
        images = order[index * batch : (index + 1) * batch].tolist()
        raise IcdctlError(
            f"training is no longer finite: `{names[column]}` is {log[row, column].item()} in epoch {epoch}, step "
            f"{index + 1} of {self.num_steps}; training images of that batch: {', '.join(map(str, images))}",
            hint="lower `--lr`, or the weights of the method by `--set`; check the teacher with `icdctl eval`",
        )

    def _finish(self, out: Path, progress: Progress, teacher_origin: Mapping[str, str | None]) -> RunResult:
        """Weights and metrics of a run whose last epoch is done."""
        config, history = self.config, progress.history
        metrics: dict[str, Any] = {
            **self._accuracy(history),
            "epochs": progress.epoch,
            "steps": progress.steps,
            "seconds": progress.seconds,
            "images_per_second": self._images_of(progress.steps) / progress.seconds,
            "nonfinite_steps": 0,  # a run that meets one stops
            "params": sum(parameter.numel() for parameter in self.student.parameters()),
            "variant": config.settings["variant"],
            "dataset_sha256": self.dataset.sha256,
            "train_images": self.num_images,
            "unlabeled_images": int((self.dataset.train_labels == UNLABELED).sum()),
            "skipped_images": self.dataset.skipped_images,
            **teacher_origin,
        }
        said = targets.metadata(config.student, self.dataset)
        _write_history(out / "history.csv", history)
        models.save_weights(out / registry.WEIGHTS_FILE, self.student, said)
        files.write_json(out / "metrics.json", metrics)
        return RunResult(out, config, metrics, True, self.student.eval())

    def _accuracy(self, history: list[dict[str, float]]) -> dict[str, Any]:
        """Of the final weights on the test images, and of the best epoch by the images that were watched.

        Where validation images were watched, the test images are looked at here for the first and only time.
        """
        last = history[-1]
        best = max(history, key=lambda row: row[f"{self.watched}_top1"])
        if self.watched == "test":
            final = {f"final_{key}": last[f"test_{key}"] for key in ("top1", "top5", "loss")}
            return {**final, "best_top1": best["test_top1"], "best_epoch": int(best["epoch"])}
        numbers = self._evaluated(self.dataset.test_images, self.dataset.test_labels)
        return {
            "final_top1": numbers.top1,
            "final_top5": numbers.top5,
            "final_loss": numbers.loss,
            "best_top1": None,  # on the test images: they were not watched
            "best_epoch": int(best["epoch"]),
            **{f"final_val_{key}": last[f"val_{key}"] for key in ("top1", "top5", "loss")},
            "best_val_top1": best["val_top1"],
        }


def _class_weights(dataset: Dataset) -> Tensor:
    """Inverse to each class's share of the labelled training images, 1 on average over them: [K]."""
    labels = dataset.train_labels[dataset.train_labels != UNLABELED]
    counts = torch.bincount(labels, minlength=dataset.num_classes)
    return labels.shape[0] / (dataset.num_classes * counts.clamp(min=1).float())


def _make_optimizer(config: RunConfig, student: Classifier) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=True,
    )


def interrupted(interrupt: KeyboardInterrupt, epoch: int, config: RunConfig) -> Interrupted:
    """What is said when a run is stopped from outside."""
    exit_code = 143 if interrupt.args else 130
    state = f"the state after epoch {epoch} of {config.epochs} is saved" if epoch else "no epoch was finished"
    error = Interrupted(f"interrupted; {state}", hint=f"go on with the same command and `--resume --out {config.out}`")
    error.exit_code = exit_code
    return error


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    """history.csv, whole: a line an epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "epoch": int(row["epoch"])} for row in history)
    files.write_text(path, text.getvalue())
