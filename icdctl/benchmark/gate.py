"""Whether the reference and icdctl compute the same: the gate that a comparison of their speed goes through first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from icdctl.benchmark.child import Ask
from icdctl.benchmark.workload import EPOCH, Session
from icdctl.engine.device import backend_settings
from icdctl.errors import IcdctlError
from icdctl.methods import LOGITS

_EPOCHS = (1, EPOCH, 30)
"""First, inside and after the distillation warm-up."""
_RIGHT_SHARE = 0.7
"""Of the gate's labels that the teacher gets right, as on training images."""
_TOLERANCES = {"float32": {"loss": 1e-4, "gradient": 3e-2}, "float64": {"loss": 1e-6, "gradient": 1e-6}}
"""Of relative differences."""
_DOUBLE_IMAGES = 16
_GRADIENT = "gradient norm"


def largest_differences(
    label: str,
    make_session: Callable[[torch.dtype], Session],
    ask: Ask,
    folder: Path,
    *,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, float]:
    """The same steps by both sides: the largest relative difference of a loss term and of the gradient's norm.

    In float32 as it will be timed, and in float64 on fewer images, where nothing but another formula can differ: at
    random weights, batch norms amplify float32 rounding to 1e-2 of the gradient on both sides.

    Args:
        label: of the pair of models.
        make_session: icdctl's side, from the same weights each time, in a type.
        ask: the reference's side.
        folder: where batches are handed over.
        device: of both.
        say: told of what a reader of the speeds should know.

    Returns:
        `float32_loss`, `float32_gradient`, `float64_loss` and `float64_gradient`.

    Raises:
        IcdctlError: a difference is above its tolerance.
    """
    worst: dict[str, float] = {}
    for dtype, tolerance in _TOLERANCES.items():
        double = dtype == "float64"
        with backend_settings(device, "fp32", deterministic=False):
            session = make_session(torch.float64 if double else torch.float32)
            batch = min(_DOUBLE_IMAGES, session.shared.batch_size) if double else session.shared.batch_size
            ours = _our_steps(session, batch, folder / f"{dtype}.safetensors")
        theirs = ask("gate", double=double, batches=f"{dtype}.safetensors")
        clips = theirs["clip_norm"] is not None
        for own, other in zip(ours, theirs["batches"], strict=True):
            for name, (here, there, gap) in _gaps(label, own, other, clips).items():
                kind = "gradient" if _GRADIENT in name else "loss"
                key = f"{dtype}_{kind}"
                worst[key] = max(worst.get(key, 0.0), gap)
                if not gap <= tolerance[kind]:
                    told = f"`{name}` in epoch {own['epoch']}, {dtype}, is {there:.9g} there and {here:.9g} here"
                    raise _disagreement(label, told)
    if not clips:
        say("note: the checkout does not clip gradients; icdctl does")
    return worst


def _our_steps(session: Session, batch: int, path: Path) -> list[dict[str, Any]]:
    """Our side, every step from the same weights; its batches are left for the other at `path`."""
    run = session.run
    state = {key: tensor.clone() for key, tensor in run.student.state_dict().items()}
    dtype = next(run.student.parameters()).dtype
    views, _ = session.start_epoch(EPOCH)
    found: list[dict[str, Any]] = []
    held: dict[str, Tensor] = {}
    for number, epoch in enumerate(_EPOCHS):
        part = views[number * batch : (number + 1) * batch]
        images = session.shared.store.inputs(part).to(dtype)
        answer = session.inline(images)
        is_right = torch.arange(batch, device=session.shared.device) < _RIGHT_SHARE * batch
        labels = torch.where(is_right, answer[LOGITS].argmax(dim=1), session.shared.labels[part.index])
        run.student.load_state_dict(state)
        run.step.optimizer.state.clear()
        run.student.train()
        run.step.start_epoch(epoch)
        run.step(0, images, labels, answer)
        *terms, norm = run.step.log[0].tolist()
        gradients = [parameter.grad for parameter in run.student.parameters() if parameter.grad is not None]
        found.append(
            {
                "epoch": epoch,
                "inputs": float(images.double().abs().sum()),
                "terms": dict(zip(run.step.objective.term_names, terms, strict=True)),
                "gradient": math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients)),
                "before_clipping": norm,
            }
        )
        handed = {
            "pixels": session.shared.store.pixels(part).cpu(),
            "labels": labels.cpu(),
            "epoch": torch.tensor(epoch),
        }
        held |= {f"{number}.{key}": value.contiguous() for key, value in handed.items()}
    save_file(held, path)
    return found


def _gaps(
    label: str, own: Mapping[str, Any], other: Mapping[str, Any], clips: bool
) -> dict[str, tuple[float, float, float]]:
    """By name of a number: ours, theirs, the relative difference."""
    here, there = (
        {
            **side["terms"],
            _GRADIENT: side["before_clipping"],
            f"clipped {_GRADIENT}": side["gradient" if clips else "before_clipping"],
            "sum of the inputs": side["inputs"],
        }
        for side in (own, other)
    )
    if set(here) != set(there):
        raise _disagreement(label, f"its terms are {sorted(other['terms'])}, ours {sorted(own['terms'])}")
    return {name: (here[name], there[name], _relative_difference(here[name], there[name])) for name in here}


def _relative_difference(one: float, other: float) -> float:
    largest = max(abs(one), abs(other))
    return abs(one - other) / largest if largest else 0.0


def _disagreement(label: str, what: str) -> IcdctlError:
    return IcdctlError(
        f"{label}: the checkout and icdctl don't compute the same, so no speed is told: {what}",
        hint="compare with an unchanged checkout, or name the `--method` that it has",
    )
