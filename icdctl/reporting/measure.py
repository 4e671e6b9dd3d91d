"""Measure the trained models of a report on the test images.

The numbers of a run are kept in the state folder under the hash of everything that decides them, so that a report over
many runs evaluates each model once.

Shapes: N test images, K classes, C channels.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icdctl import evaluation, files, teachers, versions
from icdctl.data import Dataset
from icdctl.engine.observer import Observer
from icdctl.errors import ArtifactError, UsageError
from icdctl.evaluation import Evaluation
from icdctl.exporting import OnnxClassifier, onnx_bytes
from icdctl.methods import gram_matrix, pool_regions, region_logits
from icdctl.models import Classifier
from icdctl.models.external import CUSTOM_MODEL
from icdctl.registry import trained
from icdctl.registry.trained import TrainedModel
from icdctl.reporting.finished_runs import FinishedRun
from icdctl.reporting.run_groups import RunGroup

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """A trained model on the test images of its data set."""

    numbers: Evaluation
    agreement: float | None = None
    """Percent of the images that it and its teacher put into the same class."""
    fidelity: float | None = None
    """Mean KL(teacher || student), in nats."""


@dataclass(frozen=True)
class FigureInputs:
    """Outputs of a model on the test images, for figures."""

    logits: Tensor
    """[N, K], for all test images."""
    features: Tensor
    """[F, C], the input of the head, for the images chosen for the map of features."""
    regions: Tensor
    """[I, K, 4, 4], the logits of the regions, for the images chosen for Gram matrices."""


@dataclass(frozen=True)
class ChosenImages:
    """Numbers of test images that a fixed seed chose for figures that can't show all."""

    mapped: Tensor
    """[F] int64, for the map of features."""
    classes: tuple[int, ...]
    """The classes of the mapped images."""
    shown: Tensor
    """[I] int64, for Gram matrices."""


FEWEST_MAPPED = 5
"""The fewest images that a map of features is drawn for."""
_MAPPED_CLASSES, _MAPPED_IMAGES = 10, 30
_SEED = 0
_SCHEME = 2
"""Version of the numbers that are kept: the first had 0 where a class or a bin has no images."""


def choose_images(labels: Tensor, *, num_shown: int, shown: Sequence[int] | None = None) -> ChosenImages:
    """Choose images for the figures that can't show all.

    Args:
        labels: [N], the classes of all test images.
        num_shown: how many images have their Gram matrices drawn, each of another class if there are enough classes.
        shown: the numbers of these images; None to choose them.

    Raises:
        UsageError: `shown` has a number that no image has.
    """
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.randperm(len(labels), generator=generator)
    present = sorted(set(labels.tolist()))
    drawn = torch.randperm(len(present), generator=generator)[:_MAPPED_CLASSES].tolist()
    classes = tuple(sorted(present[number] for number in drawn))
    mapped = [order[labels[order] == number][:_MAPPED_IMAGES] for number in classes]
    if shown is None:
        first: dict[int, int] = {}
        for number in order.tolist():
            first.setdefault(int(labels[number]), number)
        shown = list(first.values())[:num_shown]
    wrong = [number for number in shown if not 0 <= number < len(labels)]
    if wrong:
        raise UsageError(f"there is no test image {wrong[0]}", hint=f"their numbers are 0 to {len(labels) - 1}")
    return ChosenImages(torch.cat(mapped), classes, torch.tensor(shown))


def student_of(run: FinishedRun) -> TrainedModel:
    """The trained model of a run.

    Raises:
        ArtifactError, UsageError: its weights can't be used, or it is a custom module.
    """
    _refuse_custom(run.config.student)
    return trained.resolve(str(run.folder))


def teacher_of(group: RunGroup, dataset: Dataset) -> TrainedModel | None:
    """The teacher of a group; None for a group without one.

    Raises:
        ArtifactError, UsageError: its weights are missing, or are not those that the students learnt from.
    """
    if group.teacher is None:
        return None
    _refuse_custom(group.teacher)
    run = next(run for cell in group.cells for run in cell.runs if run.config.teacher is not None)
    place = run.config.teacher_weights or ""
    at = str(place) if place and Path(place).is_file() else group.teacher
    found = teachers.find(at, dataset=dataset)
    if found.sha256 != group.teacher_sha256:
        raise ArtifactError(
            f"teacher `{found.path}` is not the one that the students learnt from",
            hint="put its weights back, or train the students again",
        )
    return found


def _refuse_custom(model: str) -> None:
    if model == CUSTOM_MODEL:
        raise ArtifactError(
            "the model is a custom module, which icdctl can't build", hint="use the numbers of its run instead"
        )


class ModelMeasurer:
    """Measures models on the test images of one data set.

    Args:
        dataset: the data set.
        device: the device that models run on.
        observer: receives the progress.
        message: called with a line about kept numbers that have changed or were not checked.
    """

    def __init__(
        self, dataset: Dataset, device: torch.device, observer: Observer, message: Callable[[str], None]
    ) -> None:
        self.dataset, self._device, self._observer, self._message = dataset, device, observer, message
        pixels = dataset.test_images.contiguous().numpy().tobytes()
        self._data = files.sha256_bytes(pixels + dataset.test_labels.numpy().tobytes())
        self._of_teachers: dict[str, Tensor] = {}

    def measure(self, trained_model: TrainedModel, *, teacher: TrainedModel | None) -> Measurement:
        """Measure a model, and compare it with its teacher if there is one.

        Raises:
            IcdctlError: the model can't be built, or its logits are not finite.
        """
        facts = {
            "weights": trained_model.sha256,
            "teacher": None if teacher is None else teacher.sha256,
            "data": self._data,
            "device": self._device.type,
            "versions": versions.versions(("icdctl", "torch")),
            "scheme": _SCHEME,
        }
        path = _cache_path("evaluated", facts)
        held = _held(path, facts, self._message)
        try:
            alike = [None if teacher is None else float(held[key]) for key in ("agreement", "fidelity")]
            numbers = Evaluation.from_json(held["numbers"])
            if len(numbers.per_class) == self.dataset.num_classes:
                return Measurement(numbers, *alike)
        except (KeyError, TypeError, ValueError):
            pass  # not measured before, or the file is broken
        logits = self._all_logits(trained_model)
        found = Measurement(evaluation.evaluate_logits(logits, self.dataset.test_labels))
        if teacher is not None:
            theirs = self._teachers_logits(teacher)
            found = Measurement(
                found.numbers, evaluation.agreement(logits, theirs), evaluation.fidelity(logits, theirs)
            )
        whole = {"numbers": found.numbers.as_json(), "agreement": found.agreement, "fidelity": found.fidelity}
        _keep(path, {**whole, "of": facts})
        return found

    def figure_inputs(
        self, trained_model: TrainedModel, chosen: ChosenImages, *, is_teacher: bool = False
    ) -> FigureInputs:
        """Outputs of a model on all test images, and more outputs on the chosen ones.

        Args:
            trained_model: the model.
            chosen: the images for the figures that can't show all.
            is_teacher: keep the logits, because several groups need them.

        Raises:
            IcdctlError: the model can't be built.
        """
        model = self._ready(trained_model)
        pooled = self._over(chosen.mapped, lambda images: model.outputs(images).pooled)

        def regions_of(images: Tensor) -> Tensor:
            return region_logits(model.outputs(images).feature_map, model.head)

        regions = self._over(chosen.shown, regions_of)
        logits = self._teachers_logits(trained_model) if is_teacher else self._all_logits(trained_model)
        return FigureInputs(logits, pooled, regions)

    def _teachers_logits(self, teacher: TrainedModel) -> Tensor:
        """A teacher's logits on all test images; they are kept, because a teacher has many students."""
        if teacher.sha256 not in self._of_teachers:
            self._of_teachers[teacher.sha256] = self._all_logits(teacher)
        return self._of_teachers[teacher.sha256]

    def _ready(self, trained_model: TrainedModel) -> Classifier:
        return trained_model.load().to(self._device).to(memory_format=torch.channels_last)

    def _all_logits(self, trained_model: TrainedModel) -> Tensor:
        images = self.dataset.test_images
        predict = evaluation.module_predictor(self._ready(trained_model), self.dataset.preprocessing, self._device)
        self._observer.begin(f"evaluating {trained_model.model}", images.shape[0])
        size = evaluation.batch_size_on(self._device, images)
        return evaluation.predict_all(predict, images, batch_size=size, on_batch=self._observer.advance)

    def _over(self, numbers: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The results of `compute` for the test images with these numbers, in batches; float32 on the CPU."""
        normalise = self.dataset.preprocessing.normaliser(self._device)
        with torch.inference_mode():
            parts = [
                compute(normalise(self.dataset.test_images[part].to(self._device))).float().cpu()
                for part in torch.split(numbers, evaluation.BATCH_SIZE)
            ]
        return torch.cat(parts)


def latency_ms(trained_model: TrainedModel, cpu: str, message: Callable[[str], None]) -> float:
    """Median time of one image in ONNX Runtime on one thread of this machine, in milliseconds.

    It is measured once for a model and kept in the state folder, so that repeated reports do not differ.

    Args:
        trained_model: the model.
        cpu: name of this machine's processor.
        message: called with a line about a kept time that has changed or was not checked.

    Raises:
        IcdctlError: the model can't be exported or run.
    """
    facts = {
        "model": trained_model.model,
        "classes": trained_model.num_classes,
        "size": list(trained_model.preprocessing.size),
        "cpu": cpu,
        "versions": versions.versions(("onnxruntime", "torch")),
    }
    path = _cache_path("latency", facts)
    held = _held(path, facts, message)
    if isinstance(held.get("ms"), float):
        return float(held["ms"])
    with tempfile.TemporaryDirectory(prefix="icdctl-latency-") as name:
        file = Path(name) / "model.onnx"
        file.write_bytes(onnx_bytes(trained_model))
        measured = OnnxClassifier(file).latency_ms()
    _keep(path, {"ms": measured, "of": facts})
    return measured


def _cache_path(kind: str, facts: Mapping[str, object]) -> Path:
    """The file that holds the measurement that these facts decide."""
    key = files.sha256_bytes(json.dumps(facts, sort_keys=True).encode())[:20]
    return files.cache_folder() / kind / f"{key}.json"


def _keep(path: Path, value: Mapping[str, object]) -> None:
    """Keep a measurement for the next report; if the state folder can't be written to, that report measures again."""
    with contextlib.suppress(ArtifactError):
        files.write_json(path, {**value, _HASH: files.content_sha256(value)})


_HASH = "sha256"
"""Key in a kept measurement for the hash of the rest."""


def _held(path: Path, facts: Mapping[str, object], message: Callable[[str], None]) -> dict[str, Any]:
    """A measurement that was kept; empty if there is none, or if the file is broken or has changed.

    Args:
        path: its file.
        facts: what decides it.
        message: called with a line where the file has changed, or where an earlier version kept it without a hash.
    """
    try:
        value = files.parse_json(files.read_regular(path))
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict):
        return {}
    stated = value.get(_HASH)
    of = files.parse_json(json.dumps(facts))
    if value.get("of") != of or stated not in (None, files.content_sha256(value, without=(_HASH,))):
        message(f"`{path}` has changed since a report kept it there: its numbers were measured again")
        return {}
    if stated is None:
        message(
            "an earlier version of icdctl kept numbers without hashes, which were not checked; they are measured again "
            "after `icdctl clean --kind numbers`"
        )
    files.mark_used(path)
    return value


def correlation(logits: Tensor) -> Matrix:
    """How similar classes are to a model: Pearson's correlation of their logits over the images, [N, K] -> [K, K].

    A class whose logit never changes has correlation 0 with every class.
    """
    values = logits.double()
    values = values - values.mean(dim=0)
    length = values.norm(dim=0)
    matrix = (values.T @ values) / (length[:, None] * length[None, :]).clamp(min=1e-12)
    held: Matrix = matrix.clamp(-1, 1).numpy()
    return held


def gram_of(regions: Tensor, scale: int) -> Matrix:
    """The Gram matrix of an image's patches of one scale, from its regions: [K, 4, 4] -> [scale^2, scale^2]."""
    matrix: Matrix = gram_matrix(pool_regions(regions[None].double(), [scale]))[0].numpy()
    return matrix


def perplexity(num_images: int) -> float:
    """The perplexity of a map of this many images: 30, or less for few images."""
    return min(30.0, max(1.0, (num_images - 1) / 3))


def feature_map(features: Tensor) -> Matrix:
    """Map features of at least `FEWEST_MAPPED` images to the plane by t-SNE with a fixed seed: [F, C] -> [F, 2].

    Source: van der Maaten and Hinton 2008, https://www.jmlr.org/papers/v9/vandermaaten08a.html
    """
    from sklearn.manifold import TSNE

    values = features.double()
    start = "pca" if float(values.std(dim=0).max()) > 0 else "random"  # equal features have no principal components
    placed = TSNE(random_state=_SEED, init=start, perplexity=perplexity(len(values)), n_jobs=1).fit_transform(
        values.numpy()
    )
    return np.asarray(placed, dtype=np.float64)
