"""Does an exported graph compute what the weights compute? Values decide; equal top classes would hide a wrong weight.

The reference is PyTorch in float64, from the original weights with their own preprocessing. How far float32 PyTorch is
from it ("noise") says how far an honest graph may be: error <= max(1e-5, 8 * noise). Over the architectures here honest
graphs stay below twice the noise, and changing one large convolution weight by 0.1 % goes beyond 8 times.

Shapes: B images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from icdctl.errors import ArtifactError
from icdctl.exporting import manifest
from icdctl.exporting.description import BATCH_NAME, INPUT_NAME, OUTPUT_NAME, ModelDescription
from icdctl.exporting.reading import OnnxFile, read_onnx
from icdctl.exporting.report import Check, Report
from icdctl.exporting.session import OnnxClassifier
from icdctl.files import read_json
from icdctl.registry.trained import TrainedModel

SMALLEST_TOLERANCE = 1e-5
NOISE_FACTOR = 8
NUM_PROBES = 64
NUM_RECORDED = 8
"""Probes whose reference logits an export keeps."""

_BATCHES = {1: 8, 7: 14, 64: 64}
"""Batch size -> probes that are run at it."""
_FULL_BATCH = "batch_64"
_PROBE_SEED = 20240


@dataclass(frozen=True)
class _Reference:
    """What the graph should give for the probes and the given images."""

    logits: Tensor
    """[B, K] float64: the probes (or the first of them), then the images."""
    num_probes: int
    tolerance: float
    noise: float | None
    source: str


def probes(size: tuple[int, int]) -> Tensor:
    """[64, H, W, 3] uint8: all 0, all 255, and 62 of uniform noise, the same on every machine."""
    height, width = size
    pixels = np.random.RandomState(_PROBE_SEED).randint(0, 256, (NUM_PROBES, height, width, 3), dtype=np.uint8)
    pixels[0], pixels[1] = 0, 255
    return torch.from_numpy(pixels)


def verify_file(onnx_path: Path | str, target: TrainedModel | None = None, *, images: Tensor | None = None) -> Report:
    """Look at one .onnx file; with `target`, run it against the weights that it should have been made from.

    Args:
        onnx_path: the file.
        target: the original weights; without them nothing says which values are right.
        images: [B, H, W, 3] uint8, more inputs to compare, and to count equal top classes on. A thousand are plenty.

    Raises:
        ArtifactError: the file is refused before it is run: broken, not self-contained, or of another program.
        UsageError: the images are not what the model takes.
    """
    file = read_onnx(onnx_path)
    return _report(file, target, images, lambda given: _from_weights(target, given) if target else None)


def verify_folder(folder: Path | str, target: TrainedModel | None = None, *, images: Tensor | None = None) -> Report:
    """Look at an export folder: first the hashes of its files, then the graph, then its values.

    Without `target` the values are compared with the reference logits that the export recorded.

    Raises:
        ArtifactError: there is no such folder, or its graph is refused as in `verify_file`.
    """
    folder = Path(folder)
    hashes = _check_hashes(folder)
    if hashes.status == "fail":
        return Report((hashes,))
    file = read_onnx(folder / manifest.MODEL_FILE)
    if target is None:
        recorded = _recorded(folder / manifest.VERIFY_FILE, file.description.num_classes)
        report = _report(file, None, images, lambda _: recorded)
    else:
        report = _report(file, target, images, lambda given: _from_weights(target, given))
    return Report((hashes, *report.checks), report.max_error, report.tolerance, report.agreement, report.reference)


def _check_hashes(folder: Path) -> Check:
    found = manifest.compare(folder)
    problems = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
    detail = "; ".join(problems) or "every file is the one that was exported"
    return Check("hashes", "fail" if problems else "pass", detail, found)


def _report(
    file: OnnxFile,
    target: TrainedModel | None,
    images: Tensor | None,
    reference_of: Callable[[Tensor], _Reference | None],
) -> Report:
    nodes = len(file.proto.graph.node)
    checks = [
        Check(
            "format", "pass", "parses, and the ONNX checker accepts it", {"bytes": len(file.content), "nodes": nodes}
        ),
        Check("self_contained", "pass", "one file, standard operators only", {"opset": file.opset}),
    ]
    interface = _interface_problems(file)
    origin = _origin_problems(file.description, target) if target else []
    problems = interface + origin
    detail = "; ".join(problems) or "input, output and metadata fit each other"
    checks.append(Check("declared", "fail" if problems else "pass", detail))
    if interface or (target and not _comparable(file.description, target)):
        reason = "not run: what the file declares is wrong"
        return Report((*checks, *(Check(name, "skipped", reason) for name in _RUN_CHECKS)))
    run = _run(file, images)
    if isinstance(run, ArtifactError):
        failed = Check("values", "fail", run.message)
        return Report((*checks, failed, *(Check(name, "skipped", "it does not run") for name in _RUN_CHECKS[1:])))
    inputs, outputs, image_logits = run
    reference = reference_of(inputs)
    values, max_error = _check_values(outputs, image_logits, reference)
    agreed, agreement = _check_agreement(image_logits, reference)
    checks += [values, _check_batches(outputs, reference), agreed, _check_finite(outputs, image_logits)]
    recorded = reference.logits[:NUM_RECORDED].tolist() if reference else []
    return Report(
        tuple(checks),
        max_error,
        reference.tolerance if reference else None,
        agreement,
        tuple(tuple(row) for row in recorded) or None,
    )


_RUN_CHECKS = ("values", "batches", "agreement", "finite")


def _interface_problems(file: OnnxFile) -> list[str]:
    """Where the declared inputs and outputs are not what the metadata promise."""
    graph, description = file.proto.graph, file.description
    kind = onnx.TensorProto.UINT8 if description.input_kind == "uint8" else onnx.TensorProto.FLOAT
    problems = []
    if [value.name for value in graph.input] != [INPUT_NAME]:
        problems.append(f"inputs {[value.name for value in graph.input]}, expected `{INPUT_NAME}` alone")
    else:
        problems += _tensor_problems(graph.input[0], kind, description.input_shape)
    if not graph.output or graph.output[0].name != OUTPUT_NAME:
        problems.append(f"outputs {[value.name for value in graph.output]}, expected `{OUTPUT_NAME}` first")
    else:
        shape = (BATCH_NAME, description.num_classes)
        problems += _tensor_problems(graph.output[0], onnx.TensorProto.FLOAT, shape)
    return problems


def _tensor_problems(value: Any, kind: int, shape: tuple[str | int, ...]) -> list[str]:
    declared = value.type.tensor_type
    found = tuple(dim.dim_param or dim.dim_value for dim in declared.shape.dim)
    if declared.elem_type == kind and found == shape:
        return []
    wanted, actual = (onnx.TensorProto.DataType.Name(number).lower() for number in (kind, declared.elem_type))
    return [f"`{value.name}` is {actual} {list(found)}, expected {wanted} {list(shape)}"]


def _origin_problems(description: ModelDescription, target: TrainedModel) -> list[str]:
    pairs = {
        "model": (description.model, target.model),
        "data set": (description.dataset, target.dataset),
        "classes": (description.class_names, target.class_names),
        "preprocessing": (description.preprocessing, target.preprocessing),
        "weights": (description.weights_sha256[:12], target.sha256[:12]),
    }
    return [
        f"made for other {what}" if what == "classes" else f"{what} {declared}, expected {actual}"
        for what, (declared, actual) in pairs.items()
        if declared != actual
    ]


def _comparable(description: ModelDescription, target: TrainedModel) -> bool:
    same_size = description.preprocessing.size == target.preprocessing.size
    return same_size and description.num_classes == target.num_classes


def _run(file: OnnxFile, images: Tensor | None) -> tuple[Tensor, dict[str, Tensor], Tensor | None] | ArtifactError:
    """Inputs (probes, then images), the probes' logits by kind of run, the images' logits; or why it does not run.

    "unoptimised" is a run of what is written: among what the runtime rewrites is dropout in training mode, which it
    drops, while other runtimes may not.
    """
    probe_images = probes(file.description.preprocessing.size)
    given = None if images is None or images.shape[0] == 0 else images.cpu()
    inputs = probe_images if given is None else torch.cat((probe_images, given))
    try:
        classifier = OnnxClassifier(file)
        outputs = {
            f"batch_{size}": batched(classifier.logits, probe_images[:rows], size) for size, rows in _BATCHES.items()
        }
        literal = OnnxClassifier(file, optimise=False)
        outputs["unoptimised"] = batched(literal.logits, probe_images, NUM_PROBES)
        image_logits = None if given is None else batched(classifier.logits, given, NUM_PROBES)
    except ArtifactError as error:
        return error
    return inputs, outputs, image_logits


def batched(function: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """What `function` gives for all images, `size` at a time."""
    return torch.cat([function(images[first : first + size]) for first in range(0, len(images), size)])


@torch.no_grad()
def _from_weights(target: TrainedModel, images: Tensor) -> _Reference:
    preprocessing = target.preprocessing
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    model = target.load()
    single = batched(lambda part: model(preprocessing.normalise(part)), images, NUM_PROBES)
    model.double()
    try:
        double = batched(
            lambda part: model(((part.double() / 255 - mean) / std).permute(0, 3, 1, 2)), images, NUM_PROBES
        )
    except RuntimeError as error:  # a module of one's own may fix the kind of its numbers
        raise ArtifactError(
            f"`{target.model}` can't be run in float64, so there is nothing to verify against: {error}",
            hint="its `forward` must leave the kind of numbers to its input, e.g. without `.float()`",
        ) from error
    noise = _gap(single, double)
    tolerance = max(SMALLEST_TOLERANCE, NOISE_FACTOR * noise)
    return _Reference(double, NUM_PROBES, tolerance, noise, "PyTorch in float64 from the original weights")


def _recorded(path: Path, num_classes: int) -> _Reference:
    hint = "export the model again with `icdctl export`"
    value = read_json(path, what="verification report", hint=hint)
    try:
        logits = torch.tensor(value["reference_logits"], dtype=torch.float64).reshape(NUM_RECORDED, num_classes)
        tolerance = float(value["tolerance"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"`{path}` does not hold the reference logits of its export", hint=hint) from error
    return _Reference(logits, NUM_RECORDED, tolerance, None, "the logits that the export recorded")


def _check_values(
    outputs: dict[str, Tensor], image_logits: Tensor | None, reference: _Reference | None
) -> tuple[Check, float | None]:
    if reference is None:
        return Check("values", "skipped", "no weights were given to compare with"), None
    errors = {}
    for run, logits in outputs.items():
        rows = min(len(logits), reference.num_probes)
        errors[f"max_error_{run}"] = _gap(logits[:rows], reference.logits[:rows])
    expected = _expected_of_images(image_logits, reference)
    if image_logits is not None and expected is not None:
        errors["max_error_images"] = _gap(image_logits, expected)
    worst = max(errors.values())
    passed = worst <= reference.tolerance
    relation = "within" if passed else "beyond"
    detail = f"largest error {worst:.2e} is {relation} {reference.tolerance:.2e} of {reference.source}"
    numbers = {**errors, "max_error": worst, "tolerance": reference.tolerance, "noise": reference.noise}
    return Check("values", "pass" if passed else "fail", detail, numbers), worst


def _expected_of_images(image_logits: Tensor | None, reference: _Reference | None) -> Tensor | None:
    """The reference's logits of the given images, where it has them."""
    if image_logits is None or reference is None or reference.num_probes == len(reference.logits):
        return None
    return reference.logits[reference.num_probes :]


def _check_batches(outputs: dict[str, Tensor], reference: _Reference | None) -> Check:
    full = outputs[_FULL_BATCH]
    tolerance = reference.tolerance if reference else SMALLEST_TOLERANCE * max(1.0, full.abs().max().item())
    worst = max(_gap(logits, full[: len(logits)]) for run, logits in outputs.items() if run.startswith("batch_"))
    passed = worst <= tolerance
    detail = f"an image's logits differ by {worst:.2e} at most between batches of 1, 7 and 64"
    return Check("batches", "pass" if passed else "fail", detail, {"max_difference": worst, "tolerance": tolerance})


def _check_agreement(image_logits: Tensor | None, reference: _Reference | None) -> tuple[Check, float | None]:
    expected = _expected_of_images(image_logits, reference)
    if image_logits is None or reference is None or expected is None:
        reason = "no images were given" if image_logits is None else "no weights were given to compare with"
        return Check("agreement", "skipped", reason), None
    flipped = image_logits.argmax(dim=1) != expected.argmax(dim=1)
    num_images, num_flips = len(expected), int(flipped.sum())
    agreement = 100.0 * (num_images - num_flips) / num_images
    top = expected[flipped].topk(2, dim=1).values
    margin = (top[:, 0] - top[:, 1]).max().item() if num_flips else 0.0
    passed = margin <= 2 * reference.tolerance
    detail = f"{num_images - num_flips} of {num_images} images get the reference's top class"
    numbers = {"images": num_images, "agreement": agreement, "flips": num_flips, "largest_flip_margin": margin}
    return Check("agreement", "pass" if passed else "fail", detail, numbers), agreement


def _check_finite(outputs: dict[str, Tensor], image_logits: Tensor | None) -> Check:
    logits = [*outputs.values()] if image_logits is None else [*outputs.values(), image_logits]
    bad = sum(int((~torch.isfinite(part)).sum()) for part in logits)
    detail = f"{bad} logits are NaN or infinite" if bad else "every logit is finite"
    return Check("finite", "fail" if bad else "pass", detail, {"nonfinite": bad})


def _gap(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where a value is not finite."""
    gap = (actual.double() - expected.double()).abs().max().item()
    return gap if math.isfinite(gap) else math.inf
