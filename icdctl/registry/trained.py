"""Find a trained model by the name that a user typed: a run folder, a weights file or a registered artifact."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icdctl import files, models, registry, run_files
from icdctl.data import DatasetInfo, Preprocessing, SplitRecord
from icdctl.errors import ArtifactError, UsageError
from icdctl.models import Classifier, Weights
from icdctl.models.external import CUSTOM_MODEL, adapt, without_adapter
from icdctl.run_files import WEIGHTS_FILE


@dataclass(frozen=True)
class TrainedModel:
    """A trained classifier on disk, with everything that is needed to use it."""

    path: Path
    """Path of the weights file."""
    sha256: str
    """Hash of the weights file."""
    model: str
    """Name of the architecture in `MODELS`; for a custom module, the name of its class."""
    dataset: str
    """The data set that it was trained on, according to the weights file or else to the user."""
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    origin: str
    """The name that the user typed."""
    weights: Weights
    module: nn.Module | None = None
    """The custom module that the weights belong to, which is never changed; None for a model of `MODELS`."""
    split: SplitRecord | None = None
    """How its data set was divided, and the hashes of its images; None where the weights do not say it."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def source(self) -> str:
        """Where the weights come from: what their publisher states, or that icdctl trained them."""
        return str(self._published("source") or self._published("url") or f"trained with icdctl on `{self.dataset}`")

    @property
    def licence(self) -> str | None:
        """Terms of use that the publisher of the weights states; None if they were not published."""
        stated = self._published("licence")
        return None if stated is None else str(stated)

    def _published(self, key: str) -> object:
        origin = self.weights.metadata.get("origin") if self.weights.metadata else {"source": "a file without a record"}
        return origin.get(key) if isinstance(origin, dict) else None

    def load(self) -> Classifier:
        """The model in eval mode on the CPU, float32.

        Raises:
            ArtifactError: the weights file has changed since it was found, or does not fit the model.
            UsageError: a custom module does not take these images, or has another number of classes.
        """
        size = self.preprocessing.size
        if self.module is None:
            model = models.create(self.model, self.num_classes, image_size=size)
        else:
            module = copy.deepcopy(self.module).float().cpu()
            model = adapt(module, image_size=size, num_classes=self.num_classes, needs_patches=False)
        loaded = models.load_weights(without_adapter(model), self.path)
        if loaded.sha256 != self.sha256:
            raise ArtifactError(
                f"`{self.path}` changed while it was being read",
                hint="wait until the program that writes it has finished, then run the command again",
            )
        return model.eval()


class CustomModuleError(UsageError):
    """The weights belong to a custom module, and the caller did not pass that module."""


def resolve(
    target: str,
    *,
    dataset: DatasetInfo | None = None,
    registry_folder: Path | None = None,
    module: nn.Module | None = None,
) -> TrainedModel:
    """Find the trained model that `target` names.

    Args:
        target: a run folder, a weights file (.safetensors, or a .pth of CRD, mdistiller or iCD), or
            `registry:NAME[@vN]`.
        dataset: the data set for a weights file that does not state it; gives normalisation and class names.
        registry_folder: the registry that `registry:` names are looked up in; None for the project's.
        module: the custom module that the weights belong to; None for a model of `MODELS`.

    Raises:
        CustomModuleError: the weights belong to a custom module, and `module` was not given.
        UsageError: the file does not state its data set, and `dataset` was not given.
        ArtifactError: nothing is found, or the files are broken.
    """
    if module is not None and not isinstance(module, nn.Module):
        raise UsageError(
            f"`model` is a {type(module).__name__}, expected an nn.Module", hint="pass the module itself: `model=Net()`"
        )
    if target.startswith("registry:"):
        folder = registry_folder or registry.default_folder()
        artifact = registry.find(folder, target.removeprefix("registry:"))
        return _from_file(artifact.file(WEIGHTS_FILE), origin=target, dataset=dataset, module=module)
    path = files.user_path(target)
    if path.is_dir():
        weights_file = path / WEIGHTS_FILE
        if not weights_file.is_file():
            unfinished = (path / "config.json").is_file()
            raise ArtifactError(
                f"`{path}` holds no `{WEIGHTS_FILE}`" + (": its run is not finished" if unfinished else ""),
                hint=f"finish it with `--resume --out {path}`" if unfinished else "name a finished run folder",
            )
        found = _from_file(weights_file, origin=target, dataset=dataset, module=module)
        as_it_is = f"restore it, or name `{found.path}` itself to use it as it is now"
        run_files.check_as_written(path, found.sha256, hint=as_it_is)
        return found
    return _from_file(path, origin=target, dataset=dataset, module=module)


def _from_file(path: Path, *, origin: str, dataset: DatasetInfo | None, module: nn.Module | None) -> TrainedModel:
    weights = models.read_weights(path)
    said = weights.metadata
    if said:
        return _from_metadata(path, origin, weights, said, module)
    if dataset is None:
        raise UsageError(
            f"`{path}` does not say which data set it was trained on",
            hint="add `--dataset NAME`, e.g. `--dataset cifar100` for the teachers of CRD and mdistiller",
        )
    known = (dataset.name, dataset.class_names, dataset.preprocessing)
    if module is not None:
        return TrainedModel(path, weights.sha256, type(module).__name__, *known, origin, weights, module)
    model, num_classes = identify(path, weights.tensors, dataset=dataset)
    if num_classes != dataset.num_classes:
        raise ArtifactError(
            f"weights in `{path}` have {num_classes} classes, `{dataset.name}` has {dataset.num_classes}",
            hint="name the data set that they were trained on with `--dataset`",
        )
    return TrainedModel(path, weights.sha256, model, *known, origin, weights)


def _from_metadata(
    path: Path, origin: str, weights: Weights, said: Mapping[str, Any], module: nn.Module | None
) -> TrainedModel:
    if said.get("model") == CUSTOM_MODEL and module is None:
        raise CustomModuleError(
            f"`{path}` holds weights of a custom module, which icdctl can't build",
            hint="in Python, pass the module to `icdctl.evaluate` or `icdctl.export` as `model=MODULE`; to use it as a "
            "teacher or student, load the weights into the module and pass the module",
        )
    try:
        class_names = tuple(unicodedata.normalize("NFC", str(name)) for name in said["class_names"])
        preprocessing = Preprocessing.from_json(said["preprocessing"])
        model = models.resolve(str(said["model"])) if module is None else type(module).__name__
        dataset = str(said["dataset"])
        if len(class_names) < 2:
            raise ValueError(f"{len(class_names)} class names")
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise ArtifactError(
            f"the metadata of `{path}` do not have icdctl's format: {error}",
            hint="another program or version wrote this file; train or convert the model again",
        ) from error
    known = (dataset, class_names, preprocessing)
    return TrainedModel(path, weights.sha256, model, *known, origin, weights, module, split_in(said, path=path))


def split_in(metadata: Mapping[str, Any], *, path: Path) -> SplitRecord | None:
    """The record of the split in the metadata of weights; None where they have none.

    Args:
        metadata: the metadata.
        path: the file that they are from, for the message.

    Raises:
        ArtifactError: the record is malformed.
    """
    try:
        return SplitRecord.from_metadata(metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"the metadata of `{path}` do not say how its images were divided in icdctl's format: {error}",
            hint="another program or version wrote this file; train the model again",
        ) from error


def identify(path: Path, tensors: dict[str, Tensor], *, dataset: DatasetInfo) -> tuple[str, int]:
    """The name of the model that has exactly these keys and shapes, and its number of classes.

    Raises:
        ArtifactError: no model has them.
    """
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    # The head is the only matrix: all other weights belong to convolutions or batch norms.
    heads = [shape for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2]
    if len(heads) == 1 and heads[0][0] >= 2:
        num_classes = heads[0][0]
        for name in models.MODELS:
            with torch.device("meta"):
                state = models.create(name, num_classes, image_size=dataset.preprocessing.size).state_dict()
            if {key: tensor.shape for key, tensor in state.items()} == shapes:
                return name, num_classes
    raise ArtifactError(
        f"weights in `{path}` fit none of the {len(models.MODELS)} models for `{dataset.name}`",
        hint="`icdctl list models` shows the models; keys and shapes must be those of CRD, mdistiller or icdctl. A "
        "custom module can be used through the library: `icdctl.distill(teacher=MODULE, ...)`",
    )
