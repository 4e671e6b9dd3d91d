"""The card of a registered version: what a user should know before using the artifact, in Markdown."""

from __future__ import annotations

import json
import re

from pydantic import JsonValue

from icdctl.files.markup import code, markdown
from icdctl.registry.artifact import Artifact, DatasetRecord, GitRecord, Manifest, OnnxRecord, TeacherRecord


def card(artifact: Artifact) -> str:
    """The content of `card.md`: what a user should know before using the artifact, in Markdown."""
    manifest = artifact.manifest
    sections = [
        f"# {artifact.reference}",
        _summary(manifest),
        _table(("", "value"), _numbers(manifest)),
        "## Training",
        _training(manifest),
        "## Teacher",
        _teacher(manifest.teacher),
        "## Data",
        _data(manifest.dataset),
        "## Use",
        _usage(artifact),
        "## Limits",
        _limits(manifest),
        "## Files",
        "All files are below `files/`; `icdctl registry verify` compares them with these hashes.",
        _table(
            ("file", "bytes", "sha256"),
            [(code(name), f"{row.bytes:,}", code(row.sha256)) for name, row in sorted(manifest.files.items())],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(manifest: Manifest) -> str:
    how = (
        f"distilled from {markdown(manifest.teacher.model)} with {code(manifest.method)}"
        if manifest.teacher
        else f"trained without a teacher ({code(manifest.method)})"
    )
    variant = f", variant {code(manifest.variant)}" if manifest.variant else ""
    return f"A {markdown(manifest.model)} image classifier for {markdown(manifest.dataset.name)}, {how}{variant}."


def _numbers(manifest: Manifest) -> list[tuple[str, ...]]:
    metrics = manifest.metrics
    rows: list[tuple[str, ...]] = [("top-1, final epoch", f"**{_percent(metrics.get('final_top1'))}**")]
    if "final_top5" in metrics:
        rows.append(("top-5, final epoch", _percent(metrics["final_top5"])))
    for key, where in (("best_top1", "test images"), ("best_val_top1", "validation images")):
        if metrics.get(key) is not None:
            epoch = metrics.get("best_epoch", "unknown")
            rows.append((f"best top-1 on the {where} (epoch {markdown(epoch)})", _percent(metrics[key])))
    if type(metrics.get("params")) is int:
        rows.append(("parameters", f"{metrics['params']:,}"))
    if manifest.onnx:
        rows.append(("ONNX compared with the weights", _verdict(manifest.onnx)))
    return rows


def _verdict(onnx: OnnxRecord) -> str:
    parts = ["passed" if onnx.passed else "NOT passed"]
    if onnx.max_error is not None and onnx.tolerance is not None:
        parts.append(f"largest error {onnx.max_error:.2g}, allowed {onnx.tolerance:.2g}")
    if onnx.agreement is not None:
        parts.append(f"same class for {onnx.agreement:.2f} % of the images")
    return ", ".join(parts)


def _training(manifest: Manifest) -> str:
    versions = [(name, version) for name, version in manifest.versions.items() if version is not None]
    rows: list[tuple[str, ...]] = [
        ("epochs", str(manifest.epochs)),
        ("seed", str(manifest.seed)),
        ("scales", ", ".join(map(str, manifest.scales)) or "none"),
        ("settings", code(json.dumps(manifest.settings))),
        ("recipe", code(json.dumps(manifest.recipe))),
        ("registered", markdown(manifest.created)),
        ("code", _code(manifest.git)),
        ("versions", ", ".join(markdown(f"{name} {version}") for name, version in versions) or "not on record"),
    ]
    return _table(("", "value"), rows)


def _code(git: GitRecord | None) -> str:
    if git is None:
        return "not in a git checkout"
    return code(git.commit) + (" with uncommitted changes" if git.dirty else "")


def _teacher(teacher: TeacherRecord | None) -> str:
    if teacher is None:
        return "None: the model learnt from the labels alone."
    where = (
        f"registered as {code(teacher.artifact)}" if teacher.artifact else "not registered when this version was added"
    )
    weights = f"sha256 of its weights {code(teacher.sha256)}" if teacher.sha256 else "no weights on record"
    lines = [
        f"{markdown(teacher.model)}, {where}; {weights}.",
        "",
        f"- Source of its weights: {markdown(teacher.source or 'not on record')}",
        f"- Licence of its weights: {markdown(teacher.licence or 'none stated')}",
    ]
    return "\n".join(lines)


def _data(dataset: DatasetRecord) -> str:
    lines = [
        f"- Source: {markdown(dataset.source or 'not known to icdctl')}",
        f"- Licence: {markdown(dataset.licence or 'not known to icdctl; ask the provider of the images')}",
    ]
    if dataset.sha256:
        lines.append(f"- sha256 of pixels and labels: {code(dataset.sha256)}")
    return "\n".join(lines)


def _usage(artifact: Artifact) -> str:
    dataset = artifact.manifest.dataset.name
    if not re.fullmatch(r"[\w.:/-]{1,200}", dataset):  # a command that is copied must be nothing else
        dataset = "DATASET"
    reference = f"registry:{artifact.reference}"
    return (
        "```\n"
        f"icdctl eval {reference}\n"
        f"icdctl distill --teacher {reference} --student MODEL --dataset {dataset} --method kd\n"
        "```"
    )


def _limits(manifest: Manifest) -> str:
    lines = [
        f"- This is one run with one seed ({manifest.seed}), without a mean or a spread. Compare methods over several "
        "seeds.",
        "- The main number is that of the final epoch; "
        + (
            "the test images were used once, after it."
            if manifest.metrics.get("best_val_top1") is not None
            else "the best epoch was chosen on the test images and is not a fair estimate."
        ),
        f"- The model was tested on the test images of {markdown(manifest.dataset.name)} alone; results on other "
        "images may differ.",
    ]
    if manifest.onnx is None:
        lines.append("- No ONNX file was registered with this version; `icdctl export` makes one.")
    return "\n".join(lines)


def _percent(value: JsonValue) -> str:
    return f"{value:.2f} %" if isinstance(value, int | float) else "not on record"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_in_a_cell(cell) for cell in line) + " |" for line in lines)


def _in_a_cell(text: str) -> str:
    """Markdown as a cell of a table, where `|` ends a span of code, too."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)
