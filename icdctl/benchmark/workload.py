"""What is timed: a run's own session, on random images, with fresh models that behave like trained ones.

Shapes: N images, B images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icdctl import data, methods, models
from icdctl.config import resolving
from icdctl.config.run import RunConfig
from icdctl.config.sources import Options
from icdctl.data import Dataset, Views
from icdctl.engine.compiled import Compiler
from icdctl.engine.device_loop import Loop
from icdctl.engine.run import step_by_position
from icdctl.engine.student_run import Member, make_place
from icdctl.engine.teacher import AheadTeacher, Answers, CachedTeacher, InlineTeacher, Teacher, TeacherPrecision
from icdctl.errors import IcdctlError, UsageError
from icdctl.evaluation import Evaluation
from icdctl.models import Classifier

DATASET = "cifar100"
NUM_CLASSES = 100
EPOCH = 5
"""The epoch that is timed: inside the distillation warm-up."""

_CALIBRATION_BATCHES, _CALIBRATION_IMAGES = 4, 64
_LOGIT_SPREAD = 3.0
"""Standard deviation of the teacher's logits: about that of a trained one, so that no loss is a difference of noise."""


@dataclass(frozen=True)
class Pair:
    """A teacher and a student."""

    label: str
    """As typed: `TEACHER:STUDENT`."""
    teacher: str
    """A key of `models.MODELS`."""
    student: str
    """A key of `models.MODELS`."""


@dataclass(frozen=True)
class Plan:
    """How a benchmark runs; None leaves the recipe's or the run's own default."""

    method: str | None = None
    batch_size: int | None = None
    device: str = "auto"
    precision: str | None = None
    teacher_mode: str | None = None
    teacher_precision: str | None = None
    scales: str | None = None
    settings: Mapping[str, object] | None = None
    """What `--set` gives, as options of a run."""
    recipe: str | None = None
    seed: int = 0
    threads: int = 1
    """Of the CPU."""
    compile: bool = False


def parse_pairs(text: str) -> list[Pair]:
    """`res32x4:mv2,wrn40_2:res8x4` as pairs of models.

    Raises:
        UsageError: a part is not TEACHER:STUDENT, is named twice, or a model is unknown.
    """
    pairs: list[Pair] = []
    for part in text.split(","):
        teacher, colon, student = part.strip().partition(":")
        if not colon or not teacher or not student:
            raise UsageError(
                f"pair `{part.strip()}` is not TEACHER:STUDENT", hint="e.g. `--pairs res32x4:mv2,wrn40_2:res8x4`"
            )
        if part.strip() in [pair.label for pair in pairs]:
            raise UsageError(f"pair `{part.strip()}` is named twice", hint="name it once")
        pairs.append(Pair(part.strip(), models.resolve(teacher), models.resolve(student)))
    return pairs


def build_config(plan: Plan, pair: Pair) -> RunConfig:
    """The configuration of a run on CIFAR-100 as planned. The environment and params.yaml are not read.

    Raises:
        UsageError: unknown names, wrong values, or a method without a teacher.
    """
    wanted = {
        "method": plan.method,
        "dataset": DATASET,
        "student": pair.student,
        "scales": plan.scales,
        **(plan.settings or {}),
        "recipe": plan.recipe,
        "seed": plan.seed,
        "batch_size": plan.batch_size,
        "device": plan.device,
        "precision": plan.precision,
        "teacher_mode": plan.teacher_mode,
        "teacher_precision": plan.teacher_precision,
        "compile": plan.compile,
        "out": "bench",
    }
    options = Options({key: value for key, value in wanted.items() if value is not None})
    config = resolving.make_config("distill", options, teacher=(pair.teacher, "", ""))
    if not methods.METHODS[config.method].needs_teacher:
        raise UsageError(
            f"method `{config.method}` has no teacher: there is nothing to distill",
            hint="choose another `--method`; `icdctl list methods`",
        )
    return config


def random_dataset(num_train: int, num_test: int, *, seed: int) -> Dataset:
    """Images shaped like CIFAR-100's, every byte and label drawn at random: zeros would run faster than photographs do.

    Args:
        num_train: N of the training images.
        num_test: N of the test images.
        seed: of pixels and labels.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
        return pixels, torch.randint(0, NUM_CLASSES, (count,), generator=generator)

    train_images, train_labels = draw(num_train)
    test_images, test_labels = draw(num_test)
    known = data.describe(data.request(DATASET))
    return Dataset(
        name=DATASET,
        class_names=known.class_names,
        preprocessing=known.preprocessing,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        source="drawn at random",
        licence="none needed",
        sha256="",
    )


def fresh_model(name: str, dataset: Dataset, *, seed: int, is_teacher: bool) -> Classifier:
    """A model with random weights whose batch norms know the images; a teacher's logits spread as a trained one's.

    Args:
        name: a key of `models.MODELS`.
        dataset: its first training images calibrate the batch norms.
        seed: of the weights.
        is_teacher: scale the head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.create(name, NUM_CLASSES)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    count = min(_CALIBRATION_IMAGES, len(dataset.train_images))
    inputs = dataset.preprocessing.normalise(dataset.train_images[: count * _CALIBRATION_BATCHES])
    for norm in norms:
        norm.momentum = None  # a plain average over the batches
    with torch.no_grad():
        model.train()
        for batch in torch.split(inputs, count):
            model(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        if is_teacher:
            scale = _LOGIT_SPREAD / float(model.eval()(inputs[:count]).std().clamp(min=1e-6))
            model.head.weight.mul_(scale)
            model.head.bias.mul_(scale)
    return model


def teacher_precision(config: RunConfig) -> TeacherPrecision:
    """`auto` is float32: whether half precision agrees is a question to a trained teacher."""
    return "fp32" if config.teacher_precision == "auto" else config.teacher_precision


class Session:
    """A student on its way through its steps, as a run has it, with its teacher."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        teacher: Classifier,
        student: Classifier,
        *,
        device: torch.device,
        precision: str,
        message: Callable[[str], None],
    ) -> None:
        """
        Args:
            config: from `build_config`.
            dataset: from `random_dataset`.
            teacher: from `fresh_model`.
            student: from `fresh_model`; it is trained.
            device: where it runs.
            precision: of the student.
            message: told where steps can't be compiled or captured.

        Raises:
            UsageError: the images don't fill a batch, or the table of a cached teacher would be too large.
        """
        self.config = config
        self.place = make_place(config, dataset, device, precision)
        self.member = Member(config, self.place, student, Compiler(message))
        self.message = message
        self.inline = InlineTeacher(
            teacher,
            needs_cells=methods.METHODS[config.method].needs_patches,
            device=device,
            precision=teacher_precision(config),
        )
        self.teacher_mode = config.teacher_mode
        if config.teacher_mode == "auto":
            self.teacher_mode = "ahead" if device.type == "cuda" else "inline"
        self.teacher = self._teacher()

    def _teacher(self) -> Teacher:
        store = self.place.store
        if self.teacher_mode == "inline":
            return self.inline
        if self.teacher_mode == "ahead":
            return AheadTeacher(self.inline, store)
        if store.num_views != 1:
            raise UsageError(
                "a table of every crop and flip takes longer to fill than a benchmark lasts",
                hint="`--teacher-mode inline` or `ahead`, or a recipe without crops and flips: `--recipe digits100`",
            )
        answer = self.inline.of_views(store, store.numbered(torch.arange(store.num_images)))
        return CachedTeacher(store, answer.logits, answer.cells)

    def draw(self, epoch: int) -> Views:
        """The epoch's views on the CPU; the student ready, its log empty."""
        self.member.start_epoch()
        self.member.step.start_epoch(epoch)
        return self.place.store.epoch(seed=self.config.seed, epoch=epoch)

    def start_epoch(self, epoch: int) -> tuple[Views, Answers]:
        """The same on the device, and the teacher's answers to them."""
        views = self.draw(epoch).to(self.place.device)
        return views, self.teacher.epoch(views, self.config.batch_size)

    def part(self, views: Views, index: int) -> Views:
        """The views of a step."""
        return views[index * self.config.batch_size : (index + 1) * self.config.batch_size]

    def evaluate(self) -> Evaluation:
        """The student on all test images, in eval mode."""
        return self.member.evaluate(self.place.watched_images, self.place.watched_labels)


class Stepper:
    """Takes a session's training steps one after another, as a run on its device does, epoch after epoch."""

    def __init__(self, session: Session) -> None:
        """
        Args:
            session: whose student learns.
        """
        self.session = session
        self._loop: Loop | None = None
        self._epoch, self._index = EPOCH - 1, 0
        self.start_epoch()

    @property
    def captures(self) -> bool:
        """Whether a step is one CUDA graph."""
        return self._loop is not None and self._loop.captures

    def start_epoch(self) -> None:
        """Go to the first step of the next epoch.

        Raises:
            IcdctlError: a step of the last one was not finite.
        """
        self.check_finite()
        session, place = self.session, self.session.place
        self._epoch, self._index = self._epoch + 1, 0
        drawn = session.draw(self._epoch)
        if place.by_position and drawn.key is None:
            if self._loop is None:
                self._loop = Loop(place.store, place.labels, place.batch_size, session.teacher, session.message)
            self._loop.start_epoch(drawn)
            return
        self._views = drawn.to(place.device)
        self._answers = session.teacher.epoch(self._views, place.batch_size)

    def check_finite(self) -> None:
        """Look at the log of the epoch so far, which waits for the device; a run does it at the end of each.

        Raises:
            IcdctlError: a loss term or the gradient is not a number.
        """
        if not bool(torch.isfinite(self.session.member.step.log[: self._index]).all()):
            raise IcdctlError(
                "a loss or gradient of the random images is not finite, so no speed is told",
                hint="choose other values by `--set`, or another `--recipe`",
            )

    def __call__(self) -> None:
        """One step.

        Raises:
            IcdctlError: a loss term or the gradient is not finite.
        """
        session, member = self.session, self.session.member
        if self._index == session.place.num_steps:
            self.start_epoch()
        if self._loop is not None:
            step_by_position(self._loop, [member], self._index)
        else:
            part = session.part(self._views, self._index)
            images = session.place.store.inputs(part)
            answer = self._answers(self._index, part, images)
            member.train(self._index, part, images, session.place.labels[part.index], answer)
        self._index += 1
