"""One number of a paper's table as a cell that can be trained, and the comparisons that the paper makes.

Nothing here trains a model or knows which methods are installed: `Cell.why_not` receives their names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from icdctl.errors import unknown_name
from icdctl.science import published
from icdctl.science.paper import FAMILIES
from icdctl.science.published import PublishedNumber, Row

Metric = Literal["top1", "seconds_per_step"]
Pair = tuple[str, str]
"""Teacher and student."""

SCALES = (1, 2, 4)
"""The scales of the patches, unless a table states others."""
LOSSES = ("kd", "dkd", "nkd")
"""The losses that the papers extend by SDD and CD."""


@dataclass(frozen=True)
class Cell:
    """One number of a table: what to train for it, and which numbers were published for it."""

    dataset: str
    teacher: str | None
    student: str
    method: str
    settings: Mapping[str, float] = field(default_factory=dict)
    """The settings that the table or the family states; the method's defaults hold for all others."""
    scales: tuple[int, ...] = ()
    """The scales of the patches; empty for a method that reads no patches."""
    overrides: Mapping[str, float | int] = field(default_factory=dict)
    """Values that deviate from the data set's recipe, e.g. `lr`."""
    families: tuple[str, ...] = ()
    """The sets of defaults that the cell belongs to; empty if the table has only one set."""
    detail: str = ""
    """How the run deviates from the method; a cell with such a deviation can't be run."""
    published: tuple[Row, ...] = ()
    """All published rows for this cell, including suspect ones and repetitions."""
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
    def reference(self) -> PublishedNumber | None:
        """The number that the cell is compared with; None if no usable number was published."""
        return published.reference(self.published)

    @property
    def suspect(self) -> str | None:
        """The reason why no published number is usable; None if one is, or if none was published."""
        if self.reference is not None:
            return None
        return next((row.suspect for row in self.published if row.suspect), None)

    def why_not(self, methods: Collection[str]) -> str | None:
        """The reason why the cell can't be run with these methods; None if it can."""
        if self.method not in methods:
            return f"icdctl has no method `{self.method}`"
        if self.detail:
            return f"`{self.method}` has no setting for this: {self.detail}"
        return None


@dataclass(frozen=True)
class Claim:
    """A comparison that a paper makes: the first method is better than the second, for one pair of models."""

    comparison: str
    """The name of the comparison, the same for all pairs of models: `cd_sdd_dkd - sdd_dkd`."""
    family: str
    """The set of defaults that both cells belong to; empty if the table has only one set."""
    pair: str
    """Teacher and student, e.g. `res32x4-mv2`."""
    first: str
    """Key of a cell."""
    second: str
    """Key of a cell."""
    claimed: float | None = None
    """The published number of the first cell minus that of the second; None if one is missing or suspect. If a cell
    without the cluster term has no number at these defaults, its number at SDD's defaults is used instead, as in the
    paper's own tables."""


@dataclass(frozen=True)
class PaperTable:
    """A table of a paper, or the demo's own: the cells and claims that `icdctl reproduce NAME` trains and tests."""

    name: str
    about: str
    source: str
    cells: tuple[Cell, ...]
    claims: tuple[Claim, ...] = ()
    metric: Metric = "top1"
    margin: float = 0.5
    """The largest difference that still counts as equal: points of top-1, or a share of the ratio for times. Half a
    point is twice the spread of a seed. In the published tables, SDD adds more than that to plain methods, and CD adds
    less than that to SDD; therefore the claims are tested separately."""
    notes: tuple[str, ...] = ()

    def cell(self, key: str) -> Cell:
        """The cell with this key.

        Raises:
            UsageError: the table has no such cell.
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


def select(
    cells: Iterable[Cell],
    *,
    family: str | None = None,
    methods: Collection[str] | None = None,
    students: Collection[str] | None = None,
) -> tuple[Cell, ...]:
    """The cells of one family (and those without a family), restricted to some methods and some students.

    None means no restriction.
    """
    return tuple(
        cell
        for cell in cells
        if (family is None or not cell.families or family in cell.families)
        and (methods is None or cell.method in methods)
        and (students is None or cell.student in students)
    )


def unique(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """The cells with duplicates merged: one cell for each key, with the families and published rows of all of them."""
    by_key: dict[str, Cell] = {}
    for cell in cells:
        known = by_key.get(cell.key)
        if known is not None:
            families = tuple(name for name in FAMILIES if name in known.families + cell.families)
            rows = known.published + tuple(row for row in cell.published if row not in known.published)
            cell = replace(known, families=families, published=rows)
        by_key[cell.key] = cell
    return tuple(by_key.values())


def method_claims(cells: Sequence[Cell], *, families: Sequence[str]) -> tuple[Claim, ...]:
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
                        found.append(make_claim(f"{better} - {worse}", cells, keys[better], keys[worse], family=family))
    return tuple(found)


def make_claim(comparison: str, cells: Sequence[Cell], first: str, second: str, *, family: str = "") -> Claim:
    """The claim that the cell with the key `first` is better than the one with the key `second`."""
    by_key = {cell.key: cell for cell in cells}
    cell, other = by_key[first], by_key[second]
    number, other_number = (
        _number_at_any_defaults(each, cells) if family else each.reference for each in (cell, other)
    )
    claimed = None if number is None or other_number is None else number.top1 - other_number.top1
    return Claim(comparison, family, f"{cell.teacher}-{cell.student}", first, second, claimed)


def _number_at_any_defaults(cell: Cell, cells: Sequence[Cell]) -> PublishedNumber | None:
    """The cell's published number; for a cell without the cluster term, also one at the other defaults."""
    if cell.reference is not None or cell.method.startswith("cd_"):
        return cell.reference
    same = [
        known.reference
        for known in cells
        if (known.teacher, known.student, known.method) == (cell.teacher, cell.student, cell.method)
    ]
    return next((found for found in same if found is not None), None)
