"""The tables that `icdctl reproduce` knows, by name.

A table is a list of explicit cells: what to train, and which published number the result is compared with. A cell that
can't be run is listed with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from icdctl.errors import unknown_name
from icdctl.science import baseline_tables, icd_tables
from icdctl.science.experiments import SCALES, Cell, PaperTable, make_claim


def load(name: str) -> PaperTable:
    """The table with this name.

    Raises:
        UsageError: there is no such table; the message suggests the nearest name.
    """
    if name not in TABLES:
        raise unknown_name("table", name, TABLES, listing="icdctl reproduce --list")
    return _built(name)


@cache
def _built(name: str) -> PaperTable:
    return TABLES[name]()


def _demo() -> PaperTable:
    budget = {"epochs": 6, "train_images": 2000}
    cells = (
        Cell("digits100", None, "res8", "ce", overrides=budget),
        *(
            Cell(
                "digits100",
                "res20",
                "res8",
                method,
                settings=settings,
                scales=SCALES if "sdd" in method else (),
                overrides=budget,
            )
            for method, settings in (
                ("dkd", {"beta": 2.0}),
                ("sdd_dkd", {"beta": 2.0}),
                ("cd_sdd_dkd", {"beta": 2.0, "gamma": 2.0}),
            )
        ),
    )
    plain, base, sdd, cd = (cell.key for cell in cells)
    return PaperTable(
        "demo",
        "the same comparisons on the embedded digits, in minutes",
        "no numbers are published for this data set, so only the claims are tested",
        cells,
        (
            make_claim("cd_sdd_dkd - sdd_dkd", cells, cd, sdd),
            make_claim("sdd_dkd - dkd", cells, sdd, base),
            make_claim("cd_sdd_dkd - dkd", cells, cd, base),
            make_claim("dkd - ce", cells, base, plain),
        ),
        notes=(
            "The images are small synthetic compositions of real digits: the table shows how icdctl works, not how the "
            "methods rank.",
        ),
    )


TABLES: dict[str, Callable[[], PaperTable]] = {
    "icd-cifar100": icd_tables.icd_cifar100,
    "icd-cub200": icd_tables.icd_cub200,
    "sdd-cifar100": baseline_tables.sdd_cifar100,
    "sdd-cub200": baseline_tables.sdd_cub200,
    "dkd-cifar100": baseline_tables.dkd_cifar100,
    "crd-cifar100": baseline_tables.crd_cifar100,
    "icd-gamma": icd_tables.icd_gamma,
    "icd-scales": icd_tables.icd_scales,
    "icd-time": icd_tables.icd_time,
    "demo": _demo,
}
"""Name -> the function that builds the table from the published results and the paper's settings."""
