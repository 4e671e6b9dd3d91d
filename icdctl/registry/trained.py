"""What a person may point at: a run folder, a weights file, a registered artifact. One answer: a `TrainedModel`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icdctl import files, models, registry, run_files
from icdctl.data import DatasetInfo, Preprocessing
from icdctl.errors import ArtifactError, UsageError
from icdctl.models import Classifier, Weights
from icdctl.models.external import CUSTOM_MODEL, adapt, without_adapter
from icdctl.run_files import WEIGHTS_FILE


@dataclass(frozen=True)
class TrainedModel:
    """A trained classifier on disk, and what is known of it."""

    path: Path
    """The weights file."""
    sha256: str
    """Of the weights file."""
    model: str
    """A name in `MODELS`; the name of the class for a module of one's own."""
    dataset: str
    """What it was trained on, or is taken to have been."""
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    origin: str
    """What was pointed at, as a person would write it."""
    weights: Weights
    module: nn.Module | None = None
    """What the weights belong to where no name says it; it is left as it is."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def source(self) -> str:
        """Where the weights come from."""
        return str(self._published("source") or self._published("url") or f"trained with icdctl on `{self.dataset}`")

    @property
    def licence(self) -> str | None:
        """What the publisher of the weights says on their use; None where nobody published them."""
        stated = self._published("licence")
        return None if stated is None else str(stated)

    def _published(self, key: str) -> Any:
        origin = self.weights.metadata.get("origin") if self.weights.metadata else {"source": "a file without a record"}
        return origin.get(key) if isinstance(origin, dict) else None

    def load(self) -> Classifier:
        """The model in eval mode on the CPU, float32.

        Raises:
            ArtifactError: the file has changed since it was looked at, or does not fit.
            UsageError: a module of one's own takes other images, or tells other classes apart.
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
                f"`{self.path}` was replaced while it was being read", hint="run the command again when it is at rest"
            )
        return model.eval()


class OwnModuleError(UsageError):
    """Weights of a module of one's own, and nobody handed it over."""


def resolve(
    target: str,
    *,
    dataset: DatasetInfo | None = None,
    registry_folder: Path | None = None,
    module: nn.Module | None = None,
) -> TrainedModel:
    """What `target` points at.

    Args:
        target: a run folder, a weights file (.safetensors, or a .pth of CRD, mdistiller or iCD), or
            `registry:NAME[@vN]`.
        dataset: what a file that does not say so was trained on; its normalisation and class names are then taken.
        registry_folder: where `registry:` names are looked up; the project's registry otherwise.
        module: what the weights belong to, where that is no model of `MODELS`.

    Raises:
        OwnModuleError: they belong to such a module, and none was given.
        UsageError: the file does not say what it was trained on, and `dataset` was not given.
        ArtifactError: nothing is there, or it is broken.
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
                hint=f"finish it with `--resume --out {path}`" if unfinished else "point at a finished run folder",
            )
        found = _from_file(weights_file, origin=target, dataset=dataset, module=module)
        as_it_is = f"restore it, or point at `{found.path}` itself to use it as it is now"
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
            hint="pass it with `--dataset`, e.g. `--dataset cifar100` for the CRD and mdistiller teachers",
        )
    known = (dataset.name, dataset.class_names, dataset.preprocessing)
    if module is not None:
        return TrainedModel(path, weights.sha256, type(module).__name__, *known, origin, weights, module)
    model, num_classes = identify(path, weights.tensors, dataset=dataset)
    if num_classes != dataset.num_classes:
        raise ArtifactError(
            f"weights in `{path}` tell {num_classes} classes apart, `{dataset.name}` has {dataset.num_classes}",
            hint="pass the data set that they were trained on with `--dataset`",
        )
    return TrainedModel(path, weights.sha256, model, *known, origin, weights)


def _from_metadata(
    path: Path, origin: str, weights: Weights, said: dict[str, Any], module: nn.Module | None
) -> TrainedModel:
    if said.get("model") == CUSTOM_MODEL and module is None:
        raise OwnModuleError(
            f"`{path}` holds weights of a module of your own, which icdctl can't build",
            hint="in Python, `icdctl.evaluate` and `icdctl.export` take it as `model=MODULE`; as a teacher or student, "
            "load the weights into the module and pass that",
        )
    try:
        class_names = tuple(str(name) for name in said["class_names"])
        preprocessing = Preprocessing.from_json(said["preprocessing"])
        model = models.resolve(str(said["model"])) if module is None else type(module).__name__
        dataset = str(said["dataset"])
        if len(class_names) < 2:
            raise ValueError(f"{len(class_names)} class names")
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise ArtifactError(
            f"`{path}` does not say what it is as icdctl's files do: {error}",
            hint="it was written by another program or version; train or convert it again",
        ) from error
    return TrainedModel(path, weights.sha256, model, dataset, class_names, preprocessing, origin, weights, module)


def identify(path: Path, tensors: dict[str, Tensor], *, dataset: DatasetInfo) -> tuple[str, int]:
    """Which model has exactly these keys and shapes, and its number of classes.

    Raises:
        ArtifactError: none of them has.
    """
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    # The head is the one matrix among them: every other weight is a convolution's or a batch norm's.
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
        hint="`icdctl list models` shows them; the layout must be that of CRD, mdistiller or icdctl. A module of your "
        "own goes in through the library: `icdctl.distill(teacher=MODULE, ...)`",
    )
