"""The training configurations of the reference code under icdctl's names, and their corrections: `paper.json`.

docs/make_paper.py writes this file from a transcript of the reference's files and explains how it corrects each fault.
The recipes `cifar100` and `cub200` hold what all configurations share (240 epochs, batches of 64, weight decay, decay
of the learning rate); this file holds what differs between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from icdctl.errors import UsageError
from icdctl.science.package_file import StrictModel, parse_package_file, read_package_file

FILE = "paper.json"
FAMILIES = ("gamma2", "gamma8")
"""The two sets of defaults that the recorded results were made with; `Paper.families` has their numbers. A value that a
file states itself (beta 6 for some pairs) is the same in both."""


class Family(StrictModel):
    """The defaults of the reference code at one point of its history."""

    beta: float
    gamma: float
    about: str


class PaperConfig(StrictModel):
    """One configuration file of the reference code."""

    config: str
    """Path of the file below configs/."""
    group: str
    dataset: str
    teacher: str
    student: str
    method: str
    scales: tuple[tuple[int, ...], ...]
    """Every set of scales that the reference's scripts pass with this file; empty if no script uses it."""
    lr: float
    """The learning rate that icdctl uses."""
    lr_said: float
    """The learning rate that the file states."""
    settings: dict[str, dict[str, float]] | None
    """Family -> beta and gamma, as far as the method has them; None for a method that icdctl does not have."""
    runs: bool
    """True if the published code can run this file, judged by reading that code."""
    why_not: str | None
    """The reason where it can't be run."""


class Correction(StrictModel):
    """A fault in one of these files, and the value that replaces it."""

    config: str
    key: str
    said: str
    used: str
    why: str


class _ConfigTranscript(StrictModel):
    file: str
    sha256: str
    configs: int


class Paper(StrictModel):
    """The whole of `paper.json`."""

    made_by: str
    made_from: _ConfigTranscript
    source: str
    families: dict[str, Family]
    configs: tuple[PaperConfig, ...]
    corrections: tuple[Correction, ...]


@cache
def load() -> Paper:
    """The configurations that icdctl ships.

    Raises:
        ArtifactError: the file in the package is broken.
    """
    return parse(read_package_file(FILE))


def parse(content: bytes) -> Paper:
    """The content of a file in the format of `paper.json`.

    Raises:
        ArtifactError: the content does not have this format; the message names the first problem.
    """
    return parse_package_file(Paper, content, what="list of the paper's configurations")


def settings_of(dataset: str, teacher: str, student: str, method: str, family: str) -> Mapping[str, float]:
    """Beta and gamma of the paper for a pair, as far as the method has them.

    The reference has no file for some plain methods. The file of the SDD method for the same pair then decides whether
    the pair has its own beta; without one, the family's default is used.

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
        f"the paper has no settings for `{method}` with {teacher} to {student} on {dataset}",
        hint="`icdctl list methods` shows the defaults of a method",
    )
