"""The state of a run between two steps: one safetensors file, replaced atomically, with a hash of all that it holds.

The state before it stays beside it until the run is done: a damaged one costs one interval of work, not the run.
`icdctl.engine.run_state` says where states lie, and which run may take one up.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
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
_LOG, _NUM_RIGHT = "epoch.log", "epoch.num_right"
"""What an epoch that is not over has added up so far."""
_METADATA, _CONFIG, _HASH = "icdctl", "config", "sha256"
STATE_FILE = "state.safetensors"
PREVIOUS_FILE = "previous.safetensors"
"""The state before the last one."""
_LARGEST_BYTES = 64 * 1024**3
"""Largest state that is read."""
REPLAY_FILE = "nonfinite.safetensors"
"""A batch that was not finite, beside a state from before it."""


class Progress(BaseModel):
    """The progress of a run: epochs and steps done, history, what it is made of, and what was decided at its start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = Field(ge=0)
    """Epochs done."""
    steps: int = Field(ge=0)
    """Steps of these epochs."""
    step_in_epoch: int = Field(default=0, ge=0)
    """Steps done of the next epoch."""
    epoch_seconds: float = Field(default=0.0, ge=0)
    """Training time of these."""
    history: list[dict[str, float]]
    """One row per epoch, with the columns of history.csv."""
    seconds: float = Field(ge=0)
    """Training time of the epochs, in all attempts together."""
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
    run: str = ""
    """Name of this run, drawn when it began; empty for a run that began before runs had one."""
    student_sha256: str = ""
    """Hash of a custom module as it was when the run began; empty for a model of icdctl, which the seed gives."""
    attempts: list[dict[str, JsonValue]] = []
    """The environments that it was trained in, in order."""

    @model_validator(mode="after")
    def _has_a_row_an_epoch(self) -> Self:
        if len(self.history) != self.epoch:
            raise ValueError(f"{len(self.history)} rows of history for {self.epoch} epochs")
        return self

    @property
    def has_begun(self) -> bool:
        """Whether any step is done."""
        return bool(self.epoch or self.step_in_epoch)

    def shown(self, config: RunConfig) -> str:
        """How far the run is: `epoch 3 of 10, step 120`."""
        inside = f", step {self.step_in_epoch} of the next" if self.step_in_epoch else ""
        return f"epoch {self.epoch} of {config.epochs}{inside}"


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
        tensors = {key: tensor.detach() for key, tensor in _tensors(step, progress).items()}
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
    """Write a state; the one before it gets the name `PREVIOUS_FILE`, and neither is ever absent."""
    content = save(held, metadata={**said, _HASH: _hash_of(held, said)})
    if path.is_file():
        spare = path.with_name(f".{PREVIOUS_FILE}")
        try:
            spare.unlink(missing_ok=True)
            os.link(path, spare)
            spare.replace(path.with_name(PREVIOUS_FILE))
        except OSError:  # a file system without links: the new state alone is kept
            spare.unlink(missing_ok=True)
    files.write_bytes(path, content)


def _hash_of(tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> str:
    """sha256 of everything in a state: tensors on the CPU, and texts."""
    digest = hashlib.sha256()
    for key in sorted(said.keys() - {_HASH}):
        digest.update(f"{key}\0{said[key]}\0".encode())
    update_hash(digest, tensors)
    return digest.hexdigest()


def update_hash(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Add the names, types, shapes and bytes of tensors on the CPU to a hash."""
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _tensors(step: TrainingStep, progress: Progress) -> dict[str, Tensor]:
    """All tensors of a state, under their names in the file."""
    tensors = {
        prefix + key: tensor for prefix, module in _modules(step).items() for key, tensor in module.state_dict().items()
    }
    if step.average is not None:
        tensors[_NUM_AVERAGED] = step.num_averaged
    for index, state in step.optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    if progress.step_in_epoch:
        tensors |= {_LOG: step.log[: progress.step_in_epoch], _NUM_RIGHT: step.num_right}
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


def state_files(folder: Path) -> list[Path]:
    """The states that a folder has, the newest first."""
    return [path for path in (folder / STATE_FILE, folder / PREVIOUS_FILE) if path.is_file()]


def load_checkpoint(folder: Path, step: TrainingStep, message: Callable[[str], None]) -> Progress | None:
    """Put weights and optimiser back as they were, or return None where nothing was saved.

    Args:
        folder: holds the state, and the one before it, which is taken where the state is damaged.
        step: what the state is loaded into.
        message: called where the one before is taken.

    Raises:
        ArtifactError: both are damaged.
    """
    paths = state_files(folder)
    for path in paths:
        try:
            progress = _loaded(path, step)
        except ArtifactError as error:
            if path == paths[-1]:
                raise
            message(f"warning: {error.message}; the state before it is taken")
        else:
            return progress
    return None


def _loaded(path: Path, step: TrainingStep) -> Progress:
    """Load one file.

    Raises:
        ArtifactError: it is damaged.
    """
    try:
        tensors, said = files.read_tensors(path, most_bytes=_LARGEST_BYTES)
        if _HASH in said and said[_HASH] != _hash_of(tensors, said):  # earlier versions wrote none
            raise ValueError("it was changed after it was written: its sha256 is another one")
        progress = Progress.model_validate_json(said[_METADATA], strict=True)
        for prefix, module in _modules(step).items():
            module.load_state_dict(_below(prefix, tensors))
        if step.average is not None:
            step.num_averaged.copy_(tensors[_NUM_AVERAGED])
        if progress.step_in_epoch:
            step.log[: progress.step_in_epoch] = tensors[_LOG]
            step.num_right.copy_(tensors[_NUM_RIGHT])
        _load_optimizer(step.optimizer, tensors)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _broken(path, error) from error
    return progress


def _broken(path: Path, error: Exception) -> ArtifactError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ArtifactError(
        f"checkpoint `{path}` is broken: {reason}", hint="delete it and the run folder, and start the run again"
    )


def read_state(folder: Path) -> tuple[Progress, RunConfig | None] | None:
    """The progress of the run that a folder has the state of, and its configuration; no weight is read.

    Returns:
        None where there is no state; no configuration where the state is of an earlier version.

    Raises:
        ArtifactError: no state in the folder can be read.
    """
    paths = state_files(folder)
    for path in paths:
        try:
            said = files.read_texts(path)
            progress = Progress.model_validate_json(said[_METADATA], strict=True)
        except (OSError, KeyError, ValueError) as error:
            if path == paths[-1]:
                raise _broken(path, error) from error
            continue
        try:
            return progress, RunConfig.model_validate_json(said[_CONFIG])
        except (KeyError, ValueError):  # of an earlier version
            return progress, None
    return None


def read_student(folder: Path) -> dict[str, Tensor]:
    """The tensors of the student in a state; empty where they can't be read."""
    try:
        return _below(_MODEL, files.read_tensors(folder / STATE_FILE, most_bytes=_LARGEST_BYTES)[0])
    except (OSError, ValueError):
        return {}


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
