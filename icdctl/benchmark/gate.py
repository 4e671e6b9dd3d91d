"""The gate before a comparison of speed: a check that the reference and icdctl compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from icdctl.benchmark.child import Ask
from icdctl.benchmark.workload import EPOCH, Session
from icdctl.engine.device import backend_settings
from icdctl.errors import IcdctlError
from icdctl.files import JsonObject
from icdctl.methods import LOGITS

_EPOCHS = (1, EPOCH, 30)
"""Epochs to compare: the first one, one inside and one after the distillation warm-up."""
_RIGHT_SHARE = 0.7
"""Share of the labels that the teacher gets right, as on training images."""
_TOLERANCES = {"float32": {"loss": 1e-4, "gradient": 3e-2}, "float64": {"loss": 1e-6, "gradient": 1e-6}}
"""Largest relative differences that are accepted."""
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
    """Take the same steps on both sides: the largest relative difference of a loss term and of the gradient's norm.

    The steps are in float32, as they will be timed, and in float64 on fewer images, where only another formula can make
    a difference: with random weights, batch norms amplify float32 rounding to 1e-2 of the gradient on both sides.

    Args:
        label: label of the pair of models, for messages.
        make_session: builds icdctl's side in a dtype, with the same weights each time.
        ask: sends a request to the reference's side.
        folder: folder for the files that both sides exchange.
        device: device of both sides.
        say: called with what readers of the speeds should know.

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
                    what = f"`{name}` in epoch {own['epoch']}, {dtype}, is {there:.9g} there and {here:.9g} here"
                    raise _disagreement(label, what)
    if not clips:
        say("note: the checkout does not clip gradients; icdctl does")
    return worst


def _our_steps(session: Session, batch: int, path: Path) -> list[JsonObject]:
    """The numbers of icdctl's steps, each from the same weights; `path` gets the batches, for the reference."""
    run = session.run
    state = {key: tensor.clone() for key, tensor in run.student.state_dict().items()}
    dtype = next(run.student.parameters()).dtype
    views, _ = session.start_epoch(EPOCH)
    found: list[JsonObject] = []
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
        run.step(0, images, labels, answer, part.index)
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


def _gaps(label: str, own: JsonObject, other: JsonObject, clips: bool) -> dict[str, tuple[float, float, float]]:
    """Name of a number -> our value, the reference's value, the relative difference."""
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
        f"{label}: the checkout and icdctl don't compute the same, so no speed is reported: {what}",
        hint="compare with an unchanged checkout, or name a `--method` that it has",
    )
