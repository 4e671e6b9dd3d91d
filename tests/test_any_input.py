"""Readers and parsers, with whatever Hypothesis finds: a value, or the error that they promise."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from icdctl import files, models
from icdctl.config.expand import parse_seeds
from icdctl.config.run_config import RunConfig
from icdctl.errors import ArtifactError, IcdctlError
from icdctl.exporting.reading import read_onnx
from icdctl.files import markup, reading, yaml_reading
from icdctl.methods import METHODS, check_settings, parse_scales, resolve
from icdctl.registry.artifact import Manifest
from icdctl.registry.find import check_name

settings.register_profile("same", derandomize=True, database=None, deadline=None, max_examples=150)
settings.load_profile("same")

TEXT = st.text(max_size=40)
WORDS = st.sampled_from(
    ["", "1,2,4", "0-3", "..", "~", "null", "1e999", "!!python/object", "&a [*a]", "a: {b: c}", "[", "-", "\x00", "é"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | WORDS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)
BYTES = st.binary(max_size=400)


def taken(parse: Callable[[], object]) -> bool:
    """Whether something is taken; where it is refused, that is with a message and a hint."""
    try:
        parse()
    except IcdctlError as error:
        if not (error.message and error.hint):
            raise
        return False
    return True


def is_sound(value: Any) -> bool:
    """Whether a JSON value is one that `parse_json` accepts."""
    match value:
        case float():
            return math.isfinite(value)
        case int():
            return len(str(abs(value))) <= 40
        case str():
            return "\x00" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
        case list():
            return all(map(is_sound, value))
        case dict():
            return all(is_sound(key) and is_sound(inner) for key, inner in value.items())
    return True


@given(VALUES)
def test_sound_json_is_read_as_it_is_and_other_is_refused(value: Any) -> None:
    text = json.dumps(value)
    if is_sound(value):
        assert files.parse_json(text) == value
    else:
        with pytest.raises(ValueError, match=r"."):
            files.parse_json(text)


@given(BYTES | TEXT.map(str.encode))
def test_no_bytes_confuse_the_readers(content: bytes) -> None:
    for read in (files.parse_json, files.texts_in):
        with suppress(ValueError):
            read(content)


@given(st.lists(TEXT | WORDS, max_size=6).map("\n".join) | VALUES.map(json.dumps))
def test_no_text_confuses_the_reader_of_yaml(text: str) -> None:
    with suppress(ValueError):
        reading.check_value(yaml_reading.parse_yaml(text))


@given(st.dictionaries(TEXT.filter(is_sound), TEXT.filter(is_sound), min_size=1, max_size=3), st.data())
def test_texts_of_safetensors_are_read_and_a_shorter_file_is_refused(
    texts: dict[str, str], data: st.DataObject
) -> None:
    content = safetensors.numpy.save({}, metadata=texts)
    assert files.texts_in(content) == texts
    with pytest.raises(ValueError, match="header"):
        files.texts_in(content[: data.draw(st.integers(0, len(content) - 1))])


@given(BYTES, st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"PK\x05\x06", b"\x02\0\0\0\0\0\0\0{}", b"\x08\x08"]))
def test_no_bytes_confuse_the_readers_of_weights_and_graphs(content: bytes, prefix: bytes) -> None:
    path = Path("file")
    path.write_bytes(prefix + content)
    for read in (models.read_weights, read_onnx):
        with pytest.raises(ArtifactError) as caught:
            read(path)
        assert caught.value.hint


@given(TEXT | WORDS)
def test_what_is_typed_is_taken_or_refused_with_a_hint(text: str) -> None:
    for parse in (parse_scales, parse_seeds, resolve, check_name):
        taken(functools.partial(parse, text))


@given(
    st.sampled_from(sorted(METHODS)), st.dictionaries(TEXT | st.sampled_from(["gamma", "variant"]), LEAVES, max_size=2)
)
def test_settings_of_a_method_are_finite_or_refused(method: str, given: dict[str, object]) -> None:
    if taken(lambda: check_settings(method, given)):
        found = check_settings(method, given)
        assert all(isinstance(value, str) or math.isfinite(value) for value in found.values())


@given(st.sampled_from(sorted(RunConfig.model_fields)) | TEXT, VALUES)
def test_any_value_in_a_configuration_or_manifest_is_taken_or_refused(key: str, value: Any) -> None:
    sound = {"dataset": "digits100", "student": "res8", "method": "ce"}
    for kind in (RunConfig, Manifest):
        with suppress(ValidationError):
            taken(functools.partial(kind.model_validate, {**sound, key: value}))


@given(TEXT)
def test_nothing_that_is_printed_leaves_its_cell_or_its_line(text: str) -> None:
    assert "\n" not in markup.one_line(text)
    row = f"| {markup.cell(text)} | end |"
    assert row.count(" | ") - row.count("\\| ") <= 2
    assert "\n" not in row


@given(BYTES)
def test_tables_are_read_or_refused(content: bytes) -> None:
    path = Path("table.csv")
    path.write_bytes(content)
    with suppress(ValueError):
        rows = files.read_table(path)
        assert all(row.keys() == rows[0].keys() for row in rows)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of its own: Hypothesis calls a test many times with the same fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("any"))
        yield
