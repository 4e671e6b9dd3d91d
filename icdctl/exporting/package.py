"""Write an export folder: graph, facts, verification, model card and manifest. Either all files appear or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypedDict

import torch
from torch import Tensor

from icdctl import files, versions
from icdctl.errors import ArtifactError, UsageError
from icdctl.exporting import graph, manifest
from icdctl.exporting.card import card
from icdctl.exporting.checks import VerificationReport
from icdctl.exporting.description import BATCH_NAME, INPUT_NAME, OUTPUT_NAME, InputKind, ModelDescription
from icdctl.exporting.session import OnnxClassifier
from icdctl.exporting.verify import batched, verify_file
from icdctl.registry.trained import TrainedModel

_BATCH_SIZE = 64
_VERIFIED_IMAGES = 1000
"""The most images that a verification uses; its reference runs in float64, which is slow."""
_PACKAGES = ("icdctl", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")


class Accuracy(TypedDict):
    """Accuracy of a graph as `model.json` and the model card state it."""

    top1: float
    """Top-1 accuracy, in percent."""
    images: int
    """Number of images that it was measured on."""


@dataclass(frozen=True)
class Export:
    """A finished and verified export."""

    folder: Path
    description: ModelDescription
    report: VerificationReport
    sha256: str
    """Hash of the graph's file."""
    num_bytes: int
    """Size of the graph's file."""
    accuracy: Accuracy | None = None
    """Accuracy measured with the graph; None if no labels were given."""
    unmeasured: str | None = None
    """Why no accuracy was measured, as the caller said it; None where it was."""

    @property
    def model_file(self) -> Path:
        """Path of the graph's file."""
        return self.folder / manifest.MODEL_FILE

    def as_json(self) -> dict[str, object]:
        """A value that `json` can write."""
        return {
            "folder": str(self.folder),
            "file": str(self.model_file),
            "sha256": self.sha256,
            "bytes": self.num_bytes,
            "model": self.description.model,
            "dataset": self.description.dataset,
            "input": self.description.input_kind,
            "accuracy": self.accuracy,
            "unmeasured": self.unmeasured,
            "verification": self.report.as_json(),
        }


def export_onnx(
    trained_model: TrainedModel,
    out: Path,
    *,
    input_kind: InputKind = "uint8",
    opset: int = graph.OPSETS.start,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    facts: Mapping[str, object] | None = None,
    replace: bool = False,
) -> Export:
    """Write a folder with a graph that was verified against the weights; on failure, everything stays as it was.

    Args:
        trained_model: the model to export.
        out: the folder to write; it must not exist yet, except with `replace`.
        input_kind: "uint8" puts the preprocessing into the graph, "float" leaves it to the caller.
        opset: ONNX operator set, 18 to 23.
        images: [B, H, W, 3] uint8; the graph is also verified on the first thousand of them.
        labels: [B], the classes of the images; the model card then states the graph's accuracy.
        facts: JSON values about the origin of the weights (teacher, method, metrics, licence, ...). They go into the
            model card and `model.json`; `variant` goes into the graph, too. Absolute paths are cut to their last part.
        replace: remove an older export at `out` once the new one is in its place.

    Raises:
        UsageError: the opset is not supported, or labels or images do not fit.
        ArtifactError: `out` exists or can't be written, the model can't be exported, or the graph failed verification.
    """
    out = Path(os.path.realpath(out))
    _check_free(out, replace=replace)
    _check_images(trained_model, images, labels)
    known = {key: _without_folders(value) for key, value in (facts or {}).items()}
    description = _description(trained_model, input_kind, variant=known.get("variant"))
    with _folder_beside(out) as folder:
        content = graph.graph_bytes(trained_model.load(), description, opset=opset)
        model_file = folder / manifest.MODEL_FILE
        files.write_bytes(model_file, content)
        report = verify_file(model_file, trained_model, images=None if images is None else images[:_VERIFIED_IMAGES])
        if not report.passed:
            raise _failed(trained_model, report)
        accuracy = _accuracy(model_file, images, labels)
        text = card(description, report, opset=opset, num_bytes=len(content), accuracy=accuracy, facts=known)
        files.write_json(folder / manifest.VERIFY_FILE, {**report.as_json(), "reference_logits": report.reference})
        files.write_text(folder / manifest.CARD_FILE, text)
        _write_facts(folder, description, opset=opset, accuracy=accuracy, facts=known)
        manifest.write(folder)
        _move(folder, out)
    return Export(out, description, report, files.sha256_bytes(content), len(content), accuracy)


def onnx_bytes(trained_model: TrainedModel) -> bytes:
    """The graph that `export_onnx` would write for uint8 pixels, without verification: for timing, not for deployment.

    Raises:
        ArtifactError: the model can't be exported.
    """
    return graph.graph_bytes(trained_model.load(), _description(trained_model, "uint8"))


def _description(trained_model: TrainedModel, input_kind: InputKind, *, variant: object = None) -> ModelDescription:
    return ModelDescription(
        trained_model.model,
        trained_model.dataset,
        trained_model.class_names,
        trained_model.preprocessing,
        input_kind,
        trained_model.sha256,
        variant=variant,
        split=trained_model.split,
    )


def _check_free(out: Path, *, replace: bool) -> None:
    if not out.exists():
        return
    if not replace:
        raise ArtifactError(f"`{out}` exists already", hint="choose another folder, or replace it with `--replace`")
    if not out.is_dir() or (any(out.iterdir()) and not manifest.is_export(out)):
        raise ArtifactError(
            f"`{out}` is not an export folder, so it is not replaced", hint="choose another folder, or move it away"
        )


def _check_images(trained_model: TrainedModel, images: Tensor | None, labels: Tensor | None) -> None:
    if images is not None:
        expected = (*trained_model.preprocessing.size, 3)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected or images.dtype != torch.uint8:
            found = f"{list(images.shape)} {str(images.dtype).removeprefix('torch.')}"
            raise UsageError(
                f"the images to verify with are {found}, `{trained_model.model}` takes {['B', *expected]} uint8",
                hint="verify with images of the data set that the model was trained on",
            )
    if labels is not None and (images is None or len(labels) != len(images)):
        raise UsageError(
            f"{len(labels)} labels for {0 if images is None else len(images)} images", hint="give one label per image"
        )


def _failed(trained_model: TrainedModel, report: VerificationReport) -> ArtifactError:
    reasons = "; ".join(f"{check.name}: {check.detail}" for check in report.failures)
    return ArtifactError(
        f"the exported graph differs from `{trained_model.model}` with these weights; nothing was written: {reasons}",
        hint="try another version of torch or onnxruntime, and report the model and the versions that fail",
    )


def _accuracy(model_file: Path, images: Tensor | None, labels: Tensor | None) -> Accuracy | None:
    if images is None or labels is None or len(labels) == 0:
        return None
    classifier = OnnxClassifier(model_file)
    top = batched(classifier.logits, images, _BATCH_SIZE).argmax(dim=1)
    return {"top1": 100.0 * int((top == labels.cpu()).sum()) / len(labels), "images": len(labels)}


def _write_facts(
    folder: Path, description: ModelDescription, *, opset: int, accuracy: Accuracy | None, facts: Mapping[str, object]
) -> None:
    own: dict[str, object] = dict(description.metadata())
    of_json = [key for key in ("names", "icdctl.preprocess", "icdctl.split") if key in own]
    own |= {key: files.parse_json(str(own[key])) for key in of_json}
    value = {
        **{key.removeprefix("icdctl."): entry for key, entry in own.items() if key != "icdctl.variant"},
        "num_classes": description.num_classes,
        "variant": description.variant,
        "opset": opset,
        "inputs": [
            {
                "name": INPUT_NAME,
                "type": "uint8" if description.input_kind == "uint8" else "float32",
                "shape": list(description.input_shape),
            }
        ],
        "outputs": [{"name": OUTPUT_NAME, "type": "float32", "shape": [BATCH_NAME, description.num_classes]}],
        "accuracy": accuracy,
        "facts": facts,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "versions": {name: found or "not installed" for name, found in versions.versions(_PACKAGES).items()},
    }
    files.write_json(folder / manifest.FACTS_FILE, value)


def _without_folders(value: object) -> object:
    """The same value with absolute paths cut to their last part, because folders name machines and users."""
    if isinstance(value, Mapping):
        return {str(key): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and PurePosixPath(value).is_absolute():
        return PurePosixPath(value).name
    if isinstance(value, str) and PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name
    return value


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `out`; it is deleted afterwards unless it was moved."""
    files.make_folder(out.parent)
    try:
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise files.not_writable(out, error) from error
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`. An older `out` is first renamed, then deleted once the new one is in its place."""
    try:
        if not out.exists():
            folder.replace(out)
            return
        aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
        try:
            out.replace(aside)
            folder.replace(out)
        except BaseException:
            if out.exists():
                aside.rmdir()
            else:
                aside.replace(out)
            raise
    except OSError as error:
        raise files.not_writable(out, error) from error
    shutil.rmtree(aside, ignore_errors=True)
