"""Arguments of thousands of digits, and texts with a zero byte, are known errors: never a traceback, never a flood."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from pydantic import ValidationError

import icdctl as library
from icdctl import cleanup, files
from icdctl.config import expand, run_config, sources
from icdctl.engine.device import resolve_device
from icdctl.errors import ArtifactError, IcdctlError, UsageError
from icdctl.methods.patch import parse_scales
from icdctl.registry import find

N = "9" * 5000
READERS: dict[str, Callable[[], object]] = {
    "device": lambda: resolve_device(f"cuda:{N}"),
    "device-of-20-digits": lambda: resolve_device("cuda:99999999999999999999"),
    "device-of-another-script": lambda: resolve_device("cuda:\u0663"),
    "scales": lambda: parse_scales(f"1,{N}"),
    "seeds": lambda: expand.parse_seeds(N),
    "range-of-seeds": lambda: expand.parse_seeds(f"0-{N}"),
    "duration": lambda: run_config.parse_duration(f"{N}h"),
    "number-as-duration": lambda: run_config.parse_duration(N),
    "age": lambda: cleanup.chosen([], f"{N}d", among=()),
    "version": lambda: find(Path("registry"), f"res8-ce@v{N}"),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_number_of_thousands_of_digits_is_refused_in_a_few_words(kind: str) -> None:
    with pytest.raises(UsageError) as caught:
        READERS[kind]()
    assert len(caught.value.message) < 400


def test_numbers_of_the_usual_length_are_read() -> None:
    assert parse_scales("1,2,4") == (1, 2, 4)
    assert expand.parse_seeds("0-2,5") == [0, 1, 2, 5]
    assert run_config.parse_duration("1h30m") == 5400
    assert run_config.parse_duration(0.30000000000000004) == 0.30000000000000004
    assert run_config.check_device("cuda:15") == "cuda:15"


FIELDS: dict[str, object] = {"command": "train", "method": "ce", "dataset": "digits100", "student": "res8", "out": "x"}


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("seed", 10**5000, "`seed` is `a number of thousands of digits`"),
        ("out", "a\0b", "it holds a zero byte"),
        ("data_dir", "a\0b", "it holds a zero byte"),
    ],
    ids=["seed", "out", "data-dir"],
)
def test_a_keyword_that_no_file_can_hold_is_named(field: str, value: object, problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        run_config.RunConfig.model_validate({**FIELDS, field: value})
    assert problem in sources.from_validation(caught.value).message
    keyword: dict[str, Any] = {field: value}
    with pytest.raises(IcdctlError):
        library.train(model="res8", dataset="digits100", **keyword)


def test_a_path_with_a_zero_byte_is_an_error_that_can_be_printed() -> None:
    with pytest.raises(ArtifactError, match=r"`a\\0b` holds a zero byte"):
        files.user_path("a\0b")
    with pytest.raises(ArtifactError, match="holds a zero byte"):
        library.evaluate("a\0b", dataset="digits100")


@pytest.mark.parametrize("text", ["[" * 5000, '{"gamma": 1e999}', '{"a": ' + N + "}", r'{"a": "\ud800"}'])
def test_a_variable_of_settings_has_the_limits_of_json(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ICDCTL_SETTINGS", text)
    with pytest.raises(UsageError) as caught:
        sources.collect({})
    assert caught.value.hint == "change the variable `ICDCTL_SETTINGS`"
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--model", "res8", "--dataset", "digits100", "--dry-run", "--seed", N),
        ("train", "--model", "res8", "--dataset", "digits100", "--dry-run", "--lr", N),
        ("distill", "--student", "res8", "--dataset", "digits100", "--dry-run", "--scales", N),
        ("registry", "show", f"res8@v{N}"),
        ("report", "--images", N),
        ("reproduce", "demo", "--seeds", N),
        ("clean", "--older-than", f"{N}d"),
    ],
    ids=lambda words: f"{words[0]}-{words[-2]}",
)
def test_commands_refuse_long_numbers_as_wrong_usage(icdctl: CommandLine, arguments: tuple[str, ...]) -> None:
    code, _, err = icdctl(*arguments)
    assert code == 2, err[-500:]
    assert "error: " in err
