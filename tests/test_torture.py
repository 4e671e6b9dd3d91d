"""A small part of the attack of tests/torture with every test run, and the tests of its means."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import save
from torture import figures, mutations

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/reliability.md"
_ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: the attack forks, which a process with threads must not do."""
    environment = {**os.environ, **_ENVIRONMENT}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


# --- the attack ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What ten killed jobs, four run several times at once, 150 mutated files and all adverse places showed."""
    folder = tmp_path_factory.mktemp("torture")
    given = ("--kills", "10", "--crowds", "4", "--mutations", "150", "--seed", "0", "--workers", "1")
    done = python("-m", "torture", *given, "--folder", str(folder), "--json", str(folder / "rows.json"))
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))["rows"]
    return found


@pytest.mark.parametrize(("part", "least"), [("kill", 10), ("together", 4), ("mutation", 150), ("place", 23)])
def test_an_attack_finds_no_fault(rows: list[dict[str, Any]], part: str, least: int) -> None:
    of_part = [row for row in rows if row["part"] == part]
    assert (sum(row["kills"] for row in of_part) if part == "kill" else len(of_part)) >= least
    assert [f"{row['what']}: {fault}" for row in of_part for fault in row["faults"]] == []


def test_an_attack_reaches_what_it_aims_at(rows: list[dict[str, Any]]) -> None:
    codes = {row["code"] for row in rows if row["part"] == "mutation"}
    assert codes == {0, 1, 2}, "some mutations do no harm, some are refused, some are wrong usage"


# --- its means -------------------------------------------------------------------------------------------------------

_MISBEHAVIOUR = {
    "pass": [],
    "open('../../elsewhere', 'w')": ["wrote outside its folder: open .*elsewhere"],
    "os.rename('here', '../../gone')": ["wrote outside its folder: os.rename .*gone"],
    "time.sleep(60)": ["no end after"],
    "exec('while True: pass')": ["no end after"],
    "raise ValueError('no')": ["exit code 70", "traceback: .*no"],
    "sys.exit(1)": ["no `error:` line"],
    "sys.exit(3)": ["exit code 3"],
    "keep.append(bytearray(900 << 20))": ["took 9[0-9][0-9] MiB, 10 MiB on sound files"],
    "os.kill(os.getpid(), 9)": ["exit code -9"],
}


@pytest.fixture(scope="module")
def noticed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Misbehaviour -> faults that are noticed."""
    folder = tmp_path_factory.mktemp("misbehaviour")
    code = f"""
import json, os, sys, time
from pathlib import Path
from torture.children import Limits, Place, Running

keep = []
found = {{}}
for number, text in enumerate({list(_MISBEHAVIOUR)!r}):
    place = Place(Path({str(folder)!r}) / str(number)).make({{}})
    (place.project / "here").touch()
    limits = Limits(cpu_seconds=1, wall_seconds=3.0)
    def misbehave():
        try:
            exec(text, globals())
        except SystemExit as leave:
            sys.stdout.flush()
            os._exit(leave.code)
    ended = Running([], place, limits=limits, instead=misbehave).finish()
    found[text] = ended.faults(honest_bytes=10 << 20)
print(json.dumps(found))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("text", _MISBEHAVIOUR)
def test_what_a_command_must_not_do_is_noticed(noticed: dict[str, list[str]], text: str) -> None:
    found, expected = noticed[text], _MISBEHAVIOUR[text]
    assert len(found) == len(expected), found
    for fault, pattern in zip(found, expected, strict=True):
        assert re.match(pattern, fault)


def _samples() -> dict[str, bytes]:
    import io

    import onnx
    import torch

    value = {"a": [1, 2.5, "x"], "b": {"c": None, "d": True}}
    checkpoint = io.BytesIO()
    torch.save({"model": {"weight": torch.zeros(3)}}, checkpoint)
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    shapes = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", shapes[:1], shapes[1:], [tensor])
    return {
        "json": json.dumps(value).encode(),
        "yaml": yaml.safe_dump(value).encode(),
        "csv": b"epoch,loss\n1,0.5\n2,0.25\n",
        "safetensors": save({}, metadata={"icdctl": json.dumps(value)}),
        "zip": checkpoint.getvalue(),
        "onnx": onnx.helper.make_model(graph).SerializeToString(),
    }


@pytest.mark.parametrize("name", mutations.STRUCTURES)
def test_mutations_are_drawn_by_their_seed(name: str) -> None:
    content = _samples()[name]
    way = mutations.STRUCTURES[name]
    made = [way(content, random.Random(seed)) for seed in range(40)]
    if name != "zip":  # members of a zip file carry the time
        assert made == [way(content, random.Random(seed)) for seed in range(40)]
    assert len(set(made)) > 15


def test_bytes_are_mutated_in_every_way() -> None:
    content = bytes(range(256)) * 8
    made = [mutations.mutate_bytes(content, random.Random(seed)) for seed in range(300)]
    assert made == [mutations.mutate_bytes(content, random.Random(seed)) for seed in range(300)]
    sizes = [len(each) for each in made]
    assert min(sizes) == 0
    assert max(sizes) > len(content)
    assert any(len(each) == len(content) and each != content for each in made)


@pytest.mark.parametrize("thing", mutations.THINGS)
def test_other_things_are_put_in_the_place_of_a_file(thing: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    mutations.put_in_place(path, thing)
    assert not path.is_file() or path.stat().st_size > 2 * 1024**3


# --- the page --------------------------------------------------------------------------------------------------------


def _promises() -> list[tuple[str, str]]:
    lines = PAGE.read_text(encoding="utf-8").partition(figures.BEGIN)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [(promise, tests) for promise, tests in rows if promise != "promise"]


@pytest.mark.parametrize(("promise", "tests"), _promises())
def test_a_promise_names_tests_that_exist(promise: str, tests: str) -> None:
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", tests)
    assert named, f"no test for: {promise}"
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}.py::{name}"


def test_figures_are_written_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n", encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {"part": "kill", "what": "a", "of": "train", "kills": 2, "faults": []},
        {"part": "mutation", "what": "b", "of": "PNG", "kills": 0, "code": 1, "seconds": 0.25, "faults": ["x"]},
    ]
    figures.write(page, figures.Figures.of(rows, seed=7, seconds=90))
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{figures.BEGIN}\n")
    assert text.endswith(f"{figures.END}\nafter\n")
    for fact in (
        "old",
        "2 kills, 1 times compared",
        "| train | 2 |",
        "1 with 1",
        "| cases with a fault | 1 |",
        "seed 7",
    ):
        assert (fact in text) == (fact != "old")


def test_the_page_has_a_place_for_figures_and_is_linked() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(figures.BEGIN) == text.count(figures.END) == 1
    assert "docs/reliability.md" in (ROOT / "README.md").read_text(encoding="utf-8")
