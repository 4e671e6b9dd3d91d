"""Export to ONNX: a graph that takes pixels, verified against the weights it came from, in a folder that says so.

`export_onnx` makes the folder, `verify_folder` and `verify_file` look at one later, `OnnxClassifier` runs it.
"""

from icdctl.exporting.description import InputKind, ModelDescription
from icdctl.exporting.package import Export, export_onnx, onnx_bytes
from icdctl.exporting.reading import OnnxFile, read_onnx
from icdctl.exporting.report import Check, Report
from icdctl.exporting.session import OnnxClassifier
from icdctl.exporting.verify import verify_file, verify_folder

__all__ = [
    "Check",
    "Export",
    "InputKind",
    "ModelDescription",
    "OnnxClassifier",
    "OnnxFile",
    "Report",
    "export_onnx",
    "onnx_bytes",
    "read_onnx",
    "verify_file",
    "verify_folder",
]
