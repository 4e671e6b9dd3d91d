"""Turn a PyTorch classifier into the bytes of one ONNX file. Equal weights and versions give equal bytes."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from icdctl.data import Preprocessing
from icdctl.errors import ArtifactError, UsageError
from icdctl.exporting.description import BATCH_NAME, INPUT_NAME, OUTPUT_NAME, InputKind, ModelDescription
from icdctl.models import fold_batch_norms

OPSETS = range(18, 24)
"""The supported ONNX operator sets. The exporter uses 18; later ones give the same graph and need a newer runtime."""


class Deployed(nn.Module):
    """A classifier that takes pixels: [batch, H, W, 3] uint8 RGB -> logits [batch, K].

    The mean can't be folded into the first convolution, because its zero padding must be zero after normalisation.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * std)).float().reshape(1, 3, 1, 1))
        self.register_buffer("offset", (-mean / std).float().reshape(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """[batch, H, W, 3] uint8 -> logits [batch, K]."""
        # Without `contiguous`, the strides of the permuted image add index arithmetic to the graph.
        pixels = image.permute(0, 3, 1, 2).contiguous().to(torch.float32)
        logits: Tensor = self.model(pixels * self.scale + self.offset)
        return logits


class Affine(nn.Module):
    """A batch norm in eval mode: one factor and one offset per channel, computed in float64."""

    scale: Tensor
    offset: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        scale = norm.weight.detach().double() / torch.sqrt(variance.double() + norm.eps)
        offset = norm.bias.detach().double() - mean.double() * scale
        self.register_buffer("scale", scale.float().reshape(1, -1, 1, 1))
        self.register_buffer("offset", offset.float().reshape(1, -1, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """[batch, C, H, W] -> [batch, C, H, W]."""
        return features * self.scale + self.offset


def _without_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of the model whose batch norms are folded into the convolution before them, or replaced by `Affine`.

    The exporter folds most batch norms itself, but how it does that, and whether it can write the others, depends on
    the versions of torch and onnxscript.
    """
    network = fold_batch_norms(model)
    for name, norm in list(network.named_modules()):
        # In a custom module, a subclass may do more, and a norm without statistics uses those of the batch.
        if type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, Affine(norm))
    return network


def graph_bytes(model: nn.Module, description: ModelDescription, *, opset: int = OPSETS.start) -> bytes:
    """The content of a classifier's .onnx file; it has not been checked or verified.

    Args:
        model: [B, 3, H, W] normalised -> logits [B, K]; in eval mode, on the CPU, float32.
        description: the metadata to write; its input kind decides what the graph takes.
        opset: ONNX operator set, one of `OPSETS`.

    Raises:
        UsageError: the opset is not supported.
        ArtifactError: torch can't export the module.
    """
    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset} is not supported",
            hint=f"choose {OPSETS.start} (the default) to {OPSETS.stop - 1}; older runtimes want the lower ones",
        )
    example = _example(description.input_kind, description.preprocessing)
    network = _without_batch_norms(model)
    deployed = Deployed(network, description.preprocessing) if description.input_kind == "uint8" else network
    proto = _traced(deployed.eval(), example, opset=opset, name=description.model)
    _strip(proto)
    _name_batch(proto.graph)
    proto.producer_name, proto.producer_version = "icdctl", ""
    # The exporter writes the newest, which older runtimes refuse, though they know the opset.
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    proto.graph.name = description.model
    for key, value in sorted(description.metadata().items()):
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _example(input_kind: InputKind, preprocessing: Preprocessing) -> Tensor:
    """Two images, because older exporters take the batch size 1 for a constant."""
    height, width = preprocessing.size
    if input_kind == "uint8":
        return torch.zeros(2, height, width, 3, dtype=torch.uint8)
    return torch.zeros(2, 3, height, width)


def _traced(module: nn.Module, example: Tensor, *, opset: int, name: str) -> onnx.ModelProto:
    # Values of many types, passed by keyword to a function whose arguments depend on the version of torch.
    wanted: dict[str, Any] = {
        "dynamo": True,
        "opset_version": opset,
        "input_names": [INPUT_NAME],
        "output_names": [OUTPUT_NAME],
        "dynamic_shapes": ({0: torch.export.Dim(BATCH_NAME)},),  # a dict would be keyed by the argument of `forward`
        "external_data": False,
        "optimize": True,
        "fallback": False,  # never the old exporter, which writes another graph
        "verbose": False,
    }
    known = inspect.signature(torch.onnx.export).parameters
    arguments = {key: value for key, value in wanted.items() if key in known}
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(module, (example,), **arguments)
    except torch.onnx.OnnxExporterError as error:
        raise ArtifactError(
            f"torch {torch.__version__} can't export `{name}`: {type(error.__cause__ or error).__name__}",
            hint="the model's `forward` must not branch on the values of its input",
        ) from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hide what the exporter prints on stdout and stderr, and its warnings about its own code."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _name_batch(graph: onnx.GraphProto) -> None:
    """Give the dynamic dimension its name; older exporters call it `s0` or similar."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if symbol and dimension.dim_param == symbol:
                dimension.dim_param = BATCH_NAME


def _strip(message: Any) -> None:
    """Clear the exporter's notes at every level, because they hold stack traces with the paths of this machine."""
    for field in ("metadata_props", "doc_string"):
        if field in message.DESCRIPTOR.fields_by_name:
            message.ClearField(field)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if hasattr(value, "__len__") else (value,):
                _strip(part)
