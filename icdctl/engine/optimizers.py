"""The optimisers that a run can name, fused, and ready for steps that a CUDA graph holds."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from icdctl.config.run_config import RunConfig


class _Uncompiled(torch.optim.Optimizer):
    """torch wraps an optimiser's methods so that its compiler leaves them alone; the wrappers import the compiler,
    which takes a second. Optimisers are never compiled here, so these are the methods as they are inside.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class _SGD(_Uncompiled, torch.optim.SGD):
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class DistillationOriented(_Uncompiled):
    """DOT: SGD with two momenta, a small one for the cross-entropy and a large one for what comes from the teacher.

    With g and h the gradients of the two, v <- (m - d) v + g + decay * p, w <- (m + d) w + h, p <- p - lr (v + w). A
    parameter that one of them alone reaches has the momentum m: the student's head under a method on features, or a
    connector. The reference leaves out the weight decay of a connector's first step; here it has it.

    Source: Zhao et al. 2023, algorithm 1, https://openaccess.thecvf.com/content/ICCV2023/papers/
    Zhao_DOT_A_Distillation-Oriented_Trainer_ICCV_2023_paper.pdf
    """

    BUFFERS = ("momentum_buffer", "momentum_kd_buffer")
    """Names in the state of a parameter: v and w."""
    found_inf: torch.Tensor | None = None
    """A scalar that is 1 where the update is to be left out; None where it never is."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        lr: float | torch.Tensor,
        momentum: float,
        delta: float,
        weight_decay: float,
    ) -> None:
        """
        Args:
            parameters: what is trained.
            lr: the learning rate; a tensor where steps are driven from the device.
            momentum: m.
            delta: d.
            weight_decay: of all parameters.
        """
        settings = {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay}
        super().__init__(parameters, {**settings, "differentiable": False})
        for name in self.BUFFERS:
            self._buffers(parameters, name)
        self._gradients: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def backward(self, ce: torch.Tensor, distillation: torch.Tensor) -> None:
        """Compute both gradients, and give each parameter their sum as its `grad`.

        Args:
            ce: the cross-entropy, a scalar.
            distillation: the sum of all other terms, a scalar of the same graph.
        """
        parameters = self._parameters
        of_ce = torch.autograd.grad(ce, parameters, retain_graph=True, allow_unused=True)
        of_teacher = torch.autograd.grad(distillation, parameters, allow_unused=True)
        self._gradients = list(zip(of_ce, of_teacher, strict=True))
        for parameter, (first, second) in zip(parameters, self._gradients, strict=True):
            parameter.grad = second if first is None else first if second is None else first + second

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Multiply both gradients by a scalar, as their sum was scaled to clip it."""
        held = [gradient for pair in self._gradients for gradient in pair if gradient is not None]
        torch._foreach_mul_(held, factor.to(held[0].dtype))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        """Move the parameters by the gradients of the last `backward`."""
        group = self.param_groups[0]
        momentum, delta = group["momentum"], group["delta"]
        for place, (name, with_other) in enumerate(
            zip(self.BUFFERS, (momentum - delta, momentum + delta), strict=True)
        ):
            for is_alone, factor in ((True, momentum), (False, with_other)):
                parameters, gradients = self._reached(place, is_alone=is_alone)
                if parameters:
                    decay = group["weight_decay"] if is_alone or place == 0 else 0.0
                    self._move(parameters, gradients, name, factor, decay, group["lr"])

    def _reached(self, place: int, *, is_alone: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What the gradient at this place reaches, alone or beside the other one, and the gradients."""
        parameters: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for parameter, pair in zip(self._parameters, self._gradients, strict=True):
            gradient = pair[place]
            if gradient is not None and (pair[1 - place] is None) == is_alone:
                parameters.append(parameter)
                gradients.append(gradient)
        return parameters, gradients

    def _move(
        self,
        parameters: list[torch.Tensor],
        gradients: list[torch.Tensor],
        name: str,
        momentum: float,
        weight_decay: float,
        lr: float | torch.Tensor,
    ) -> None:
        """Update one buffer of these parameters, and move them by it."""
        buffers = self._buffers(parameters, name)
        moved = list(torch._foreach_mul(buffers, momentum))
        torch._foreach_add_(moved, gradients)
        if weight_decay:
            torch._foreach_add_(moved, parameters, alpha=weight_decay)
        changes = list(torch._foreach_mul(moved, lr))
        if self.found_inf is not None:
            is_bad = self.found_inf > 0
            moved = [torch.where(is_bad, old, new) for old, new in zip(buffers, moved, strict=True)]
            changes = [torch.where(is_bad, torch.zeros_like(change), change) for change in changes]
        torch._foreach_copy_(buffers, moved)
        torch._foreach_add_(parameters, changes, alpha=-1)

    def _buffers(self, parameters: Sequence[torch.Tensor], name: str) -> list[torch.Tensor]:
        """One buffer of each of these parameters, zero at first."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]


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
    if config.optimizer == "dot":
        return DistillationOriented(
            parameters, lr=rate, momentum=config.momentum, delta=config.dot_delta, weight_decay=config.weight_decay
        )
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
