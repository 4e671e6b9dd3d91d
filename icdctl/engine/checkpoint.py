"""The state of a run at the end of an epoch: one safetensors file, replaced atomically.

It lives outside the run folder, under the run's fingerprint, and is kept after success, so that whatever deletes the
outputs of a finished run gets them back at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icdctl import files
from icdctl.engine.step import TrainingStep
from icdctl.errors import ArtifactError

_MODEL, _AVERAGE, _OPTIMIZER = "model.", "average.", "optimizer."
_NUM_AVERAGED = "num_averaged"
_METADATA = "icdctl"


class Progress(BaseModel):
    """How far a run is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = Field(ge=0)
    """Epochs done."""
    steps: int = Field(ge=0)
    """Steps done."""
    history: list[dict[str, float]]
    """A row an epoch, its columns in the order of history.csv."""
    seconds: float = Field(ge=0)
    """Spent, all attempts together."""
    done: bool
    """Nothing is left to train."""
    dataset_sha256: str
    """Of the images and labels that it was trained on."""
    nonfinite_steps: int = 0
    """Left out, where the run leaves such steps out."""
    teacher_mode: str = "auto"
    """As decided when the run began."""
    teacher_precision: str = "auto"
    """As decided when the run began."""

    @model_validator(mode="after")
    def _has_a_row_an_epoch(self) -> Self:
        if len(self.history) != self.epoch:
            raise ValueError(f"{len(self.history)} rows of history for {self.epoch} epochs")
        return self


def checkpoint_path(fingerprint: str) -> Path:
    """Where the state of a run is kept."""
    return files.state_folder() / "checkpoints" / fingerprint / "state.safetensors"


def save_checkpoint(path: Path, step: TrainingStep, progress: Progress) -> None:
    """Write weights, optimiser state and progress.

    Raises:
        ArtifactError: the place can't be written to.
    """
    tensors = {_MODEL + key: tensor for key, tensor in step.student.state_dict().items()}
    if step.average is not None:
        tensors |= {_AVERAGE + key: tensor for key, tensor in step.average.state_dict().items()}
        tensors[_NUM_AVERAGED] = step.num_averaged
    for index, state in step.optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    text = progress.model_dump_json()
    files.write_bytes(path, save(held, metadata={_METADATA: text}))


def load_checkpoint(path: Path, step: TrainingStep) -> Progress | None:
    """Put weights and optimiser back as they were, or return None where nothing was saved.

    Raises:
        ArtifactError: the file is broken.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (it is no dictionary)
            progress = Progress.model_validate_json(stored.metadata()[_METADATA], strict=True)
        step.student.load_state_dict(_below(_MODEL, tensors))
        if step.average is not None:
            step.average.load_state_dict(_below(_AVERAGE, tensors))
            step.num_averaged.copy_(tensors[_NUM_AVERAGED])
        _load_optimizer(step.optimizer, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"checkpoint `{path}` can't be read: {str(error).splitlines()[0]}",
            hint="delete it and the run folder, and start the run again",
        ) from error
    return progress


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
