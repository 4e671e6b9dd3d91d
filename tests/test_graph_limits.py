"""Graphs from any source: only operators of classifiers, on values whose size is known before they are run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from icdctl import models
from icdctl.data import Preprocessing
from icdctl.errors import ArtifactError
from icdctl.exporting import OnnxClassifier, limits, session, verify_file
from icdctl.exporting.description import ModelDescription
from icdctl.exporting.graph import graph_bytes
from icdctl.exporting.reading import read_onnx

CLASSES = 10
PREPROCESSING = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DESCRIPTION = ModelDescription("res8", "x", tuple(map(str, range(CLASSES))), PREPROCESSING, "uint8", "0" * 64)
Part = onnx.NodeProto | onnx.TensorProto


def ints(name: str, values: Sequence[int] | int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def floats(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.full(shape, 0.001, np.float32), name)


def node(kind: str, given: str, made: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, given.split(), made.split(), **attributes)


@pytest.fixture(scope="module")
def honest() -> bytes:
    return graph_bytes(models.create("res8", CLASSES).eval(), DESCRIPTION)


ZEROS: list[Part] = [
    node("Shape", "image", "batch", start=0, end=1),
    ints("classes", [CLASSES]),
    node("Concat", "batch classes", "size", axis=0),
    node("ConstantOfShape", "size", "zeros"),
]
"""A graph that gives logits of 0 under the name `zeros`."""


def graph(honest: bytes, parts: Sequence[Part]) -> bytes:
    """A file with the description and the interface of an honest one, and these nodes and constants."""
    proto = onnx.load_model_from_string(honest)
    for field in (proto.graph.node, proto.graph.initializer, proto.graph.value_info):
        del field[:]
    proto.graph.node.extend(part for part in parts if isinstance(part, onnx.NodeProto))
    proto.graph.initializer.extend(part for part in parts if isinstance(part, onnx.TensorProto))
    return bytes(proto.SerializeToString())


def _loop() -> list[Part]:
    scalar = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("c", 9), ("v", 1))]
    outputs = [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("v2", 1, [])]
    body = helper.make_graph([node("Identity", "c", "c2"), node("Identity", "v", "v2")], "body", scalar, outputs)
    forever = [ints("trips", 2**62), numpy_helper.from_array(np.array(True), "go"), floats("start")]
    return [*ZEROS, *forever, node("Loop", "trips go start", "end", body=body), node("Add", "zeros end", "logits")]


def _branch() -> list[Part]:
    one = helper.make_graph([node("Identity", "zeros", "a")], "a", [], [helper.make_tensor_value_info("a", 1, None)])
    choice = numpy_helper.from_array(np.array(True), "choice")
    return [*ZEROS, choice, node("If", "choice", "logits", then_branch=one, else_branch=one)]


def _of_size(size: int, *nodes: Part) -> list[Part]:
    """A constant of a size, summed up and added to the logits; `huge` is its name."""
    return [
        *ZEROS,
        ints("wanted", [size]),
        *nodes,
        node("ReduceSum", "huge", "sum", keepdims=0),
        node("Add", "zeros sum", "logits"),
    ]


def _products(count: int, side: int) -> list[Part]:
    parts: list[Part] = [*ZEROS, floats("m", side, side), node("Identity", "m", "p0")]
    parts += [node("MatMul", f"p{number} m", f"p{number + 1}") for number in range(count)]
    return [*parts, node("ReduceSum", f"p{count}", "sum", keepdims=0), node("Add", "zeros sum", "logits")]


PIXELS: list[Part] = [
    node("Cast", "image", "pixels", to=1),
    ints("flat", [0, -1]),
    node("Reshape", "pixels flat", "rows"),
]
HOSTILE: dict[str, tuple[list[Part], str]] = {
    "loop": (_loop(), "the operator `Loop`"),
    "branch": (_branch(), "the operator `If`"),
    "random": ([node("RandomNormal", "", "logits", shape=[1, CLASSES])], "the operator `RandomNormal`"),
    "of-values": ([*ZEROS, node("NonZero", "zeros", "logits")], "the operator `NonZero`"),
    "constant": (_of_size(900_000_000, node("ConstantOfShape", "wanted", "huge")), "need more than 2 GiB"),
    "expanded": (_of_size(900_000_000, floats("one", 1), node("Expand", "one wanted", "huge")), "need more than 2 GiB"),
    "tiled": (_of_size(900_000_000, floats("one", 1), node("Tile", "one wanted", "huge")), "need more than 2 GiB"),
    "outer-product": (
        _of_size(1, floats("a", 40_000, 1), floats("b", 1, 40_000), node("Mul", "a b", "huge")),
        "need more than 2 GiB",
    ),
    "kept-constants": (
        [
            *_of_size(60_000_000, node("ConstantOfShape", "wanted", "huge")),
            *(node("ConstantOfShape", "wanted", f"more{number}") for number in range(9)),
        ],
        "need more than 2 GiB",
    ),
    "range-of-values": (
        [
            *PIXELS,
            node("ReduceMax", "rows", "top", keepdims=0),
            floats("zero"),
            floats("step"),
            node("Range", "zero top step", "huge"),
            node("ReduceSum", "huge", "sum", keepdims=0),
            *ZEROS,
            node("Add", "zeros sum", "logits"),
        ],
        "not known beforehand",
    ),
    "images-times-images": (
        [
            *PIXELS,
            node("Transpose", "rows", "columns"),
            node("MatMul", "rows columns", "each"),
            node("Unsqueeze", "each two", "wide"),
            ints("two", [2]),
            node("Mul", "wide many", "huge"),
            floats("many", 5000),
            node("ReduceSum", "huge", "sum", keepdims=0),
            *ZEROS,
            node("Add", "zeros sum", "logits"),
        ],
        "grows faster than the number of images",
    ),
    "weights-of-many": (
        [
            *ZEROS,
            *PIXELS,
            floats("w", 3072, 3072),
            *(node("MatMul", "rows w", f"p{number}") for number in range(60)),
            node("ReduceSum", "p59", "sum", keepdims=0),
            node("Add", "zeros sum", "logits"),
        ],
        "more than 2 GiB for their weights",
    ),
    "products-of-constants": (_products(12, 1000), "multiplies constants with each other"),
    "work": (
        [*ZEROS, *PIXELS, ints("long", [20_000, 3072]), node("Expand", "rows long", "tall"), floats("w", 3072, 2000)]
        + [node("MatMul", "tall w", f"huge{number}") for number in range(10)]
        + [node("ReduceSum", "huge9", "sum", keepdims=0)]
        + [node("Add", "zeros sum", "logits")],
        "multiplications for an image",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_graph_that_may_take_all_time_or_memory_is_refused_unrun(
    honest: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    parts, reason = HOSTILE[kind]
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(honest, parts))
    monkeypatch.delattr(onnxruntime, "InferenceSession")
    start = time.perf_counter()
    with pytest.raises(ArtifactError) as caught:
        read_onnx(path)
    assert f"`{path}` is refused: " in caught.value.message
    assert reason in caught.value.message
    assert time.perf_counter() - start < 5


def _of_unknown_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"


def _sparse(proto: onnx.ModelProto) -> None:
    values, places = floats("s", 1), ints("p", [0])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [10**12]))


@pytest.mark.parametrize(
    ("change", "reason"), [(_of_unknown_input, "the size of its input"), (_sparse, "sparse weights")]
)
def test_what_has_no_known_size_is_refused(
    honest: bytes, tmp_path: Path, change: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    proto = onnx.load_model_from_string(honest)
    change(proto)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ArtifactError, match=reason):
        read_onnx(tmp_path / "model.onnx")


def _message(field: int, content: bytes) -> bytes:
    length, size = len(content), b""
    while length >= 0x80:
        size += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([field << 3 | 2]) + size + bytes([length]) + content


@pytest.mark.parametrize(
    "content",
    [
        _message(7, _message(1, b"") * 60_000),
        _message(7, _message(5, _message(1, bytes(17 << 20)) + _message(9, bytes(1)) + _message(8, bytes(18 << 20)))),
        _message(7, _message(13, bytes(33 << 20))),
        _message(14, b"") * 20 + _message(6, bytes(33 << 20)),
    ],
    ids=["nodes", "weights", "values", "notes"],
)
def test_a_model_of_countless_parts_is_refused_before_it_is_parsed(content: bytes) -> None:
    with pytest.raises(limits.RefusedGraphError, match="besides"):
        limits.check_size(content)


@pytest.mark.parametrize(
    "content", [b"\x3a\xff", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x3b", b"\x08"]
)
def test_what_is_no_model_is_no_hang(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut short|unknown kind"):
        limits.check_size(content)


def test_an_export_is_within_the_limits(honest: bytes) -> None:
    proto = onnx.load_model_from_string(honest)
    limits.check_size(honest)
    limits.check_operators(proto)
    needs = limits.measure_graph(proto)
    # The widest maps of res8 are [16, 32, 32] float32, 64 KiB; no more than three of them are in use at a time.
    assert needs.fixed == 0
    assert 2 * 65_536 <= needs.per_image <= 3 * 65_536
    assert needs.most_images == (4 << 30) // needs.per_image


def test_a_range_over_the_images_and_other_sizes_are_known(honest: bytes) -> None:
    # torch exports `LayerNorm` over channels with numbers from 0 to the number of images.
    parts: list[Part] = [
        *ZEROS,
        ints("zero", 0),
        ints("one", 1),
        ints("none", [0]),
        node("Squeeze", "batch none", "n"),
        node("Range", "zero n one", "numbers"),
        node("Cast", "numbers", "floats", to=1),
        ints("last", [1]),
        node("Unsqueeze", "floats last", "column"),
        node("Add", "zeros column", "logits"),
    ]
    limits.measure_graph(onnx.load_model_from_string(graph(honest, parts)))


# --- what a graph gives ----------------------------------------------------------------------------------------------

ROW_TOO_MANY: list[Part] = [*ZEROS[:3], ints("more", [1, 0]), node("Add", "size more", "larger")]
ROW_TOO_MANY += [node("ConstantOfShape", "larger", "logits")]
CLASS_TOO_FEW: list[Part] = [*ZEROS, ints("a", [0]), ints("b", [9]), ints("axis", [1])]
CLASS_TOO_FEW += [node("Slice", "zeros a b axis", "logits")]


@pytest.mark.parametrize(
    ("parts", "shape"), [(ROW_TOO_MANY, "[4, 10]"), (CLASS_TOO_FEW, "[3, 9]")], ids=["row", "class"]
)
def test_logits_have_a_row_for_each_image_and_a_column_for_each_class(
    honest: bytes, tmp_path: Path, parts: list[Part], shape: str
) -> None:
    proto = onnx.load_model_from_string(graph(honest, parts))
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    for side in ("rows", "columns"):
        proto.graph.output[0].type.tensor_type.shape.dim.add().dim_param = side
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ArtifactError) as caught:
        OnnxClassifier(path, threads=1).logits(torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
    assert f"gives float32 logits {shape} for 3 images, expected floats [3, 10]" in caught.value.message
    assert not verify_file(path).passed


def test_a_graph_that_takes_too_long_is_stopped(honest: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_LONGEST_SECONDS", 0.02)
    monkeypatch.setattr(session, "_SECONDS_PER_IMAGE", 0)
    parts: list[Part] = [*PIXELS, node("Concat", "rows " * 8, "p0", axis=1), *ZEROS]
    parts += [node("Erf", f"p{number}", f"p{number + 1}") for number in range(400)]
    parts += [node("ReduceSum", "p400", "sum", keepdims=0), node("Add", "zeros sum", "logits")]
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(honest, parts))
    classifier = OnnxClassifier(path, threads=1)
    start = time.perf_counter()
    with pytest.raises(ArtifactError, match=r"was stopped: 64 images took more than 0\.02 s"):
        classifier.logits(torch.zeros(64, 32, 32, 3, dtype=torch.uint8))
    assert time.perf_counter() - start < 10


def test_a_batch_that_needs_too_much_memory_is_run_in_parts(honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(honest)
    file = read_onnx(path)
    images = torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = OnnxClassifier(file, threads=1).logits(images)
    narrow = replace(file, needs=limits.Needs(fixed=0, per_image=(4 << 30) // 3))
    assert narrow.needs.most_images == 3
    torch.testing.assert_close(OnnxClassifier(narrow, threads=1).logits(images), whole)
