"""The tables of the papers as explicit cells: what to train, and which published number it is compared with.

`TABLES` names them; `load(name)` gives the cells. A cell that can't be run is there with its reason. Nothing here
trains or knows which methods are installed: `Cell.why_not` is asked with their names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from icdctl.errors import unknown_name
from icdctl.science import paper, published
from icdctl.science.paper import FAMILIES
from icdctl.science.published import Reference, Row

Metric = Literal["top1", "seconds_per_step"]
Pair = tuple[str, str]

SCALES = (1, 2, 4)
LOSSES = ("kd", "dkd", "nkd")

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
"""Of SDD's Tables 1 (the first four) and 2, and of iCD's."""
CUB200_PAIRS: tuple[Pair, ...] = (
    ("res32x4", "mv2"),
    ("res32x4", "shuv1"),
    ("vgg13", "mv2"),
    ("vgg13", "vgg8"),
    ("res50", "shuv1"),
)
"""Of SDD's Table 5, and of iCD's."""
SCALE_SETS = ((1,), (2,), (4,), (1, 2), (1, 4), (2, 4), (1, 2, 4))

_NO_TEACHER = "the published CUB-200 teachers can't be downloaded by a program; one of our own may differ from theirs"


@dataclass(frozen=True)
class Cell:
    """One number of a table: what to train for it, and what was published."""

    dataset: str
    teacher: str | None
    student: str
    method: str
    settings: Mapping[str, float] = field(default_factory=dict)
    """Where the table, or the family, states them; the method's defaults otherwise."""
    scales: tuple[int, ...] = ()
    """Of the patches; none for a method that reads none."""
    overrides: Mapping[str, float | int] = field(default_factory=dict)
    """Where it deviates from the data set's recipe, e.g. `lr`."""
    families: tuple[str, ...] = ()
    """The sets of defaults that it belongs to; none where there is only one."""
    detail: str = ""
    """What sets it apart from the method as it is; such a cell can't be run."""
    published: tuple[Row, ...] = ()
    """All that is known of it, suspect rows and repetitions too."""
    note: str = ""
    metric: Metric = "top1"

    @property
    def key(self) -> str:
        """The name of the cell: `cifar100/res32x4-mv2-cd_sdd_dkd-beta2-gamma2`."""
        parts = [self.teacher] if self.teacher else []
        parts += [self.student, self.method]
        if self.scales and self.scales != SCALES:
            parts.append("scales" + "".join(map(str, self.scales)))
        for values in (self.settings, self.overrides):
            parts += [f"{name.replace('_', '')}{values[name]:g}" for name in sorted(values)]
        if self.detail:
            parts.append(self.detail.replace(" ", "_"))
        if self.metric != "top1":
            parts.append("time")
        return f"{self.dataset}/{'-'.join(parts)}"

    @property
    def reference(self) -> Reference | None:
        """What it is compared with; None where nothing usable was published."""
        return published.reference(self.published)

    @property
    def suspect(self) -> str | None:
        """Why there is nothing usable although something was published."""
        if self.reference is not None:
            return None
        return next((row.suspect for row in self.published if row.suspect), None)

    def why_not(self, methods: Collection[str]) -> str | None:
        """Why it can't be run with these methods; None if it can."""
        if self.method not in methods:
            return f"icdctl has no method `{self.method}`"
        if self.detail:
            return f"`{self.method}` has no setting for this: {self.detail}"
        return None


@dataclass(frozen=True)
class Claim:
    """A comparison that a paper makes: the first method is better than the second, for one pair of models."""

    comparison: str
    """What is compared, the same for all pairs of models: `cd_sdd_dkd - sdd_dkd`."""
    family: str
    """That both cells are of; empty where there is only one."""
    pair: str
    """`res32x4-mv2`, with the data set in front where a table has several."""
    first: str
    """Key of a cell."""
    second: str
    """Key of a cell."""
    claimed: float | None = None
    """Published value of the first less that of the second, single numbers both; None where one is missing or
    suspect. Where a cell without the cluster term has no number at these defaults, the one at SDD's stands in for it,
    as in the paper's own tables."""


@dataclass(frozen=True)
class Table:
    """What `icdctl reproduce NAME` stands for."""

    name: str
    about: str
    source: str
    cells: tuple[Cell, ...]
    claims: tuple[Claim, ...] = ()
    metric: Metric = "top1"
    margin: float = 0.5
    """The difference that does not matter: points of top-1, or a share of the ratio for times. Half a point is twice
    the spread of a seed. What SDD adds to plain methods is more in the published tables; what CD adds to SDD is less,
    and that is what the claims are for."""
    notes: tuple[str, ...] = ()

    def cell(self, key: str) -> Cell:
        """The cell of that name.

        Raises:
            UsageError: there is none.
        """
        for cell in self.cells:
            if cell.key == key:
                return cell
        raise unknown_name(
            f"cell of `{self.name}`",
            key,
            [cell.key for cell in self.cells],
            listing=f"icdctl reproduce {self.name} --list",
        )


def load(name: str) -> Table:
    """The table of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in TABLES:
        raise unknown_name("table", name, TABLES, listing="icdctl reproduce --list")
    return _built(name)


@cache
def _built(name: str) -> Table:
    return TABLES[name]()


def select(
    cells: Iterable[Cell],
    *,
    family: str | None = None,
    methods: Collection[str] | None = None,
    students: Collection[str] | None = None,
) -> tuple[Cell, ...]:
    """The cells of a family (and those that belong to none), of some methods, of some students."""
    return tuple(
        cell
        for cell in cells
        if (family is None or not cell.families or family in cell.families)
        and (methods is None or cell.method in methods)
        and (students is None or cell.student in students)
    )


def _unique(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """One cell for each key, with the families and published rows of all that have it."""
    by_key: dict[str, Cell] = {}
    for cell in cells:
        known = by_key.get(cell.key)
        if known is not None:
            families = tuple(name for name in FAMILIES if name in known.families + cell.families)
            rows = known.published + tuple(row for row in cell.published if row not in known.published)
            cell = replace(known, families=families, published=rows)
        by_key[cell.key] = cell
    return tuple(by_key.values())


def _icd(dataset: str, pairs: Sequence[Pair]) -> tuple[Cell, ...]:
    """CD, SDD and plain methods of the same pairs, in both families, and the students without a teacher."""
    cells = []
    for teacher, student in pairs:
        for loss in LOSSES:
            for method in (f"cd_sdd_{loss}", f"sdd_{loss}", loss):
                for family in FAMILIES:
                    cells.append(_icd_cell(dataset, teacher, student, method, family))
        cells.append(_plain(dataset, student))
    return _unique(cells)


def _icd_cell(dataset: str, teacher: str, student: str, method: str, family: str) -> Cell:
    has_cluster = method.startswith("cd_")
    if has_cluster:
        rows = published.find(
            dataset=dataset,
            teacher=teacher,
            student=student,
            method=method,
            kind="student",
            source="iCD:eval",
            family=family,
            scales=SCALES,
        )
        # The ablations have rows of the same name and gamma; they are other runs, and stand in their own tables.
        rows = tuple(row for row in rows if row.heading is None or not row.heading.startswith(_ABLATIONS))
        headed = [source for source, named in _HEADED_OTHERWISE.items() if named == (method, family)]
        rows += tuple(
            row
            for row in published.find(dataset=dataset, teacher=teacher, student=student, source="iCD:eval")
            if row.source in headed
        )
    else:
        rows = _sdd_rows(dataset, teacher, student, method)
        # What beta these numbers were made with is not recorded; DKD's and SDD's code has 8 by default.
        if paper.settings_of(dataset, teacher, student, method, family) != paper.settings_of(
            dataset, teacher, student, method, "gamma8"
        ):
            rows = ()
    return Cell(
        dataset,
        teacher,
        student,
        method,
        settings=dict(paper.settings_of(dataset, teacher, student, method, family)),
        scales=SCALES if "sdd" in method else (),
        families=(family,),
        published=rows,
    )


_ABLATIONS = ("gamma的影响", "patch数量的影响")
"""Headings of the reference's ablations: the influence of gamma, the influence of the number of patches."""
_HEADED_OTHERWISE = {
    "iCD:eval.sh:291": ("cd_sdd_kd", "gamma2"),
    "iCD:eval_cub.sh:84": ("cd_sdd_kd", "gamma2"),
    "iCD:eval_cub.sh:88": ("cd_sdd_kd", "gamma2"),
    "iCD:eval_cub.sh:92": ("cd_sdd_kd", "gamma2"),
}
"""Suspect rows that stand under the heading of another method or gamma than their folder says: shown with both."""


def _sdd_rows(dataset: str, teacher: str, student: str, method: str) -> tuple[Row, ...]:
    """A cell's rows of SDD's main tables."""
    rows = published.find(dataset=dataset, teacher=teacher, student=student, method=method, kind="student")
    return tuple(row for row in rows if row.paper in _SDD_MAIN)


_SDD_MAIN = ("SDD (CVPR 2024) Table 1", "SDD (CVPR 2024) Table 2", "SDD (CVPR 2024) Table 5")


def _plain(dataset: str, student: str) -> Cell:
    """A student that is trained without a teacher; its one number stands in several columns."""
    rows = published.find(dataset=dataset, student=student, kind="plain")
    return Cell(dataset, None, student, "ce", published=rows[:1])


def _claims(cells: Sequence[Cell], *, families: Sequence[str]) -> tuple[Claim, ...]:
    """CD against SDD, SDD against the plain method, CD against the plain method: each loss, family and pair."""
    found = []
    pairs = list(dict.fromkeys((cell.teacher, cell.student) for cell in cells if cell.teacher))
    for loss in LOSSES:
        for better, worse in ((f"cd_sdd_{loss}", f"sdd_{loss}"), (f"sdd_{loss}", loss), (f"cd_sdd_{loss}", loss)):
            for family in families:
                for teacher, student in pairs:
                    keys = {
                        cell.method: cell.key
                        for cell in cells
                        if (cell.teacher, cell.student) == (teacher, student)
                        and (not family or family in cell.families)
                        and not cell.overrides
                        and not cell.detail
                        and cell.scales in ((), SCALES)
                    }
                    if better in keys and worse in keys:
                        found.append(_claim(f"{better} - {worse}", cells, keys[better], keys[worse], family=family))
    return tuple(found)


def _claim(comparison: str, cells: Sequence[Cell], first: str, second: str, *, family: str = "") -> Claim:
    by_key = {cell.key: cell for cell in cells}
    cell, other = by_key[first], by_key[second]
    number, other_number = (
        _number_at_any_defaults(of_claim, cells) if family else of_claim.reference for of_claim in (cell, other)
    )
    claimed = None if number is None or other_number is None else number.top1 - other_number.top1
    return Claim(comparison, family, f"{cell.teacher}-{cell.student}", first, second, claimed)


def _number_at_any_defaults(cell: Cell, cells: Sequence[Cell]) -> Reference | None:
    if cell.reference is not None or cell.method.startswith("cd_"):
        return cell.reference
    same = [
        known.reference
        for known in cells
        if (known.teacher, known.student, known.method) == (cell.teacher, cell.student, cell.method)
    ]
    return next((found for found in same if found is not None), None)


def _icd_cifar100() -> Table:
    cells = _icd("cifar100", CIFAR100_PAIRS)
    fault = Cell(
        "cifar100",
        "vgg13",
        "mv2",
        "cd_sdd_kd",
        settings={"gamma": 2.0},
        scales=SCALES,
        overrides={"lr": 0.05},
        published=tuple(
            row.model_copy(update={"suspect": None})
            for row in published.find(source="iCD:eval.sh:312", family="gamma2")
        ),
        note="as its config says; the collapsed number 60.19 was most likely made with this rate",
    )
    return Table(
        "icd-cifar100",
        "CD, SDD and plain methods on CIFAR-100, 10 pairs",
        "iCD (arXiv:2509.12553), values recorded in its repository; SDD's tables for what it compares with",
        (*cells, fault),
        _claims(cells, families=FAMILIES),
        notes=(
            "Which of the recorded runs the paper prints is not known: the printed tables were not reachable. Both "
            "sets of defaults are here, as gamma2 and gamma8.",
            "Published values of sdd_dkd, sdd_nkd and dkd stand at the beta that SDD's code has, 8 or that of the "
            "pair's file.",
        ),
    )


def _icd_cub200() -> Table:
    cells = _icd("cub200", CUB200_PAIRS)
    return Table(
        "icd-cub200",
        "CD, SDD and plain methods on CUB-200, 5 pairs",
        "iCD (arXiv:2509.12553), values recorded in its repository; SDD's Table 5 for what it compares with",
        cells,
        _claims(cells, families=FAMILIES),
        notes=(_NO_TEACHER,),
    )


_SDD_METHODS = ("kd", "sdd_kd", "dkd", "sdd_dkd", "nkd", "sdd_nkd")


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
        cells.append(_plain(dataset, student))
    return _unique(cells)


_SDD_NOTES = {
    ("cifar100", "res50", "vgg8", "sdd_nkd"): "SDD's script trains this cell with scales 1,2; the paper says 1,2,4",
    ("cifar100", "wrn40_2", "vgg8", "sdd_nkd"): "SDD's script trains this cell with scales 1,2; the paper says 1,2,4",
}


def _sdd_cifar100() -> Table:
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
    cells = _unique((*main, *rest))
    return Table(
        "sdd-cifar100",
        "SDD, plain methods and others on CIFAR-100: 10 pairs, scales, ablations",
        "SDD (arXiv:2403.13512), Tables 1, 2, 6, 7, 8 and appendix",
        cells,
        _claims(main, families=("",)),
        notes=("Beta is 8, the default of SDD's code, or what the pair's file states.",),
    )


def _sdd_cub200() -> Table:
    cells = _sdd_main("cub200", CUB200_PAIRS)
    return Table(
        "sdd-cub200",
        "SDD, plain methods and others on CUB-200, 5 pairs",
        "SDD (arXiv:2403.13512), Table 5",
        cells,
        _claims(cells, families=("",)),
        notes=(_NO_TEACHER, "Beta is 8, the default of SDD's code, or what the pair's file states."),
    )


def _dkd_cifar100() -> Table:
    rows = published.find(dataset="cifar100", kind="student", paper="DKD (CVPR 2022)")
    cells = []
    for row in rows:
        teacher, student, method = row.teacher or "", row.student or "", row.method or ""
        settings = dict(paper.settings_of("cifar100", teacher, student, method, "gamma8"))
        cells.append(Cell("cifar100", teacher, student, method, settings=settings, published=(row,)))
    pairs = list(dict.fromkeys((cell.teacher, cell.student) for cell in cells))
    by_name = {(cell.teacher, cell.student, cell.method): cell.key for cell in cells}
    claims = tuple(
        _claim("dkd - kd", cells, by_name[teacher, student, "dkd"], by_name[teacher, student, "kd"])
        for teacher, student in pairs
    )
    return Table(
        "dkd-cifar100",
        "DKD and KD on CIFAR-100, 11 pairs",
        "DKD (arXiv:2203.08679), the README of mdistiller",
        _unique(cells),
        claims,
        notes=(
            "Beta is 8, mdistiller's default, or what the file of the pair states; the paper tunes it, and its list "
            "was not reachable.",
            "mdistiller does not clip gradients; the recipe here does, at a norm of 40.",
        ),
    )


def _crd_cifar100() -> Table:
    rows = published.find(dataset="cifar100", kind="student", paper="CRD (ICLR 2020)")
    cells = [
        Cell("cifar100", row.teacher, row.student or "", row.method or "", published=(row,))
        for row in sorted(rows, key=lambda row: row.id)
    ]
    by_name = {(cell.teacher, cell.student, cell.method): cell.key for cell in cells}
    claims = tuple(
        _claim("crd - kd", cells, key, by_name[teacher, student, "kd"])
        for (teacher, student, method), key in by_name.items()
        if method == "crd"
    )
    return Table(
        "crd-cifar100",
        "13 methods on CIFAR-100, 13 pairs",
        "CRD (arXiv:1910.10699), the README of RepDistiller",
        _unique(cells),
        claims,
        notes=(
            "These are final epochs, means of several runs. All methods but KD are without KD beside them.",
            "CRD does not clip gradients; the recipe here does, at a norm of 40.",
        ),
    )


def _icd_gamma() -> Table:
    cells = tuple(
        Cell(
            "cub200",
            "res32x4",
            "shuv1",
            "cd_sdd_kd",
            settings={"gamma": float(gamma)},
            scales=SCALES,
            published=tuple(row for row in _ablation(_ABLATIONS[0], "res32x4") if row.gamma == gamma),
        )
        for gamma in range(1, 9)
    )
    return Table(
        "icd-gamma",
        "the weight of the cluster term, 1 to 8, on CUB-200",
        "iCD's repository, eval_cub.sh",
        cells,
        tuple(_claim(f"gamma {gamma} - gamma 1", cells, cells[gamma - 1].key, cells[0].key) for gamma in range(2, 9)),
        notes=(_NO_TEACHER,),
    )


def _icd_scales() -> Table:
    cells, claims = [], []
    for teacher, student, gamma in (("res32x4", "shuv1", 1.0), ("vgg13", "vgg8", 2.0)):
        of_pair = {}
        for scales in SCALE_SETS:
            rows = tuple(row for row in _ablation(_ABLATIONS[1], teacher) if row.scales == scales)
            cell = Cell(
                "cub200", teacher, student, "cd_sdd_kd", settings={"gamma": gamma}, scales=scales, published=rows
            )
            of_pair[scales] = cell.key
            cells.append(cell)
        claims += [
            _claim(f"scales {','.join(map(str, scales))} - scales 1", cells, of_pair[scales], of_pair[1,])
            for scales in SCALE_SETS[1:]
        ]
    return Table(
        "icd-scales",
        "which scales the patches have, on CUB-200",
        "iCD's repository, eval_cub.sh",
        tuple(cells),
        tuple(claims),
        notes=(
            _NO_TEACHER,
            "Gamma is 1 for the first pair and 2 for the second, as their files state.",
            "The published code refuses 2, 4, 1,4 and 2,4, although numbers are recorded for them.",
            "With scale 1 alone there is one patch: SDD is the plain method, and the cluster term is 0.",
        ),
    )


def _ablation(heading: str, teacher: str) -> tuple[Row, ...]:
    rows = published.find(dataset="cub200", teacher=teacher, method="cd_sdd_kd", source="iCD:eval_cub.sh")
    return tuple(row for row in rows if row.heading == heading)


def _icd_time() -> Table:
    teacher, student = "res32x4", "mv2"
    cells = []
    for loss in LOSSES:
        for method in (loss, f"sdd_{loss}", f"cd_sdd_{loss}"):
            rows = published.find(dataset="cub200", teacher=teacher, student=student, method=method, kind="time")
            cells.append(
                Cell(
                    "cub200",
                    teacher,
                    student,
                    method,
                    settings=dict(paper.settings_of("cub200", teacher, student, method, "gamma2")),
                    scales=SCALES if "sdd" in method else (),
                    published=rows,
                    metric="seconds_per_step",
                )
            )
    for row in published.find(dataset="cifar100", kind="time"):
        method = row.method or ""
        cells.append(
            Cell(
                "cifar100",
                row.teacher,
                row.student or "",
                method,
                scales=SCALES if "sdd" in method else (),
                published=(row,),
                metric="seconds_per_step",
            )
        )
    return Table(
        "icd-time",
        "seconds a training step, as ratios to kd",
        "iCD's repository, ablation_study.sh (CUB-200); SDD's Table 9 (CIFAR-100)",
        tuple(cells),
        metric="seconds_per_step",
        margin=0.1,
        notes=(
            "Seconds of other hardware can't be compared; their ratios to kd on the same hardware can.",
            "iCD's timer is read before the GPU has finished, except where the method itself waits for it. Its ratios "
            "of 2.6 are most likely that (an inference from its code); SDD's own ratio is 1.",
            "iCD's config of kd in this study has lr 0.05 where its siblings have 0.01; a rate costs no time.",
        ),
    )


def _demo() -> Table:
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
    return Table(
        "demo",
        "the same comparisons on the embedded digits, in minutes",
        "nobody published numbers for this data set: only the claims are tested",
        cells,
        (
            _claim("cd_sdd_dkd - sdd_dkd", cells, cd, sdd),
            _claim("sdd_dkd - dkd", cells, sdd, base),
            _claim("cd_sdd_dkd - dkd", cells, cd, base),
            _claim("dkd - ce", cells, base, plain),
        ),
        notes=("Small synthetic compositions of real digits: this shows the machinery, not how methods rank.",),
    )


TABLES: dict[str, Callable[[], Table]] = {
    "icd-cifar100": _icd_cifar100,
    "icd-cub200": _icd_cub200,
    "sdd-cifar100": _sdd_cifar100,
    "sdd-cub200": _sdd_cub200,
    "dkd-cifar100": _dkd_cifar100,
    "crd-cifar100": _crd_cifar100,
    "icd-gamma": _icd_gamma,
    "icd-scales": _icd_scales,
    "icd-time": _icd_time,
    "demo": _demo,
}
"""Name -> what builds it from the published results and the paper's settings."""
