"""A classifier measured on the test images of a data set, alone or beside a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from icdctl import data, evaluation
from icdctl.api.classifiers import Model, doubts_about, named_weights, ready
from icdctl.api.known_errors import known_errors
from icdctl.config.dataset_request import dataset_request
from icdctl.engine.device import resolve_device
from icdctl.engine.observer import Observer, SilentObserver, decoding
from icdctl.errors import UsageError


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers of a classifier on a data set's test images."""

    target: str
    dataset: str
    num_images: int
    class_names: tuple[str, ...]
    numbers: evaluation.Evaluation
    agreement: float | None
    """Share of the images on which it gives the same class as the teacher, in percent."""
    fidelity: float | None
    """Mean KL(teacher || this classifier), in nats."""
    warnings: tuple[str, ...] = ()
    """What makes the numbers doubtful, such as test images that the classifier was trained on."""

    def as_json(self) -> dict[str, Any]:
        """The JSON object that `--json` prints."""
        found = {"target": self.target, "dataset": self.dataset, "num_images": self.num_images}
        found["warnings"] = list(self.warnings)
        compared = {} if self.agreement is None else {"agreement": self.agreement, "fidelity": self.fidelity}
        return {**found, **self.numbers.as_json(), **compared}


@known_errors()
def evaluate(
    target: Model,
    *,
    dataset: str | None = None,
    teacher: Model | None = None,
    model: nn.Module | None = None,
    data_dir: str | None = None,
    test_images: int | None = None,
    image_size: int | None = None,
    device: str = "auto",
    observer: Observer | None = None,
) -> EvaluationResult:
    """Measure a classifier on the test images: accuracies, loss, calibration; with a teacher, agreement too.

    Args:
        target: a run folder, a weights file, `registry:NAME`, an .onnx file or an nn.Module.
        dataset: the data set to test on; by default the one that the target was trained on.
        teacher: another classifier to compare with, or a model's name for its registered teacher.
        model: the nn.Module that the weights of `target` belong to, where that is a custom module.
        data_dir: the folder that holds the folders of the data sets.
        test_images: number of test images that `digits100` draws.
        image_size: side of the images that an nn.Module reads, in pixels, where `dataset` is an `imagefolder`.
        device: the device for torch models; ONNX files run on the CPU.
        observer: receives the progress.

    Raises:
        IcdctlError: with a message and a hint.
    """
    place = resolve_device(device)
    seen = observer or SilentObserver()
    named = None if dataset is None else data.describe(dataset_request(dataset, image_size=image_size))
    classifier, predict = ready(target, named, place, module=model, image_size=image_size)
    wanted = classifier.own_images(dataset, data_dir=data_dir, test_images=test_images)
    measured = [classifier]
    if teacher is not None:
        other, predict_as_other = ready(
            named_weights(teacher, wanted), data.describe(wanted), place, image_size=wanted.image_size
        )
        measured.append(other)
        if dataset is None and other.dataset not in (None, classifier.dataset):
            raise UsageError(
                f"`{other.label}` was trained on `{other.dataset}`, `{classifier.label}` on `{classifier.dataset}`",
                hint="compare models of one data set, or name the one to test on with `--dataset`",
            )
    for note in dict.fromkeys(note for each in measured for note in each.notes):
        seen.message(note)
    for each in measured:
        each.check_size(data.describe(wanted))
    divided = classifier.how_divided(wanted)
    if divided is not None:
        seen.message(divided)
    held = data.load(wanted, on_images=decoding(seen))
    warnings = doubts_about(held, measured)
    changed = classifier.what_changed(held)
    for text in (*(f"warning: {warning}" for warning in warnings), *([] if changed is None else [changed])):
        seen.message(text)
    others = None
    if teacher is not None:
        seen.begin("teacher", held.test_images.shape[0])
        others = evaluation.predict_all(predict_as_other, held.test_images, on_batch=seen.advance)
        other.check_classes(others, held)
    seen.begin("evaluating", held.test_images.shape[0])
    logits = evaluation.predict_all(predict, held.test_images, on_batch=seen.advance)
    classifier.check_classes(logits, held)
    return EvaluationResult(
        target=classifier.label,
        dataset=held.name,
        num_images=logits.shape[0],
        class_names=held.class_names,
        numbers=evaluation.evaluate_logits(logits, held.test_labels),
        agreement=None if others is None else evaluation.agreement(logits, others),
        fidelity=None if others is None else evaluation.fidelity(logits, others),
        warnings=warnings,
    )
