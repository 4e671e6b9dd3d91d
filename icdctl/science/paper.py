"""The reference's training configurations in our names, and what was corrected in them: `paper.json`.

docs/make_paper.py makes the file from a transcript of the reference's files and says of every fault what is done. What
all configurations share (240 epochs, batches of 64, weight decay, decay of the rate) is in the recipes `cifar100` and
`cub200`; here is what differs between them.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from functools import cache

from pydantic import BaseModel, ConfigDict, ValidationError

from icdctl.errors import ArtifactError, UsageError

FILE = "paper.json"
FAMILIES = ("gamma2", "gamma8")
"""Two sets of defaults that the recorded results come from; `Paper.families` has their numbers. What a file states
itself (beta 6 for some pairs) is the same in both."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Family(_Frozen):
    """Defaults of the reference at one time."""

    beta: float
    gamma: float
    about: str


class Config(_Frozen):
    """One of the reference's files."""

    config: str
    """Its name under configs/."""
    group: str
    dataset: str
    teacher: str
    student: str
    method: str
    scales: tuple[tuple[int, ...], ...]
    """Those that its scripts call it with; empty where none does."""
    lr: float
    """That is used."""
    lr_said: float
    settings: dict[str, dict[str, float]] | None
    """Family -> beta and gamma, as far as the method has them; None for a method that icdctl does not have."""
    runs: bool
    """Whether the published code can run it, read from the code."""
    why_not: str | None


class Correction(_Frozen):
    """A fault of one of these files, and what is used."""

    config: str
    key: str
    said: str
    used: str
    why: str


class _MadeFrom(_Frozen):
    file: str
    sha256: str
    configs: int


class Paper(_Frozen):
    """The whole file."""

    made_by: str
    made_from: _MadeFrom
    source: str
    families: dict[str, Family]
    configs: tuple[Config, ...]
    corrections: tuple[Correction, ...]


@cache
def load() -> Paper:
    """The package's file.

    Raises:
        ArtifactError: it is broken.
    """
    return parse(importlib.resources.files("icdctl.science").joinpath(FILE).read_bytes())


def parse(content: bytes) -> Paper:
    """What a file in the format of `paper.json` holds.

    Raises:
        ArtifactError: it is not one; the first problem is named.
    """
    try:
        return Paper.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"the paper's configurations are broken at `{place}`: {first['msg']}", hint="install icdctl again"
        ) from error


def settings_of(dataset: str, teacher: str, student: str, method: str, family: str) -> Mapping[str, float]:
    """Beta and gamma of the paper for a pair, as far as the method has them.

    Where the reference has no file for a plain method and a pair, the file of the SDD method of the same pair says
    whether the pair has a beta of its own; otherwise the family's default holds.

    Raises:
        UsageError: the paper has no settings for this method.
    """
    wanted = (dataset, teacher, student)
    by_method = {
        config.method: config.settings[family]
        for config in load().configs
        if (config.dataset, config.teacher, config.student) == wanted
        and config.settings is not None
        and not config.group.startswith("ablation")
    }
    if method in by_method:
        return by_method[method]
    defaults = load().families[family]
    if method in ("ce", "kd", "sdd_kd"):
        return {}
    if method == "nkd":
        return {"beta": 1.5}  # a constant in the reference's code
    if method == "dkd":
        return by_method.get("sdd_dkd", {"beta": defaults.beta})
    if method in ("sdd_dkd", "sdd_nkd"):
        return {"beta": defaults.beta}
    raise UsageError(
        f"the paper has no settings of `{method}` for {teacher} to {student} on {dataset}",
        hint="`icdctl list methods` shows the defaults of a method",
    )
