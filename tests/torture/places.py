"""Adverse places for sound commands: full disks, few open files, no home, old terminals, odd paths."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import children, system
from .children import Limits, Place
from .originals import DISTILL, SHORT, Originals


@dataclass(frozen=True)
class Adverse:
    """What is wrong with a place."""

    environment: Mapping[str, str | None] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    project_name: str = "project"
    read_only: bool = False
    works: bool = True
    """Commands do their work there; otherwise they may also say why they can't."""


_PLACES: dict[str, Adverse] = {
    "no HOME": Adverse({"HOME": None, "MPLCONFIGDIR": None}),
    "a HOME that does not exist": Adverse({"HOME": "/nowhere/home", "MPLCONFIGDIR": None}),
    "LANG=C": Adverse({"LANG": "C"}),
    "an unknown LANG": Adverse({"LANG": "xx_YY.UTF-8", "LC_ALL": "xx_YY"}),
    "40 columns": Adverse({"COLUMNS": "40"}),
    "1 column": Adverse({"COLUMNS": "1"}),
    "TERM=dumb": Adverse({"TERM": "dumb", "NO_COLOR": None}),
    "no PATH": Adverse({"PATH": None}),
    "an unknown time zone, and times of 1970 for builds": Adverse({"SOURCE_DATE_EPOCH": "0", "TZ": "Nowhere/Town"}),
    "a path with spaces": Adverse(project_name=" a project  of mine"),
    "a path with umlauts": Adverse(project_name="Übung größe é"),
    "a path with umlauts, LANG=C": Adverse({"LANG": "C"}, project_name="Übung"),
    "a path with a newline": Adverse(project_name="two\nlines"),
    "a path with quotes": Adverse(project_name='it\'s "quoted" `$HOME` [red]'),
    "a path of 200 characters": Adverse(project_name="x" * 200),
    "32 open files": Adverse(limits=Limits(open_files=32), works=False),
    "a disk full after 4 KiB": Adverse(limits=Limits(file_bytes=4096), works=False),
    "a disk full after 200 KiB": Adverse(limits=Limits(file_bytes=200_000), works=False),
    "200 MiB of address space": Adverse(limits=Limits(address_bytes=200 << 20), works=False),
    "20 MiB of address space": Adverse(limits=Limits(address_bytes=20 << 20), works=False),
    "a read-only project": Adverse(limits=Limits(obeys_permissions=True), read_only=True, works=False),
    "no /dev/shm": Adverse(limits=Limits(shared_memory=False)),
    "a clock set back by a year": Adverse(limits=Limits(days_ahead=-365)),
    "a clock ahead by a year": Adverse(limits=Limits(days_ahead=365)),
}
_COMMANDS: tuple[tuple[str, ...], ...] = (
    ("train", "--model", "res8", *SHORT, "--max-steps", "2", "--out", "new"),
    (*DISTILL, "--method", "kd", *SHORT, "--max-steps", "2", "--out", "taught"),
    ("eval", "student"),
    ("verify", "exported"),
    ("registry", "add", "student", "--name", "other"),
    ("registry", "list"),
    ("list", "models"),
    ("clean", "--list"),
    ("grid", "status"),
)
_NEEDS = ("teacher", "student", "exported", "params.yaml", "cells.yaml")


def names() -> list[str]:
    """All adverse places that this user can make."""
    can_hide = system.can_hide_shared_memory()
    return [name for name, adverse in _PLACES.items() if can_hide or adverse.limits.shared_memory]


def run(name: str, originals: Originals, folder: Path) -> list[str]:
    """Run sound commands in one adverse place; the faults."""
    adverse = _PLACES[name]
    place = Place(folder / "place", adverse.environment, adverse.project_name).make(originals.sources(_NEEDS))
    if adverse.read_only:
        _make(place.project, 0o555)
    faults = []
    for command in _COMMANDS:
        ended = children.run(command, place, limits=adverse.limits)
        found = [*ended.faults(), *(f"left `{stray}`" for stray in place.strays())]
        if adverse.works and ended.code != 0:
            found.append(f"exit code {ended.code}: {ended.err[-300:]}")
        faults += [f"icdctl {' '.join(command)}: {fault}" for fault in found]
    if adverse.read_only:
        _make(place.project, 0o755)
    if faults:
        place.root.rename(folder / f"place-{list(_PLACES).index(name)}")
    else:
        shutil.rmtree(place.root)
    return faults


def _make(project: Path, mode: int) -> None:
    """Give a folder and all folders in it these permissions."""
    for folder in (project, *(path for path in project.rglob("*") if path.is_dir())):
        folder.chmod(mode)
