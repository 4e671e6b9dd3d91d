"""The optimisers that a run can name, fused, and ready for steps that a CUDA graph holds."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from icdctl.config.run_config import RunConfig


class _SGD(torch.optim.SGD):
    """torch's SGD, whose methods are wrapped so that its compiler leaves them alone; the wrappers import the compiler,
    which takes a second. Optimisers are never compiled here, so these are the methods as they are inside.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def make_optimizer(
    config: RunConfig, parameters: Sequence[nn.Parameter], *, device_driven: bool
) -> torch.optim.Optimizer:
    """The fused optimiser of a run.

    Args:
        config: the configuration of the run.
        parameters: what is trained, on one device.
        device_driven: whether steps are driven from the device: learning rate and state are then tensors from the
            start.
    """
    # float32 is what the fused kernels read on CUDA.
    rate = torch.tensor(config.lr, dtype=torch.float32, device=parameters[0].device) if device_driven else config.lr
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            parameters, lr=rate, weight_decay=config.weight_decay, fused=True, capturable=device_driven
        )
        # torch warns of steps outside a graph; those before a capture, and all steps where it fails, are intended.
        optimizer._warned_capturable_if_run_uncaptured = True
    else:
        optimizer = _SGD(
            parameters,
            lr=rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,
        )
    # Where its first step is left out, torch's SGD keeps the momentum that it has allocated and not filled.
    if device_driven or config.on_nonfinite == "skip":
        _make_state(optimizer)
    return optimizer


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """The state that the optimiser would make at its first step, with zeros, which lead to the same first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(optimizer, torch.optim.AdamW):
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            elif group["momentum"]:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
