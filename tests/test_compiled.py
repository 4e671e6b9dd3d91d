"""The ladder of a step: compiled, as it is, without a graph; on a CPU, by backends that need no compiler of C++."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device_loop import Listener
from test_engine import SMALL, history, weights
from test_together import planned, together
from torch._dynamo.testing import CompileCounterWithBackend

import icdctl as library
from icdctl.api import planning
from icdctl.engine import compiled, device_loop, shared_data


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    library.train(model="res8", **SMALL, out=str(out))
    return out


def refuse(*arguments: Any) -> Any:
    raise RuntimeError("no compiler here\nmore of it")


def test_students_are_compiled_each_by_itself(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled, "_BACKEND", counter)
    methods = ("kd", "cd_sdd_dkd", "sdd_nkd")
    names = [tmp_path / f"{method}-{is_compiled}" for is_compiled in (False, True) for method in methods]
    for out in names[:3]:
        library.distill(**SMALL, method=out.name.split("-")[0], teacher=str(taught), student="res8", out=str(out))
    configs = [planned(taught, out, method=out.name.split("-")[0], compile=True) for out in names[3:]]
    # Two sizes of batch: the compilations of one student are within the limit, those of all of them are not.
    with torch._dynamo.config.patch(cache_size_limit=2):
        results = together(configs, taught)
    assert counter.frame_count >= 3 * 2
    assert all(result.metrics["compiled"] for result in results)
    for plain, fast in zip(names[:3], names[3:], strict=True):
        assert weights(plain) == weights(fast)
        assert history(plain) == history(fast)


def test_where_compiling_fails_students_learn_as_they_are_and_it_is_said_once(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_BACKEND", refuse)
    library.distill(**SMALL, method="kd", teacher=str(taught), student="res8", out=str(tmp_path / "plain"))
    configs = [planned(taught, tmp_path / name, method="kd", compile=True) for name in ("one", "two")]
    listener = Listener()
    results = together(configs, taught, observer=listener)
    assert [result.metrics["compiled"] for result in results] == [False, False]
    (said,) = listener.said
    assert said == "warning: students run without torch.compile, with another rounding: no compiler here"
    assert weights(tmp_path / "plain") == weights(tmp_path / "one") == weights(tmp_path / "two")


def test_torchs_advice_to_round_products_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    advice = "TensorFloat32 tensor cores for float32 matrix multiplication are not enabled"

    def compile_and_advise(function: Callable[[int], int], **options: Any) -> Callable[[int], int]:
        def fast(number: int) -> int:
            warnings.warn(advice, stacklevel=1)
            return function(number)

        return fast

    class Student:
        def outcome(self, number: int) -> int:
            return number + 1

    monkeypatch.setattr(torch, "compile", compile_and_advise)
    assert compiled.Compiler(pytest.fail).compiled(Student().outcome)(1) == 2
    with pytest.warns(UserWarning, match="TensorFloat32"):  # whoever asks for it elsewhere still hears it
        warnings.warn(advice, stacklevel=1)


@pytest.mark.parametrize("failures", [1, 2])
def test_the_ladder_is_gone_down_rung_by_rung(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    given = {**SMALL, "method": "cd_sdd_dkd", "teacher": str(taught), "student": "res8"}
    library.distill(**given, out=str(tmp_path / "plain"))
    tried: list[int] = []

    def record(step: Any, stream: Any, pool: Any) -> Any:
        tried.append(1)
        if len(tried) <= failures:
            raise RuntimeError("not while capturing")
        return step

    monkeypatch.setattr(compiled, "_BACKEND", "aot_eager")
    for module in (shared_data, device_loop):
        monkeypatch.setattr(module, "is_device_driven", lambda device: True)
    monkeypatch.setattr(device_loop, "record", record)
    listener = Listener()
    result = library.distill(**given, compile=True, out=str(tmp_path / "ladder"), observer=listener)
    assert [said.split(",")[0] for said in listener.said] == [
        "warning: students run without torch.compile",
        "warning: steps run without a CUDA graph",
    ][:failures]
    assert len(tried) == (3 if failures == 1 else 2)  # the graph of the last, smaller batch
    assert result.metrics["compiled"] is False
    assert weights(tmp_path / "plain") == weights(tmp_path / "ladder")


def test_a_module_from_outside_is_never_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_BACKEND", refuse)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 100))
    listener = Listener()
    result = library.train(model=module, **SMALL, compile=True, out=str(tmp_path / "run"), observer=listener)
    assert (result.finished, result.metrics["compiled"], listener.said) == (True, False, [])


def test_compiling_is_another_run_and_its_absence_is_not() -> None:
    given = {**SMALL, "student": "res8", "out": "run"}
    plain, fast = (planning.plan("train", {**given, **change}) for change in ({}, {"compile": True}))
    assert (plain.compile, fast.compile) == (False, True)
    assert "compile" not in plain.identity
    assert plain.identity != fast.identity


def test_torchs_compiler_is_not_imported_where_nothing_is_compiled(tmp_path: Path) -> None:
    """It takes a second, at the start of every run."""
    code = f"""
import sys, icdctl
settings = {{**{SMALL!r}, "epochs": 1, "out": {str(tmp_path / "run")!r}}}
icdctl.train(model="res8", **settings)
icdctl.train(model="res8", **{{**settings, "epochs": 2, "out": {str(tmp_path / "more")!r}}}, time_limit="0.001s")
icdctl.train(model="res8", **{{**settings, "epochs": 2, "out": {str(tmp_path / "more")!r}}}, resume=True)
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
