"""Run an exported file as a classifier: pixels in, logits out, with ONNX Runtime on the CPU.

Shapes: B images, K classes.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from icdctl.data import Preprocessing
from icdctl.errors import ArtifactError, UsageError
from icdctl.exporting.description import INPUT_NAME, OUTPUT_NAME, InputKind, ModelDescription
from icdctl.exporting.reading import OnnxFile, read_onnx

Input = NDArray[np.uint8] | NDArray[np.float32]
"""A batch as the runtime takes it: pixels, or normalised values."""

_WARM_UP_RUNS = 10
_SILENT = 4
_LONGEST_SECONDS = 60
"""Longest time of a run, besides `_SECONDS_PER_IMAGE`."""
_SECONDS_PER_IMAGE = 5


class OnnxClassifier:
    """An .onnx file of `icdctl export`, ready to run.

    Args:
        path: path of the file, or a file that has been read.
        threads: CPU threads that the runtime uses; None for as many as torch uses.
        optimise: let the runtime rewrite the graph, as it usually does; False runs the graph as it is written.

    Raises:
        ArtifactError: the file is missing, broken, refused, or was made by another program.
    """

    def __init__(self, path: Path | str | OnnxFile, *, threads: int | None = None, optimise: bool = True) -> None:
        self.file = path if isinstance(path, OnnxFile) else read_onnx(path)
        self._session = _session(self.file, threads or torch.get_num_threads(), optimise=optimise)

    @property
    def description(self) -> ModelDescription:
        """The description in the file's metadata."""
        return self.file.description

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits' columns."""
        return self.description.class_names

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels become the network's input."""
        return self.description.preprocessing

    @property
    def input_kind(self) -> InputKind:
        """The kind of input: "uint8" if the graph normalises pixels, "float" if its caller does."""
        return self.description.input_kind

    def logits(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 RGB -> logits [B, K] float32, on the CPU.

        Raises:
            UsageError: the size or type of the images is not what the graph takes.
            ArtifactError: the runtime can't run the graph.
        """
        self._check(images)
        most = self.file.needs.most_images
        parts = [images[first : first + most] for first in range(0, len(images), most)]
        found = [self._run(self._session, self._input(part)) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def latency_ms(self, *, batch_size: int = 1, repeats: int = 50, threads: int = 1) -> float:
        """Median wall-clock time of one call of the runtime in milliseconds, after a warm-up.

        Normalisation is not included if the graph takes normalised images.
        """
        height, width = self.preprocessing.size
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (batch_size, height, width, 3), dtype=torch.uint8, generator=generator)
        session, feed = _session(self.file, threads), self._input(images)
        self._run(session, feed)
        seconds = []
        with _time_limit(_seconds_for((_WARM_UP_RUNS + repeats) * batch_size)) as options:
            for _ in range(_WARM_UP_RUNS + repeats):
                start = time.perf_counter()
                self._logits(session, feed, options)
                seconds.append(time.perf_counter() - start)
        return 1000 * statistics.median(seconds[_WARM_UP_RUNS:])

    def _check(self, images: Tensor) -> None:
        expected = (*self.preprocessing.size, 3)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected or images.dtype != torch.uint8:
            found = f"{list(images.shape)} {str(images.dtype).removeprefix('torch.')}"
            raise UsageError(
                f"`{self.file.path}` takes images [B, {expected[0]}, {expected[1]}, 3] uint8, got {found}",
                hint="resize the images to the size that the model was trained on, or choose its data set",
            )

    def _input(self, images: Tensor) -> Input:
        images = images.cpu()
        if self.input_kind == "float":
            images = self.preprocessing.normalise(images)
        pixels: Input = images.contiguous().numpy()
        return pixels

    def _run(self, session: onnxruntime.InferenceSession, feed: Input) -> Tensor:
        """Logits [B, K], within the time that this many images may take."""
        with _time_limit(_seconds_for(len(feed))) as options:
            logits = self._logits(session, feed, options)
        expected = (len(feed), self.description.num_classes)
        if getattr(logits, "shape", None) != expected or logits.dtype.kind != "f":
            raise ArtifactError(
                f"`{self.file.path}` gives {getattr(logits, 'dtype', 'no')} logits "
                f"{list(getattr(logits, 'shape', ()))} for {expected[0]} images, expected floats {list(expected)}",
                hint="make the file again with `icdctl export`",
            )
        return torch.from_numpy(logits)

    def _logits(
        self, session: onnxruntime.InferenceSession, feed: Input, options: onnxruntime.RunOptions
    ) -> NDArray[np.floating[Any]]:
        try:
            (logits,) = session.run([OUTPUT_NAME], {INPUT_NAME: feed}, options)
        except Exception as error:  # the runtime's exceptions have no other common base
            if options.terminate:
                raise ArtifactError(
                    f"`{self.file.path}` was stopped: {len(feed)} images took more than {_seconds_for(len(feed))} s",
                    hint="use a smaller model, a faster machine, or fewer images at once",
                ) from error
            raise _not_run(self.file.path, error) from error
        found: NDArray[np.floating[Any]] = logits
        return found


@contextmanager
def _time_limit(seconds: float) -> Iterator[onnxruntime.RunOptions]:
    """Options of a run, which stop it after so many seconds."""
    options = onnxruntime.RunOptions()
    timer = threading.Timer(seconds, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    finally:
        timer.cancel()


def _seconds_for(num_images: int) -> float:
    """The time that so many images may take on a slow machine."""
    return _LONGEST_SECONDS + _SECONDS_PER_IMAGE * num_images


def _session(file: OnnxFile, threads: int, *, optimise: bool = True) -> onnxruntime.InferenceSession:
    onnxruntime.disable_telemetry_events()  # some builds of the runtime report their use to its publisher
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT  # failures raise exceptions anyway
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(file.content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as in `_run`
        raise _not_run(file.path, error) from error


def _not_run(path: Path, error: Exception) -> ArtifactError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ArtifactError(
        f"ONNX Runtime {onnxruntime.__version__} can't run `{path}`: {first_line}",
        hint="make the file again with `icdctl export`; a file with a newer opset needs a newer onnxruntime",
    )
