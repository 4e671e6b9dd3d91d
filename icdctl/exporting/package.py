"""The export folder: graph, facts, verification, card and manifest, all of them or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from icdctl import files, versions
from icdctl.errors import ArtifactError, UsageError
from icdctl.exporting import graph, manifest
from icdctl.exporting.card import card
from icdctl.exporting.description import BATCH_NAME, INPUT_NAME, OUTPUT_NAME, InputKind, ModelDescription
from icdctl.exporting.report import Report
from icdctl.exporting.session import OnnxClassifier
from icdctl.exporting.verify import batched, verify_file
from icdctl.registry.trained import TrainedModel

_BATCH_SIZE = 64
_VERIFIED_IMAGES = 1000
"""How many of the given images join the verification at most: its reference runs in float64, which is slow."""
_PACKAGES = ("icdctl", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Export:
    """A finished, verified export."""

    folder: Path
    description: ModelDescription
    report: Report
    sha256: str
    """Of the graph."""
    num_bytes: int
    """Of the graph."""
    accuracy: dict[str, Any] | None = None
    """`top1` in percent and the number of `images`, where labels were given."""

    @property
    def model_file(self) -> Path:
        """The graph."""
        return self.folder / manifest.MODEL_FILE

    def as_json(self) -> dict[str, Any]:
        """A plain value."""
        return {
            "folder": str(self.folder),
            "file": str(self.model_file),
            "sha256": self.sha256,
            "bytes": self.num_bytes,
            "model": self.description.model,
            "dataset": self.description.dataset,
            "input": self.description.input_kind,
            "accuracy": self.accuracy,
            "verification": self.report.as_json(),
        }


def export_onnx(
    target: TrainedModel,
    out: Path,
    *,
    input_kind: InputKind = "uint8",
    opset: int = graph.OPSETS.start,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    facts: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Export:
    """Make a folder with a graph that was verified against the weights, or leave everything as it was.

    Args:
        target: the weights.
        out: the folder; it must not exist yet.
        input_kind: "uint8" puts the preprocessing into the graph, "float" leaves it to the caller.
        opset: 18 to 23.
        images: [B, H, W, 3] uint8; the first thousand are more inputs to verify with.
        labels: [B] of the images; the graph's accuracy then goes into the card.
        facts: what is known of the weights' origin (teacher, method, metrics, licence, ...), as JSON can hold it. It
            goes into the card and `model.json`; `variant` also into the graph. Of an absolute path the name is kept.
        replace: an older export at `out` is taken away once the new one is in its place.

    Raises:
        UsageError: an opset that is not supported; labels or images that don't fit.
        ArtifactError: `out` exists or can't be written; the model can't be exported; the graph failed verification.
    """
    out = Path(os.path.realpath(out))
    _check_free(out, replace=replace)
    _check_images(target, images, labels)
    known = _without_folders(dict(facts or {}))
    description = _description(target, input_kind, variant=known.get("variant"))
    with _folder_beside(out) as folder:
        content = graph.graph_bytes(target.load(), description, opset=opset)
        model_file = folder / manifest.MODEL_FILE
        files.write_bytes(model_file, content)
        report = verify_file(model_file, target, images=None if images is None else images[:_VERIFIED_IMAGES])
        if not report.passed:
            raise _failed(target, report)
        accuracy = _accuracy(model_file, images, labels)
        text = card(description, report, opset=opset, num_bytes=len(content), accuracy=accuracy, facts=known)
        files.write_json(folder / manifest.VERIFY_FILE, {**report.as_json(), "reference_logits": report.reference})
        files.write_text(folder / manifest.CARD_FILE, text)
        _write_facts(folder, description, opset=opset, accuracy=accuracy, facts=known)
        manifest.write(folder)
        _move(folder, out)
    return Export(out, description, report, files.sha256_bytes(content), len(content), accuracy)


def onnx_bytes(target: TrainedModel) -> bytes:
    """The graph that `export_onnx` would make of pixels, not verified: to be timed, not to be deployed.

    Raises:
        ArtifactError: the model can't be exported.
    """
    return graph.graph_bytes(target.load(), _description(target, "uint8"))


def _description(target: TrainedModel, input_kind: InputKind, *, variant: Any = None) -> ModelDescription:
    return ModelDescription(
        target.model,
        target.dataset,
        target.class_names,
        target.preprocessing,
        input_kind,
        target.sha256,
        variant=variant,
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


def _check_images(target: TrainedModel, images: Tensor | None, labels: Tensor | None) -> None:
    if images is not None:
        expected = (*target.preprocessing.size, 3)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected or images.dtype != torch.uint8:
            found = f"{list(images.shape)} {str(images.dtype).removeprefix('torch.')}"
            raise UsageError(
                f"the images to verify with are {found}, `{target.model}` takes {['B', *expected]} uint8",
                hint="verify with images of the data set that the model was trained on",
            )
    if labels is not None and (images is None or len(labels) != len(images)):
        raise UsageError(
            f"{len(labels)} labels for {0 if images is None else len(images)} images", hint="give one label an image"
        )


def _failed(target: TrainedModel, report: Report) -> ArtifactError:
    reasons = "; ".join(f"{check.name}: {check.detail}" for check in report.failures)
    return ArtifactError(
        f"the exported graph is not `{target.model}` of these weights, nothing was written: {reasons}",
        hint="try another version of torch or onnxruntime, and report the failing model and versions",
    )


def _accuracy(model_file: Path, images: Tensor | None, labels: Tensor | None) -> dict[str, Any] | None:
    if images is None or labels is None or len(labels) == 0:
        return None
    classifier = OnnxClassifier(model_file)
    top = batched(classifier.logits, images, _BATCH_SIZE).argmax(dim=1)
    return {"top1": 100.0 * int((top == labels.cpu()).sum()) / len(labels), "images": len(labels)}


def _write_facts(
    folder: Path, description: ModelDescription, *, opset: int, accuracy: dict[str, Any] | None, facts: dict[str, Any]
) -> None:
    own = description.metadata()
    own.update({"names": json.loads(own["names"]), "icdctl.preprocess": json.loads(own["icdctl.preprocess"])})
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


def _without_folders(value: Any) -> Any:
    """The same value, with absolute paths cut to their last part: they name machines and people."""
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
    """A temporary folder on the same disk as `out`; gone afterwards unless it was moved."""
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
    """Rename `folder` to `out`. What is at `out` steps aside, and is removed once the new one is in its place."""
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
