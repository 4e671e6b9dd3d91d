"""What a report finds out about each group: its teacher, its students, their numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from icdctl import data
from icdctl.config.run import RunConfig
from icdctl.data import Request
from icdctl.engine.environment import cpu_name
from icdctl.engine.observer import Observer
from icdctl.errors import IcdctlError
from icdctl.registry.trained import TrainedModel
from icdctl.reporting import numbers
from icdctl.reporting.collect import Cell, Group
from icdctl.reporting.numbers import Examiner, Measured


@dataclass
class Asked:
    """What was found out about a group, as far as its models could be asked."""

    group: Group
    data_sha256: str | None = None
    """None where its images are not there."""
    num_classes: int | None = None
    teacher: TrainedModel | None = None
    teacher_numbers: Measured | None = None
    measured: dict[Path, Measured] = field(default_factory=dict)
    """By run folder."""
    targets: dict[str, TrainedModel] = field(default_factory=dict)
    """Label of a cell -> weights of its first run."""
    latencies: dict[str, float] = field(default_factory=dict)
    """Model -> milliseconds."""

    def of(self, cell: Cell) -> list[Measured]:
        """Of all runs of a cell; none where one could not be asked."""
        found = [self.measured[run.folder] for run in cell.runs if run.folder in self.measured]
        return found if len(found) == len(cell.runs) else []


class Asker:
    """Asks group after group; groups of one data set after each other share its images and its teachers' logits.

    Args:
        device: that models run on.
        data_dir: what holds the data sets; None for where the runs found them.
        latency: measure one image in ONNX Runtime.
        observer: told of the progress.
        notes: gets what could not be asked, and why.
    """

    def __init__(
        self, device: torch.device, *, data_dir: str | None, latency: bool, observer: Observer, notes: list[str]
    ) -> None:
        self._device, self._data_dir, self._latency = device, data_dir, latency
        self._observer, self._notes = observer, notes
        self._held: tuple[Request, Examiner] | None = None

    def ask(self, group: Group) -> tuple[Asked, Examiner | None]:
        """What the models of a group say, and who asked them; a model that can't be asked is a note."""
        found = Asked(group)
        try:
            examiner = self._examiner(group.cells[0].config)
        except IcdctlError as error:
            self._notes.append(f"{group.title}: its models were not asked: {error.message}")
            return found, None
        found.data_sha256, found.num_classes = examiner.dataset.sha256, len(examiner.dataset.class_names)
        self._ask_teacher(found, examiner)
        for cell in group.cells:
            for run in cell.runs:
                try:
                    target = numbers.run_target(run)
                    found.measured[run.folder] = examiner.measure(target, teacher=found.teacher)
                except IcdctlError as error:
                    self._notes.append(f"{run.folder} was not measured: {error.message}")
                    continue
                if run is cell.runs[0]:
                    found.targets[cell.label] = target
        if self._latency:
            self._time(found)
        return found, examiner

    def _examiner(self, config: RunConfig) -> Examiner:
        if self._data_dir is not None:
            config = config.model_copy(update={"data_dir": self._data_dir})
        wanted = config.images
        if self._held is None or self._held[0] != wanted:
            self._held = None  # frees the images of the last one
            self._held = (wanted, Examiner(data.load(wanted), self._device, self._observer))
        return self._held[1]

    def _ask_teacher(self, found: Asked, examiner: Examiner) -> None:
        try:
            teacher = numbers.teacher_target(found.group, examiner.dataset)
            if teacher is not None:
                found.teacher_numbers = examiner.measure(teacher, teacher=None)
                found.teacher = teacher
        except IcdctlError as error:
            self._notes.append(f"{found.group.title}: nothing is compared with the teacher: {error.message}")

    def _time(self, found: Asked) -> None:
        for target in [*([found.teacher] if found.teacher else []), *found.targets.values()]:
            if target.model in found.latencies:
                continue
            try:
                found.latencies[target.model] = numbers.latency_ms(target, cpu_name())
            except IcdctlError as error:
                self._notes.append(f"the latency of {target.model} was not measured: {error.message}")
