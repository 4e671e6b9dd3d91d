"""What a student run is built from: its model, first weights and objective, as the configuration and the seed say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from icdctl import methods, models
from icdctl.config.run_config import RunConfig
from icdctl.engine.shared_data import SharedData, balanced_class_weights
from icdctl.errors import ArtifactError, UsageError
from icdctl.methods import ModelProbe, Objective, Supervision
from icdctl.models import Classifier, Weights, pretrained
from icdctl.models.external import Adapted, check_patches, without_adapter

_OBJECTIVE_SEED = 2**31
"""Added to the run's seed for what a method draws: a connector's weights are not those of the student's first layer."""


def new_student(config: RunConfig, shared: SharedData) -> Classifier:
    """The model that the configuration names, with the weights that its seed gives, or its library's trained ones."""
    size = shared.dataset.preprocessing.size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = models.create(config.student, shared.dataset.num_classes, image_size=size)
    if methods.get(config.method).needs_patches:
        check_patches(student)
    if config.pretrained and isinstance(student, Adapted):
        _check_pretrained(config, pretrained.load_pretrained(student))
    if min(size) < student.smallest_image:
        raise UsageError(
            f"images of {size[0]} x {size[1]} are too small for `{config.student}`, which needs "
            f"{student.smallest_image} x {student.smallest_image}",
            hint=f"`--image-size {student.smallest_image}` or more, or another model",
        )
    return student


def with_pretrained_hashes(configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The configurations, with the hash of the library's trained weights where they want those, which are downloaded.

    Raises:
        UsageError, ArtifactError: there are no such weights, or not those that a configuration states.
    """
    students = dict.fromkeys(config.student for config in configs if config.pretrained)
    hashes = {name: pretrained.pretrained_sha256(name) for name in students}
    found = []
    for config in configs:
        if config.pretrained:
            _check_pretrained(config, hashes[config.student])
            config = config.model_copy(update={"pretrained_sha256": hashes[config.student]})
        found.append(config)
    return found


def _check_pretrained(config: RunConfig, found: str) -> None:
    if found != (config.pretrained_sha256 or found):
        raise ArtifactError(
            f"the trained weights of `{config.student}` have sha256 {found[:12]}..., the configuration states "
            f"{str(config.pretrained_sha256)[:12]}...",
            hint="put back the file in the library's cache, or install the version of the library that it is of; "
            "`--pretrained` without `--config`, in another folder, takes them as they are now",
        )


def new_objective(config: RunConfig, shared: SharedData, student: Classifier, teacher: Classifier | None) -> Objective:
    """The objective of the method for these models, with the connectors that the seed gives."""
    balanced = config.class_weights == "balanced"
    supervision = Supervision(
        label_smoothing=config.label_smoothing,
        class_weights=balanced_class_weights(shared.dataset).to(shared.device) if balanced else None,
        has_unlabeled=shared.dataset.has_unlabeled,
        train_labels=shared.dataset.train_labels,
    )
    size = shared.dataset.preprocessing.size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_OBJECTIVE_SEED + config.seed)
        return methods.get(config.method).build(
            ModelProbe(student, size),
            None if teacher is None else ModelProbe(teacher, size),
            config.settings,
            scales=config.scales,
            supervision=supervision,
        )


def load_first_weights(student: Classifier, config: RunConfig) -> Weights:
    """Load the first weights from a file; of one with another number of classes, all but the head.

    Returns:
        The file's content, without its tensors.
    """
    path = Path(str(config.init_weights))
    loaded = models.load_weights(without_adapter(student), path, head=student.head)
    if loaded.sha256 != (config.init_sha256 or loaded.sha256):
        raise ArtifactError(
            f"first weights `{config.init_weights}` have sha256 {loaded.sha256[:12]}..., the configuration states "
            f"{str(config.init_sha256)[:12]}...",
            hint="name the file with `--init-weights` to use it as it is now",
        )
    return replace(loaded, tensors={})
