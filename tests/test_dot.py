"""DOT: the golden numbers, what it reduces to, and whole runs with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_support as golden
import pytest
import torch
from test_device_loop import ByPosition, by_position
from test_engine import SMALL, weights
from test_feature import taught
from torch import Tensor, nn

import icdctl as library
from icdctl.engine.optimizers import DistillationOriented
from icdctl.errors import UsageError

__all__ = ["by_position", "taught"]

HAS_FILE = (golden.FOLDER / "newer.json").is_file()
ARRAYS = golden.read_arrays("newer.npz") if HAS_FILE else {}
CASES = [case for case in golden.read("newer.json")["cases"] if case["section"] == "optimizer"] if HAS_FILE else []
NO_DAMPENING = "icdctl has no dampening"


def driven(optimizer: DistillationOriented, parameters: list[nn.Parameter], pairs: list[tuple[Any, Any]]) -> None:
    """One step with these gradients, each the gradient of a linear function."""
    ce = sum(
        (parameter * first).sum() for parameter, (first, _) in zip(parameters, pairs, strict=True) if first is not None
    )
    kd = sum(
        (parameter * other).sum() for parameter, (_, other) in zip(parameters, pairs, strict=True) if other is not None
    )
    assert isinstance(ce, Tensor)
    assert isinstance(kd, Tensor)
    optimizer.backward(ce, kd)
    optimizer.step()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_ten_steps_are_those_of_the_reference(case: dict[str, Any]) -> None:
    given = case["hparams"]
    if given["dampening"]:
        golden.record("optimizer", skipped_rule=NO_DAMPENING)
        return
    momentum, delta = (given["momentum"] + given["momentum_kd"]) / 2, (given["momentum_kd"] - given["momentum"]) / 2
    names = [name.removeprefix("param_") for name in case["inputs"] if name.startswith("param_")]

    def array(name: str) -> Tensor | None:
        key = case["inputs"].get(name)
        return None if key is None else torch.from_numpy(ARRAYS[key]).double()

    parameters = [nn.Parameter(torch.from_numpy(ARRAYS[case["inputs"][f"param_{name}"]]).double()) for name in names]
    gradients = [(array(f"grad_ce_{name}"), array(f"grad_kd_{name}")) for name in names]
    optimizer = DistillationOriented(
        parameters, lr=0.1, momentum=momentum, delta=delta, weight_decay=given["weight_decay"]
    )
    rates = given["lr"] if isinstance(given["lr"], list) else [given["lr"]] * 10
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        pairs = [(None if ce is None else ce[step], None if kd is None else kd[step]) for ce, kd in gradients]
        if step == 0:  # the reference leaves out the weight decay of what the teacher's terms alone reach
            pairs = [
                (None, kd - given["weight_decay"] * parameter.detach()) if ce is None and kd is not None else (ce, kd)
                for (ce, kd), parameter in zip(pairs, parameters, strict=True)
            ]
        driven(optimizer, parameters, pairs)
        for name, parameter in zip(names, parameters, strict=True):
            expected = torch.from_numpy(ARRAYS[case["expected"]["float64"][name]["npz"]][step])
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)
    for name, parameter in zip(names, parameters, strict=True):
        for buffer, stored in case["final_state"][name].items():
            expected = torch.from_numpy(ARRAYS[stored["npz"]])
            torch.testing.assert_close(optimizer.state[parameter][buffer], expected, rtol=1e-9, atol=1e-12)
    golden.record("optimizer", checked=1)


def test_with_equal_momenta_it_is_sgd_and_a_step_that_is_left_out_changes_nothing() -> None:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(3, 2, dtype=torch.float64)), nn.Parameter(torch.randn(4, dtype=torch.float64))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    dot = DistillationOriented(mine, lr=0.1, momentum=0.9, delta=0.0, weight_decay=0.01)
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        pairs = [(torch.randn_like(parameter), torch.randn_like(parameter)) for parameter in mine]
        driven(dot, mine, pairs)
        for parameter, (first, second) in zip(theirs, pairs, strict=True):
            parameter.grad = first + second
        sgd.step()
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    before = [parameter.detach().clone() for parameter in mine]
    dot.found_inf = torch.ones(())
    driven(dot, mine, [(torch.full_like(parameter, torch.nan), torch.randn_like(parameter)) for parameter in mine])
    assert all(torch.equal(parameter.detach(), old) for parameter, old in zip(mine, before, strict=True))
    assert all(torch.isfinite(dot.state[parameter]["momentum_buffer"]).all() for parameter in mine)


@pytest.mark.parametrize("method", ["kd", "fitnet"])
def test_a_stopped_run_resumes_to_the_same_bytes_and_so_does_the_form_of_a_graph(
    taught: Path, tmp_path: Path, method: str, by_position: ByPosition
) -> None:
    given: dict[str, Any] = {**SMALL, "method": method, "teacher": str(taught), "student": "res8", "optimizer": "dot"}
    given |= {"epochs": 2, "momentum": 0.8, "dot_delta": 0.1}
    library.distill(**given, out=str(tmp_path / "whole"))
    library.distill(**given, out=str(tmp_path / "cut"), time_limit="0.001s")
    library.distill(**given, out=str(tmp_path / "cut"), resume=True)
    library.distill(**{**given, "dot_delta": 0}, out=str(tmp_path / "other"))
    by_position()
    library.distill(**given, out=str(tmp_path / "by-position"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole") != weights(tmp_path / "other")
    assert weights(tmp_path / "by-position") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"momentum": 0.95}, r"momentum 0\.95 less and plus dot_delta 0\.075"),
        ({"method": "ce", "teacher": None}, "`ce` has no distillation"),
    ],
)
def test_what_it_can_not_do_is_refused(taught: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {**SMALL, "method": "kd", "teacher": str(taught), "student": "res8", "optimizer": "dot"}
    with pytest.raises(UsageError, match=message):
        library.distill(**{**given, **changed}, out=str(tmp_path / "run"))
