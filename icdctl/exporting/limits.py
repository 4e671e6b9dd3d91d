"""What a graph from any source may compute: operators of feed-forward classifiers, on values of known, limited size.

A graph is a program: a few bytes may ask for a loop without an end, or for a tensor of any size. So its operators are
those of `OPERATORS`, the shape of every value is known before the graph runs, and memory and work are bounded by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.reference
from numpy.typing import NDArray

_OF_ICDCTL = """
Add AveragePool Cast Concat Conv Gemm MaxPool Mul ReduceMean Relu Reshape Split Transpose
"""
_OF_CUSTOM_MODULES = """
Abs And Ceil Celu Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Hardmax
Identity LeakyRelu Less LessOrEqual Log LogSoftmax Max Mean Min Mish Mod Neg Not Or PRelu Pow Reciprocal Round
Selu Sigmoid Sign Sin Softmax Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
MatMul Einsum ConvTranspose ConvInteger MatMulInteger QLinearConv QLinearMatMul
DequantizeLinear DynamicQuantizeLinear QuantizeLinear
GlobalAveragePool GlobalMaxPool LpPool BatchNormalization GroupNormalization InstanceNormalization
LayerNormalization LpNormalization LRN MeanVarianceNormalization RMSNormalization Dropout
ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMin ReduceProd ReduceSum ReduceSumSquare
TopK ScatterElements ScatterND Constant ConstantOfShape DepthToSpace Expand Flatten Gather GatherElements GatherND
Pad Range Resize Shape Size Slice SpaceToDepth Squeeze Tile Trilu Unsqueeze
"""
_OF_SIZES = "Add Cast Concat Div Gather Identity Mul Reshape Slice Squeeze Sub Unsqueeze"
OPERATORS = frozenset((_OF_ICDCTL + _OF_CUSTOM_MODULES).split())
"""Operators that a graph may have; none of them runs other graphs, repeats, or draws random numbers."""

MOST_BYTES = 2 * 1024**3
"""Most memory that the values of a graph may need at one time for one image."""
_MOST_BATCH_BYTES = 4 * 1024**3
"""The same for a batch of images; larger batches are run in parts."""
_MOST_OPERATIONS = 10**12
"""Most multiplications for one image; the largest vision transformers need about a third."""
_MOST_FOLDED_OPERATIONS = 10**10
"""Most multiplications of constants with each other, which the runtime does before it can be stopped."""
_MOST_NODES = 50_000
_MOST_BESIDES = 32 * 1024**2
"""Most bytes of a graph besides its weights: they take about 50 times as much memory."""
_SMALL_CONSTANT = 4096
"""Largest constant, in items, whose values may decide a shape."""
_BATCHES = (1, 4)
_MOST_SIZES = 64
"""Most items of a value that is a list of sizes."""
_ON_SIZES = frozenset(_OF_SIZES.split())
_WITH_KERNEL = {"Conv", "ConvInteger", "QLinearConv"}
_REFUSED_ATTRIBUTES = {
    onnx.AttributeProto.GRAPH,
    onnx.AttributeProto.GRAPHS,
    onnx.AttributeProto.SPARSE_TENSOR,
    onnx.AttributeProto.SPARSE_TENSORS,
}
_MATRIX = {"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"}
_WEIGHT_PLACE = {"QLinearConv": 3, "QLinearMatMul": 3}
_Array = NDArray[Any]
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_WEIGHTS = {4, 9, 10}
"""Fields of a tensor that hold floats, bytes and doubles, which take no more memory than they have bytes."""
_LENGTH_DELIMITED = 2


class RefusedGraphError(Exception):
    """The graph may not be run; the message says why, as a clause."""


@dataclass(frozen=True)
class Needs:
    """Memory of the values of a graph, in bytes; its weights are not counted."""

    fixed: int
    """Memory that does not depend on the number of images."""
    per_image: int

    @property
    def most_images(self) -> int:
        """Most images that may be run together; at least 1."""
        return max(1, (_MOST_BATCH_BYTES - self.fixed) // max(1, self.per_image))


@dataclass(frozen=True)
class _Value:
    shape: tuple[int, ...]
    item_bytes: int

    @property
    def num_items(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_items * self.item_bytes


def check_size(content: bytes) -> None:
    """Check, before it is parsed, that a model's file is made of weights for the most part.

    Raises:
        RefusedGraphError: it has too much besides weights.
        ValueError: it is not a protobuf message.
    """
    besides = nodes = 0
    for number, start, end in _fields(content, 0, len(content)):
        if number != _GRAPH:
            besides += end - start
            continue
        for inner, inner_start, inner_end in _fields(content, start, end):
            nodes += inner == _NODE
            if inner == _INITIALIZER:
                fields = _fields(content, inner_start, inner_end)
                besides += 64 + sum(last - first for field, first, last in fields if field not in _WEIGHTS)
            else:
                besides += inner_end - inner_start + 2
            if nodes > _MOST_NODES or besides > _MOST_BESIDES:
                raise RefusedGraphError(
                    f"it has more than {_MOST_NODES:,} operators, or more than {_MOST_BESIDES // 1024**2} MiB besides "
                    "its weights"
                )
    if besides > _MOST_BESIDES:
        raise RefusedGraphError(f"it has more than {_MOST_BESIDES // 1024**2} MiB besides its weights")


def check_operators(model: onnx.ModelProto) -> None:
    """Check the operators of a graph.

    Raises:
        RefusedGraphError: it has another one than `OPERATORS`, a graph inside the graph, or a sparse tensor.
    """
    if model.graph.sparse_initializer:
        raise RefusedGraphError("it has sparse weights")
    for node in model.graph.node:
        if node.op_type not in OPERATORS:
            raise RefusedGraphError(f"it has the operator `{node.op_type[:40]}`, which no classifier needs")
        if any(each.type in _REFUSED_ATTRIBUTES for each in node.attribute):
            raise RefusedGraphError(f"an operator `{node.op_type}` of it holds a graph or a sparse tensor")


def measure_graph(model: onnx.ModelProto) -> Needs:
    """What a graph that the ONNX checker has accepted needs, found without running it.

    Raises:
        RefusedGraphError: it has a value of unknown size, or needs too much memory or work.
    """
    one, several = (_peak(model, _values(model, batch)) for batch in _BATCHES)
    per_image = -(-(several - one) // (_BATCHES[1] - _BATCHES[0]))
    if per_image > max(one, 1):
        raise RefusedGraphError("the memory that it needs grows faster than the number of images")
    return Needs(max(0, one - per_image), per_image)


def _values(model: onnx.ModelProto, batch: int) -> dict[str, _Value]:
    """The shapes of all values for that many images."""
    slim = _without_weights(model, batch)
    try:
        inferred = onnx.shape_inference.infer_shapes(slim, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RefusedGraphError(f"the sizes of its values can't be found: {first_line[:200]}") from error
    found: dict[str, _Value] = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        tensor = value.type.tensor_type
        known = all(dimension.HasField("dim_value") for dimension in tensor.shape.dim)
        if known and tensor.HasField("shape"):
            shape = tuple(int(dimension.dim_value) for dimension in tensor.shape.dim)
            if any(side < 0 for side in shape):
                raise RefusedGraphError("it has a value of a negative size")
            found[value.name] = _Value(shape, _item_bytes(tensor.elem_type))
    for constant in slim.graph.initializer:
        found[constant.name] = _Value(tuple(constant.dims), _item_bytes(constant.data_type))
    return found


def _without_weights(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The graph for a number of images; large constants become inputs, since only their shapes matter."""
    graph = model.graph
    slim = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    slim.graph.name = "sizes"
    slim.graph.node.extend(graph.node)
    constants = {constant.name for constant in graph.initializer}
    for given in graph.input:
        if given.name not in constants:
            first, *others = [dim.dim_value for dim in given.type.tensor_type.shape.dim] or [0]
            if any(side < 1 for side in others):
                raise RefusedGraphError(f"it does not say the size of its input `{given.name[:40]}`")
            dims = [first or batch, *others]
            slim.graph.input.append(
                onnx.helper.make_tensor_value_info(given.name, given.type.tensor_type.elem_type, dims)
            )
    for constant in graph.initializer:
        if math.prod(constant.dims) <= _SMALL_CONSTANT:
            slim.graph.initializer.append(constant)
        else:
            slim.graph.input.append(
                onnx.helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims)
            )
    for output in graph.output:
        slim.graph.output.append(
            onnx.helper.make_tensor_value_info(output.name, output.type.tensor_type.elem_type, None)
        )
    _fold_sizes(slim)
    return slim


def _fold_sizes(slim: onnx.ModelProto) -> None:
    """Replace what computes sizes from the shape of the images by its values, which the inference then knows."""
    known = {each.name: onnx.numpy_helper.to_array(each) for each in slim.graph.initializer}
    known = {name: array for name, array in known.items() if array.size <= _MOST_SIZES}
    shapes = {each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in slim.graph.input}
    opsets = {entry.domain: entry.version for entry in slim.opset_import}
    left = []
    for node in slim.graph.node:
        sizes = _sizes_of(node, known, shapes, opsets)
        if sizes is None or sizes.size > _MOST_SIZES:
            left.append(node)
        else:
            known[node.output[0]] = sizes
            slim.graph.initializer.append(onnx.numpy_helper.from_array(sizes, node.output[0]))
    del slim.graph.node[:]
    slim.graph.node.extend(left)


def _sizes_of(
    node: onnx.NodeProto, known: Mapping[str, _Array], shapes: Mapping[str, list[int]], opsets: Mapping[str, int]
) -> _Array | None:
    """The output of a node that gives a shape, or computes with known sizes; None for any other."""
    if node.op_type == "Shape" and node.input[0] in shapes:
        ends = {each.name: each.i for each in node.attribute}
        return np.array(shapes[node.input[0]][ends.get("start", 0) : ends.get("end")], dtype=np.int64)
    if node.op_type not in _ON_SIZES or len(node.output) != 1 or not known.keys() >= set(node.input):
        return None
    try:
        evaluator = onnx.reference.ReferenceEvaluator(node, opsets=dict(opsets))
        (found,) = evaluator.run(None, {name: known[name] for name in node.input})
    except Exception:  # the evaluator raises any; the inference reports what is wrong
        return None
    return np.asarray(found)


def _item_bytes(data_type: int) -> int:
    try:
        return max(1, int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize))
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedGraphError(f"it has values of the unknown type {data_type}") from error


def _peak(model: onnx.ModelProto, values: Mapping[str, _Value]) -> int:
    """Bytes of the values that are in use at the same time, at most.

    Raises:
        RefusedGraphError: the size of a value is not known, or memory or work are beyond the limits.
    """
    graph = model.graph
    constants = {constant.name for constant in graph.initializer}
    weights = set(constants)
    last_use = {name: number for number, node in enumerate(graph.node) for name in node.input}
    last_use |= {output.name: len(graph.node) for output in graph.output}
    in_use = peak = operations = folded = packed = 0
    for number, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name not in values:
                raise RefusedGraphError(f"the size of a value of its operator `{node.op_type}` is not known beforehand")
        made = [values[name] for name in node.output if name]
        work = _operations(node, [values.get(name) for name in node.input], made)
        if constants.issuperset(filter(None, node.input)):
            constants.update(node.output)  # the runtime keeps it
            folded += work
        operations += work
        packed += _weight_bytes(node, values, constants)
        in_use += sum(value.num_bytes for value in made)
        peak = max(peak, in_use)
        if peak > MOST_BYTES * _BATCHES[-1]:
            raise RefusedGraphError("its values need more than 2 GiB for an image")
        for name in {*node.input, *node.output}:
            if name in values and name not in constants and last_use.get(name, number) == number:
                in_use -= values[name].num_bytes
    if packed > MOST_BYTES:
        raise RefusedGraphError("its operators need more than 2 GiB for their weights")
    _check_totals(peak, operations, folded, batch=_batch_of(graph, values, weights))
    return peak


def _weight_bytes(node: onnx.NodeProto, values: Mapping[str, _Value], constants: set[str]) -> int:
    """Bytes of the weights of a node, which the runtime copies for each of its operators."""
    if node.op_type not in _WITH_KERNEL | _MATRIX | {"ConvTranspose"}:
        return 0
    return sum(values[name].num_bytes for name in node.input if name in constants and name in values)


def _batch_of(graph: onnx.GraphProto, values: Mapping[str, _Value], weights: set[str]) -> int:
    given = next((each.name for each in graph.input if each.name not in weights), "")
    return values[given].shape[0] if given in values and values[given].shape else 1


def _check_totals(peak: int, operations: int, folded: int, *, batch: int) -> None:
    if peak > MOST_BYTES * batch:
        raise RefusedGraphError("its values need more than 2 GiB for an image")
    if operations > _MOST_OPERATIONS * batch:
        raise RefusedGraphError(f"it needs {operations // batch:.1e} multiplications for an image")
    if folded > _MOST_FOLDED_OPERATIONS:
        raise RefusedGraphError(f"it multiplies constants with each other {folded:.1e} times")


def _operations(node: onnx.NodeProto, given: Sequence[_Value | None], made: Sequence[_Value]) -> int:
    """Multiplications of a node, or items that it reads and writes."""
    num_made = sum(value.num_items for value in made)
    num_given = sum(value.num_items for value in given if value is not None)
    weight = given[_WEIGHT_PLACE.get(node.op_type, 1)] if len(given) > 1 else None
    if node.op_type in _WITH_KERNEL and weight is not None and weight.shape:
        return num_made * max(1, weight.num_items // max(1, weight.shape[0]))
    if node.op_type == "ConvTranspose" and given[0] is not None and weight is not None and weight.shape:
        return given[0].num_items * max(1, weight.num_items // max(1, weight.shape[0]))
    if node.op_type in _MATRIX and given[0] is not None and given[0].shape:
        return num_made * max(given[0].shape[-1], given[0].shape[0] if node.op_type == "Gemm" else 1)
    if node.op_type == "Einsum":
        return _einsum_operations(node, given)
    kernel = next((math.prod(each.ints) for each in node.attribute if each.name == "kernel_shape"), 1)
    size = next((each.i for each in node.attribute if each.name == "size"), 1)
    return max(num_given, num_made * max(1, kernel, size))


def _einsum_operations(node: onnx.NodeProto, given: Sequence[_Value | None]) -> int:
    """The product of the lengths of all its axes."""
    terms = next(each.s for each in node.attribute if each.name == "equation").decode("ascii", "replace")
    sides: dict[str, int] = {}
    for term, value in zip(terms.replace(" ", "").partition("->")[0].split(","), given, strict=False):
        if value is None or len(term) != len(value.shape):  # an ellipsis stands for any number of axes
            raise RefusedGraphError(f"its operator `Einsum` has the equation `{terms[:40]}`")
        sides |= dict(zip(term, value.shape, strict=True))
    return math.prod(sides.values())


def _fields(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of the content of each field of a protobuf message."""
    place = start
    while place < end:
        key, place = _varint(content, place, end)
        kind = key & 7
        if kind == _LENGTH_DELIMITED:
            length, place = _varint(content, place, end)
        elif kind == 0:
            _, after = _varint(content, place, end)
            length = after - place
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError("a field of an unknown kind")
        if length > end - place:
            raise ValueError("a field is cut short")
        yield key >> 3, place, place + length
        place += length


def _varint(content: bytes, place: int, end: int) -> tuple[int, int]:
    """A number of the protobuf format, and the place behind it."""
    value = shift = 0
    while place < end and shift < 70:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError("a number is cut short")
