"""Values of files in Markdown, LaTeX and CSV are text: no tag, no heading, no cell, no formula."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from icdctl.files import markup
from icdctl.registry.artifact import Artifact, Manifest
from icdctl.registry.artifact_card import card
from icdctl.reporting.page import Page, PageTable, Section, render_markdown, render_page
from icdctl.science import verdict_formats
from icdctl.science.verdict_formats import Sheet


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("res32x4", "res32x4"),
        ("cd_sdd_dkd, top-1 < 5 & 3 > 2", "cd_sdd_dkd, top-1 < 5 & 3 > 2"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)>"),
        ("</td><!-- <?php", "&lt;/td>&lt;!-- &lt;?php"),
        ("x\n\n# Heading", "x # Heading"),
        ("# Heading", r"\# Heading"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("-0.5 and 2.", "-0.5 and 2."),
        ("a|b", r"a\|b"),
        ("`code`", r"\`code\`"),
        ("[text](javascript:alert(1))", r"\[text\](javascript:alert(1))"),
        ("a\\", r"a\\"),
        ("\x1b[2J", r"?\[2J"),
        (3.5, "3.5"),
    ],
)
def test_markdown_shows_a_value_as_it_is(value: object, shown: str) -> None:
    assert markup.markdown(value) == shown


def test_a_span_of_code_ends_where_it_should() -> None:
    assert markup.code("kd") == "`kd`"
    assert markup.code("a`b\n`c <2") == "`a'b 'c <2`"
    assert markup.code("a`<b>&") == "<code>a'&lt;b>&amp;</code>".replace("b>", "b&gt;")


def test_text_with_code_keeps_it() -> None:
    assert markup.with_code("see `a<b>` and <b>[x]") == r"see `a<b>` and &lt;b>\[x\]"
    assert markup.with_code("`not closed <b>") == r"\`not closed &lt;b>"
    assert markup.cell("a|b `c|d` e\\|f") == r"a\|b `c\|d` e\|f"


HOSTILE = "x\n\n# Heading <script>alert(2)</script>|`"
MANIFEST = {
    "schema": 1,
    "name": "digits100/res8-ce",
    "version": 1,
    "created": HOSTILE,
    "files": {"student.safetensors": {"sha256": "0" * 64, "bytes": 5}, "<b>|`.txt": {"sha256": "0" * 64, "bytes": 5}},
    "dataset": {"name": f"a; rm -rf ~ {HOSTILE}", "sha256": "0" * 64, "source": HOSTILE, "licence": HOSTILE},
    "model": HOSTILE,
    "method": HOSTILE,
    "variant": HOSTILE,
    "teacher": {"model": HOSTILE, "sha256": "0" * 64, "artifact": HOSTILE, "source": HOSTILE, "licence": HOSTILE},
    "scales": [1],
    "seed": 0,
    "settings": {HOSTILE: HOSTILE},
    "recipe": HOSTILE,
    "epochs": 1,
    "metrics": {"final_top1": 50.0, "best_top1": 50.0, "best_epoch": HOSTILE},
    "onnx": None,
    "git": {"commit": HOSTILE, "dirty": False},
    "versions": {HOSTILE: HOSTILE},
}


def test_a_card_of_the_registry_holds_no_markup_of_the_run() -> None:
    manifest = Manifest.model_validate(MANIFEST)
    text = card(Artifact("digits100/res8-ce", 1, Path("v1"), manifest))
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("# ")] == ["# digits100/res8-ce@v1"]
    assert len([line for line in lines if line.startswith("#")]) == 7
    for line in lines:
        assert "<script" not in line
        assert "<b>" not in line
    rows = [line for line in lines if line.startswith("|") and "Heading" in line]
    assert rows
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}
    # A command that is copied from the card runs nothing else.
    assert "--student MODEL --dataset DATASET --method kd" in text
    assert text.count("```") == 2


def test_a_report_holds_no_markup_of_its_runs() -> None:
    table = PageTable(HOSTILE, ("a", "b"), ((HOSTILE, "1"),), (HOSTILE,))
    page = Page("title", (HOSTILE,), (Section("x", HOSTILE, (HOSTILE,), (table,)),), (HOSTILE,))
    text = render_markdown(page)
    assert "<script" not in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# title"]
    assert "<script>alert" not in render_page(page)


def test_sheets_hold_no_markup_and_no_formulas() -> None:
    sheet = Sheet("title", ("a", "b"), ((HOSTILE, r"[x] \input{/etc/passwd}"),))
    markdown, latex = verdict_formats.to_markdown([sheet]), verdict_formats.to_latex([sheet])
    assert "<script" not in markdown
    assert "\n#" not in markdown.replace("## title", "")
    assert r"{[}x{]} \textbackslash{}input\{/etc/passwd\}" in latex
    assert r"\#" in latex


def test_text_in_a_csv_file_is_no_formula() -> None:
    text = verdict_formats._csv([{"a": "=cmd()", "b": -1.5, "c": "@x", "d": "x=1", "e": 3}], "abcde")
    assert list(csv.reader(io.StringIO(text)))[1] == ["'=cmd()", "-1.500000", "'@x", "x=1", "3"]
