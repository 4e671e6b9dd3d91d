"""One student of a run or of many at once: its weights, optimiser, progress, and what it leaves in its run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from icdctl import files, models, run_files
from icdctl.config.run import RunConfig
from icdctl.data import UNLABELED, Dataset, ImageStore, Views
from icdctl.engine.checkpoint import REPLAY_FILE, CheckpointWriter, Progress, checkpoint_path, load_checkpoint
from icdctl.engine.compiled import Compiler
from icdctl.engine.device import goes_by_position
from icdctl.engine.environment import describe_environment
from icdctl.engine.run_folder import write_history
from icdctl.engine.schedule import learning_rate
from icdctl.engine.step import StepRule, TrainingStep
from icdctl.engine.teacher import Answer
from icdctl.errors import ArtifactError, IcdctlError, UsageError
from icdctl.evaluation import Evaluation, batch_size_on, evaluate_logits, module_predictor, predict_all
from icdctl.models import Classifier
from icdctl.models.external import Adapted, without_adapter


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


@dataclass(frozen=True)
class Place:
    """What all students of a run share: the images on the device, and how a step is cut out of them."""

    dataset: Dataset
    device: torch.device
    precision: str
    store: ImageStore
    labels: Tensor
    """[N] int64 on the device."""
    watched: str
    """"val" where images are held out for validation, else "test"."""
    watched_images: Tensor
    """[V, H, W, 3] uint8 on the device."""
    watched_labels: Tensor
    """[V] int64 on the CPU."""
    batch_size: int
    num_steps: int
    """Of an epoch."""
    by_position: bool
    """Steps read what they need from tensors that stay where they are, the learning rate too."""

    @property
    def num_images(self) -> int:
        """N."""
        return self.store.num_images

    def images_of(self, steps: int) -> int:
        """How many images so many steps see, epochs with a smaller last batch included."""
        epochs, rest = divmod(steps, self.num_steps)
        per_epoch = min(self.num_images, self.num_steps * self.batch_size)
        return epochs * per_epoch + rest * self.batch_size


def make_place(config: RunConfig, dataset: Dataset, device: torch.device, precision: str) -> Place:
    """The images of a run on its device.

    Raises:
        UsageError: there are too few of them.
    """
    num_images = dataset.train_images.shape[0]
    if config.drop_last and num_images < config.batch_size:
        raise UsageError(
            f"{num_images} training images do not fill one batch of {config.batch_size}, and the recipe drops "
            "batches that are not full",
            hint=f"use `--batch-size {num_images}` or less",
        )
    whole, rest = divmod(num_images, config.batch_size)
    # Batch norm can't learn from a single image, so a rest of one is left out.
    num_steps = whole + (1 if rest > 1 and not config.drop_last else 0)
    if num_steps == 0:
        raise UsageError("one training image is too few", hint="train on 2 images or more")
    has_val = dataset.val_images is not None
    watched_images = dataset.test_images if dataset.val_images is None else dataset.val_images
    return Place(
        dataset=dataset,
        device=device,
        precision=precision,
        store=ImageStore(dataset.train_images, dataset.preprocessing, config.augmentation, device=device),
        labels=dataset.train_labels.to(device),
        watched="val" if has_val else "test",
        watched_images=watched_images.to(device),
        watched_labels=dataset.test_labels if dataset.val_labels is None else dataset.val_labels,
        batch_size=config.batch_size,
        num_steps=num_steps,
        by_position=goes_by_position(device),
    )


class NotFiniteError(IcdctlError):
    """A loss term or the gradient of a step is not a number."""

    def __init__(self, message: str, *, hint: str, index: int) -> None:
        super().__init__(message, hint=hint)
        self.index = index
        """Of the step in its epoch, from 0."""


class Member:
    """One student on its way through its epochs."""

    def __init__(
        self, config: RunConfig, place: Place, student: Classifier | None, compiler: Compiler | None = None
    ) -> None:
        """
        Args:
            config: of its run.
            place: the images.
            student: an own module in place of the one that the configuration names.
            compiler: for a run that is to be compiled.

        Raises:
            ArtifactError: its checkpoint or its first weights can't be read, or are of other images.
        """
        self.config, self.place = config, place
        self.out = Path(config.out)
        self.student = student if student is not None else self._new_student()
        if config.init_weights is not None:
            _load_first_weights(self.student, config)
        self.student.to(place.device).to(memory_format=torch.channels_last)
        optimizer = _make_optimizer(config, self.student, place)
        self._rate = config.lr
        """What the optimiser's learning rate was last set to."""
        self.writer = CheckpointWriter(place.device, in_background=place.by_position)
        balanced = config.class_weights == "balanced"
        rule = StepRule(
            config.method,
            config.settings,
            config.scales,
            config.clip_norm,
            autocast=place.precision == "bf16",
            label_smoothing=config.label_smoothing,
            class_weights=_class_weights(place.dataset).to(place.device) if balanced else None,
            has_unlabeled=place.dataset.has_unlabeled,
            skip_nonfinite=config.on_nonfinite == "skip",
            ema_decay=config.ema_decay,
        )
        # A module from outside runs as it is: what its Python does beside the numbers would be compiled away.
        may_compile = config.compile and not isinstance(self.student, Adapted)
        self.step = TrainingStep(
            self.student,
            optimizer,
            rule,
            steps_per_epoch=place.num_steps,
            device=place.device,
            compiler=compiler if may_compile else None,
        )
        self.limit_steps = config.epochs * place.num_steps
        if config.max_steps is not None:
            self.limit_steps = min(self.limit_steps, config.max_steps)
        self.state_path = checkpoint_path(config.fingerprint)
        self.progress = load_checkpoint(self.state_path, self.step) or Progress(
            epoch=0, steps=0, history=[], seconds=0.0, done=False, dataset_sha256=place.dataset.sha256
        )
        if self.progress.dataset_sha256 != place.dataset.sha256:
            raise ArtifactError(
                f"the images of `{config.dataset}` have changed since this run began",
                hint=f"bring them back, or delete `{self.out}` and `{self.state_path.parent}` and start again",
            )

    def _new_student(self) -> Classifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            size = self.place.dataset.preprocessing.size
            student = models.create(self.config.student, self.place.dataset.num_classes, image_size=size)
        if min(size) < student.smallest_image:
            raise UsageError(
                f"images of {size[0]} x {size[1]} are too small for `{self.config.student}`, which needs "
                f"{student.smallest_image} x {student.smallest_image}",
                hint=f"`--image-size {student.smallest_image}` or more, or another model",
            )
        return student

    @property
    def is_compiled(self) -> bool:
        """Whether its forward pass and losses go through torch.compile, up to now."""
        return self.step.compiler is not None and self.step.compiler.is_on

    @property
    def images_left(self) -> int:
        """How many images it will still see."""
        return self.place.images_of(self.limit_steps) - self.place.images_of(self.progress.steps)

    @property
    def steps_of_epoch(self) -> int:
        """Steps of the epoch that comes next."""
        return min(self.place.num_steps, self.limit_steps - self.progress.steps)

    def begin(self) -> None:
        """Write what is known before the first step."""
        if self.progress.done:  # nothing is decided any more: what was, is stated again
            decided = {key: getattr(self.progress, key) for key in ("teacher_mode", "teacher_precision")}
            self.config = self.config.model_copy(update=decided)
        files.write_json(self.out / "config.json", self.config.model_dump(mode="json"))
        environment = describe_environment(self.place.device, self.place.precision)
        files.write_json(self.out / "environment.json", environment)

    def start_epoch(self) -> None:
        """Make ready for the epoch that comes next."""
        self.student.train()
        self.step.start_epoch(self.progress.epoch + 1)

    def train(self, index: int, views: Views, images: Tensor, labels: Tensor, answer: Answer | None) -> None:
        """One step.

        Args:
            index: of the step in its epoch, from 0.
            views: of its images.
            images: [B, 3, H, W], their pixels.
            labels: [B].
            answer: the teacher's.

        Raises:
            NotFiniteError: on a CPU, where looking costs nothing; on other devices `end_epoch` looks.
        """
        self.set_learning_rate(index)
        self.step(index, images, labels, answer)
        if self.place.device.type == "cpu":
            self._check_finite(self.step.log[index : index + 1], views.index, first_index=index)

    def set_learning_rate(self, index: int) -> None:
        """Give the optimiser the rate of a step, counted in its epoch from 0; a device is not waited for."""
        config, progress = self.config, self.progress
        rate = learning_rate(
            config,
            epoch=progress.epoch + 1,
            step=progress.steps + index,
            total_steps=config.epochs * self.place.num_steps,
        )
        for group in self.step.optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = rate
            elif rate != self._rate:
                group["lr"].fill_(rate)
        self._rate = rate

    def end_epoch(self, order: Tensor, seconds: float) -> dict[str, float]:
        """Evaluate, remember and save.

        Args:
            order: [N] of the epoch's images, on the CPU.
            seconds: that the epoch has taken so far, for this student's share.

        Returns:
            The epoch's row of history.

        Raises:
            NotFiniteError: a step was not finite; nothing of the epoch is saved then.
        """
        started = time.perf_counter()
        place, progress, num_steps = self.place, self.progress, self.steps_of_epoch
        log = self.step.log[:num_steps].cpu()
        self._check_finite(log, order, first_index=0)
        seen = place.dataset.train_labels[order[: num_steps * place.batch_size]]
        row = self._row(log, num_labelled=int((seen != UNLABELED).sum()))
        row["seconds"] = seconds + time.perf_counter() - started
        steps = progress.steps + num_steps
        self.progress = Progress(
            epoch=progress.epoch + 1,
            steps=steps,
            history=[*progress.history, row],
            seconds=progress.seconds + row["seconds"],
            done=steps >= self.limit_steps,
            dataset_sha256=progress.dataset_sha256,
            nonfinite_steps=progress.nonfinite_steps + int((~torch.isfinite(log).all(dim=1)).sum()),
            teacher_mode=self.config.teacher_mode,
            teacher_precision=self.config.teacher_precision,
        )
        self.writer.save(self.state_path, self.step, self.progress, self.config)
        self._check_folder()
        write_history(self.out / "history.csv", self.progress.history)
        return row

    def _check_folder(self) -> None:
        """Stop where the run folder was taken away: whoever did it may be about to train something else there.

        A pipeline that is started anew deletes the outputs of a stage, and its first trainer may have outlived it.
        """
        if not (self.out / "config.json").is_file():
            raise ArtifactError(
                f"run folder `{self.out}` was taken away during the run; the state after epoch {self.progress.epoch} "
                "is saved",
                hint="the same command with `--resume` goes on from there",
            )

    def _row(self, log: Tensor, *, num_labelled: int) -> dict[str, float]:
        finite = log[torch.isfinite(log).all(dim=1)]
        if not len(finite):
            raise IcdctlError(
                f"no step of epoch {self.progress.epoch + 1} was finite: there is nothing left to train",
                hint="lower `--lr`, or the weights of the method by `--set`; check the teacher with `icdctl eval`",
            )
        means = finite.double().mean(dim=0).tolist()
        numbers = self.evaluate(self.place.watched_images, self.place.watched_labels)
        row: dict[str, float] = {"epoch": self.progress.epoch + 1, "lr": self._rate}
        row |= dict(zip(self.step.rule.term_names, means[:-1], strict=True))
        row["train_top1"] = 100.0 * self.step.num_right.item() / max(num_labelled, 1)
        watched = {"top1": numbers.top1, "top5": numbers.top5, "loss": numbers.loss}
        return row | {f"{self.place.watched}_{key}": value for key, value in watched.items()}

    @property
    def result_model(self) -> Classifier:
        """What is evaluated and kept: the student, or the moving average of its weights."""
        return self.student if self.step.average is None else self.step.average

    def evaluate(self, images: Tensor, labels: Tensor) -> Evaluation:
        """What is kept of it, on images [N, H, W, 3] uint8 and their labels [N]."""
        model = self.result_model.eval()
        predict = module_predictor(model, self.place.dataset.preprocessing, self.place.device)
        batch_size = batch_size_on(self.place.device, images)
        return evaluate_logits(predict_all(predict, images, batch_size=batch_size), labels)

    def _check_finite(self, log: Tensor, order: Tensor, *, first_index: int) -> None:
        """Stop where a loss term or the gradient is not a number: step, term and images are named.

        Args:
            log: [S, terms + 1] of some steps.
            order: of their images; of the one step alone where `log` is that of one step.
            first_index: of the first of them in the epoch.
        """
        bad = ~torch.isfinite(log)
        if self.config.on_nonfinite == "skip" or not bad.any():
            return
        row, column = (int(place) for place in bad.nonzero()[0])
        index = first_index + row
        names = [*self.step.rule.term_names, "gradient norm"]
        batch = self.place.batch_size
        images = (
            order if len(log) == 1 and len(order) <= batch else order[index * batch : (index + 1) * batch]
        ).tolist()
        raise NotFiniteError(
            f"training is no longer finite: `{names[column]}` is {log[row, column].item()} in epoch "
            f"{self.progress.epoch + 1}, step {index + 1} of {self.place.num_steps}; training images of that batch: "
            f"{', '.join(map(str, images))}; the batch is kept in `{self.replay_path}`",
            hint="lower `--lr`, or the weights of the method by `--set`; check the teacher with `icdctl eval`; "
            "`--set on_nonfinite=skip` leaves such steps out and counts them",
            index=index,
        )

    @property
    def replay_path(self) -> Path:
        """Where a batch that was not finite is kept."""
        return self.state_path.with_name(REPLAY_FILE)

    def keep_replay(self, index: int, views: Views, answer: Answer | None) -> None:
        """Keep what a step that was not finite saw: pixels, labels and the teacher's answer.

        The weights before its epoch are the checkpoint beside it, or those that the seed gives.
        """
        held = {
            "pixels": self.place.store.pixels(views),
            "labels": self.place.labels[views.index],
            "image_numbers": views.index,
        }
        if answer is not None:
            held["teacher_logits"] = answer.logits
            if answer.cells is not None:
                held["teacher_cells"] = answer.cells
        said = {"epoch": str(self.progress.epoch + 1), "step": str(index + 1), "config": self.config.model_dump_json()}
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in held.items()}
        files.write_bytes(self.replay_path, save(tensors, metadata=said))

    def unfinished(self) -> RunResult:
        """The result of a run that goes on another time."""
        return RunResult(self.out, self.config, {}, False, self.result_model.eval())

    def finish(self, teacher_origin: Mapping[str, str | None], *, num_students: int) -> RunResult:
        """Weights and metrics of a run whose last epoch is done."""
        self._check_folder()
        config, progress, dataset = self.config, self.progress, self.place.dataset
        metrics: dict[str, Any] = {
            **self._accuracy(progress.history),
            "epochs": progress.epoch,
            "steps": progress.steps,
            "seconds": progress.seconds,
            "images_per_second": self.place.images_of(progress.steps) / progress.seconds,
            "students_at_once": num_students,
            **({"compiled": self.is_compiled} if config.compile else {}),
            "nonfinite_steps": progress.nonfinite_steps,
            "params": sum(parameter.numel() for parameter in self.student.parameters()),
            "variant": config.settings["variant"],
            "dataset_sha256": dataset.sha256,
            "train_images": self.place.num_images,
            "unlabeled_images": int((dataset.train_labels == UNLABELED).sum()),
            "skipped_images": dataset.skipped_images,
            **teacher_origin,
        }
        write_history(self.out / "history.csv", progress.history)
        said = dataset.weights_metadata(config.student)
        # Those of an earlier training in this folder, whose weights go now.
        (self.out / "metrics.json").unlink(missing_ok=True)
        weights_path = self.out / run_files.WEIGHTS_FILE
        metrics[run_files.HASH_KEY] = models.save_weights(weights_path, without_adapter(self.result_model), said)
        files.write_json(self.out / "metrics.json", metrics)
        return RunResult(self.out, config, metrics, True, self.result_model.eval())

    def _accuracy(self, history: list[dict[str, float]]) -> dict[str, Any]:
        """Of the final weights on the test images, and of the best epoch by the images that were watched.

        Where validation images were watched, the test images are looked at here for the first and only time.
        """
        watched, last = self.place.watched, history[-1]
        best = max(history, key=lambda row: row[f"{watched}_top1"])
        if watched == "test":
            final = {f"final_{key}": last[f"test_{key}"] for key in ("top1", "top5", "loss")}
            return {**final, "best_top1": best["test_top1"], "best_epoch": int(best["epoch"])}
        numbers = self.evaluate(self.place.dataset.test_images, self.place.dataset.test_labels)
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


def _load_first_weights(student: Classifier, config: RunConfig) -> None:
    """Start from a file's weights."""
    loaded = models.load_weights(without_adapter(student), Path(str(config.init_weights)))
    if loaded.sha256 != (config.init_sha256 or loaded.sha256):
        raise ArtifactError(
            f"first weights `{config.init_weights}` have sha256 {loaded.sha256[:12]}..., the configuration states "
            f"{str(config.init_sha256)[:12]}...",
            hint="name the file with `--init-weights` to use it as it is now",
        )


def _make_optimizer(config: RunConfig, student: Classifier, place: Place) -> torch.optim.Optimizer:
    """The fused optimiser; for steps by position its learning rate and its state are tensors from the start."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    # float32 is what the fused kernels read on CUDA.
    rate = torch.tensor(config.lr, dtype=torch.float32, device=place.device) if place.by_position else config.lr
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            parameters, lr=rate, weight_decay=config.weight_decay, fused=True, capturable=place.by_position
        )
        # torch warns of steps outside a graph; those before a capture, and all where it fails, are meant to be.
        optimizer._warned_capturable_if_run_uncaptured = True
    else:
        optimizer = torch.optim.SGD(
            parameters,
            lr=rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,
        )
    # Where its first step is left out, torch's SGD keeps the momentum that it has allocated and not filled.
    if place.by_position or config.on_nonfinite == "skip":
        _make_state(optimizer)
    return optimizer


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """The state that the optimiser would make at its first step, with zeros, which lead to the same first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            elif group["momentum"]:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
