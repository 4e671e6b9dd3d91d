"""Read an .onnx file from any source. A file that is broken, or that needs other files or code, is refused first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from icdctl.errors import ArtifactError
from icdctl.exporting import limits
from icdctl.exporting.description import ModelDescription
from icdctl.exporting.graph import OPSETS
from icdctl.files import read_foreign, sha256_bytes

_AGAIN_HINT = "make it again with `icdctl export`, or copy it again from its source"
_FOREIGN_HINT = "icdctl reads the files of `icdctl export`: one file, standard operators, opset 18 to 23"


@dataclass(frozen=True)
class OnnxFile:
    """The content of a file that passed every check that does not run the graph."""

    path: Path
    content: bytes
    proto: onnx.ModelProto
    description: ModelDescription
    opset: int
    needs: limits.Needs
    """Memory that the graph needs."""

    @property
    def sha256(self) -> str:
        """Hash of the content."""
        return sha256_bytes(self.content)


def read_onnx(path: Path | str) -> OnnxFile:
    """Read a graph from a file; refuse it if it is broken, needs other files, or has no description.

    Raises:
        ArtifactError: the file is missing or refused; the message gives the reason.
    """
    path = Path(path)
    content = read_foreign(path, what="ONNX file", example="model.onnx", again=_AGAIN_HINT)
    try:
        limits.check_size(content)
        proto = onnx.ModelProto.FromString(content)
    except limits.RefusedGraphError as error:
        raise _refused(path, str(error)) from error
    except (DecodeError, ValueError) as error:
        raise ArtifactError(f"`{path}` is not an ONNX file, or is cut short", hint=_AGAIN_HINT) from error
    if not proto.graph.node:
        raise ArtifactError(f"`{path}` is not an ONNX file, or is cut short: it holds no graph", hint=_AGAIN_HINT)
    opset = _check_plain(path, proto)
    try:
        onnx.checker.check_model(content, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"`{path}` is not a valid ONNX graph: {first_line}", hint=_AGAIN_HINT) from error
    description = _description(path, proto)
    try:
        needs = limits.measure_graph(proto)
    except limits.RefusedGraphError as error:
        raise _refused(path, str(error)) from error
    return OnnxFile(path, content, proto, description, opset, needs)


def _check_plain(path: Path, proto: onnx.ModelProto) -> int:
    """Refuse a graph that needs other files, or operators that a plain runtime does not have. Returns the opset."""
    for message in _messages(proto):
        if isinstance(message, onnx.TensorProto) and (
            message.external_data or message.data_location == onnx.TensorProto.EXTERNAL
        ):
            raise _refused(path, f"the values of `{message.name}` are stored in another file")
        if isinstance(message, onnx.NodeProto) and message.domain not in ("", "ai.onnx"):
            raise _refused(
                path, f"it needs the operator `{message.op_type}` of `{message.domain}`, which is not a standard one"
            )
    domains = [entry.domain for entry in proto.opset_import if entry.domain not in ("", "ai.onnx")]
    if domains or proto.functions:
        raise _refused(path, f"it defines or needs custom operators ({', '.join(domains) or 'local functions'})")
    try:
        limits.check_operators(proto)
    except limits.RefusedGraphError as error:
        raise _refused(path, str(error)) from error
    if len(proto.opset_import) != 1 or proto.opset_import[0].version not in OPSETS:
        versions = ", ".join(str(entry.version) for entry in proto.opset_import) or "none"
        raise _refused(path, f"its opset is {versions}, expected {OPSETS.start} to {OPSETS.stop - 1}")
    return int(proto.opset_import[0].version)


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages inside it, at any depth."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if hasattr(value, "__len__") else (value,):
                yield from _messages(part)


def _description(path: Path, proto: onnx.ModelProto) -> ModelDescription:
    values = {entry.key: entry.value for entry in proto.metadata_props}
    if "icdctl.schema" not in values:
        raise ArtifactError(
            f"`{path}` was not made by `icdctl export`: its metadata do not say how to prepare images for it",
            hint="export the weights with `icdctl export`; graphs from other programs can't be evaluated",
        )
    try:
        return ModelDescription.from_metadata(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"the metadata of `{path}` do not have the format of `icdctl export`: {error}", hint=_AGAIN_HINT
        ) from error


def _refused(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"`{path}` is refused: {reason}", hint=_FOREIGN_HINT)
