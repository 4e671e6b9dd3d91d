"""From made-up results to rows, claims and files."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from icdctl.errors import UsageError
from icdctl.methods import METHODS
from icdctl.science import experiments, tables, verdict_formats
from icdctl.science.verdicts import Judgement, Result, judge

ABOVE_FINAL = 0.32
"""How far the best epochs of these results are above the final ones."""


def results(mean: float, *, seeds: int = 5, sd: float = 0.1, seed: int = 0) -> dict[int, Result]:
    """Best epochs with exactly this mean and sd."""
    draws = np.random.default_rng(seed).normal(0, 1, seeds)
    draws = (draws - draws.mean()) / draws.std(ddof=1) * sd + mean
    return {index: Result(float(draw) - ABOVE_FINAL, float(draw)) for index, draw in enumerate(draws)}


GAMMA = tables.load("icd-gamma")


def gamma_key(gamma: int) -> str:
    return f"cub200/res32x4-shuv1-cd_sdd_kd-gamma{gamma}"


@pytest.fixture(scope="module")
def judged() -> Judgement:
    measured = {
        gamma_key(1): results(65.7, seed=1),
        gamma_key(2): results(68.0, seed=2),
        gamma_key(3): results(66.3, seed=3),
        gamma_key(4): {0: Result(65.0, 65.36)},
    }
    return judge(GAMMA, measured, methods=METHODS)


def test_every_cell_has_a_row_and_a_status(judged: Judgement) -> None:
    assert [row.status for row in judged.cells] == [
        "reproduced",
        "not reproduced",
        "underpowered",
        "underpowered",
        *["not measured"] * 4,
    ]
    assert judged.counts == {"reproduced": 1, "not reproduced": 1, "underpowered": 2, "not measured": 4}
    assert "one seed" in judged.cells[3].reason


def test_a_best_epoch_is_compared_with_best_epochs(judged: Judgement) -> None:
    first = judged.cells[0]
    assert first.compared == "best"
    assert first.reproduction is not None
    assert first.reproduction.difference == pytest.approx(65.7 - 65.706)
    assert first.final is not None
    assert first.best is not None
    assert first.final.mean == pytest.approx(first.best.mean - ABOVE_FINAL)
    forced = judge(GAMMA, {gamma_key(1): results(65.7)}, methods=METHODS, epoch="final").cells[0]
    assert forced.compared == "final"
    assert forced.reproduction is not None
    assert forced.reproduction.difference == pytest.approx(65.7 - 65.706 - ABOVE_FINAL)


def test_a_missing_best_epoch_is_said() -> None:
    only_final = {seed: Result(result.final) for seed, result in results(65.7).items()}
    row = judge(GAMMA, {gamma_key(1): only_final}, methods=METHODS).cells[0]
    assert row.compared == "final"
    assert "our final epoch is compared with a published number from the best epoch" in row.reason


def test_an_underpowered_cell_says_how_many_seeds_would_do() -> None:
    row = judge(GAMMA, {gamma_key(1): results(65.7, seeds=3, sd=0.6)}, methods=METHODS).cells[0]
    assert row.status == "underpowered"
    assert "seeds confirm a mean equal to the published number in 4 cases of 5" in row.reason


def test_final_epochs_are_compared_with_final_epochs() -> None:
    table = tables.load("crd-cifar100")
    key = "cifar100/res32x4-res8x4-kd"
    (row,) = [row for row in judge(table, {key: results(73.33 + ABOVE_FINAL)}, methods=METHODS).cells if row.final]
    assert (row.compared, row.status) == ("final", "reproduced")


def test_a_suspect_number_is_no_verdict_and_a_method_that_is_missing_no_failure() -> None:
    table = tables.load("icd-cifar100")
    key = "cifar100/vgg13-mv2-cd_sdd_kd-gamma2"
    (row,) = [row for row in judge(table, {key: results(69)}, methods=METHODS).cells if row.cell.key == key]
    assert (row.status, row.reproduction) == ("suspect", None)
    assert "collapsed" in row.reason
    rows = judge(tables.load("crd-cifar100"), {}, methods={"kd"}).cells
    assert {row.status for row in rows} == {"can't be run", "not measured"}


def test_a_key_of_another_table_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown cell of `icd-gamma`"):
        judge(GAMMA, {"cub200/other": results(1)}, methods=METHODS)


def shared_noise(
    table: experiments.PaperTable, gain: dict[str, float], *, seeds: int = 5
) -> dict[str, dict[int, Result]]:
    """Results in which a seed moves all methods alike, and each kind of method adds its gain."""
    random = np.random.default_rng(4)
    measured = {}
    of_seed = random.normal(0, 0.3, seeds)
    for cell in table.cells:
        kind = next((name for name in ("cd_sdd_", "sdd_") if cell.method.startswith(name)), "")
        values = 70 + gain[kind] + of_seed + random.normal(0, 0.05, seeds)
        measured[cell.key] = {seed: Result(float(value), float(value) + 0.3) for seed, value in enumerate(values)}
    return measured


def test_claims_are_paired_by_seed_and_corrected() -> None:
    table = tables.load("icd-cub200")
    measured = shared_noise(table, {"cd_sdd_": 1.0, "sdd_": 1.0, "": 0.0})
    found = judge(table, measured, methods=METHODS)
    assert len(found.overall) == 18
    assert len(found.claims) == 90
    by_name = {(row.comparison, row.family): row for row in found.overall}
    sdd = by_name["sdd_dkd - dkd", "gamma2"]
    assert sdd.pair == "mean of 5 of 5 pairs"
    assert sdd.measured is not None
    assert sdd.measured.sd is not None
    assert sdd.measured.sd < 0.1, "the noise of the seed is gone"
    assert sdd.finding == "first is better"
    cd = by_name["cd_sdd_dkd - sdd_dkd", "gamma2"]
    assert cd.finding == "not distinguishable"
    assert cd.claimed == pytest.approx(-0.109, abs=0.001)
    assert all(
        row.p_holm is not None
        and row.measured is not None
        and row.measured.p is not None
        and row.p_holm >= row.measured.p
        for row in found.claims
    )


def test_overall_uses_the_seeds_and_pairs_that_are_there() -> None:
    table = tables.load("icd-cub200")
    measured = shared_noise(table, {"cd_sdd_": 0.0, "sdd_": 1.0, "": 0.0})
    measured = {key: value for key, value in measured.items() if "vgg8" not in key}
    measured["cub200/res32x4-mv2-sdd_kd"].pop(3)
    found = judge(table, measured, methods=METHODS)
    (row,) = [row for row in found.overall if (row.comparison, row.family) == ("cd_sdd_kd - sdd_kd", "gamma2")]
    assert row.pair == "mean of 4 of 5 pairs"
    assert row.measured is not None
    assert row.measured.seeds == (0, 1, 2, 4)
    assert row.finding == "second is better"
    assert any(row.finding == "not measured" for row in found.claims)


def test_nothing_measured_is_a_table_all_the_same() -> None:
    found = judge(tables.load("icd-cub200"), {}, methods=METHODS)
    assert set(found.counts) == {"not measured"}
    assert {row.finding for row in (*found.overall, *found.claims)} == {"not measured"}
    assert verdict_formats.to_markdown(verdict_formats.sheets(found))


def test_times_are_ratios_to_kd() -> None:
    table = tables.load("icd-time")
    random = np.random.default_rng(1)

    def seconds(mean: float) -> dict[int, Result]:
        return {seed: Result(float(mean * random.normal(1, 0.005))) for seed in range(5)}

    measured = {
        "cifar100/res32x4-res8x4-kd-time": seconds(0.004),
        "cifar100/res32x4-res8x4-sdd_kd-time": seconds(0.00404),
        "cub200/res32x4-mv2-kd-time": seconds(0.02),
        "cub200/res32x4-mv2-sdd_kd-time": seconds(0.021),
    }
    rows = {row.cell.key: row for row in judge(table, measured, methods=METHODS).cells}
    assert rows["cifar100/res32x4-res8x4-sdd_kd-time"].status == "reproduced"
    slow = rows["cub200/res32x4-mv2-sdd_kd-time"]
    assert slow.status == "not reproduced"
    assert slow.reference is not None
    assert slow.reference.top1 == pytest.approx(2.6, abs=0.02)
    assert rows["cub200/res32x4-mv2-kd-time"].reason == "1 by definition"


def test_part_of_a_table_can_be_judged() -> None:
    cells = [GAMMA.cells[0], GAMMA.cells[7]]
    found = judge(GAMMA, {gamma_key(1): results(65.7), gamma_key(2): results(65.7)}, methods=METHODS, cells=cells)
    assert [row.cell.key for row in found.cells] == [gamma_key(1), gamma_key(8)]
    assert [claim.comparison for claim in found.claims] == ["gamma 8 - gamma 1"]


def test_writers_give_the_same_bytes_and_every_row(judged: Judgement) -> None:
    found = verdict_formats.sheets(judged)
    assert [sheet.title for sheet in found] == [
        "icd-gamma: the weight of the cluster term, 1 to 8, on CUB-200",
        "icd-gamma: claims, for each pair of models",
    ]
    for write in (verdict_formats.to_markdown, verdict_formats.to_latex):
        text = write(found)
        assert text == write(verdict_formats.sheets(judged))
        assert text.count("not reproduced") >= 1
        assert text.endswith("\n")
    markdown = verdict_formats.to_markdown(found).splitlines()
    columns = {line.count(" | ") for line in markdown if line.startswith("| ")}
    assert columns == {9, 10}
    latex = verdict_formats.to_latex(found)
    assert r"cd\_sdd\_kd" in latex
    assert "±" not in latex
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 2


def test_csv_is_for_programs(judged: Judgement) -> None:
    rows = list(csv.DictReader(io.StringIO(verdict_formats.cells_csv(judged))))
    assert len(rows) == 8
    assert rows[0]["verdict"] == "reproduced"
    assert float(rows[0]["published"]) == 65.706
    assert rows[7]["n"] == "0"
    assert rows[7]["final_mean"] == ""
    claims = list(csv.DictReader(io.StringIO(verdict_formats.claims_csv(judged))))
    assert [row["comparison"] for row in claims][:2] == ["gamma 2 - gamma 1", "gamma 3 - gamma 1"]


def test_json_has_no_nan(judged: Judgement) -> None:
    text = json.dumps(verdict_formats.as_json(judged), allow_nan=False)
    assert json.loads(text)["counts"]["reproduced"] == 1


def test_signs_and_zeros_read_well() -> None:
    demo = tables.load("demo")
    same = {seed: Result(90.0 + seed, 91.0 + seed) for seed in range(3)}
    found = judge(demo, {cell.key: same for cell in demo.cells}, methods=METHODS)
    assert {row.finding for row in found.claims} == {"not distinguishable"}
    line = verdict_formats.sheets(found)[1].rows[0]
    assert "0.00 ± 0.00" in line
    assert "-0.00" not in "".join(line)


def test_verdicts_on_a_whole_table_are_wrong_no_more_often_than_stated() -> None:
    """A table whose published numbers are single draws of the same methods: no cell should be `not reproduced`."""
    random = np.random.default_rng(8)
    wrong = judged_cells = 0
    for _ in range(60):
        measured = {}
        for cell in GAMMA.cells:
            assert cell.reference is not None
            mean = cell.reference.top1 + random.normal(0, 0.25)
            values = mean + random.normal(0, 0.25, 5)
            measured[cell.key] = {seed: Result(float(value), float(value)) for seed, value in enumerate(values)}
        counts = judge(GAMMA, measured, methods=METHODS).counts
        wrong += counts.get("not reproduced", 0)
        judged_cells += len(GAMMA.cells)
    assert wrong / judged_cells <= 0.05
