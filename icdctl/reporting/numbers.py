"""What the trained models of a report say on the test images.

Numbers of a run are kept in the state folder by the hashes of what they follow from, so that a report over many runs
asks each model once.

Shapes: N test images, K classes, C channels.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
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
from icdctl.reporting.collect import Group, Run

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A trained model on the test images of its data set."""

    numbers: Evaluation
    agreement: float | None = None
    """Share of the images that it and its teacher classify alike, in percent."""
    fidelity: float | None = None
    """Mean KL(teacher || student), in nats."""


@dataclass(frozen=True)
class View:
    """What a model makes of the test images, for figures."""

    logits: Tensor
    """[N, K]."""
    features: Tensor
    """[F, C]: what the head reads, of the images chosen for the map of features."""
    cells: Tensor
    """[I, K, 4, 4]: logits of the cells, of the images chosen for Gram matrices."""


@dataclass(frozen=True)
class Chosen:
    """Test images that stand for all, drawn by a fixed seed."""

    mapped: Tensor
    """[F] int64: for the map of features."""
    classes: tuple[int, ...]
    """Theirs."""
    shown: Tensor
    """[I] int64: for Gram matrices."""


FEWEST_MAPPED = 5
_MAPPED_CLASSES, _MAPPED_IMAGES = 10, 30
_SEED = 0


def choose_images(labels: Tensor, *, num_shown: int, shown: Sequence[int] | None = None) -> Chosen:
    """Images for the figures that can't hold all.

    Args:
        labels: [N].
        num_shown: how many have their Gram matrices drawn, each of another class where there are so many.
        shown: these, in their place.

    Raises:
        UsageError: there is no image of that number.
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
        raise UsageError(f"there is no test image {wrong[0]}", hint=f"they are 0 to {len(labels) - 1}")
    return Chosen(torch.cat(mapped), classes, torch.tensor(shown))


def run_target(run: Run) -> TrainedModel:
    """The weights of a run.

    Raises:
        ArtifactError, UsageError: they can't be used, or the model is the user's own module.
    """
    _refuse_custom(run.config.student)
    return trained.resolve(str(run.folder))


def teacher_target(group: Group, dataset: Dataset) -> TrainedModel | None:
    """The teacher of a group, where its weights are still what the students saw; None for a group without.

    Raises:
        ArtifactError, UsageError: they are not there.
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
            "the model is a module of one's own, which icdctl can't build", hint="its numbers are those of its run"
        )


class Examiner:
    """Asks models of one data set; holds its test images.

    Args:
        dataset: whose test images they are asked on.
        device: that they run on.
        observer: told of the progress.
    """

    def __init__(self, dataset: Dataset, device: torch.device, observer: Observer) -> None:
        self.dataset, self._device, self._observer = dataset, device, observer
        pixels = dataset.test_images.contiguous().numpy().tobytes()
        self._data = files.sha256_bytes(pixels + dataset.test_labels.numpy().tobytes())
        self._of_teachers: dict[str, Tensor] = {}

    def measure(self, target: TrainedModel, *, teacher: TrainedModel | None) -> Measured:
        """Numbers of a model, and how alike it and its teacher are.

        Raises:
            IcdctlError: it can't be built, or its logits are not finite.
        """
        facts = {
            "weights": target.sha256,
            "teacher": None if teacher is None else teacher.sha256,
            "data": self._data,
            "device": self._device.type,
            "versions": versions.versions(("icdctl", "torch")),
        }
        path = _cache_path("evaluated", facts)
        held = _held(path)
        try:
            alike = [None if teacher is None else float(held[key]) for key in ("agreement", "fidelity")]
            return Measured(Evaluation.from_json(held["numbers"]), *alike)
        except (KeyError, TypeError, ValueError):
            pass  # never measured, or a broken file
        logits = self._all_logits(target)
        found = Measured(evaluation.evaluate_logits(logits, self.dataset.test_labels))
        if teacher is not None:
            theirs = self._teachers_logits(teacher)
            found = Measured(found.numbers, evaluation.agreement(logits, theirs), evaluation.fidelity(logits, theirs))
        whole = {"numbers": found.numbers.as_json(), "agreement": found.agreement, "fidelity": found.fidelity}
        _keep(path, {**whole, "of": facts})
        return found

    def look(self, target: TrainedModel, chosen: Chosen, *, is_teacher: bool = False) -> View:
        """What a model makes of all test images, and of the chosen ones in detail.

        Args:
            target: the model.
            chosen: the images.
            is_teacher: it is asked for several groups.

        Raises:
            IcdctlError: it can't be built.
        """
        model = self._ready(target)
        pooled = self._over(chosen.mapped, lambda images: model.outputs(images).pooled)

        def cells_of(images: Tensor) -> Tensor:
            return region_logits(model.outputs(images).feature_map, model.head)

        cells = self._over(chosen.shown, cells_of)
        logits = self._teachers_logits(target) if is_teacher else self._all_logits(target)
        return View(logits, pooled, cells)

    def _teachers_logits(self, teacher: TrainedModel) -> Tensor:
        """Of all test images; kept, for a teacher has many students."""
        if teacher.sha256 not in self._of_teachers:
            self._of_teachers[teacher.sha256] = self._all_logits(teacher)
        return self._of_teachers[teacher.sha256]

    def _ready(self, target: TrainedModel) -> Classifier:
        return target.load().to(self._device).to(memory_format=torch.channels_last)

    def _all_logits(self, target: TrainedModel) -> Tensor:
        images = self.dataset.test_images
        predict = evaluation.module_predictor(self._ready(target), self.dataset.preprocessing, self._device)
        self._observer.begin(f"asking {target.model}", images.shape[0])
        size = evaluation.batch_size_on(self._device, images)
        return evaluation.predict_all(predict, images, batch_size=size, on_batch=self._observer.advance)

    def _over(self, numbers: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """Some of the test images, in batches, float32 on the CPU."""
        normalise = self.dataset.preprocessing.normaliser(self._device)
        with torch.inference_mode():
            parts = [
                ask(normalise(self.dataset.test_images[part].to(self._device))).float().cpu()
                for part in torch.split(numbers, evaluation.BATCH_SIZE)
            ]
        return torch.cat(parts)


def latency_ms(target: TrainedModel, cpu: str) -> float:
    """Median time of one image in ONNX Runtime on one thread of this machine, in milliseconds.

    Measured once for a model and kept in the state folder, so that a report does not change with the machine's mood.

    Raises:
        IcdctlError: the model can't be exported or run.
    """
    facts = {
        "model": target.model,
        "classes": target.num_classes,
        "size": list(target.preprocessing.size),
        "cpu": cpu,
        "versions": versions.versions(("onnxruntime", "torch")),
    }
    path = _cache_path("latency", facts)
    held = _held(path)
    if isinstance(held.get("ms"), float):
        return float(held["ms"])
    with tempfile.TemporaryDirectory(prefix="icdctl-latency-") as name:
        file = Path(name) / "model.onnx"
        file.write_bytes(onnx_bytes(target))
        measured = OnnxClassifier(file).latency_ms()
    _keep(path, {"ms": measured, "of": facts})
    return measured


def _cache_path(kind: str, facts: dict[str, Any]) -> Path:
    key = files.sha256_bytes(json.dumps(facts, sort_keys=True).encode())[:20]
    return files.cache_folder() / kind / f"{key}.json"


def _keep(path: Path, value: dict[str, Any]) -> None:
    """For the next report; one whose state folder can't be written to measures again."""
    with contextlib.suppress(ArtifactError):
        files.write_json(path, value)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} was never measured")


def _held(path: Path) -> dict[str, Any]:
    """What was measured before; nothing where it was not, or where the file is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError):
        return {}
    files.mark_used(path)
    return value if isinstance(value, dict) else {}


def correlation(logits: Tensor) -> Matrix:
    """How alike classes are to a model: Pearson's correlation of their logits over the images, [N, K] -> [K, K].

    A class whose logit never changes correlates with nothing.
    """
    values = logits.double()
    values = values - values.mean(dim=0)
    length = values.norm(dim=0)
    matrix = (values.T @ values) / (length[:, None] * length[None, :]).clamp(min=1e-12)
    held: Matrix = matrix.clamp(-1, 1).numpy()
    return held


def gram_of(cells: Tensor, scale: int) -> Matrix:
    """The Gram matrix of the patches of one scale, from an image's cells: [K, 4, 4] -> [scale^2, scale^2]."""
    matrix: Matrix = gram_matrix(pool_regions(cells[None].double(), [scale]))[0].numpy()
    return matrix


def perplexity(num_images: int) -> float:
    """Of a map of so many images: 30, or what few allow."""
    return min(30.0, max(1.0, (num_images - 1) / 3))


def feature_map(features: Tensor) -> Matrix:
    """A map of the plane by t-SNE, from a fixed seed: [F, C] -> [F, 2], of at least `FEWEST_MAPPED` images.

    Source: van der Maaten and Hinton 2008, https://www.jmlr.org/papers/v9/vandermaaten08a.html
    """
    from sklearn.manifold import TSNE

    values = features.double()
    start = "pca" if float(values.std(dim=0).max()) > 0 else "random"  # without any spread there are no components
    placed = TSNE(random_state=_SEED, init=start, perplexity=perplexity(len(values)), n_jobs=1).fit_transform(
        values.numpy()
    )
    return np.asarray(placed, dtype=np.float64)
