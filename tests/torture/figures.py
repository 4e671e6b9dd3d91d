"""The figures of an attack, and where docs/reliability.md has them."""

from __future__ import annotations

import datetime
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icdctl import versions

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
"""What stands before and after the figures in the page."""


@dataclass(frozen=True)
class Figures:
    """What an attack did and found."""

    seed: int
    minutes: float
    places: int
    jobs: int
    """Jobs that were killed, each once or several times."""
    kills: int
    crowds: int
    """Jobs that were run several times at once."""
    mutations: int
    killed: Counter[str]
    """Job -> kills."""
    mutated: Counter[str]
    """Kind of file -> mutations."""
    codes: Counter[int]
    """Exit code of a command on a mutated file -> how often."""
    slowest: float
    """Seconds of the slowest command on a mutated file."""
    faults: int
    """Cases with a fault."""

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]], *, seed: int, seconds: float) -> Figures:
        """Count the rows of all workers."""
        kills = [row for row in rows if row["part"] == "kill"]
        mutations = [row for row in rows if row["part"] == "mutation"]
        killed = Counter[str]()
        for row in kills:
            killed[row["of"]] += row["kills"]
        return cls(
            seed=seed,
            minutes=seconds / 60,
            places=sum(row["part"] == "place" for row in rows),
            jobs=len(kills),
            kills=killed.total(),
            crowds=sum(row["part"] == "together" for row in rows),
            mutations=len(mutations),
            killed=killed,
            mutated=Counter(row["of"] for row in mutations),
            codes=Counter(row["code"] for row in mutations),
            slowest=max((row["seconds"] for row in mutations), default=0.0),
            faults=sum(bool(row["faults"]) for row in rows),
        )

    @property
    def summary(self) -> str:
        """One line."""
        return (
            f"{self.kills} kills of {self.jobs} jobs, {self.crowds} jobs several times at once, {self.mutations} "
            f"mutations, {self.places} adverse places in {self.minutes:.1f} minutes (seed {self.seed}): "
            f"{self.faults} cases with a fault"
        )


def write(page: Path, figures: Figures) -> None:
    """Put the figures between the two markers of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{_shown(figures)}\n{END}{after}", encoding="utf-8")


def _shown(figures: Figures) -> str:
    known = versions.versions(["torch", "onnxruntime", "numpy", "pillow"])
    named = ", ".join(f"{name} {version}" for name, version in known.items())
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    codes = ", ".join(f"{count:,} with {code}" for code, count in sorted(figures.codes.items()))
    return "\n".join(
        [
            f"Run on {day}, {figures.minutes:.0f} minutes, seed {figures.seed}, {_machine()}; {named}.",
            "",
            "| what was done | how often |",
            "|---|---|",
            f"| commands killed at a random instant and repeated until they ended | {figures.kills:,} kills, "
            f"{figures.jobs:,} times compared |",
            f"| commands run two to four times at once, a quarter of them killed | {figures.crowds:,} |",
            f"| files mutated and given to a command | {figures.mutations:,} |",
            f"| exit codes on mutated files | {codes} |",
            f"| slowest command on a mutated file | {figures.slowest:.1f} s |",
            f"| adverse places, nine commands in each | {figures.places} |",
            f"| cases with a fault | {figures.faults} |",
            "",
            _table("job", "kills", figures.killed),
            "",
            _table("kind of file", "mutations", figures.mutated),
            "",
        ]
    )


def _table(what: str, count: str, counted: Counter[str]) -> str:
    rows = [f"| {name} | {number:,} |" for name, number in sorted(counted.items())]
    return "\n".join([f"| {what} | {count} |", "|---|---|", *rows])


def _machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {models[0] if models else name}"
