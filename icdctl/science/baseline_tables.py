"""The tables of the papers that iCD builds on and compares with: SDD, DKD and CRD."""

from __future__ import annotations

from collections.abc import Sequence

from icdctl.science import paper, published
from icdctl.science.experiments import SCALES, Cell, Pair, PaperTable, make_claim, method_claims, unique
from icdctl.science.published import Row

CIFAR100_PAIRS: tuple[Pair, ...] = (
    ("res32x4", "mv2"),
    ("wrn40_2", "vgg8"),
    ("wrn40_2", "mv2"),
    ("res50", "shuv1"),
    ("res32x4", "shuv1"),
    ("wrn40_2", "shuv1"),
    ("res50", "mv2"),
    ("vgg13", "mv2"),
    ("res32x4", "shuv2"),
    ("res50", "vgg8"),
)
"""The pairs of SDD's Tables 1 (the first four) and 2, and of iCD's main table."""
CUB200_PAIRS: tuple[Pair, ...] = (
    ("res32x4", "mv2"),
    ("res32x4", "shuv1"),
    ("vgg13", "mv2"),
    ("vgg13", "vgg8"),
    ("res50", "shuv1"),
)
"""The pairs of SDD's Table 5, and of iCD's main table."""

NO_TEACHER = (
    "The published CUB-200 teachers can't be downloaded by a program; a teacher that you train yourself may differ "
    "from them."
)
_SDD_MAIN = ("SDD (CVPR 2024) Table 1", "SDD (CVPR 2024) Table 2", "SDD (CVPR 2024) Table 5")
_SDD_METHODS = ("kd", "sdd_kd", "dkd", "sdd_dkd", "nkd", "sdd_nkd")
_SDD_NOTES = {
    ("cifar100", "res50", "vgg8", "sdd_nkd"): "SDD's script trains this cell with scales 1,2; the paper says 1,2,4",
    ("cifar100", "wrn40_2", "vgg8", "sdd_nkd"): "SDD's script trains this cell with scales 1,2; the paper says 1,2,4",
}


def sdd_cifar100() -> PaperTable:
    """SDD on CIFAR-100: its main tables and its ablations."""
    main = _sdd_main("cifar100", CIFAR100_PAIRS)
    rest = []
    for row in published.find(
        dataset="cifar100",
        kind="student",
        paper=[f"SDD (CVPR 2024) {part}" for part in ("Table 6", "Table 7", "Table 8", "appendix")],
    ):
        method = row.method or ""
        known = method in _SDD_METHODS
        teacher, student = row.teacher or "", row.student or ""
        rest.append(
            Cell(
                "cifar100",
                teacher,
                student,
                method,
                settings=dict(paper.settings_of("cifar100", teacher, student, method, "gamma8")) if known else {},
                scales=(row.scales or ()) if method.startswith("sdd_") else (),
                detail=row.detail,
                published=(row,),
            )
        )
    cells = unique((*main, *rest))
    return PaperTable(
        "sdd-cifar100",
        "SDD, plain methods and others on CIFAR-100: 10 pairs, scales, ablations",
        "SDD (arXiv:2403.13512), Tables 1, 2, 6, 7, 8 and appendix",
        cells,
        method_claims(main, families=("",)),
        notes=("Beta is 8, the default of SDD's code, unless the pair's file states another value.",),
    )


def sdd_cub200() -> PaperTable:
    """SDD on CUB-200: its Table 5."""
    cells = _sdd_main("cub200", CUB200_PAIRS)
    return PaperTable(
        "sdd-cub200",
        "SDD, plain methods and others on CUB-200, 5 pairs",
        "SDD (arXiv:2403.13512), Table 5",
        cells,
        method_claims(cells, families=("",)),
        notes=(NO_TEACHER, "Beta is 8, the default of SDD's code, unless the pair's file states another value."),
    )


def _sdd_main(dataset: str, pairs: Sequence[Pair]) -> tuple[Cell, ...]:
    cells = []
    for teacher, student in pairs:
        rows = [
            row
            for row in published.find(dataset=dataset, teacher=teacher, student=student, kind="student")
            if row.paper in _SDD_MAIN
        ]
        for method in dict.fromkeys(row.method or "" for row in rows):
            known = method in _SDD_METHODS
            cells.append(
                Cell(
                    dataset,
                    teacher,
                    student,
                    method,
                    settings=dict(paper.settings_of(dataset, teacher, student, method, "gamma8")) if known else {},
                    scales=SCALES if method.startswith("sdd_") else (),
                    published=tuple(row for row in rows if row.method == method),
                    note=_SDD_NOTES.get((dataset, teacher, student, method), ""),
                )
            )
        cells.append(plain_student(dataset, student))
    return unique(cells)


def sdd_rows(dataset: str, teacher: str, student: str, method: str) -> tuple[Row, ...]:
    """The rows of SDD's main tables for one pair and method."""
    rows = published.find(dataset=dataset, teacher=teacher, student=student, method=method, kind="student")
    return tuple(row for row in rows if row.paper in _SDD_MAIN)


def plain_student(dataset: str, student: str) -> Cell:
    """The cell of a student that is trained without a teacher; the papers repeat its number in several columns."""
    rows = published.find(dataset=dataset, student=student, kind="plain")
    return Cell(dataset, None, student, "ce", published=rows[:1])


def dkd_cifar100() -> PaperTable:
    """DKD on CIFAR-100, with KD beside it."""
    rows = published.find(dataset="cifar100", kind="student", paper="DKD (CVPR 2022)")
    cells = []
    for row in rows:
        teacher, student, method = row.teacher or "", row.student or "", row.method or ""
        settings = dict(paper.settings_of("cifar100", teacher, student, method, "gamma8"))
        cells.append(Cell("cifar100", teacher, student, method, settings=settings, published=(row,)))
    pairs = list(dict.fromkeys((cell.teacher, cell.student) for cell in cells))
    by_name = {(cell.teacher, cell.student, cell.method): cell.key for cell in cells}
    claims = tuple(
        make_claim("dkd - kd", cells, by_name[teacher, student, "dkd"], by_name[teacher, student, "kd"])
        for teacher, student in pairs
    )
    return PaperTable(
        "dkd-cifar100",
        "DKD and KD on CIFAR-100, 11 pairs",
        "DKD (arXiv:2203.08679), the README of mdistiller",
        unique(cells),
        claims,
        notes=(
            "Beta is 8, the default of mdistiller, unless the pair's file states another value; the paper tunes beta "
            "for each pair, and its list could not be fetched.",
            "mdistiller does not clip gradients; icdctl's recipe clips them at a norm of 40.",
        ),
    )


def crd_cifar100() -> PaperTable:
    """CRD's comparison of 13 methods on CIFAR-100."""
    rows = published.find(dataset="cifar100", kind="student", paper="CRD (ICLR 2020)")
    cells = [
        Cell("cifar100", row.teacher, row.student or "", row.method or "", published=(row,))
        for row in sorted(rows, key=lambda row: row.id)
    ]
    by_name = {(cell.teacher, cell.student, cell.method): cell.key for cell in cells}
    claims = tuple(
        make_claim("crd - kd", cells, key, by_name[teacher, student, "kd"])
        for (teacher, student, method), key in by_name.items()
        if method == "crd"
    )
    return PaperTable(
        "crd-cifar100",
        "13 methods on CIFAR-100, 13 pairs",
        "CRD (arXiv:1910.10699), the README of RepDistiller",
        unique(cells),
        claims,
        notes=(
            "The published numbers are means of several runs at the final epoch. No method is combined with KD.",
            "CRD does not clip gradients; icdctl's recipe clips them at a norm of 40.",
        ),
    )
