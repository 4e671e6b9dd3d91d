"""The named tables: how many cells, none twice, all runnable ones with settings that the methods take."""

from __future__ import annotations

from collections import Counter
from statistics import mean, stdev

import pytest

from icdctl import data, methods, models
from icdctl.config import recipes
from icdctl.config.run_config import RunConfig
from icdctl.errors import UsageError
from icdctl.methods import METHODS
from icdctl.science import published, tables
from icdctl.science.baseline_tables import CIFAR100_PAIRS, CUB200_PAIRS
from icdctl.science.experiments import LOSSES, PaperTable, select
from icdctl.science.tables import TABLES

NAMES = (
    "icd-cifar100",
    "icd-cub200",
    "sdd-cifar100",
    "sdd-cub200",
    "dkd-cifar100",
    "crd-cifar100",
    "icd-gamma",
    "icd-scales",
    "icd-time",
    "demo",
)
CD = tuple(f"cd_sdd_{loss}" for loss in LOSSES)
SDD = tuple(f"sdd_{loss}" for loss in LOSSES)


def test_the_tables_are_those_of_the_command() -> None:
    assert tuple(TABLES) == NAMES
    with pytest.raises(UsageError, match="unknown table `icd-cifar`"):
        tables.load("icd-cifar")


@pytest.mark.parametrize("name", NAMES)
def test_no_two_cells_are_alike_and_each_can_be_run_or_says_why_not(name: str) -> None:
    table = tables.load(name)
    keys = [cell.key for cell in table.cells]
    assert len(set(keys)) == len(keys)
    fields = [
        (
            cell.dataset,
            cell.teacher,
            cell.student,
            cell.method,
            tuple(sorted(cell.settings.items())),
            cell.scales,
            tuple(sorted(cell.overrides.items())),
            cell.detail,
        )
        for cell in table.cells
    ]
    assert len(set(fields)) == len(fields)
    for cell in table.cells:
        assert cell.metric == table.metric
        assert data.resolve(cell.dataset) == cell.dataset
        assert models.resolve(cell.student) == cell.student
        assert cell.teacher is None or models.resolve(cell.teacher) == cell.teacher
        reason = cell.why_not(METHODS)
        if reason is not None:
            assert cell.method in reason
            continue
        methods.check_settings(cell.method, cell.settings)
        assert METHODS[cell.method].needs_teacher == (cell.teacher is not None)
        assert METHODS[cell.method].needs_patches == bool(cell.scales)
        if cell.scales:
            assert methods.check_scales(cell.scales) == cell.scales
        assert cell.overrides.keys() <= RunConfig.model_fields.keys()


@pytest.mark.parametrize("name", NAMES)
def test_claims_are_about_cells_of_the_table(name: str) -> None:
    table = tables.load(name)
    for claim in table.claims:
        assert claim.first != claim.second
        for key in (claim.first, claim.second):
            cell = table.cell(key)
            assert not claim.family or claim.family in cell.families
    with pytest.raises(UsageError, match="unknown cell"):
        table.cell("cifar100/none")


@pytest.mark.parametrize(("name", "pairs"), [("icd-cifar100", CIFAR100_PAIRS), ("icd-cub200", CUB200_PAIRS)])
@pytest.mark.parametrize("family", ["gamma2", "gamma8"])
def test_each_family_has_three_methods_of_each_kind_for_each_pair(
    name: str, pairs: tuple[tuple[str, str], ...], family: str
) -> None:
    table = tables.load(name)
    cells = [cell for cell in select(table.cells, family=family) if not cell.overrides]
    assert len(pairs) == {"icd-cifar100": 10, "icd-cub200": 5}[name]
    for kind in (CD, SDD, LOSSES):
        found = Counter((cell.teacher, cell.student, cell.method) for cell in cells if cell.method in kind)
        assert found == {(*pair, method): 1 for pair in pairs for method in kind}
    assert {cell.student for cell in cells if cell.method == "ce"} == {student for _, student in pairs}
    gammas = {cell.settings["gamma"] for cell in cells if cell.method in CD}
    assert gammas == {float(family.removeprefix("gamma"))}
    comparisons = Counter(claim.comparison for claim in table.claims if claim.family == family)
    assert set(comparisons.values()) == {len(pairs)}
    assert len(comparisons) == 9


def test_the_corrected_rate_is_used_and_the_faulty_one_is_a_cell_of_its_own() -> None:
    table = tables.load("icd-cifar100")
    corrected = table.cell("cifar100/vgg13-mv2-cd_sdd_kd-gamma2")
    assert not corrected.overrides
    assert corrected.reference is None
    assert corrected.suspect is not None
    assert "0.05" in corrected.suspect
    assert recipes.RECIPES["cifar100"].lr_of_student["mv2"] == 0.01
    faulty = table.cell("cifar100/vgg13-mv2-cd_sdd_kd-gamma2-lr0.05")
    assert faulty.reference is not None
    assert faulty.reference.top1 == 60.19


def test_ablations_have_all_their_values() -> None:
    assert [cell.settings["gamma"] for cell in tables.load("icd-gamma").cells] == [1, 2, 3, 4, 5, 6, 7, 8]
    scales = tables.load("icd-scales").cells
    of_pair = {(1,), (2,), (4,), (1, 2), (1, 4), (2, 4), (1, 2, 4)}
    for student in ("shuv1", "vgg8"):
        assert {cell.scales for cell in scales if cell.student == student} == of_pair
    assert len(scales) == 14
    assert {(cell.student, cell.settings["gamma"]) for cell in scales} == {("shuv1", 1), ("vgg8", 2)}
    times = tables.load("icd-time").cells
    assert {cell.method for cell in times if cell.dataset == "cub200"} == {*CD, *SDD, *LOSSES}


def test_methods_that_are_not_there_are_cells_with_a_reason() -> None:
    crd = tables.load("crd-cifar100")
    assert Counter(cell.method for cell in crd.cells) == {
        **dict.fromkeys(["kd", "fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ab", "ft", "nst", "crd"], 13),
        "fsp": 6,
    }
    known = set(METHODS) - {"crd"}
    assert all(cell.why_not(known) for cell in crd.cells if cell.method == "crd")
    assert all(cell.why_not({"kd"}) is None for cell in crd.cells if cell.method == "kd")
    sdd = tables.load("sdd-cifar100")
    part = sdd.cell("cifar100/res32x4-shuv1-sdd_kd-agreeing_patches_alone")
    assert "no setting for this" in (part.why_not(METHODS) or "")


def test_every_number_of_the_papers_tables_is_in_a_cell() -> None:
    papers = {
        "sdd-cifar100": published.find(dataset="cifar100", kind="student", paper="SDD (CVPR"),
        "sdd-cub200": published.find(dataset="cub200", kind="student", paper="SDD (CVPR"),
        "dkd-cifar100": published.find(dataset="cifar100", kind="student", paper="DKD"),
        "crd-cifar100": published.find(dataset="cifar100", kind="student", paper="CRD (ICLR"),
    }
    for name, rows in papers.items():
        held = {row.id for cell in tables.load(name).cells for row in cell.published}
        assert {row.id for row in rows} <= held, name
    recorded = published.find(kind="student", source="iCD:eval")
    of_icd = ("icd-cifar100", "icd-cub200", "icd-gamma", "icd-scales")
    held = {row.id for name in of_icd for cell in tables.load(name).cells for row in cell.published}
    left_out = [row for row in recorded if row.id not in held]
    assert {row.notes for row in left_out if row.family is None} == {
        ("early run, project cifar100_baselines: gamma and beta not recorded",)
    }
    assert [row.source for row in left_out if row.family is not None] == ["iCD:eval_cub.sh:80"]


def published_differences(table: PaperTable, comparison: str, family: str) -> list[float]:
    return [
        claim.claimed
        for claim in table.claims
        if (claim.comparison, claim.family) == (comparison, family) and claim.claimed is not None
    ]


@pytest.mark.parametrize(
    ("comparison", "family", "n", "expected_mean", "expected_sd"),
    [
        ("cd_sdd_dkd - sdd_dkd", "gamma2", 10, -0.10, 0.43),
        ("cd_sdd_nkd - sdd_nkd", "gamma2", 10, 0.03, 0.29),
        ("cd_sdd_nkd - sdd_nkd", "gamma8", 10, -0.53, 0.83),
        ("cd_sdd_kd - sdd_kd", "gamma8", 8, -0.08, 0.25),
        ("cd_sdd_kd - sdd_kd", "gamma2", 8, 0.17, 0.37),
    ],
)
def test_the_published_record_does_not_show_cd_above_sdd(
    comparison: str, family: str, n: int, expected_mean: float, expected_sd: float
) -> None:
    """What can be read off the published numbers, worked out apart from this code; suspect rows are left out."""
    found = published_differences(tables.load("icd-cifar100"), comparison, family)
    assert len(found) == n
    assert (mean(found), stdev(found)) == pytest.approx((expected_mean, expected_sd), abs=0.006)


def test_the_headline_of_the_paper_is_one_cell_against_plain_kd() -> None:
    """The abstract's +5.08 points: res32x4 to mv2 on CUB-200, and most of it is SDD."""
    table = tables.load("icd-cub200")
    claimed = {
        claim.comparison: claim.claimed
        for claim in table.claims
        if claim.pair == "res32x4-mv2" and claim.family == "gamma2"
    }
    assert claimed["cd_sdd_kd - kd"] == pytest.approx(5.08, abs=0.005)
    assert claimed["sdd_kd - kd"] == pytest.approx(4.42, abs=0.005)
