"""`icdctl list methods`: the facts of each method, and where published code and papers differ."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from conftest import CommandLine

from icdctl import methods
from icdctl.methods import DIFFERENCES, METHODS, PUBLISHED_AT

TESTS = Path(__file__).parent


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda each: f"{each.of}: {each.where}")
def test_every_difference_names_a_test_that_exists_and_a_method(difference: methods.Difference) -> None:
    file, _, name = difference.test.partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert difference.of in {*METHODS, *methods.MODIFIERS, "sdd", "cd"}


def test_a_method_has_the_differences_of_all_that_it_is_made_of() -> None:
    def of(name: str) -> set[str]:
        return {each.of for each in methods.differences_of(name)}

    assert of("kd") == of("ce") == set()
    assert of("cd_sdd_dkd") == {"dkd", "sdd", "cd"}
    assert of("sdd_rld+ls+skd") == {"rld", "sdd", "ls", "skd"}


def test_every_method_has_a_paper_and_the_list_shows_what_it_reads_and_trains(icdctl: CommandLine) -> None:
    assert {row.source for row in METHODS.values() if row.needs_teacher} <= PUBLISHED_AT.keys()
    rows = {row["name"]: row for row in json.loads(icdctl("list", "methods", "--json")[1])["methods"]}
    assert (rows["dist"]["paper"], rows["dist"]["year"]) == ("NeurIPS", 2022)
    assert rows["cat"]["reads"] == "class_maps, logits"
    assert rows["fitnet"]["parameters"] == "yes"
    assert not any(rows[name]["parameters"] for name in ("ce", "kd", "cd_sdd_dkd", "dist", "cat"))


def test_the_audit_is_text_and_a_json_object(icdctl: CommandLine) -> None:
    code, out, _ = icdctl("list", "methods", "--audit")
    assert code == 0
    assert out.count("variant=published follows the") == len(DIFFERENCES)
    assert "LDRLD.py:57 @b4dcfc9" in out
    found = json.loads(icdctl("list", "methods", "--audit", "--json")[1])["methods"]
    assert found.keys() == METHODS.keys()
    assert found["ldrld"][0]["corrected"] == "paper"
    code, _, err = icdctl("list", "models", "--audit")
    assert (code, "`--audit` is about methods" in err) == (2, True)
