"""The device's own limits: how fast it multiplies, copies and launches, for comparison with a step's time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from icdctl.benchmark import clocks

_MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_CONVOLUTION = (64, 256, 8)
"""Images, channels, side of the map in pixels: as in a deep layer of res32x4 at batch 64."""
_NUM_LAUNCHES = 1000
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def measure_ceilings(device: torch.device, kinds: Sequence[str], *, seconds: float, seed: int) -> dict[str, float]:
    """Measure rates on random data: medians of 3 to 10 repeats on the device's first clock.

    Args:
        device: the device to measure.
        kinds: number types of the products: `fp32`, `tf32`, `bf16`, `fp16`.
        seconds: approximate time for each ceiling.
        seed: seed of the data.

    Returns:
        `matmul_<kind>_tflops` (2 n^3 operations), `conv3x3_<kind>_tflops` (256 channels, 8 x 8, 64 images; the plain
        algorithm's count of operations, a library may need fewer), `copy_gb_per_second` (bytes read and written), and
        on CUDA `eager_launch_us` and `graph_node_us`, for a kernel that adds 1 to one number.
    """
    found = {}
    for kind in dict.fromkeys(kinds):
        found[f"matmul_{kind}_tflops"] = _matmul(device, kind, seconds, seed) / 1e12
        found[f"conv3x3_{kind}_tflops"] = _convolution(device, kind, seconds, seed) / 1e12
    found["copy_gb_per_second"] = _copy(device, seconds, seed) / 1e9
    if device.type == "cuda":
        with torch.cuda.device(device):
            found |= _launches(device)
    return found


def teacher_kind(precision: str, teacher_precision: str) -> str:
    """The number type of the products in the teacher's forward pass.

    Args:
        precision: the student's precision; with tf32, torch's switch applies to a teacher in fp32 too.
        teacher_precision: the teacher's precision.
    """
    return precision if (precision, teacher_precision) == ("tf32", "fp32") else teacher_precision


def _matmul(device: torch.device, kind: str, seconds: float, seed: int) -> float:
    """Operations per second of a matrix product."""
    side = _MATMUL_SIDE[device.type]
    dtype = _DTYPES.get(kind, torch.float32)
    generator = torch.Generator(device).manual_seed(seed)
    left = torch.randn((side, side), generator=generator, device=device).to(dtype)
    right = torch.randn((side, side), generator=generator, device=device).to(dtype)
    out = torch.empty_like(left)
    with _tf32_matmul(kind == "tf32"):
        spent = clocks.repeat(lambda: torch.mm(left, right, out=out), seconds=seconds, device=device)
    return 2.0 * side**3 / spent


def _convolution(device: torch.device, kind: str, seconds: float, seed: int) -> float:
    """Operations per second of a 3 x 3 convolution, by the count of the plain algorithm."""
    images, channels, side = _CONVOLUTION
    dtype = _DTYPES.get(kind, torch.float32)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device)
        return drawn.to(dtype).to(memory_format=torch.channels_last)

    maps, kernels = draw(images, channels, side, side), draw(channels, channels, 3, 3)
    with torch.no_grad():
        spent = clocks.repeat(lambda: F.conv2d(maps, kernels, padding=1), seconds=seconds, device=device)
    return 2.0 * 9 * images * side * side * channels * channels / spent


def _copy(device: torch.device, seconds: float, seed: int) -> float:
    """Bytes per second, read and written."""
    size = _COPY_BYTES[device.type]
    generator = torch.Generator(device).manual_seed(seed)
    source = torch.randint(0, 256, (size,), generator=generator, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2.0 * size / clocks.repeat(lambda: target.copy_(source), seconds=seconds, device=device)


def _launches(device: torch.device) -> dict[str, float]:
    """Microseconds per kernel, launched one by one and as a node of a CUDA graph."""
    number = torch.zeros(1, device=device)

    def launch_all() -> None:
        for _ in range(_NUM_LAUNCHES):
            number.add_(1.0)

    launch_all()
    torch.cuda.synchronize(device)
    before = time.perf_counter()
    launch_all()
    torch.cuda.synchronize(device)
    eager = time.perf_counter() - before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_all()
    spent = clocks.repeat(graph.replay, seconds=1.0, device=device)
    return {"eager_launch_us": 1e6 * eager / _NUM_LAUNCHES, "graph_node_us": 1e6 * spent / _NUM_LAUNCHES}


@contextmanager
def _tf32_matmul(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
