"""`icdctl report`: what it measures, what it draws, what it says, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from conftest import CommandLine
from grid_support import write_run
from numpy.typing import NDArray
from scipy import stats

from icdctl import api, evaluation, files, run_files
from icdctl.engine.observer import SilentObserver
from icdctl.errors import ArtifactError, UsageError
from icdctl.evaluation import Evaluation
from icdctl.papers.table_runs import grid_cell, name_of
from icdctl.reporting import ReportOptions, build_report, drawing, figures, measure, model_maps, pictures, result_tables
from icdctl.reporting.collect import collect_runs
from icdctl.reporting.drawing import Picture, finish
from icdctl.reporting.group_measurements import GroupMeasurements
from icdctl.reporting.page import Page, PageTable, Section, render_markdown, render_page
from icdctl.reporting.run_groups import RunGroup
from icdctl.science import tables as papers

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TINY: dict[str, Any] = {"dataset": "digits100", "train_images": 100, "test_images": 300, "epochs": 2, "device": "cpu"}
DISTILLED = ("dkd", "sdd_dkd", "cd_sdd_dkd")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and students of it with two seeds: a grid that was trained, with an export among its runs."""
    here = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("ICDCTL_HOME", str(here / "state"))
        api.train(model="res14", out=str(here / "runs/teacher"), **TINY)
        cells: dict[str, Any] = {"plain": {"student": "res8", "method": "ce"}}
        for method in DISTILLED:
            cells[method] = {"student": "res8", "method": method, "teacher": "runs/teacher"}
        cells["gamma"] = {**cells["cd_sdd_dkd"], "settings": {"gamma": 8.0}}
        (here / "params.yaml").write_text(yaml.safe_dump({"train": TINY, "seeds": [0, 1], "cells": cells}))
        (here / "dvc.yaml").write_text("stages: {}\n")
        from icdctl.cli import main

        assert main(["grid", "run"]) == 0
        api.export(here / "runs/cd_sdd_dkd/s0", here / "runs/cd_sdd_dkd/s0/onnx")
    return here


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project as the current folder."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("ICDCTL_HOME", str(project / "state"))
    return project


@pytest.fixture(scope="module")
def page(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on all of it."""
    out = tmp_path_factory.mktemp("page") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("ICDCTL_HOME", str(project / "state"))
        from icdctl.cli import main

        assert main(["report", "--out", str(out)]) == 0
    return out


class Reader(HTMLParser):
    """Elements of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def having(self, key: str) -> Iterator[tuple[str, str]]:
        """(element, value) of that attribute."""
        return ((tag, attributes[key]) for tag, attributes in self.elements if key in attributes)


def test_a_report_has_the_numbers_of_its_runs(icdctl: CommandLine, inside: Path, page: Path, tmp_path: Path) -> None:
    code, out, err = icdctl("report", "--out", tmp_path / "again", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [row["cell"] for row in told["cells"]] == [
        "ce",
        "dkd",
        "sdd_dkd",
        "cd_sdd_dkd gamma=2",
        "cd_sdd_dkd gamma=8",
    ]
    assert told["notes"] == []
    (row,) = [row for row in told["cells"] if row["cell"] == "cd_sdd_dkd gamma=2"]
    assert (row["teacher"], row["student"], row["variant"], row["seeds"]) == ("res14", "res8", "published", [0, 1])
    for seed in (0, 1):
        run = inside / "runs/cd_sdd_dkd" / f"s{seed}"
        metrics = json.loads((run / "metrics.json").read_text())
        own = api.evaluate(run, teacher=inside / "runs/teacher", device="cpu")
        assert row["final_top1"][seed] == metrics["final_top1"] == own.numbers.top1
        assert row["ece"][seed] == pytest.approx(own.numbers.ece)
        assert row["agreement"][seed] == own.agreement
        assert row["fidelity"][seed] == pytest.approx(own.fidelity)
    assert row["latency_ms"] > 0
    assert {Path(name).name for name in told["files"]} >= {"index.html", "report.json", "summary.md"}
    assert all(Path(name).is_file() for name in told["files"])
    # The same inputs give the same bytes, another folder or not.
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (page, tmp_path / "again")
    )
    assert first.keys() == second.keys()
    assert [path for path in first if first[path] != second[path]] == []
    summary = (page / "summary.md").read_text()
    assert "| res14 : res8 | sdd_dkd | 2 |" in summary
    top1 = {row["cell"]: np.array(row["final_top1"]) for row in told["cells"]}
    compared = ("dkd", "ce"), ("sdd_dkd", "dkd"), ("cd_sdd_dkd gamma=2", "sdd_dkd")
    assert compared_in(summary) == expected_comparisons(
        [(one, other, top1[one] - top1[other]) for one, other in compared]
    )


def compared_in(summary: str) -> list[tuple[str, str, str]]:
    """Comparison, difference and finding: the rows of the table of what each part adds."""
    _, _, table = summary.partition("| finding |\n")
    rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()[1:]]
    return [(row[0], row[1], row[-1]) for row in rows]


def expected_comparisons(pairs: list[tuple[str, str, NDArray[np.float64]]]) -> list[tuple[str, str, str]]:
    """The same rows from the differences [n] of the seeds, by SciPy's t test and Holm's definition."""
    # A difference that is the same for all seeds has no test, unless it is 0.
    p_values = [
        1.0 if not each.any() else None if np.ptp(each) == 0 else float(stats.ttest_1samp(each, 0.0).pvalue)
        for *_, each in pairs
    ]
    tested = sorted(p for p in p_values if p is not None)
    rows = []
    for (one, other, each), p in zip(pairs, p_values, strict=True):
        finding = "no spread to test with"
        if p is not None:
            adjusted = max((len(tested) - rank) * smaller for rank, smaller in enumerate(tested) if smaller <= p)
            finding = "not distinguishable" if adjusted > 0.05 else "higher" if each.mean() > 0 else "lower"
        rows.append((f"{one} - {other}", f"{each.mean():+.2f} ± {each.std(ddof=1):.2f}", finding))
    return rows


def test_every_figure_is_there_as_svg_and_png(page: Path) -> None:
    names = {path.stem for path in (page / "figures").glob("*.svg")}
    assert names == {path.stem for path in (page / "figures").glob("*.png")}
    pair = "digits100-res14-res8"
    kinds = ("curves", "classes", "reliability", "agreement", "correlation", "features")
    patches = ("sdd_dkd", "cd_sdd_dkd")
    assert names == {
        *(f"{pair}-{kind}" for kind in kinds),
        *(f"{pair}-patches-{method}" for method in patches),
        "pareto-digits100",
        "lineage",
    }
    for path in (page / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_page_stands_by_itself_and_says_what_its_figures_show(page: Path) -> None:
    text = (page / "index.html").read_text(encoding="utf-8")
    read = Reader(text)
    names = [value for _, value in read.having("id")]
    assert len(names) == len(set(names))
    for key in ("href", "xlink:href", "src"):
        for tag, value in read.having(key):
            assert value.startswith(("#", "data:")), f"<{tag} {key}={value}>"
            assert value[0] != "#" or value[1:] in names
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(names)
    assert not re.search(r"url\((?!#)|@import|<link rel=.stylesheet", text)
    images = [attributes for _, attributes in read.elements if attributes.get("role") == "img"]
    assert len(images) == len(list((page / "figures").glob("*.svg")))
    assert all(len(attributes["aria-label"]) > 40 for attributes in images)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert str(page) not in text


def test_lineage_names_data_teacher_students_and_what_was_delivered(inside: Path, page: Path) -> None:
    from icdctl.files import sha256_file

    text = (page / "index.html").read_text(encoding="utf-8")
    for path in (
        inside / "runs/teacher/student.safetensors",
        inside / "runs/cd_sdd_dkd/s0/student.safetensors",
        inside / "runs/cd_sdd_dkd/s0/onnx/model.onnx",
    ):
        assert sha256_file(path) in text
    metrics = json.loads((inside / "runs/plain/s0/metrics.json").read_text())
    assert metrics["dataset_sha256"] in text
    assert "CC BY 4.0" in text


def test_what_is_asked_for_is_shown(icdctl: CommandLine, inside: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> & `code`"
    given = ("report", inside / "runs/teacher", inside / "runs/dkd", "--out", tmp_path, "--title", hostile)
    code, _, err = icdctl(*given, "--images", "3,5", "--no-latency", "--detail", "res8")
    assert code == 0, err
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "(no. 3)" in text
    assert "(no. 5)" in text
    assert "ONNX Runtime on one thread" not in text
    assert "its own run reached" in text
    assert not (tmp_path / "figures/digits100-res14-res8-patches-cd_sdd_dkd.svg").exists()
    # A later report takes the figures of the earlier one away, and nothing else.
    (tmp_path / "mine.txt").write_text("kept")
    code, _, err = icdctl("report", inside / "runs/plain", "--out", tmp_path, "--no-latency")
    assert code == 0, err
    kept = {path.name for path in (tmp_path / "figures").iterdir()}
    assert "digits100-res14-res8-curves.svg" not in kept
    assert "digits100-res8-curves.svg" in kept
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_judged_table_joins_the_page(icdctl: CommandLine, project: Path, tmp_path: Path) -> None:
    given = ("report", project / "runs/plain", "--table", "icd-gamma", "--out", tmp_path, "--no-latency")
    code, _, err = icdctl(*given)
    assert (code, "table `icd-gamma` has no runs" in err) == (1, True)
    name = "cub200-res32x4-shuv1-cd_sdd_kd-gamma1"
    (found,) = [each for each in papers.load("icd-gamma").cells if name_of(each) == name]
    cell = grid_cell(found, {})
    for seed, top1 in enumerate((65.6, 65.7, 65.8, 65.7, 65.7)):
        metrics = {"final_top1": top1 - 0.3, "best_top1": top1}
        write_run(Path("runs") / name / f"s{seed}", cell.command, {**cell.options, "seed": seed}, metrics)
    code, _, err = icdctl(*given)
    assert code == 0, err
    assert "Reproduction: icd-gamma" in (tmp_path / "index.html").read_text(encoding="utf-8")
    (table,) = json.loads((tmp_path / "report.json").read_text())["tables"]
    assert table["counts"]["reproduced"] == 1


def test_models_that_can_not_be_asked_are_told(icdctl: CommandLine, inside: Path, tmp_path: Path) -> None:
    for name in ("dkd", "teacher"):
        shutil.copytree(inside / "runs" / name, tmp_path / "runs" / name)
    config = tmp_path / "runs/dkd/s0/config.json"
    for seed in (0, 1):
        config = tmp_path / f"runs/dkd/s{seed}/config.json"
        moved = {**json.loads(config.read_text()), "teacher_weights": str(tmp_path / "gone/student.safetensors")}
        config.write_text(json.dumps(moved))
    given = ("report", tmp_path / "runs/dkd", "--out", tmp_path / "out", "--no-latency")
    code, _, err = icdctl(*given)
    assert code == 0, err
    assert "the students are not compared with the teacher" in err
    assert not (tmp_path / "out/figures/digits100-res14-res8-agreement.svg").exists()
    assert (tmp_path / "out/figures/digits100-res14-res8-reliability.svg").exists()
    (tmp_path / "runs/dkd/s1/student.safetensors").write_bytes(b"broken")
    code, _, err = icdctl(*given)
    assert code == 0, err
    assert "s1 was not measured" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "holds no finished run"),
        (["runs/unfinished"], 1, "is not finished"),
        (["runs/old"], 1, "is broken, or another version made it"),
        (["runs/plain", "--images", "300", "--detail", "res8"], 2, "there is no test image 300"),
        (["runs/plain", "--images", "x"], 2, "is not a list of different numbers of images"),
        (["runs/plain", "--detail", "mv2"], 2, "no pair of models has `mv2`"),
        (["runs/plain", "--table", "icd"], 2, "unknown table"),
        (["runs/plain", "--out", "params.yaml"], 1, "params.yaml"),
    ],
)
def test_what_can_not_be_reported_is_told(
    icdctl: CommandLine, inside: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    shutil.copytree(inside / "runs/plain/s0", tmp_path / "runs/copy")
    shutil.copytree(inside / "runs/plain", tmp_path / "runs/plain")
    shutil.copyfile(inside / "params.yaml", tmp_path / "params.yaml")
    (tmp_path / "runs/unfinished").mkdir()
    shutil.copyfile(inside / "runs/plain/s0/config.json", tmp_path / "runs/unfinished/config.json")
    shutil.copytree(inside / "runs/plain/s0", tmp_path / "runs/old")
    (tmp_path / "runs/old/config.json").write_text('{"method": "ce"}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        found, out, err = icdctl("report", *arguments, "--no-latency")
    assert (found, out) == (code, "")
    assert message in err
    assert "hint:" in err


def test_runs_of_another_version_in_a_folder_are_left_out(inside: Path, tmp_path: Path) -> None:
    shutil.copytree(inside / "runs/plain", tmp_path / "plain")
    (tmp_path / "plain/s1/config.json").write_text("{}")
    found = collect_runs([tmp_path])
    assert [len(cell.runs) for group in found.groups for cell in group.cells] == [1]
    assert "s1 is left out" in found.notes[0]
    (tmp_path / "plain/s0/config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="none of 2 runs can be read"):
        collect_runs([tmp_path])


def test_a_run_that_is_there_twice_counts_once_and_trials_do_not(inside: Path, tmp_path: Path) -> None:
    shutil.copytree(inside / "runs/plain", tmp_path / "runs/plain")
    shutil.copytree(inside / "runs/plain/s1", tmp_path / "runs/sweep/s1")
    shutil.copytree(inside / "runs/dkd/s0", tmp_path / "runs/dkd-search/temperature4/s0")
    (tmp_path / "runs/dkd-search/search.json").write_text("{}")
    found = collect_runs([tmp_path / "runs"])
    ((cell,),) = (group.cells for group in found.groups)
    assert [run.config.seed for run in cell.runs] == [0, 1]
    assert found.notes == (f"{tmp_path}/runs/sweep/s1 is left out: the same run as {tmp_path}/runs/plain/s1",)


def test_cells_are_compared_with_what_they_build_on(inside: Path) -> None:
    (group,) = collect_runs([inside / "runs"]).groups
    assert group.name == "digits100-res14-res8"
    assert [(first.config.method, second.config.method) for first, second in group.comparisons] == [
        ("dkd", "ce"),
        ("sdd_dkd", "dkd"),
        ("cd_sdd_dkd", "sdd_dkd"),
    ]
    # Of two cells of one method, the one with the method's own settings is drawn.
    assert [cell.config.settings["gamma"] for cell in group.drawn if cell.config.method == "cd_sdd_dkd"] == [2.0]


def copied(inside: Path, out: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """The first seeds of some cells, each with a configuration of other values."""
    for name, change in changes.items():
        shutil.copytree(inside / "runs" / name / "s0", out / name)
        path = out / name / "config.json"
        held = json.loads(path.read_text())
        settings = {**held["settings"], **change.get("settings", {})}
        path.write_text(json.dumps({**held, **change, "settings": settings}))
        hash_again(out / name)
    return out


def hash_again(folder: Path) -> None:
    """Make the hashes of a run those of its changed files."""
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = {key: value for key, value in metrics.items() if key != run_files.METRICS_HASH_KEY}
    files.write_json(folder / "metrics.json", {**kept, **run_files.hashes(folder, kept)})


def named(group: RunGroup) -> list[tuple[str, str]]:
    return [(first.label, second.label) for first, second in group.comparisons]


def test_only_what_was_trained_alike_is_compared(inside: Path, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {"plain": {}, "dkd": {"epochs": 1}, "sdd_dkd": {}, "cd_sdd_dkd": {"lr": 0.5}}
    (group,) = collect_runs([copied(inside, tmp_path, changes)]).groups
    assert [cell.label for cell in group.cells] == ["ce", "dkd epochs=1", "sdd_dkd", "cd_sdd_dkd lr=0.5"]
    assert group.usual == {"epochs": 2, "lr": 0.1}
    assert named(group) == [("sdd_dkd", "ce")]
    assert [(cell.label, base.label) for cell, base in group.uncompared] == [
        ("dkd epochs=1", "ce"),
        ("cd_sdd_dkd lr=0.5", "sdd_dkd"),
    ]
    table, told = result_tables.comparisons(GroupMeasurements(group))
    assert table is not None
    assert [row[0] for row in table.rows] == ["sdd_dkd - ce"]
    assert (
        "dkd epochs=1 is not compared with ce, which it builds on: they were trained with different `epochs`." in told
    )
    # With one seed nothing is tested, and nothing is said of tests.
    assert not any("Holm" in note for note in table.notes)


def test_what_else_differs_is_told(inside: Path, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {"dkd": {"settings": {"beta": 8.0}}, "sdd_dkd": {}}
    (group,) = collect_runs([copied(inside, tmp_path, changes)]).groups
    assert named(group) == [("sdd_dkd", "dkd")]
    assert result_tables.comparisons(GroupMeasurements(group))[1] == ["sdd_dkd and dkd also differ in beta (2, 8)."]


def test_the_training_that_most_methods_share_is_drawn(inside: Path, tmp_path: Path) -> None:
    copied(inside, tmp_path, {"plain": {}, "dkd": {}, "sdd_dkd": {}})
    copied(inside, tmp_path / "short", {"dkd": {"max_steps": 1}})
    (group,) = collect_runs([tmp_path]).groups
    assert [cell.label for cell in group.cells] == ["ce", "dkd", "dkd max_steps=1", "sdd_dkd"]
    assert [cell.label for cell in group.drawn] == ["ce", "dkd", "sdd_dkd"]


def test_teachers_of_one_model_are_told_apart(inside: Path, tmp_path: Path) -> None:
    other = {"teacher_sha256": "f" * 64, "teacher_weights": None}
    first, second = collect_runs([copied(inside, tmp_path, {"plain": {}, "dkd": {}, "sdd_dkd": other})]).groups
    assert [cell.label for cell in first.cells] == ["ce", "dkd"]
    assert second.title == "res14 ffffff to res8 on digits100"
    assert first.teacher_label == f"res14 {(first.teacher_sha256 or '')[:6]}"
    (picture,) = pictures.pareto([GroupMeasurements(first), GroupMeasurements(second)])
    assert picture.alternative.count("res8, ce ") == 1
    assert f"res8, dkd, from {first.teacher_label} " in picture.alternative
    assert "res8, sdd_dkd, from res14 ffffff " in picture.alternative


def test_test_images_of_one_name_are_told_apart(inside: Path, tmp_path: Path) -> None:
    groups = collect_runs([copied(inside, tmp_path, {"dkd": {}, "sdd_dkd": {"test_images": 200}})]).groups
    assert {group.images for group in groups} == {"digits100 (test images 1)", "digits100 (test images 2)"}
    assert len({group.title for group in groups}) == 2


def test_runs_that_watch_held_out_images_have_curves_of_their_own(inside: Path, tmp_path: Path) -> None:
    copied(inside, tmp_path, {"plain": {}, "dkd": {"val_split": 0.1}})
    path = tmp_path / "dkd/history.csv"
    path.write_text(path.read_text().replace("test_top1", "val_top1"))
    hash_again(path.parent)
    (group,) = collect_runs([tmp_path]).groups
    on_test, held_out = pictures.curves(group)
    assert "ce " in on_test.alternative
    assert "dkd" not in on_test.alternative
    assert "dkd val_split=0.1 " in held_out.alternative
    assert held_out.title == "Learning curves on held-out images"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("metrics.json", '"final_top1": ', '"final_top1": NaN, "was": ', "a number that is not finite"),
        ("metrics.json", '"seconds": ', '"seconds": "long", "was": ', "`seconds` is not a number"),
        ("metrics.json", '"best_top1": ', '"was": ', "best_top1"),
        ("history.csv", "test_top1", "top1", "has no accuracy"),
        ("environment.json", '"versions": {', '"versions": [], "was": {', "does not have the expected format"),
    ],
)
def test_a_run_with_broken_numbers_is_told(
    inside: Path, tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    path = copied(inside, tmp_path, {"dkd": {}}) / "dkd" / file
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ArtifactError, match=message):
        collect_runs([tmp_path / "dkd"])


@pytest.mark.parametrize("name", ["index.html", "report.json", "summary.md"])
def test_files_of_others_are_left_alone(icdctl: CommandLine, inside: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/mine.png").write_text("mine")
    (tmp_path / name).write_text('{"figures": 3}')
    code, _, err = icdctl("report", inside / "runs/plain", "--out", tmp_path, "--no-latency")
    assert (code, "is not part of a report that icdctl wrote" in err) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["figures", name])
    assert (tmp_path / "figures/mine.png").read_text() == "mine"


def test_a_report_that_can_not_be_written_leaves_the_earlier_page(
    icdctl: CommandLine, inside: Path, tmp_path: Path
) -> None:
    given = ("report", inside / "runs/plain", "--out", tmp_path / "report", "--no-latency")
    assert icdctl(*given)[0] == 0
    (tmp_path / "report/figures/mine.txt").write_text("mine")
    before = (tmp_path / "report/index.html").read_bytes()
    assert icdctl(*given, "--title", "another")[0] == 0
    assert (tmp_path / "report/figures/mine.txt").read_text() == "mine"
    assert (tmp_path / "report/index.html").read_bytes() != before
    shutil.rmtree(tmp_path / "report/figures")
    (tmp_path / "report/figures").write_text("in the way")
    before = (tmp_path / "report/index.html").read_bytes()
    code, _, err = icdctl(*given, "--title", "a third")
    assert (code, "can't be written" in err) == (1, True)
    assert (tmp_path / "report/index.html").read_bytes() == before
    assert icdctl("report", inside / "runs/plain", "--out", tmp_path / "report/index.html/deep")[0] == 1


def test_a_list_of_figures_reaches_no_other_folder(icdctl: CommandLine, inside: Path, tmp_path: Path) -> None:
    given = ("report", inside / "runs/plain", "--out", tmp_path / "report", "--no-latency")
    assert icdctl(*given)[0] == 0
    (tmp_path / "mine.svg").write_text("mine")
    path = tmp_path / "report/report.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "figures": ["../../mine.svg", "../index.html", "gone.svg"]})
    )
    assert icdctl(*given)[0] == 0
    assert (tmp_path / "mine.svg").read_text() == "mine"
    assert json.loads(path.read_text())["figures"] == sorted(
        each.name for each in (tmp_path / "report/figures").iterdir()
    )


def test_broken_and_missing_caches_change_nothing(
    icdctl: CommandLine, inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def page_of(name: str) -> bytes:
        code, _, err = icdctl("report", inside / "runs/dkd", "--out", tmp_path / name, "--no-latency")
        assert (code, "not measured" in err) == (0, False), err
        return (tmp_path / name / "index.html").read_bytes()

    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    first = page_of("first")
    broken = [b"", b"[1", b"\xff", b'{"numbers": 3}', b'{"numbers": NaN}', b"[]"]
    kept = sorted((tmp_path / "state/cache/evaluated").glob("*.json"))
    assert len(kept) == 3  # the teacher and two seeds
    for path, content in zip(kept, broken, strict=False):
        path.write_bytes(content)
    assert page_of("second") == first
    for path, content in zip(kept, broken[3:], strict=True):
        path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert page_of("third") == first
    # A state folder that can't be written to costs time, and no result.
    shutil.rmtree(tmp_path / "state/cache/evaluated")
    (tmp_path / "state/cache/evaluated").write_text("in the way")
    assert page_of("fourth") == first


class Listener(SilentObserver):
    """Remembers which models were asked."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def begin(self, what: str, total: int) -> None:
        self.heard.append(what)


def test_a_teacher_of_several_students_is_asked_once(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    options = {**TINY, "epochs": 1, "teacher": "runs/teacher", "method": "kd"}
    api.distill(student="shuv2", out=str(tmp_path / "shuv2"), **options)
    listener = Listener()
    paths = [inside / "runs/dkd", inside / "runs/sdd_dkd", tmp_path / "shuv2"]
    build_report(paths, tmp_path / "out", ReportOptions(latency=False, device="cpu"), observer=listener)
    # Once for its own numbers, and once for its logits, which both groups and all figures then share.
    assert listener.heard.count("evaluating res14") == 2


def test_what_is_registered_is_told(
    icdctl: CommandLine, inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "registry").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("runs/teacher", "runs/dkd/s0"):
        assert icdctl("registry", "add", inside / path)[0] == 0
    code, _, err = icdctl("report", inside / "runs/dkd", "--out", "out", "--no-latency")
    assert code == 0, err
    summary = (tmp_path / "out/summary.md").read_text()
    assert "registry: digits100/res14-ce@v1 |" in summary
    assert "| registry: digits100/res8-dkd@v1 | res8, dkd, seed 0, from res14 |" in summary


def test_lineage_of_plain_runs_has_no_teacher(icdctl: CommandLine, inside: Path, tmp_path: Path) -> None:
    code, _, err = icdctl("report", inside / "runs/plain", "--out", tmp_path, "--no-latency")
    assert code == 0, err
    drawn = (tmp_path / "figures/lineage.svg").read_text()
    assert "students" in drawn
    assert "teacher" not in drawn


def test_reliability_by_hand() -> None:
    # Three images of two classes: sure and right (0.8), sure and wrong (0.8), unsure and right (0.6).
    probabilities = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    found = evaluation.evaluate_logits(probabilities.log(), torch.tensor([0, 1, 1]))
    held = {place: each for place, each in enumerate(found.reliability) if each.images}
    assert sorted(held) == [9, 12]  # 0.6 x 15 = 9, 0.8 x 15 = 12
    assert held[12] == pytest.approx((2, 80, 50))
    assert held[9] == pytest.approx((1, 60, 100))
    assert found.ece == pytest.approx((2 * 30 + 1 * 40) / 3)
    assert Evaluation.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_correlation_and_gram_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 5.0], [2.0, 4.0, 5.0], [3.0, 0.0, 5.0]])
    matrix = measure.correlation(logits)
    assert matrix[0, 1] == pytest.approx(-0.5)  # (-1 x 0 + 0 x 2 + 1 x -2) / (sqrt 2 x sqrt 8)
    assert matrix[0, 0] == pytest.approx(1.0)
    assert matrix[2].tolist() == [0.0, 0.0, 0.0]  # never changes
    regions = torch.zeros(2, 4, 4)
    regions[0, :2], regions[1, 2:] = 3.0, 4.0  # the upper half is of one class, the lower of the other
    assert measure.gram_of(regions, 2) == pytest.approx(np.kron(np.eye(2), np.ones((2, 2))))
    assert measure.gram_of(regions, 4).shape == (16, 16)


def test_as_many_styles_as_points() -> None:
    labels = [*(f"cell {number}" for number in range(100)), "a (teacher)", "b (teacher)"]
    styles = [style for _, *style in drawing.styled(labels)]
    assert len({tuple(style) for style in styles}) == len(labels)


def test_labels_of_any_length_and_kind_leave_figures_whole() -> None:
    names = {0: "_hidden", 1: "$x^2$ <b>猫</b> & a class with a name that nobody reads to its end"}
    placed = {"m " * 40: np.arange(12.0).reshape(6, 2)}
    labels = np.arange(6) % 2
    made = model_maps.feature_maps("f", placed, labels, names, perplexity=5 / 3)
    assert "_hidden" in made.svg
    assert "$x^2$ &lt;b&gt;猫&lt;/b&gt; &amp; a" in made.svg
    assert "its end" not in made.svg
    assert "perplexity 1.67" in made.caption
    gains = figures.per_class_gains("g", {("first " * 20, "second"): [0.0, 0.0]})
    assert "0 classes better, 0 worse" in gains.alternative


def test_spread_by_hand() -> None:
    assert figures.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert figures.spread([0.1234], 3) == "0.123"
    assert figures.spread([1.0, None]) == figures.spread([]) == figures.spread(None) == ""


def test_the_frontier_is_what_nothing_cheaper_beats() -> None:
    points = [(1.0, 50.0), (2.0, 40.0), (3.0, 60.0), (3.0, 55.0), (4.0, 60.0)]
    assert figures._frontier(points) == [(1.0, 50.0), (3.0, 60.0)]


def test_few_and_equal_features_still_make_a_map() -> None:
    features = torch.ones(6, 4)
    placed = measure.feature_map(features)
    assert placed.shape == (6, 2)
    assert np.isfinite(placed).all()
    made = model_maps.feature_maps(
        "f", {"m": placed}, np.arange(6), {number: f"c{number}" for number in range(6)}, perplexity=2
    )
    assert "not defined" in made.alternative


def test_chosen_images_are_the_same_every_time() -> None:
    labels = torch.arange(200) % 20
    first, second = (measure.choose_images(labels, num_shown=4) for _ in range(2))
    assert first.shown.tolist() == second.shown.tolist()
    assert len({int(labels[number]) for number in first.shown}) == 4
    assert {int(labels[number]) for number in first.mapped} == set(first.classes)
    with pytest.raises(UsageError, match="no test image -1"):
        measure.choose_images(labels, num_shown=4, shown=[-1])


def test_a_figure_is_the_same_whatever_the_users_style(tmp_path: Path) -> None:
    import matplotlib

    def draw() -> Picture:
        with drawing.drawing(2, 2) as figure:
            figure.add_subplot().plot([1, 2], [3, 4], label="$x$ 猫 <b>")
            return finish(figure, "f", title="t", caption="c", alternative="a")

    plain = draw()
    with matplotlib.rc_context({"lines.linewidth": 7, "font.size": 20, "axes.facecolor": "black"}):
        assert draw() == plain
        assert matplotlib.rcParams["lines.linewidth"] == 7  # and the user's style is theirs afterwards
    inline = plain.inline()
    assert 'id="f-' in inline
    assert "var(--ink)" in inline
    assert "var(--ink)" not in plain.svg


def test_tables_align_numbers_and_escape_text() -> None:
    table = PageTable("t", ("a", "b", "c"), (("x|y", "1,000", ""), ("<i>", "-2.5 ± 0.1", "< 0.001")))
    assert table.kinds == ["", "number", "number"]
    assert PageTable("t", ("a", "sha256", "c"), (("x", "ab12", "word " * 20),)).kinds == ["", "hash", "long"]
    assert PageTable("t", ("a", "b"), ()).kinds == ["", ""]
    less = PageTable("t", ("a", "b", "c"), (("1", "", "x"), ("", "", "y")), ("n",)).without_empty_columns()
    assert (less.headers, less.rows, less.notes) == (("a", "c"), (("1", "x"), ("", "y")), ("n",))
    made = Page("p", ["a `b` <c>"], [Section("s", "S", tables=[table])], ["left `one"])
    html = render_page(made)
    assert "a <code>b</code> &lt;c&gt;" in html
    assert "left `one" in html
    assert "&lt;i&gt;" in html
    assert "| x\\|y | 1,000 |  |" in render_markdown(made)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: `apt install chromium`)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(page: Path, scheme: Literal["light", "dark"]) -> None:
    """It loads from disk, asks for nothing, complains of nothing, and its tables sort."""
    from playwright.sync_api import Error, sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        except Error as error:
            pytest.skip(f"Chromium does not start here: {str(error).splitlines()[0]}")
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 900}, offline=True)
        tab = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        address = (page / "index.html").as_uri()
        tab.goto(address)
        tab.wait_for_load_state("networkidle")
        assert (said, [url for url in asked if not url.startswith("data:")]) == ([], [address])
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")
        assert ink == ("rgb(31, 35, 40)" if scheme == "light" else "rgb(227, 231, 236)")
        seen = tab.get_by_role("img").all()
        assert len(seen) == len(list((page / "figures").glob("*.svg")))
        for figure in seen:
            box = figure.bounding_box()
            assert box is not None
            assert box["width"] > 100
            assert box["height"] > 50
        table = tab.locator("#results ~ div table")
        column = "td:nth-child(4)"
        header = table.get_by_role("button", name="top-1, final")
        header.click()
        up = [float(text.split()[0]) for text in table.locator(column).all_inner_texts()]
        assert up == sorted(up)
        assert table.locator("th[aria-sort=ascending]").count() == 1
        header.press("Enter")
        down = [float(text.split()[0]) for text in table.locator(column).all_inner_texts()]
        assert down == sorted(down, reverse=True)
        wide = tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert wide, "the page scrolls sideways"
        tab.set_viewport_size({"width": 400, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "on a phone"
        browser.close()
