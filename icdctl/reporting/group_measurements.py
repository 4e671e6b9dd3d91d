"""Measure the models of each group: its teacher and its students."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from icdctl import data
from icdctl.config.run_config import RunConfig
from icdctl.data import Dataset, Request
from icdctl.engine.environment import cpu_name
from icdctl.engine.observer import Observer
from icdctl.errors import ArtifactError, IcdctlError, first_few
from icdctl.registry.trained import TrainedModel
from icdctl.reporting import measure
from icdctl.reporting.measure import Measurement, ModelMeasurer
from icdctl.reporting.run_groups import ReportCell, RunGroup

_NAMED_CLASSES = 5


@dataclass
class GroupMeasurements:
    """The measurements of a group, as far as its models could be measured."""

    group: RunGroup
    data_sha256: str | None = None
    """Hash of the group's images; None if they are not on this machine."""
    num_classes: int | None = None
    teacher: TrainedModel | None = None
    teacher_numbers: Measurement | None = None
    measured: dict[Path, Measurement] = field(default_factory=dict)
    """Run folder -> measurement."""
    trained_models: dict[str, TrainedModel] = field(default_factory=dict)
    """Label of a cell -> trained model of its first run."""
    latencies: dict[str, float] = field(default_factory=dict)
    """Architecture -> milliseconds for one image."""

    def measurements_of(self, cell: ReportCell) -> list[Measurement]:
        """The measurements of all runs of a cell; empty if one run could not be measured."""
        found = [self.measured[run.folder] for run in cell.runs if run.folder in self.measured]
        return found if len(found) == len(cell.runs) else []


class GroupMeasurer:
    """Measures group after group. Consecutive groups with the same data set share its images and the teachers' logits.

    Args:
        device: the device that models run on.
        data_dir: the folder that holds the data sets; None for the one that the runs used.
        latency: measure the time of one image in ONNX Runtime.
        observer: receives the progress.
        notes: receives a sentence for everything that could not be measured.
    """

    def __init__(
        self, device: torch.device, *, data_dir: str | None, latency: bool, observer: Observer, notes: list[str]
    ) -> None:
        self._device, self._data_dir, self._latency = device, data_dir, latency
        self._observer, self._notes = observer, notes
        self._held: tuple[Request, ModelMeasurer] | None = None
        self._said: set[str] = set()

    def _say(self, text: str) -> None:
        """Show a line once, however many models it is about."""
        if text not in self._said:
            self._said.add(text)
            self._observer.message(text)

    def measure(self, group: RunGroup) -> tuple[GroupMeasurements, ModelMeasurer | None]:
        """Measure the models of a group; also returns the measurer for further figures, None without images.

        A model that can't be measured gives a note.
        """
        found = GroupMeasurements(group)
        try:
            measurer = self._measurer(group.cells[0].config)
        except IcdctlError as error:
            self._notes.append(f"{group.title}: its models were not measured: {error.message}")
            return found, None
        found.data_sha256, found.num_classes = measurer.dataset.sha256, len(measurer.dataset.class_names)
        self._measure_teacher(found, measurer)
        for cell in group.cells:
            for run in cell.runs:
                try:
                    trained_model = measure.student_of(run)
                    self._check_unseen(trained_model, f"`{run.folder}`", measurer)
                    found.measured[run.folder] = measurer.measure(trained_model, teacher=found.teacher)
                except IcdctlError as error:
                    self._notes.append(f"{run.folder} was not measured: {error.message}")
                    continue
                if run is cell.runs[0]:
                    found.trained_models[cell.label] = trained_model
        if self._latency:
            self._time(found)
        return found, measurer

    def _measurer(self, config: RunConfig) -> ModelMeasurer:
        if self._data_dir is not None:
            config = config.model_copy(update={"data_dir": self._data_dir})
        wanted = config.images
        if self._held is None or self._held[0] != wanted:
            self._held = None  # frees the images of the previous data set
            dataset = data.load(wanted)
            self._note_untested(dataset)
            self._held = (wanted, ModelMeasurer(dataset, self._device, self._observer, self._say))
        return self._held[1]

    def _note_untested(self, dataset: Dataset) -> None:
        """Note which classes have no numbers."""
        tested = set(dataset.test_labels.tolist())
        untested = [name for number, name in enumerate(dataset.class_names) if number not in tested]
        if untested:
            count = f"{len(untested)} of {dataset.num_classes} classes of `{dataset.name}`"
            names = first_few(untested, _NAMED_CLASSES)
            self._notes.append(f"{count} have no test image, so nothing is measured for them: {names}")

    def _measure_teacher(self, found: GroupMeasurements, measurer: ModelMeasurer) -> None:
        try:
            teacher = measure.teacher_of(found.group, measurer.dataset)
            if teacher is not None:
                self._check_unseen(teacher, f"teacher {teacher.model}", measurer)
                found.teacher_numbers = measurer.measure(teacher, teacher=None)
                found.teacher = teacher
        except IcdctlError as error:
            self._notes.append(f"{found.group.title}: the students are not compared with the teacher: {error.message}")

    def _check_unseen(self, trained_model: TrainedModel, label: str, measurer: ModelMeasurer) -> None:
        """Refuse to measure a model on images that it was trained on, or may have been.

        Weights of earlier versions do not say which those were, which is noted.

        Raises:
            ArtifactError: it was trained on some of the test images, or on images that have changed since.
        """
        seen = measurer.dataset.seen_by(label, trained_model.dataset, trained_model.split)
        if seen is None:
            return
        if trained_model.split is None:
            self._notes.append(seen)
            return
        raise ArtifactError(seen, hint="bring the images back, or train the model again")

    def _time(self, found: GroupMeasurements) -> None:
        for trained_model in [*([found.teacher] if found.teacher else []), *found.trained_models.values()]:
            if trained_model.model in found.latencies:
                continue
            try:
                found.latencies[trained_model.model] = measure.latency_ms(trained_model, cpu_name(), self._say)
            except IcdctlError as error:
                self._notes.append(f"the latency of {trained_model.model} was not measured: {error.message}")
