"""Classifiers to be measured (weights, an ONNX file or a module), and the images to measure them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from icdctl import data, evaluation, files, teachers
from icdctl.config.dataset_request import dataset_request
from icdctl.config.lookup import Owner, names_owned_by
from icdctl.config.run_config import RunConfig
from icdctl.config.sources import from_validation
from icdctl.data import Dataset, DatasetInfo, DatasetName, Preprocessing, Request, SplitRecord
from icdctl.errors import ArtifactError, UsageError, is_out_of_memory
from icdctl.exporting import OnnxClassifier
from icdctl.models.external import check_weights
from icdctl.models.inspection import check_logits
from icdctl.registry import trained
from icdctl.registry.trained import TrainedModel
from icdctl.run_files import HASH_KEY

Model = str | Path | nn.Module


@dataclass(frozen=True)
class ClassifierInfo:
    """What is known of a classifier to be measured."""

    label: str
    """Its name in messages."""
    dataset: str | None
    """The public name of the data set that it was trained on; None where its file does not say."""
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    """K names; None where they are not known."""
    run: RunConfig | None
    """The configuration of the run that trained it; None where no `config.json` is beside it."""
    split: SplitRecord | None = None
    """How the images were divided when it was trained; None where its file does not say it."""
    data_sha256: str | None = None
    """Hash of its run's pixels and labels; None where no `metrics.json` of its run is beside it."""
    is_file: bool = True
    """False for a module in memory, of which nothing can be known."""
    notes: tuple[str, ...] = ()
    """What a user should know of how its weights were read."""

    def own_images(self, dataset: str | None, *, data_dir: str | None, test_images: int | None) -> Request:
        """The test images of the data set that it was trained on, divided as in its run; or those of another data set.

        Where no run is beside it, its file says how to divide a folder of images.

        Args:
            dataset: another data set, as typed; None for the one that it was trained on.
            data_dir: the folder that holds the published data sets; None for the default.
            test_images: number of test images, for data sets that are made on demand; None for the run's number.

        Raises:
            UsageError: no data set is known, or it was trained on a folder of images whose path is not known.
        """
        if dataset is None and self.dataset is None:
            raise UsageError("the data set is not named", hint="pass it with `--dataset`")
        run, name = self.run, DatasetName.parse(str(dataset or self.dataset))
        run_name = None if run is None else DatasetName.parse(run.dataset)
        if dataset is None and name.is_image_folder:
            if run_name is None or not run_name.is_image_folder:
                raise UsageError(
                    f"`{self.label}` was trained on the image folder `{name.folder}`, and nothing says where it is",
                    hint="name it with `--dataset imagefolder:DIR`",
                )
            name = run_name
        name = DatasetName.parse(data.resolve(str(name)))
        settings: dict[str, Any] = {}
        if run is not None and run_name is not None and run_name.kind == name.kind:
            settings = {key: getattr(run, key) for key in (*names_owned_by(Owner.DATASET), "split_seed")}
            if name.is_image_folder and run_name == name:  # the cache of images that the run decoded is then used
                held = run.images
                settings |= {key: getattr(held, key) for key in ("val_split", "room_to_crop", "unlabeled")}
        if name.is_image_folder and self.split is not None:  # what weights say holds, wherever they were copied to
            settings |= {"val_split": self.split.val_split, "split_seed": self.split.split_seed}
            if self.split.test_split is not None:
                settings["test_split"] = self.split.test_split
        if test_images is not None:
            settings["test_images"] = test_images
        if name.is_image_folder:
            settings["image_size"] = self.preprocessing.size[0]
        folder = None if data_dir is None else files.user_path(data_dir)
        return dataset_request(str(name), folder=folder, **settings)

    def how_divided(self, wanted: Request) -> str | None:
        """The line that says how test images are split off because weights without a run say so; None elsewhere."""
        split = self.split
        if self.run is not None or split is None or split.test_split is None or wanted.test_split is None:
            return None
        return f"images are divided as `{self.label}` says it was trained: `{split.flags}`"

    def test_images_seen(self, dataset: Dataset) -> str | None:
        """What to say about test images that it was trained on, or may have been; None where it was on none."""
        if not self.is_file:
            return None
        if self.split is None and self.data_sha256 is not None and self.data_sha256 == dataset.sha256:
            return None  # a run of an earlier version, and the very images
        return dataset.seen_by(f"`{self.label}`", self.dataset, self.split)

    def what_changed(self, dataset: Dataset) -> str | None:
        """The line about other training images than it had, where the test images are the same; None elsewhere."""
        then, now = (None if split is None else split.parts for split in (self.split, dataset.split))
        if not then or not now or then.get("test") != now["test"] or then.get("train") == now["train"]:
            return None
        if self.dataset != dataset.name or (self.split and dataset.split and self.split.flags != dataset.split.flags):
            return None
        counts = [f"{part['train'].images:,}" for part in (then, now)]
        return (
            f"the images of `{dataset.name}` for training have changed since `{self.label}` was trained: {counts[0]} "
            f"then, {counts[1]} now; the test images have not"
        )

    def check_size(self, dataset: DatasetInfo) -> None:
        """Refuse images of another size than it was trained on.

        Raises:
            ArtifactError: the sizes differ.
        """
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
        """Refuse to measure where its classes, their names or their order are not those of the data set.

        Args:
            logits: [N, K].
            dataset: the data set that it was run on.

        Raises:
            ArtifactError: the classes differ.
        """
        if logits.shape[1] != dataset.num_classes:
            raise ArtifactError(
                f"`{self.label}` has {logits.shape[1]} classes, `{dataset.name}` has {dataset.num_classes}",
                hint="name the data set that it was trained on with `--dataset`",
            )
        pairs = zip(self.class_names or dataset.class_names, dataset.class_names, strict=True)
        other = next((pair for pair in pairs if pair[0] != pair[1]), None)
        if other is not None:
            raise ArtifactError(
                f"`{self.label}` has the class `{other[0]}` where `{dataset.name}` has `{other[1]}`",
                hint="name the data set that it was trained on with `--dataset`",
            )


def doubts_about(dataset: Dataset, measured: Sequence[ClassifierInfo]) -> tuple[str, ...]:
    """What makes the numbers of classifiers on a data set doubtful."""
    found = [dataset.caveat, *dataset.warnings, *(each.test_images_seen(dataset) for each in measured)]
    return tuple(dict.fromkeys(text for text in found if text is not None))


def info_of(target: TrainedModel) -> ClassifierInfo:
    """What is known of weights on disk.

    Raises:
        ArtifactError: the configuration or the metrics of their run can't be read.
    """
    folder = target.path.parent
    run = _run_beside(folder, is_own=files.user_path(target.origin) != target.path)
    known = (target.origin, target.dataset, target.preprocessing, target.class_names)
    data_sha256 = _data_beside(folder, run, target.sha256)
    return ClassifierInfo(*known, run, target.split, data_sha256, notes=target.weights.notes)


def ready(
    target: Model,
    dataset: DatasetInfo | None,
    device: torch.device,
    *,
    module: nn.Module | None = None,
    image_size: int | None = None,
) -> tuple[ClassifierInfo, evaluation.Predict]:
    """Load a classifier, so that it is ready to classify images.

    Args:
        target: weights, an ONNX file or a module.
        dataset: the data set of a target that does not say what it was trained on.
        device: where to run it; ONNX files always run on the CPU.
        module: the custom module that the weights belong to; None for weights of icdctl's models.
        image_size: side of the images that a module reads, where the data set does not say it.

    Returns:
        What is known of the classifier, and a function from images [B, H, W, 3] uint8 to logits [B, K].

    Raises:
        UsageError, ArtifactError: the target can't be loaded, or too little is known of it.
    """
    if isinstance(target, nn.Module):
        if dataset is None:
            raise UsageError("the data set is not named", hint="pass `dataset`, e.g. `dataset='cifar100'`")
        _check_size_is_said(dataset, image_size)
        name = type(target).__name__
        check_weights(target)
        predict = evaluation.module_predictor(target.eval().to(device), dataset.preprocessing, device)
        return ClassifierInfo(name, None, dataset.preprocessing, None, None, is_file=False), _checked(predict, name)
    label = str(target)
    if (files.user_path(label) / "model.onnx").is_file():  # an export folder
        label = str(files.user_path(label) / "model.onnx")
    if label.endswith(".onnx"):
        path = files.user_path(label)
        session = OnnxClassifier(path)
        said = session.description
        folder = path.parent if (path.parent / "config.json").is_file() else path.parent.parent
        run = _run_beside(folder, is_own=False)
        known = (label, said.dataset, said.preprocessing, said.class_names, run, said.split)
        return ClassifierInfo(*known, _data_beside(folder, run, said.weights_sha256)), session.logits
    found = weights_at(label, dataset, module=module, image_size=image_size)
    model = found.load().to(device).to(memory_format=torch.channels_last)
    return info_of(found), evaluation.module_predictor(model, found.preprocessing, device)


def _checked(predict: evaluation.Predict, name: str) -> evaluation.Predict:
    """A function that gives a custom module's logits, and raises a UsageError where they are none."""

    def checked(images: torch.Tensor) -> torch.Tensor:
        try:
            logits: object = predict(images)
        except Exception as error:  # a custom module can raise any exception
            if is_out_of_memory(error):
                raise
            raise UsageError(
                f"`{name}` fails on images {list(images.shape)}: {error}",
                hint="a model must map [B, 3, H, W] to logits [B, K]; the exception's cause shows where it fails",
            ) from error
        return check_logits(name, logits)

    return checked


def weights_at(
    target: str, dataset: DatasetInfo | None, *, module: nn.Module | None, image_size: int | None
) -> TrainedModel:
    """Find weights on disk; `module` is the custom module that they belong to. Arguments and errors as for `ready`."""
    found = trained.resolve(target, dataset=dataset, module=module)
    if module is not None and not found.weights.metadata:
        _check_size_is_said(dataset, image_size)
    return found


def _check_size_is_said(dataset: DatasetInfo | None, image_size: int | None) -> None:
    """Require `image_size` where it is needed: neither a module nor a folder of images says what size is read."""
    if dataset is not None and DatasetName.parse(dataset.name).is_image_folder and image_size is None:
        raise UsageError("nothing says what size of images the module reads", hint="pass `image_size`, e.g. 224")


def named_weights(teacher: Model, wanted: Request) -> Model:
    """The weights of the teacher that a model's name stands for, as for `distill`; anything else unchanged."""
    if isinstance(teacher, nn.Module) or teachers.model_of(str(teacher)) is None:
        return teacher
    return str(teachers.find(str(teacher), dataset=data.describe(wanted)).path)


def _run_beside(folder: Path, *, is_own: bool) -> RunConfig | None:
    """The configuration in a run folder or a registered artifact; None where there is none.

    Args:
        folder: the folder that the classifier's file is in.
        is_own: whether the user named the folder, so that its `config.json` can't be another program's.

    Raises:
        ArtifactError: it can't be read; other images would be measured without it.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    hint = "restore it; or copy the weights into a folder without it, and name the data set with `--dataset`"
    stated = files.read_json(path, what="config", hint=hint)
    if not is_own and not (isinstance(stated, dict) and stated.keys() >= {"dataset", "method", "student"}):
        return None  # of another program: many have a file with this name
    if not isinstance(stated, dict):
        raise ArtifactError(f"`{path}` does not hold a JSON object of settings", hint=hint)
    try:
        return RunConfig.stated(stated)
    except ValidationError as error:
        raise ArtifactError(f"`{path}`: {from_validation(error).message}", hint=hint) from error
    except ValueError as error:
        raise ArtifactError(f"`{path}`: {error}", hint=hint) from error


def _data_beside(folder: Path, run: RunConfig | None, weights_sha256: str) -> str | None:
    """The hash of pixels and labels in the metrics of a run; None where there are none of these weights.

    Raises:
        ArtifactError: they can't be read.
    """
    path = folder / "metrics.json"
    if run is None or not path.is_file():
        return None
    stated = files.read_json(path, what="metrics", hint="restore it, or train the model again")
    if not isinstance(stated, dict) or stated.get(HASH_KEY, weights_sha256) != weights_sha256:
        return None
    sha256 = stated.get("dataset_sha256")
    return sha256 if isinstance(sha256, str) else None
