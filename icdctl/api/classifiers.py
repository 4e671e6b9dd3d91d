"""What a person points at to have it measured: weights, an ONNX file or a module, and the images that it is to see."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from icdctl import data, evaluation, files, teachers
from icdctl.config.lookup import Owner, names_owned_by
from icdctl.config.run import RunConfig
from icdctl.data import Dataset, DatasetInfo, Preprocessing, Request
from icdctl.errors import ArtifactError, UsageError
from icdctl.exporting import OnnxClassifier
from icdctl.registry import trained
from icdctl.registry.trained import TrainedModel

Model = str | Path | nn.Module


@dataclass(frozen=True)
class Subject:
    """What is known of a classifier to be measured."""

    label: str
    """What to call it."""
    dataset: str | None
    """What it was trained on, as it says itself; None where it does not."""
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    run: RunConfig | None
    """The run that it comes from, where its configuration lies beside it."""

    def own_images(self, dataset: str | None, *, data_dir: str | None, test_images: int | None) -> Request:
        """The test images of what it was trained on, divided as in its run; or those of another data set.

        Raises:
            UsageError: it was trained on a folder of images, and nothing says which.
        """
        if dataset is None and self.dataset is None:
            raise UsageError("the data set is not named", hint="pass it with `--dataset`")
        run, name = self.run, str(dataset or self.dataset)
        if dataset is None and name.startswith("imagefolder:"):
            if run is None or not run.dataset.startswith("imagefolder:"):
                raise UsageError(
                    f"`{self.label}` was trained on the image folder `{name.partition(':')[2]}`, and nothing says "
                    "where it is",
                    hint="name it with `--dataset imagefolder:DIR`",
                )
            name = run.dataset
        name = data.resolve(name)
        kind = name.partition(":")[0]
        settings: dict[str, Any] = {}
        if run is not None and run.dataset.partition(":")[0] == kind:
            settings = {key: getattr(run, key) for key in (*names_owned_by(Owner.DATASET), "split_seed")}
            if kind == "imagefolder" and run.dataset == name:  # what the run decoded is then found again
                held = run.images
                settings |= {key: getattr(held, key) for key in ("val_split", "room_to_crop", "unlabeled")}
        if test_images is not None:
            settings["test_images"] = test_images
        if kind == "imagefolder":
            settings["image_size"] = self.preprocessing.size[0]
        folder = None if data_dir is None else files.user_path(data_dir)
        return data.request(name, folder=folder, **settings)

    def check_size(self, dataset: DatasetInfo) -> None:
        """Refuse images of a size that it was not trained on."""
        height, width = self.preprocessing.size
        if (height, width) != dataset.preprocessing.size:
            our_height, our_width = dataset.preprocessing.size
            raise ArtifactError(
                f"`{self.label}` reads images of {height} x {width}, those of `{dataset.name}` are "
                f"{our_height} x {our_width}",
                hint="name the data set that it was trained on with `--dataset`, and compare models for images of "
                "one size",
            )

    def check_classes(self, logits: torch.Tensor, dataset: Dataset) -> None:
        """Refuse numbers that compare one class with another."""
        if logits.shape[1] != dataset.num_classes:
            raise ArtifactError(
                f"`{self.label}` tells {logits.shape[1]} classes apart, `{dataset.name}` has {dataset.num_classes}",
                hint="name the data set that it was trained on with `--dataset`",
            )
        pairs = zip(self.class_names or dataset.class_names, dataset.class_names, strict=True)
        other = next((pair for pair in pairs if pair[0] != pair[1]), None)
        if other is not None:
            raise ArtifactError(
                f"`{self.label}` has the class `{other[0]}` where `{dataset.name}` has `{other[1]}`",
                hint="name the data set that it was trained on with `--dataset`",
            )


def subject_of(target: TrainedModel) -> Subject:
    """Of weights on disk."""
    run = _run_beside(target.path.parent)
    return Subject(target.origin, target.dataset, target.preprocessing, target.class_names, run)


def ready(
    target: Model,
    dataset: DatasetInfo | None,
    device: torch.device,
    *,
    module: nn.Module | None = None,
    image_size: int | None = None,
) -> tuple[Subject, evaluation.Predict]:
    """What a person points at, ready to classify.

    Args:
        target: weights, an ONNX file or a module.
        dataset: for what does not say what it was trained on.
        device: of all but ONNX files.
        module: that the weights belong to, where it is a person's own.
        image_size: what a module reads, where the data set does not say it.

    Raises:
        UsageError, ArtifactError: it can't be had, or too little is known of it.
    """
    if isinstance(target, nn.Module):
        if dataset is None:
            raise UsageError("the data set is not named", hint="pass `dataset`, e.g. `dataset='cifar100'`")
        _check_size_is_said(dataset, image_size)
        predict = evaluation.module_predictor(target.eval().to(device), dataset.preprocessing, device)
        return Subject(type(target).__name__, None, dataset.preprocessing, None, None), predict
    label = str(target)
    if (files.user_path(label) / "model.onnx").is_file():  # an export folder
        label = str(files.user_path(label) / "model.onnx")
    if label.endswith(".onnx"):
        path = files.user_path(label)
        session = OnnxClassifier(path)
        said = session.description
        run = _run_beside(path.parent) or _run_beside(path.parent.parent)
        return Subject(label, said.dataset, said.preprocessing, said.class_names, run), session.logits
    found = weights_at(label, dataset, module=module, image_size=image_size)
    model = found.load().to(device).to(memory_format=torch.channels_last)
    return subject_of(found), evaluation.module_predictor(model, found.preprocessing, device)


def weights_at(
    target: str, dataset: DatasetInfo | None, *, module: nn.Module | None, image_size: int | None
) -> TrainedModel:
    """Weights on disk, with the module that they belong to, where it is a person's own; arguments as for `ready`."""
    found = trained.resolve(target, dataset=dataset, module=module)
    if module is not None and not found.weights.metadata:
        _check_size_is_said(dataset, image_size)
    return found


def _check_size_is_said(dataset: DatasetInfo | None, image_size: int | None) -> None:
    """A module does not say what size of images it reads, nor does a folder of images."""
    if dataset is not None and dataset.name.startswith("imagefolder:") and image_size is None:
        raise UsageError("nothing says what size of images the module reads", hint="pass `image_size`, e.g. 224")


def named_weights(teacher: Model, wanted: Request) -> Model:
    """The weights that a model's name stands for, as for `distill`; anything else as it is."""
    if isinstance(teacher, nn.Module) or teachers.model_of(str(teacher)) is None:
        return teacher
    return str(teachers.find(str(teacher), dataset=data.describe(wanted)).path)


def _run_beside(folder: Path) -> RunConfig | None:
    """The configuration in a run folder or a registered artifact, if there is one that can be read."""
    try:
        return RunConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
