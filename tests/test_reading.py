"""The readers of files from outside: what they take, what they refuse, and that no other module has its own."""

from __future__ import annotations

import ast
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from pydantic import ValidationError

import icdctl
from icdctl import files, run_files
from icdctl.errors import ArtifactError
from icdctl.files import safetensors_files, yaml_reading
from icdctl.registry.artifact import Manifest

PACKAGE = Path(icdctl.__file__).parent


# --- files -----------------------------------------------------------------------------------------------------------


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def _device(folder: Path) -> Path:
    (folder / "link").symlink_to("/dev/zero")
    return folder / "link"


def _folder(folder: Path) -> Path:
    return folder


def _null_byte(folder: Path) -> Path:
    return folder / "a\0b"


NEVER_ENDING = {
    "pipe": (_fifo, "it is a device or a pipe, not a file"),
    "device": (_device, "it is a device or a pipe, not a file"),
    "folder": (_folder, "it is a folder"),
    "null-byte": (_null_byte, "its path holds a zero byte"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "bytes": files.read_regular,
    "text": files.read_text,
    "table": files.read_table,
    "yaml": yaml_reading.read_yaml,
    "sha256": files.sha256_file,
    "md5": files.md5_file,
    "check": files.check_regular,
    "copy": lambda path: files.copy_regular(path, path.parent / "copy"),
    "history": lambda path: run_files.read_history(path.parent),
}


@pytest.mark.parametrize("kind", NEVER_ENDING)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, reader: str, kind: str) -> None:
    make, reason = NEVER_ENDING[kind]
    path = make(tmp_path)
    if reader == "history":
        if kind == "null-byte":
            path = tmp_path / "a\0b" / run_files.HISTORY_FILE
        elif kind == "folder":
            (tmp_path / run_files.HISTORY_FILE).mkdir()
            path = tmp_path / run_files.HISTORY_FILE
        else:
            path = path.rename(tmp_path / run_files.HISTORY_FILE)
    with pytest.raises(OSError, match=re.escape(reason)):
        READERS[reader](path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_the_message_for_json_says_what_it_is_instead(tmp_path: Path, kind: str) -> None:
    make, reason = NEVER_ENDING[kind]
    path = make(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        files.read_json(path, what="manifest", hint="restore it")
    assert (caught.value.message, caught.value.hint) == (f"manifest can't be read: `{path}`: {reason}", "restore it")


def test_a_file_is_read_up_to_its_limit_and_not_beyond(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert files.read_regular(path, most_bytes=5) == b"12345"
    with pytest.raises(OSError, match="it is larger than 0 KiB"):
        files.read_regular(path, most_bytes=4)
    path.write_bytes(b"")
    assert files.read_regular(path, most_bytes=4) == b""
    # Files of /proc state no length, and have content all the same.
    assert files.read_regular(Path("/proc/self/status")).startswith(b"Name:")


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}', {"a": [1, 2.5, None, True, "é"]}),
        (str(2**127), 2**127),
        ("[" * 99 + "]" * 99, None),
        (r'"\ud83d\ude00"', "😀"),
        ("1e-400", 0.0),
    ],
)
def test_sound_json_is_read(text: str | bytes, value: object) -> None:
    found = files.parse_json(text)
    assert value is None or found == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 101 + "]" * 101, "it is nested too deep"),
        ("[" * 100_000, "it is nested too deep"),
        ('{"a":' * 100_000, "it is nested too deep"),
        ("9" * 5000, "it holds a whole number of 5,000 digits"),
        ("-" + "9" * 41, "it holds a whole number of 42 digits"),
        ("0." + "1" * 5000, "it holds a number of 5,002 characters"),
        ("1e999", "it holds 1e999, a number that is not finite"),
        ("[-1e999]", "it holds -1e999, a number that is not finite"),
        ("NaN", "it holds NaN, a number that is not finite"),
        ("-Infinity", "it holds -Infinity, a number that is not finite"),
        (r'{"a": ["\ud800"]}', r"it holds half of a character (\ud800), in `a.0`"),
        (r'{"\udfff": 1}', r"it holds half of a character (\udfff)"),
        (r'{"out": "a\u0000b"}', "it holds a zero byte, in `out`"),
        ('{"a": 1, "b": 2, "a": 3}', "it names the key `a` twice"),
        (b"\xff", "it is not UTF-8, at byte 0"),
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("1 2", "Extra data"),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, bytes) else "bytes",
)
def test_json_that_is_not_sound_is_refused(text: str | bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        files.parse_json(text)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_is_read_by_the_names_in_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('a,b\r\n1,"x, y"\n\n2,\n')
    assert files.read_table(path) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]
    path.write_text("")
    assert files.read_table(path) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a\n" + b"9" * 200_000, "it is not CSV: field larger than field limit (131072)"),
        (b"a,b\n1\n", "row 1 has 1 fields, expected 2"),
        (b"a,b\n1,2\n1,2,3\n", "row 2 has 3 fields, expected 2"),
        (b"a,a\n1,2\n", "its first line names a column twice"),
        (b'a\n"1', "it is not CSV: unexpected end of data"),
        (b"a\n\xff\n", "it is not UTF-8, at byte 2"),
    ],
)
def test_a_table_that_is_broken_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        files.read_table(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("epoch,test_top1\n1,nan\n", "history.csv holds a value that is not finite, in column `test_top1`"),
        ("epoch,ce,test_top1\n1,inf,5\n", "history.csv holds a value that is not finite, in column `ce`"),
        ("epoch,test_top1\n1,\n", "history.csv has `` in column `test_top1`, expected a number"),
        ("epoch,test_top1\n1,1e308\n", "history.csv, in column `test_top1`: 1e+308 is not a percentage from 0 to 100"),
        ("epoch,val_top1\n1,-1\n", "history.csv, in column `val_top1`: -1.0 is not a percentage from 0 to 100"),
        ("epoch,test_top1\n1,5\n3,5\n", "history.csv has epochs 1, 3, expected 1 to 2"),
        ("test_top1\n5\n", "history.csv has epochs without numbers, expected 1 to 1"),
        ("epoch\n1\n", "history.csv has no accuracy"),
    ],
)
def test_a_history_holds_finite_numbers_and_percentages(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "history.csv").write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        run_files.read_history(tmp_path)
    (tmp_path / "history.csv").write_text("epoch,ce,test_top1\n1,250.5,0\n2,1e-9,100\n")
    assert [row["test_top1"] for row in run_files.read_history(tmp_path)] == [0.0, 100.0]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, 100.1, float("nan"), float("inf"), True, "5", None, 10**400])
def test_a_percentage_is_a_number_from_0_to_100(value: object) -> None:
    assert files.percentage(0) == 0.0
    assert files.percentage(99.5) == 99.5
    with pytest.raises(ValueError, match="not a percentage"):
        files.percentage(value)


@pytest.mark.parametrize("value", [0, 11, 5.0, True, None, "9" * 5000, "-1", "٣", "1_0"])
def test_a_whole_number_lies_within_its_bounds(value: object) -> None:
    assert files.whole_number(10, low=1, high=10) == 10
    assert files.whole_number(" 7", low=1, high=10) == 7
    with pytest.raises(ValueError, match="not a whole number from 1 to 10"):
        files.whole_number(value, low=1, high=10)


# --- YAML ------------------------------------------------------------------------------------------------------------


def test_sound_yaml_is_read() -> None:
    text = "a: &x {b: [1, 2.5, yes, ~]}\nc: *x\nd: 2020-02-01\n"
    value = yaml_reading.parse_yaml(text)
    assert isinstance(value, dict)
    assert value["a"] == value["c"] == {"b": [1, 2.5, True, None]}
    assert yaml_reading.parse_yaml("") is None


CHAIN = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: " + "[" * 51 + "]" * 51, "it is nested too deep, in line 1"),
        ("a: " + "[" * 100_000 + "]" * 100_000, "it is nested too deep, in line 1"),
        ("\n".join(" " * n + "- " for n in range(60)), "it is nested too deep, in line"),
        ("{a: " * 100_000, "it is nested too deep, in line 1"),
        (CHAIN, "it is nested too deep, in line"),
        (LAUGHS, "there are too many values, in line"),
        ("a: &a [*a]", "a value refers to itself, in line 1"),
        ("a: 1\na: 2", "the key `a` appears twice, in line 2"),
        ("a: !!timestamp x", "a value is not what its tag says"),
        ("a: !!bool maybe", "a value is not what its tag says"),
        ("a: !!int ''", "a value is not what its tag says"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("? [a]\n: 1", "found unhashable key, in line 1"),
        ("a: .inf", "it holds a number that is not finite, in `a`"),
        ("a: [0, .nan]", "it holds a number that is not finite, in `a.1`"),
        ("a: " + "9" * 50, "it holds a whole number of more than 40 digits, in `a`"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        (r'a: "\0"', "it holds a zero byte, in `a`"),
        (r'a: "\ud800"', r"it holds half of a character (\ud800), in `a`"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: [", "expected the node content"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_yaml_that_is_not_sound_is_refused_in_time(text: str, problem: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        yaml_reading.parse_yaml(text)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5


def test_aliases_are_refused_where_they_are_not_wanted() -> None:
    with pytest.raises(ValueError, match="it has YAML aliases, in line 2"):
        yaml_reading.parse_yaml("a: &a [x]\nb: *a\n", aliases=False)


def test_a_yaml_file_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# " + "x" * yaml_reading.LARGEST_YAML_BYTES)
    with pytest.raises(OSError, match="it is larger than 1 MiB"):
        yaml_reading.read_yaml(path)


# --- no other readers ------------------------------------------------------------------------------------------------

OWN_READERS = {
    "files/reading.py": "the readers",
    "benchmark/reference.py": "runs in the reference's process without icdctl, and reads the requests of its parent",
    "benchmark/child.py": "the log that its own child wrote, and the pipe to it",
    "data/archive.py": "tar archives, opened with `open_regular` and limited while they are unpacked",
    "data/decode.py": "images, decoded from the bytes that `read_regular` gave",
    "grid/params_file.py": "the places of values in a text that `parse_yaml` took",
    "science/package_file.py": "files of the package itself",
    "teachers/published_teachers.py": "a file of the package itself",
    "engine/environment.py": "/proc/cpuinfo",
    "files/lock_holder.py": "/proc",
    "engine/teacher_cache.py": "/proc/meminfo",
    "models/weights.py": "weights, from the bytes that `read_foreign` gave",
    "models/pickles.py": "pickles, from the bytes that `read_foreign` gave",
}
"""Files with a call of `PARSING`, and why."""
PARSING = {
    *("json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.parse", "yaml.compose", "yaml.SafeLoader"),
    *("csv.reader", "csv.DictReader", "tomllib.load", "tomllib.loads", "pickle.load", "pickle.loads", "torch.load"),
    *("tarfile.open", "zipfile.ZipFile", "Image.open", ".read_text", ".read_bytes", "builtins.open"),
    *("safetensors.safe_open", "safetensors.torch.load_file"),
}


_NAMED = {"open": "builtins.open", "safe_open": "safetensors.safe_open", "load_file": "safetensors.torch.load_file"}


def _calls(path: Path) -> set[str]:
    """What a file calls, by `module.name`, or by `.name` for methods that a path may have."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            found.add(f"{owner.id}.{node.func.attr}" if isinstance(owner, ast.Name) else "")
            if not (isinstance(owner, ast.Name) and owner.id == "files"):
                found.add(f".{node.func.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(_NAMED.get(node.func.id, ""))
    return found


def test_no_other_module_reads_files_in_its_own_way() -> None:
    own = {
        str(path.relative_to(PACKAGE)): sorted(calls)
        for path in PACKAGE.rglob("*.py")
        if (calls := _calls(path) & PARSING)
    }
    assert own.keys() == OWN_READERS.keys(), own


def test_a_safetensors_file_that_is_not_sound_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    sound = safetensors.numpy.save({"a": np.zeros(3, dtype=np.float32)}, metadata={"b": "c"})
    path.write_bytes(sound)
    tensors, texts = files.read_tensors(path, most_bytes=1000)
    assert (tensors["a"].tolist(), texts) == ([0.0, 0.0, 0.0], {"b": "c"})
    monkeypatch.setattr(safetensors_files, "read_regular", lambda *given, **more: pytest.fail("it is read"))
    for content in (bytes(1000), sound[:-1], sound + b"x", sound[:20], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"header"):
            files.read_tensors(path, most_bytes=1000)


# --- values that are percentages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["final_top1", "best_val_top1", "final_top5"])
@pytest.mark.parametrize("value", [1e308, -1, "high", True])
def test_accuracies_of_a_manifest_are_percentages(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=f"`{key}`: .* is not a percentage from 0 to 100"):
        Manifest.model_validate({**MANIFEST, "metrics": {"final_top1": 50.0, key: value}})
    assert Manifest.model_validate({**MANIFEST, "metrics": {key: 50.0, "best_top1": None}}).metrics[key] == 50.0


MANIFEST = {
    "schema": 1,
    "name": "digits100/res8-ce",
    "version": 1,
    "created": "2026-01-01T00:00:00.000Z",
    "files": {"student.safetensors": {"sha256": "0" * 64, "bytes": 5}},
    "dataset": {"name": "digits100", "sha256": None, "source": None, "licence": None},
    "model": "res8",
    "method": "ce",
    "variant": None,
    "teacher": None,
    "scales": [],
    "seed": 0,
    "settings": {},
    "recipe": None,
    "epochs": 1,
    "onnx": None,
    "git": None,
    "versions": {},
}
