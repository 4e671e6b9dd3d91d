"""An exported file as a classifier: from pixels to logits through ONNX Runtime on the CPU.

Shapes: B images, K classes.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from icdctl.data import Preprocessing
from icdctl.errors import ArtifactError, UsageError
from icdctl.exporting.description import INPUT_NAME, OUTPUT_NAME, InputKind, ModelDescription
from icdctl.exporting.reading import OnnxFile, read_onnx

_WARM_UP_RUNS = 10
_SILENT = 4


class OnnxClassifier:
    """What an .onnx file of `icdctl export` computes.

    Args:
        path: the file, or one that has been read.
        threads: of the runtime; torch's own number otherwise.
        optimise: let the runtime rewrite the graph as it usually does. Without that it runs what is written.

    Raises:
        ArtifactError: the file is missing, broken, refused, or was made by another program.
    """

    def __init__(self, path: Path | str | OnnxFile, *, threads: int | None = None, optimise: bool = True) -> None:
        self.file = path if isinstance(path, OnnxFile) else read_onnx(path)
        self._session = _session(self.file, threads or torch.get_num_threads(), optimise=optimise)

    @property
    def description(self) -> ModelDescription:
        """All that the file says of itself."""
        return self.file.description

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the columns of the logits stand for."""
        return self.description.class_names

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels become what the network reads."""
        return self.description.preprocessing

    @property
    def input_kind(self) -> InputKind:
        """Whether the graph normalises ("uint8") or its caller does ("float")."""
        return self.description.input_kind

    def logits(self, images: Tensor) -> Tensor:
        """[B, H, W, 3] uint8 RGB -> logits [B, K] float32, on the CPU.

        Raises:
            UsageError: the images are of another size or kind than the graph was made for.
            ArtifactError: the runtime can't run the graph.
        """
        self._check(images)
        return self._run(self._session, self._input(images))

    def latency_ms(self, *, batch_size: int = 1, repeats: int = 50, threads: int = 1) -> float:
        """Median wall-clock time of one call of the runtime in milliseconds, after a warm-up; normalising is left out
        where the graph does not do it."""
        height, width = self.preprocessing.size
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (batch_size, height, width, 3), dtype=torch.uint8, generator=generator)
        session, feed = _session(self.file, threads), self._input(images)
        seconds = []
        for _ in range(_WARM_UP_RUNS + repeats):
            start = time.perf_counter()
            self._run(session, feed)
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

    def _input(self, images: Tensor) -> Any:
        images = images.cpu()
        if self.input_kind == "float":
            images = self.preprocessing.normalise(images)
        return images.contiguous().numpy()

    def _run(self, session: Any, feed: Any) -> Tensor:
        try:
            (logits,) = session.run([OUTPUT_NAME], {INPUT_NAME: feed})
        except Exception as error:  # the runtime's exceptions share no base but this one
            raise _not_run(self.file.path, error) from error
        return torch.from_numpy(logits)


def _session(file: OnnxFile, threads: int, *, optimise: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT  # what goes wrong is raised
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
        hint="make the file again with `icdctl export`; a file of a newer opset needs a newer onnxruntime",
    )
