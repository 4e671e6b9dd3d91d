"""Verify that an exported graph computes the same logits as its weights; equal top classes could hide a wrong weight.

The reference is PyTorch in float64, from the original weights with their own preprocessing. The error of float32
PyTorch against it ("noise") decides how large the error of a correct graph may be: error <= max(1e-5, 8 * noise). For
the architectures here, correct graphs stay below twice the noise, and changing one large convolution weight by 0.1 %
exceeds 8 times the noise.

Shapes: B images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from icdctl.errors import ArtifactError
from icdctl.exporting import manifest
from icdctl.exporting.checks import Check, VerificationReport
from icdctl.exporting.description import BATCH_NAME, INPUT_NAME, OUTPUT_NAME, ModelDescription
from icdctl.exporting.reading import OnnxFile, read_onnx
from icdctl.exporting.session import OnnxClassifier
from icdctl.files import read_json
from icdctl.registry.trained import TrainedModel

SMALLEST_TOLERANCE = 1e-5
NOISE_FACTOR = 8
NUM_PROBES = 64
NUM_RECORDED = 8
"""The number of probes whose reference logits an export records."""

_BATCHES = {1: 8, 7: 14, 64: 64}
"""Batch size -> number of probes that are run in batches of this size."""
_FULL_BATCH = "batch_64"
_PROBE_SEED = 20240


@dataclass(frozen=True)
class _ExpectedLogits:
    """The logits that the graph should give for the probes and the given images."""

    logits: Tensor
    """[B, K] float64: the probes (or the first `num_probes` of them), then the images."""
    num_probes: int
    tolerance: float
    noise: float | None
    source: str


def probes(size: tuple[int, int]) -> Tensor:
    """Test inputs, [64, H, W, 3] uint8: one all 0, one all 255 and 62 of uniform noise, the same on every machine."""
    height, width = size
    pixels = np.random.RandomState(_PROBE_SEED).randint(0, 256, (NUM_PROBES, height, width, 3), dtype=np.uint8)
    pixels[0], pixels[1] = 0, 255
    return torch.from_numpy(pixels)


def verify_file(
    onnx_path: Path | str, trained_model: TrainedModel | None = None, *, images: Tensor | None = None
) -> VerificationReport:
    """Check one .onnx file; with `trained_model`, compare its logits with those of the original weights.

    Args:
        onnx_path: the file.
        trained_model: the original weights; without them the values can't be verified.
        images: [B, H, W, 3] uint8, more inputs to compare, on which equal top classes are counted, too. A thousand are
            plenty.

    Raises:
        ArtifactError: the file is refused: it is broken, not self-contained, or made by another program.
        UsageError: the size or type of the images is not what the model takes.
    """
    file = read_onnx(onnx_path)
    return _report(
        file, trained_model, images, lambda given: _from_weights(trained_model, given) if trained_model else None
    )


def verify_folder(
    folder: Path | str, trained_model: TrainedModel | None = None, *, images: Tensor | None = None
) -> VerificationReport:
    """Check an export folder: the hashes of its files, then the graph, then its values.

    Without `trained_model`, the values are compared with the reference logits that the export recorded.

    Raises:
        ArtifactError: the folder does not exist, or its graph is refused as in `verify_file`.
    """
    folder = Path(folder)
    hashes = _check_hashes(folder)
    if hashes.status == "fail":
        return VerificationReport((hashes,))
    file = read_onnx(folder / manifest.MODEL_FILE)
    if trained_model is None:
        recorded = _recorded(folder / manifest.VERIFY_FILE, file.description.num_classes)
        report = _report(file, None, images, lambda _: recorded)
    else:
        report = _report(file, trained_model, images, lambda given: _from_weights(trained_model, given))
    return VerificationReport(
        (hashes, *report.checks), report.max_error, report.tolerance, report.agreement, report.reference
    )


def _check_hashes(folder: Path) -> Check:
    found = manifest.compare(folder)
    problems = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
    detail = "; ".join(problems) or "every file is as it was exported"
    return Check("hashes", "fail" if problems else "pass", detail, found)


def _report(
    file: OnnxFile,
    trained_model: TrainedModel | None,
    images: Tensor | None,
    reference_of: Callable[[Tensor], _ExpectedLogits | None],
) -> VerificationReport:
    nodes = len(file.proto.graph.node)
    checks = [
        Check(
            "format", "pass", "parses, and the ONNX checker accepts it", {"bytes": len(file.content), "nodes": nodes}
        ),
        Check("self_contained", "pass", "one file, standard operators only", {"opset": file.opset}),
    ]
    interface = _interface_problems(file)
    origin = _origin_problems(file.description, trained_model) if trained_model else []
    problems = interface + origin
    detail = "; ".join(problems) or "input, output and metadata agree with each other"
    checks.append(Check("declared", "fail" if problems else "pass", detail))
    if interface or (trained_model and not _comparable(file.description, trained_model)):
        reason = "not run: what the file declares is wrong"
        return VerificationReport((*checks, *(Check(name, "skipped", reason) for name in _RUN_CHECKS)))
    run = _run(file, images)
    if isinstance(run, ArtifactError):
        failed = Check("values", "fail", run.message)
        skipped = (Check(name, "skipped", "not run: the graph can't be run") for name in _RUN_CHECKS[1:])
        return VerificationReport((*checks, failed, *skipped))
    inputs, outputs, image_logits = run
    reference = reference_of(inputs)
    values, max_error = _check_values(outputs, image_logits, reference)
    agreed, agreement = _check_agreement(image_logits, reference)
    checks += [values, _check_batches(outputs, reference), agreed, _check_finite(outputs, image_logits)]
    recorded = reference.logits[:NUM_RECORDED].tolist() if reference else []
    return VerificationReport(
        tuple(checks),
        max_error,
        reference.tolerance if reference else None,
        agreement,
        tuple(tuple(row) for row in recorded) or None,
    )


_RUN_CHECKS = ("values", "batches", "agreement", "finite")


def _interface_problems(file: OnnxFile) -> list[str]:
    """Differences between the declared inputs and outputs and those that the metadata describe."""
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


def _tensor_problems(value: onnx.ValueInfoProto, kind: int, shape: tuple[str | int, ...]) -> list[str]:
    declared = value.type.tensor_type
    found = tuple(dim.dim_param or dim.dim_value for dim in declared.shape.dim)
    if declared.elem_type == kind and found == shape:
        return []
    wanted, actual = (onnx.TensorProto.DataType.Name(number).lower() for number in (kind, declared.elem_type))
    return [f"`{value.name}` is {actual} {list(found)}, expected {wanted} {list(shape)}"]


def _origin_problems(description: ModelDescription, trained_model: TrainedModel) -> list[str]:
    pairs = {
        "model": (description.model, trained_model.model),
        "data set": (description.dataset, trained_model.dataset),
        "classes": (description.class_names, trained_model.class_names),
        "preprocessing": (description.preprocessing, trained_model.preprocessing),
        "weights": (description.weights_sha256[:12], trained_model.sha256[:12]),
    }
    problems = [
        f"made for other {what}" if what == "classes" else f"{what} {declared}, expected {actual}"
        for what, (declared, actual) in pairs.items()
        if declared != actual
    ]
    splits = (description.split, trained_model.split)
    if None not in splits and splits[0] != splits[1]:  # exports of an earlier version say nothing
        problems.append("images divided in another way than those that the weights were trained on")
    return problems


def _comparable(description: ModelDescription, trained_model: TrainedModel) -> bool:
    same_size = description.preprocessing.size == trained_model.preprocessing.size
    return same_size and description.num_classes == trained_model.num_classes


def _run(file: OnnxFile, images: Tensor | None) -> tuple[Tensor, dict[str, Tensor], Tensor | None] | ArtifactError:
    """Inputs (probes, then images), the probes' logits by kind of run, the images' logits; or the reason it can't run.

    "unoptimised" runs the graph as it is written. The optimiser of this runtime removes dropout in training mode, for
    example; other runtimes may not.
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
    """The results of `function` for all images, computed in batches of `size`."""
    return torch.cat([function(images[first : first + size]) for first in range(0, len(images), size)])


@torch.no_grad()
def _from_weights(trained_model: TrainedModel, images: Tensor) -> _ExpectedLogits:
    preprocessing = trained_model.preprocessing
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    model = trained_model.load()
    single = batched(lambda part: model(preprocessing.normalise(part)), images, NUM_PROBES)
    model.double()
    try:
        double = batched(
            lambda part: model(((part.double() / 255 - mean) / std).permute(0, 3, 1, 2)), images, NUM_PROBES
        )
    except RuntimeError as error:  # a custom module may convert its input to a fixed type
        raise ArtifactError(
            f"`{trained_model.model}` can't be run in float64, so its graph can't be verified: {error}",
            hint="its `forward` must keep the type of its input, e.g. without `.float()`",
        ) from error
    noise = _gap(single, double)
    tolerance = max(SMALLEST_TOLERANCE, NOISE_FACTOR * noise)
    return _ExpectedLogits(double, NUM_PROBES, tolerance, noise, "PyTorch in float64 from the original weights")


def _recorded(path: Path, num_classes: int) -> _ExpectedLogits:
    hint = "export the model again with `icdctl export`"
    value = read_json(path, what="verification report", hint=hint)
    try:
        logits = torch.tensor(value["reference_logits"], dtype=torch.float64).reshape(NUM_RECORDED, num_classes)
        tolerance = float(value["tolerance"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"`{path}` does not hold the reference logits of its export", hint=hint) from error
    return _ExpectedLogits(logits, NUM_RECORDED, tolerance, None, "the logits that the export recorded")


def _check_values(
    outputs: dict[str, Tensor], image_logits: Tensor | None, reference: _ExpectedLogits | None
) -> tuple[Check, float | None]:
    if reference is None:
        return Check("values", "skipped", "not compared: no weights were given"), None
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
    detail = f"largest error {worst:.2e}, {relation} the allowed {reference.tolerance:.2e}, against {reference.source}"
    numbers = {**errors, "max_error": worst, "tolerance": reference.tolerance, "noise": reference.noise}
    return Check("values", "pass" if passed else "fail", detail, numbers), worst


def _expected_of_images(image_logits: Tensor | None, reference: _ExpectedLogits | None) -> Tensor | None:
    """The reference's logits for the given images; None if it has none."""
    if image_logits is None or reference is None or reference.num_probes == len(reference.logits):
        return None
    return reference.logits[reference.num_probes :]


def _check_batches(outputs: dict[str, Tensor], reference: _ExpectedLogits | None) -> Check:
    full = outputs[_FULL_BATCH]
    tolerance = reference.tolerance if reference else SMALLEST_TOLERANCE * max(1.0, full.abs().max().item())
    worst = max(_gap(logits, full[: len(logits)]) for run, logits in outputs.items() if run.startswith("batch_"))
    passed = worst <= tolerance
    detail = f"the logits of an image differ by {worst:.2e} at most between batches of 1, 7 and 64"
    return Check("batches", "pass" if passed else "fail", detail, {"max_difference": worst, "tolerance": tolerance})


def _check_agreement(image_logits: Tensor | None, reference: _ExpectedLogits | None) -> tuple[Check, float | None]:
    expected = _expected_of_images(image_logits, reference)
    if image_logits is None or reference is None or expected is None:
        reason = "no images were given" if image_logits is None else "no weights were given"
        return Check("agreement", "skipped", f"not compared: {reason}"), None
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
    """Largest absolute difference; infinity if any value is not finite."""
    gap = (actual.double() - expected.double()).abs().max().item()
    return gap if math.isfinite(gap) else math.inf
