"""The model card: what a user who finds the folder needs to know to run the graph and to judge it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from icdctl.exporting.checks import VerificationReport
from icdctl.exporting.description import INPUT_NAME, OUTPUT_NAME, ModelDescription
from icdctl.exporting.manifest import MODEL_FILE
from icdctl.files import markup


def card(
    description: ModelDescription,
    report: VerificationReport,
    *,
    opset: int,
    num_bytes: int,
    accuracy: Mapping[str, object] | None,
    facts: Mapping[str, object],
) -> str:
    """The model card as Markdown.

    Args:
        description: the description in the graph's metadata.
        report: the outcome of its verification.
        opset: ONNX operator set of the graph.
        num_bytes: size of the graph's file.
        accuracy: `top1` in percent and the number of `images`; None if it was not measured.
        facts: JSON values about the origin of the model; nested mappings become dotted keys.
    """
    height, width = description.preprocessing.size
    title = f"# {_text(description.model)} for {_text(description.dataset)}"
    purpose = (
        f"An image classifier with {description.num_classes} classes, for {height} x {width} RGB images, as an ONNX "
        f"graph (opset {opset}, {description.precision}, {num_bytes / 1e6:.2f} MB, `{MODEL_FILE}`)."
    )
    sections = [
        f"{title}\n\n{purpose}",
        _interface(description),
        f"## Use\n\nWith numpy, pillow and onnxruntime, in this folder:\n\n```python\n{snippet(description)}```",
        _verification(description, report),
    ]
    if accuracy is not None:
        measured = f"{accuracy['top1']:.2f} % top-1 on {accuracy['images']} images, measured with this graph"
        sections.append(f"## Accuracy\n\n{measured} in ONNX Runtime.")
    if facts:
        rows = "\n".join(f"| {_text(key)} | {_text(value)} |" for key, value in _flat(facts))
        sections.append(f"## Origin\n\n| | |\n|---|---|\n{rows}")
    sections.append(_limits(description))
    return "\n\n".join(sections) + "\n"


def snippet(description: ModelDescription) -> str:
    """The source of a program that prints the class of `image.png`; it needs neither torch nor icdctl.

    It resizes images as icdctl does when it tests a model on image files.
    """
    height, width = description.preprocessing.size
    resized_height, resized_width = description.preprocessing.resize or (height, width)
    lines = [
        "import json",
        "import numpy as np",
        "import onnxruntime as ort",
        "from PIL import Image, ImageOps",
        f'session = ort.InferenceSession("{MODEL_FILE}", providers=["CPUExecutionProvider"])',
        'picture = ImageOps.exif_transpose(Image.open("image.png"))',
        'if picture.mode.startswith("I"):  # grey of 16 bits: `convert` would clip it',
        "    picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))",
        f'picture = picture.convert("RGB").resize(({resized_width}, {resized_height}), Image.Resampling.BILINEAR)',
    ]
    if (resized_height, resized_width) != (height, width):
        left, top = round((resized_width - width) / 2), round((resized_height - height) / 2)
        lines.append(f"picture = picture.crop(({left}, {top}, {left + width}, {top + height}))")
    lines.append("image = np.asarray(picture, np.uint8)[None]")
    if description.input_kind == "float":
        mean, std = list(description.preprocessing.mean), list(description.preprocessing.std)
        lines.append(f"image = ((image / 255 - {mean}) / {std}).transpose(0, 3, 1, 2).astype(np.float32)")
    lines += [
        f'logits = session.run(["{OUTPUT_NAME}"], {{"{INPUT_NAME}": image}})[0]',
        'print(json.loads(session.get_modelmeta().custom_metadata_map["names"])[str(logits[0].argmax())])',
    ]
    return "\n".join(lines) + "\n"


def _interface(description: ModelDescription) -> str:
    shape = ", ".join(str(side) for side in description.input_shape)
    mean, std = list(description.preprocessing.mean), list(description.preprocessing.std)
    formula = f"(pixel / 255 - mean) / std with mean {mean} and std {std}, red first"
    if description.input_kind == "uint8":
        meaning = f"pixels, red first; the graph computes {formula}"
        dtype = "uint8"
    else:
        meaning = f"normalised by the caller: {formula}"
        dtype = "float32"
    return (
        "## Input and output\n\n"
        "| name | type | shape | meaning |\n|---|---|---|---|\n"
        f"| `{INPUT_NAME}` | {dtype} | [{shape}] | {meaning} |\n"
        f"| `{OUTPUT_NAME}` | float32 | [batch, {description.num_classes}] | one score per class, before softmax |\n\n"
        "`batch` may be any number. The metadata of the graph hold the class names, as JSON under `names`."
    )


def _verification(description: ModelDescription, report: VerificationReport) -> str:
    rows = "\n".join(f"| {check.name} | {check.status} | {markup.cell(check.detail)} |" for check in report.checks)
    return (
        "## Verification\n\n"
        f"The graph was made from weights with sha256 `{description.weights_sha256}` and compared with them before "
        "this folder was written; `verify.json` has all numbers. `icdctl verify .` checks the folder again, and "
        "`icdctl predict . IMAGE` classifies image files.\n\n"
        f"| check | result | |\n|---|---|---|\n{rows}"
    )


def _limits(description: ModelDescription) -> str:
    height, width = description.preprocessing.size
    resized = description.preprocessing.resize
    steps = f"be resized to {height} x {width}"
    if resized is not None:
        steps = f"be resized to {resized[0]} x {resized[1]} and cropped to the central {height} x {width}"
    return (
        "## Limits\n\n"
        f"- The model knows the {description.num_classes} classes of {markup.code(description.dataset)} and answers "
        "with one of them, whatever the image shows.\n"
        f"- Images must {steps} by the caller; the method of resizing changes the result slightly.\n"
        "- The scores are not calibrated probabilities.\n"
        "- The values were compared on a CPU; other runtimes and half precision round differently."
    )


def _flat(facts: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: object) -> str:
    """One line of text that can't end a table cell or turn into markup."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    return markup.markdown(value)
