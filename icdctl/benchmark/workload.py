"""The work that is timed: a run's own training steps, on random images, with new models that behave like trained ones.

Shapes: N images, B images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icdctl import data, methods, models
from icdctl.config import resolving
from icdctl.config.dataset_request import dataset_request
from icdctl.config.run_config import RunConfig
from icdctl.config.sources import Options
from icdctl.data import Dataset, Views
from icdctl.engine.compiled import Compiler
from icdctl.engine.shared_data import make_shared_data
from icdctl.engine.stepping import Stepping
from icdctl.engine.student_run import StudentRun
from icdctl.engine.teacher import AheadTeacher, Answers, CachedTeacher, InlineTeacher, Teacher, TeacherPrecision
from icdctl.engine.teacher_choice import teacher_reads
from icdctl.errors import IcdctlError, UsageError
from icdctl.evaluation import Evaluation
from icdctl.models import Classifier

DATASET = "cifar100"
NUM_CLASSES = 100
EPOCH = 5
"""The epoch that is timed: inside the distillation warm-up."""

_CALIBRATION_BATCHES, _CALIBRATION_IMAGES = 4, 64
_LOGIT_SPREAD = 3.0
"""Standard deviation of the teacher's logits, about that of a trained one, so that losses are more than noise."""


@dataclass(frozen=True)
class ModelPair:
    """A teacher and a student."""

    label: str
    """The text that the user typed: `TEACHER:STUDENT`."""
    teacher: str
    """A key of `models.MODELS`."""
    student: str
    """A key of `models.MODELS`."""


@dataclass(frozen=True)
class Plan:
    """The options of a benchmark; None means the default of the recipe or of the run."""

    method: str | None = None
    batch_size: int | None = None
    device: str = "auto"
    precision: str | None = None
    teacher_mode: str | None = None
    teacher_precision: str | None = None
    scales: str | None = None
    settings: Mapping[str, object] | None = None
    """The values of `--set`, as options of a run."""
    recipe: str | None = None
    seed: int = 0
    threads: int = 1
    """CPU threads."""
    compile: bool = False


def parse_pairs(text: str) -> list[ModelPair]:
    """The pairs of models in a text like `res32x4:mv2,wrn40_2:res8x4`.

    Raises:
        UsageError: a part is not TEACHER:STUDENT, is named twice, or a model is unknown.
    """
    pairs: list[ModelPair] = []
    for part in text.split(","):
        teacher, colon, student = part.strip().partition(":")
        if not colon or not teacher or not student:
            raise UsageError(
                f"pair `{part.strip()}` is not TEACHER:STUDENT", hint="e.g. `--pairs res32x4:mv2,wrn40_2:res8x4`"
            )
        if part.strip() in [pair.label for pair in pairs]:
            raise UsageError(f"pair `{part.strip()}` is named twice", hint="name it once")
        pairs.append(ModelPair(part.strip(), models.resolve(teacher), models.resolve(student)))
    return pairs


def build_config(plan: Plan, pair: ModelPair) -> RunConfig:
    """The configuration of a run on CIFAR-100 with the plan's options; the environment and params.yaml are not read.

    Raises:
        UsageError: a name is unknown, a value is wrong, or the method has no teacher.
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
    if not methods.get(config.method).needs_teacher:
        raise UsageError(
            f"method `{config.method}` has no teacher: there is nothing to distill",
            hint="choose another `--method`; `icdctl list methods` shows them",
        )
    return config


def random_dataset(num_train: int, num_test: int, *, seed: int) -> Dataset:
    """A data set in the shape of CIFAR-100 with random pixels and labels: zeros would run faster than photographs.

    Args:
        num_train: number of training images.
        num_test: number of test images.
        seed: seed of pixels and labels.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
        return pixels, torch.randint(0, NUM_CLASSES, (count,), generator=generator)

    train_images, train_labels = draw(num_train)
    test_images, test_labels = draw(num_test)
    known = data.describe(dataset_request(DATASET))
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
    """A model with random weights and batch norms calibrated on the images.

    Args:
        name: a key of `models.MODELS`.
        dataset: the data set whose first training images calibrate the batch norms.
        seed: seed of the weights.
        is_teacher: scale the head so that the logits spread like those of a trained teacher.
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
    """The teacher's precision; `auto` is float32, since only a trained teacher can show that half precision agrees."""
    return "fp32" if config.teacher_precision == "auto" else config.teacher_precision


class Session:
    """A student with its data and its teacher, set up for training steps as in a run."""

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
            student: from `fresh_model`; its weights change.
            device: where the steps run.
            precision: the student's precision.
            message: called with a warning where steps can't be compiled or captured.

        Raises:
            UsageError: the images don't fill a batch, or a teacher cache would be too large.
        """
        self.config = config
        self.shared = make_shared_data(config, dataset, device, precision)
        self.run = StudentRun(config, self.shared, student, teacher, Compiler(message))
        self.message = message
        self.inline = InlineTeacher(
            teacher,
            reads=teacher_reads(config),
            device=device,
            precision=teacher_precision(config),
        )
        self.teacher_mode = config.teacher_mode
        if config.teacher_mode == "auto":
            self.teacher_mode = "ahead" if device.type == "cuda" else "inline"
        self.teacher = self._teacher()

    def _teacher(self) -> Teacher:
        store = self.shared.store
        if self.teacher_mode == "inline":
            return self.inline
        if self.teacher_mode == "ahead":
            return AheadTeacher(self.inline, store)
        if store.num_views != 1:
            raise UsageError(
                "a teacher cache of every crop and flip takes longer to fill than a benchmark lasts",
                hint="pass `--teacher-mode inline` or `ahead`, or a recipe without both: `--recipe digits100`",
            )
        answer = self.inline.of_views(store, store.numbered(torch.arange(store.num_images)))
        return CachedTeacher(store, answer)

    def prepare(self, epoch: int) -> None:
        """Prepare the student for an epoch, with an empty log."""
        self.run.start_epoch()
        self.run.step.start_epoch(epoch)

    def draw(self, epoch: int) -> Views:
        """Prepare the student for an epoch, and draw its views on the CPU."""
        self.prepare(epoch)
        return self.shared.store.epoch_of_many(
            seed=self.config.seed, epoch=epoch, num_views=self.run.num_views, batch_size=self.config.batch_size
        )

    def start_epoch(self, epoch: int) -> tuple[Views, Answers]:
        """Like `draw`, but with the views on the device; also the teacher's answers to them."""
        views = self.draw(epoch).to(self.shared.device)
        return views, self.teacher.epoch(views, self.batch_size)

    def part(self, views: Views, index: int) -> Views:
        """The views of step `index` of the epoch."""
        return views[index * self.batch_size : (index + 1) * self.batch_size]

    @property
    def batch_size(self) -> int:
        """Views in a step."""
        return self.config.batch_size * self.run.num_views

    def evaluate(self) -> Evaluation:
        """Evaluate the student on all test images, in eval mode."""
        return self.run.evaluate(self.shared.watched_images, self.shared.watched_labels)


class Stepper:
    """Takes a session's training steps one after another, epoch after epoch, as a run on its device does."""

    def __init__(self, session: Session) -> None:
        """
        Args:
            session: the session; its student's weights change.
        """
        self.session = session
        self._stepping = Stepping(session.shared, session.teacher, session.message, num_views=session.run.num_views)
        self._epoch, self._index = EPOCH - 1, 0
        self.start_epoch()

    @property
    def captures(self) -> bool:
        """Whether a step is one CUDA graph."""
        return self._stepping.captures

    def start_epoch(self) -> None:
        """Go to the first step of the next epoch.

        Raises:
            IcdctlError: a loss term or a gradient of the last epoch was not finite.
        """
        self.check_finite()
        self._epoch, self._index = self._epoch + 1, 0
        self.session.prepare(self._epoch)
        self._stepping.start_epoch(seed=self.session.config.seed, epoch=self._epoch)

    def check_finite(self) -> None:
        """Check the log of the epoch so far, which waits for the device; a run does so at the end of each epoch.

        Raises:
            IcdctlError: a loss term or a gradient is not finite.
        """
        if not bool(torch.isfinite(self.session.run.step.log[: self._index]).all()):
            raise IcdctlError(
                "a loss or gradient of the random images is not finite, so no speed is reported",
                hint="choose other values with `--set`, or another `--recipe`",
            )

    def __call__(self) -> None:
        """Take one step.

        Raises:
            IcdctlError: a loss term or a gradient of the last epoch was not finite.
        """
        if self._index == self.session.shared.num_steps:
            self.start_epoch()
        self._stepping.step(self._index, [self.session.run])
        self._index += 1
