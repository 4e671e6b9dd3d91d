"""The demo: refused on foreign folders, run whole where minutes are allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import CommandLine


def test_a_folder_that_is_no_demo_is_left_alone(icdctl: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear to someone")
    for flags in ((), ("--restart",)):
        code, stdout, err = icdctl("demo", "--out", tmp_path, *flags)
        assert (code, stdout) == (1, "")
        assert "is not empty and holds no earlier demo" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_the_demo_reaches_its_gates_and_writes_under_its_folder_alone(icdctl: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    before = sorted(Path.cwd().rglob("*"))
    code, stdout, _ = icdctl("demo", "--out", out, "--json")
    result = json.loads(stdout)
    assert code == 0
    teacher, plain, distilled = result["members"]
    assert teacher["top1"] >= 95
    assert distilled["top1"] >= 92
    assert distilled["top1"] - plain["top1"] >= 15
    assert all(member["onnx_max_error"] <= member["onnx_tolerance"] for member in result["members"])
    assert sorted(Path.cwd().rglob("*")) == before
    assert (out / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text()
    assert "What these numbers do not say" in report
    assert "- Weights of the teacher: trained with icdctl on `digits100`." in report
    assert icdctl("registry", "verify", "--registry", out / "registry")[0] == 0
    again = json.loads(icdctl("demo", "--out", out, "--json")[1])
    assert [member["top1"] for member in again["members"]] == [member["top1"] for member in result["members"]]
