"""Export to ONNX: a graph that takes pixels and was verified against its weights, in a folder that documents this.

`export_onnx` writes the folder, `verify_folder` and `verify_file` check it later, and `OnnxClassifier` runs the graph.
"""

from icdctl.exporting.checks import Check, VerificationReport
from icdctl.exporting.description import InputKind, ModelDescription
from icdctl.exporting.package import Export, export_onnx, onnx_bytes
from icdctl.exporting.reading import OnnxFile, read_onnx
from icdctl.exporting.session import OnnxClassifier
from icdctl.exporting.verify import verify_file, verify_folder

__all__ = [
    "Check",
    "Export",
    "InputKind",
    "ModelDescription",
    "OnnxClassifier",
    "OnnxFile",
    "VerificationReport",
    "export_onnx",
    "onnx_bytes",
    "read_onnx",
    "verify_file",
    "verify_folder",
]
