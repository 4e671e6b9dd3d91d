"""The state of a run at the end of an epoch: one safetensors file, replaced atomically.

It lives outside the run folder, under the run's fingerprint, and is kept after success: when the outputs of a finished
run are deleted, they are written again at once, without training.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from icdctl import files
from icdctl.config.run_config import RunConfig
from icdctl.engine.device import beside, side_stream
from icdctl.engine.step import TrainingStep
from icdctl.errors import ArtifactError

_MODEL, _AVERAGE, _OPTIMIZER = "model.", "average.", "optimizer."
_OBJECTIVE, _OBJECTIVE_AVERAGE = "objective.", "objective_average."
_NUM_AVERAGED = "num_averaged"
_METADATA, _CONFIG = "icdctl", "config"
STATE_FILE = "state.safetensors"
REPLAY_FILE = "nonfinite.safetensors"
"""A batch that was not finite, beside the state before it."""


class Progress(BaseModel):
    """The progress of a run: epochs and steps done, history, and what was decided when it began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = Field(ge=0)
    """Epochs done."""
    steps: int = Field(ge=0)
    """Steps done."""
    history: list[dict[str, float]]
    """One row per epoch, with the columns of history.csv."""
    seconds: float = Field(ge=0)
    """Training time of all attempts together."""
    done: bool
    """Nothing is left to train."""
    dataset_sha256: str
    """Hash of the images and labels that it was trained on."""
    nonfinite_steps: int = 0
    """Steps that were left out because they were not finite."""
    teacher_mode: str = "auto"
    """Decided when the run began."""
    teacher_precision: str = "auto"
    """Decided when the run began."""

    @model_validator(mode="after")
    def _has_a_row_an_epoch(self) -> Self:
        if len(self.history) != self.epoch:
            raise ValueError(f"{len(self.history)} rows of history for {self.epoch} epochs")
        return self


def checkpoints_folder() -> Path:
    """Where states are kept, a folder for each fingerprint."""
    return files.state_folder() / "checkpoints"


def checkpoint_path(fingerprint: str) -> Path:
    """Where the state of a run is kept."""
    return checkpoints_folder() / fingerprint / STATE_FILE


class CheckpointWriter:
    """Writes the states of a student. On CUDA the training continues meanwhile; one state is written at a time."""

    def __init__(self, device: torch.device, *, in_background: bool) -> None:
        """
        Args:
            device: the student's device.
            in_background: whether `save` returns before the file is there.
        """
        self._in_background = in_background
        self._stream = side_stream(device)
        self._pending: Future[None] | None = None

    def save(self, path: Path, step: TrainingStep, progress: Progress, config: RunConfig | None = None) -> None:
        """Write weights, optimiser state and progress, as they are now, and the run that they belong to.

        Raises:
            ArtifactError: the file can't be written; where it is written in the background, `wait` or the next `save`
                raises this.
        """
        self.wait()
        said = {_METADATA: progress.model_dump_json()}
        if config is not None:
            absolute = config.model_copy(update={"out": str(Path(config.out).resolve())})
            said[_CONFIG] = absolute.model_dump_json()
        tensors = {key: tensor.detach() for key, tensor in _tensors(step).items()}
        if not self._in_background:
            _write(path, {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}, said)
            return
        # First to the device's own memory, which takes no time; then the next step may change the weights.
        copies = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        with beside(self._stream):
            on_host = {key: _to_host(copy) for key, copy in copies.items()}
        # It waits for an event, not for the stream: torch has few streams, and one that is being captured can't be
        # waited for.
        copied = None if self._stream is None else self._stream.record_event()
        self._pending = Future()
        Thread(target=self._finish, args=(self._pending, copied, copies, path, on_host, said)).start()

    def _finish(
        self,
        pending: Future[None],
        copied: torch.cuda.Event | None,
        copies: dict[str, Tensor],
        path: Path,
        on_host: dict[str, Tensor],
        said: dict[str, str],
    ) -> None:
        """Wait, in the thread, for the copies, which live until then, and write the file."""
        try:
            if copied is not None:
                copied.synchronize()
            copies.clear()
            _write(path, on_host, said)
        except BaseException as error:
            pending.set_exception(error)
        else:
            pending.set_result(None)

    def wait(self) -> None:
        """Return once the last state is on disk.

        Raises:
            ArtifactError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, complete once the current stream has reached this point."""
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return on_host.copy_(tensor, non_blocking=True)


def _write(path: Path, held: dict[str, Tensor], said: dict[str, str]) -> None:
    files.write_bytes(path, save(held, metadata=said))


def _tensors(step: TrainingStep) -> dict[str, Tensor]:
    """All tensors of a state, under their names in the file."""
    tensors = {
        prefix + key: tensor for prefix, module in _modules(step).items() for key, tensor in module.state_dict().items()
    }
    if step.average is not None:
        tensors[_NUM_AVERAGED] = step.num_averaged
    for index, state in step.optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors


def _modules(step: TrainingStep) -> dict[str, nn.Module]:
    """Everything that learns, by the prefix of its tensors in the file."""
    found = {
        _MODEL: step.student,
        _AVERAGE: step.average,
        _OBJECTIVE: step.objective,
        _OBJECTIVE_AVERAGE: step.objective_average,
    }
    return {prefix: module for prefix, module in found.items() if module is not None}


def load_checkpoint(path: Path, step: TrainingStep) -> Progress | None:
    """Put weights and optimiser back as they were, or return None where nothing was saved.

    Raises:
        ArtifactError: the file is broken.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (it is not a dictionary)
            progress = Progress.model_validate_json(stored.metadata()[_METADATA], strict=True)
        for prefix, module in _modules(step).items():
            module.load_state_dict(_below(prefix, tensors))
        if step.average is not None:
            step.num_averaged.copy_(tensors[_NUM_AVERAGED])
        _load_optimizer(step.optimizer, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"checkpoint `{path}` can't be read: {str(error).splitlines()[0]}",
            hint="delete it and the run folder, and start the run again",
        ) from error
    return progress


def read_state(path: Path) -> tuple[Progress, RunConfig | None]:
    """The progress of the run that a state belongs to, and which run that is; no weight is read.

    Raises:
        ArtifactError: the file is broken.
    """
    try:
        files.check_regular(path)
        with safe_open(path, framework="pt") as stored:
            said = stored.metadata() or {}
        progress = Progress.model_validate_json(said[_METADATA], strict=True)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"checkpoint `{path}` can't be read: {error}", hint="delete it") from error
    try:
        return progress, RunConfig.model_validate_json(said[_CONFIG])
    except (KeyError, ValueError):  # of an earlier version
        return progress, None


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_OPTIMIZER):
            index, name = key.removeprefix(_OPTIMIZER).split(".", 1)
            parameter = parameters[int(index)]
            # Buffers take their parameter's memory layout again, which the fused update expects.
            same = tensor.shape == parameter.shape
            state.setdefault(int(index), {})[name] = torch.empty_like(parameter).copy_(tensor) if same else tensor
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
