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
from icdctl.models.backbones import UnavailableError
from icdctl.models.external import CUSTOM_MODEL, adapt, without_adapter
from icdctl.models.state_dicts import differences
from icdctl.run_files import WEIGHTS_FILE

_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class TrainedModel:
    """A trained classifier on disk, with everything that is needed to use it."""

    path: Path
    """Path of the weights file."""
    sha256: str
    """Hash of the weights file."""
    model: str
    """Name of the architecture, as `models.resolve` gives it; for a custom module, the name of its class."""
    dataset: str
    """The data set that it was trained on, according to the weights file or else to the user."""
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    origin: str
    """The name that the user typed."""
    weights: Weights
    module: nn.Module | None = None
    """The custom module that the weights belong to, which is never changed; None for a model with a name."""
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
            UsageError: a custom module does not take these images, or has another number of classes; or the library
                that builds the model is not installed.
        """
        size = self.preprocessing.size
        if self.module is None:
            try:
                model = models.create(self.model, self.num_classes, image_size=size)
            except UnavailableError as error:
                raise CustomModuleError(error.message, hint=error.hint) from error
        else:
            module = copy.deepcopy(self.module).float().cpu()
            model = adapt(module, image_size=size, num_classes=self.num_classes, needs_patches=False)
        try:
            loaded = models.load_weights(without_adapter(model), self.path)
        except models.DoesNotFitError as error:
            if self.module is not None or not models.is_backbone(self.model):
                raise
            before = self.weights.metadata.get("library")
            raise models.other_version(self.model, before if isinstance(before, dict) else {}, error.message) from error
        if loaded.sha256 != self.sha256:
            raise ArtifactError(
                f"`{self.path}` changed while it was being read",
                hint="wait until the program that writes it has finished, then run the command again",
            )
        return model.eval()


class CustomModuleError(UsageError):
    """The weights belong to a custom module that the caller did not pass, or to code that is not available here."""


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
        module: the custom module that the weights belong to; None for a model with a name.

    Raises:
        CustomModuleError: the weights belong to a custom module, and `module` was not given.
        UsageError: the file does not state its data set, and `dataset` was not given.
        ArtifactError: nothing is found, or the files are broken.
    """
    if module is not None and not isinstance(module, nn.Module):
        raise UsageError(
            f"`model` is a {type(module).__name__}, expected an nn.Module", hint="pass the module itself: `model=Net()`"
        )
    found = _from_file(
        weights_file(target, registry_folder=registry_folder), origin=target, dataset=dataset, module=module
    )
    folder = files.user_path(target)
    if not target.startswith("registry:") and folder.is_dir():
        as_it_is = f"restore it, or name `{found.path}` itself to use it as it is now"
        run_files.check_as_written(folder, found.sha256, hint=as_it_is)
    return found


def weights_file(target: str, *, registry_folder: Path | None = None) -> Path:
    """The weights file of a run folder or of `registry:NAME[@vN]`; any other path is a weights file itself.

    Raises:
        ArtifactError: there is no such artifact, or the run is not finished.
    """
    if target.startswith("registry:"):
        artifact = registry.find(registry_folder or registry.default_folder(), target.removeprefix("registry:"))
        return artifact.file(WEIGHTS_FILE)
    path = files.user_path(target)
    if not path.is_dir():
        return path
    if not (path / WEIGHTS_FILE).is_file():
        unfinished = (path / "config.json").is_file()
        raise ArtifactError(
            f"`{path}` holds no `{WEIGHTS_FILE}`" + (": its run is not finished" if unfinished else ""),
            hint=f"finish it with `--resume --out {path}`" if unfinished else "name a finished run folder",
        )
    return path / WEIGHTS_FILE


def check_numbers(folder: Path) -> bool:
    """Whether metrics, history and configuration of a finished run were compared with the hashes that it wrote; False
    where an earlier version wrote none, and only the accuracy was compared.

    Raises:
        ArtifactError: one of the files can't be read, or has changed since the run wrote it.
    """
    metrics = files.read_json(folder / run_files.METRICS_FILE, what="metrics", hint=run_files.write_again_hint(folder))
    run_files.check_numbers(folder, metrics)
    return isinstance(metrics, dict) and run_files.is_hashed(metrics)


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
        ArtifactError: no model has them; the message names the nearest one, and where it differs.
    """
    # The head is the only matrix: all other weights belong to convolutions or batch norms.
    heads = [each.shape for key, each in tensors.items() if key.endswith(".weight") and each.dim() == 2]
    is_usual = len(heads) == 1 and heads[0][0] >= 2
    num_classes = heads[0][0] if is_usual else dataset.num_classes
    nearest, problems, most_alike = "", list[str](), 0.0
    for name in models.MODELS:
        with torch.device("meta"):
            state = models.create(name, num_classes, image_size=dataset.preprocessing.size).state_dict()
        found = differences(state, tensors)
        if not found and is_usual:
            return name, num_classes
        same = sum(key in state and state[key].shape == each.shape for key, each in tensors.items())
        alike = same / (len(state) + len(tensors) - same)
        if alike > most_alike:
            nearest, problems, most_alike = name, found, alike
    size = " x ".join(map(str, dataset.preprocessing.size))
    shown = "; ".join(problems[:_SHOWN_PROBLEMS])
    more = f" and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    raise ArtifactError(
        f"weights in `{path}` fit none of the {len(models.MODELS)} models for `{dataset.name}`"
        + (f"; the nearest is `{nearest}` for images of {size}, but {shown}{more}" if nearest else ""),
        hint="`icdctl list models` shows the models; keys and shapes must be those of CRD, mdistiller or icdctl. A "
        "custom module can be used through the library: `icdctl.distill(teacher=MODULE, ...)`",
    )
