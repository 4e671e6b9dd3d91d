"""Importing configurations as cells: YAML files of the mdistiller family (itself, SDD, iCD), and a run's config.json.

Values of a file are kept, even where they look wrong. A warning, one line each, names what can't be taken over,
contradicts itself, or is never read by the code that the file was written for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from icdctl import data, files, methods, models
from icdctl.config import recipes, resolving, sources
from icdctl.config.run_config import RunConfig
from icdctl.errors import ArtifactError, UsageError, unknown_name
from icdctl.files import yaml_reading
from icdctl.grid.cells import GridCell, make_cell
from icdctl.methods import METHODS
from icdctl.models.external import CUSTOM_MODEL
from icdctl.papers.catalogue import resolved
from icdctl.papers.table_runs import name_of
from icdctl.science import paper
from icdctl.science.experiments import SCALES, Cell
from icdctl.science.paper import FAMILIES

_LARGEST_BYTES = 256 * 1024
_LONGEST_SHOWN = 60

_SOLVER: dict[str, tuple[str, object]] = {
    "BATCH_SIZE": ("batch_size", 64),
    "EPOCHS": ("epochs", 240),
    "LR": ("lr", 0.05),
    "LR_DECAY_STAGES": ("lr_decay_epochs", [150, 180, 210]),
    "LR_DECAY_RATE": ("lr_decay_rate", 0.1),
    "WEIGHT_DECAY": ("weight_decay", 1e-4),
    "MOMENTUM": ("momentum", 0.9),
}
"""Key -> our option, and the default of that code."""
_KD_KEYS = {"temperature": "KD.TEMPERATURE", "ce_weight": "KD.LOSS.CE_WEIGHT", "kd_weight": "KD.LOSS.KD_WEIGHT"}
_DKD_KEYS = {"ce_weight": "DKD.CE_WEIGHT", "alpha": "DKD.ALPHA", "beta": "DKD.BETA", "temperature": "DKD.T"}
_NKD_KEYS = {"ce_weight": "DKD.CE_WEIGHT", "beta": "DKD.BETA", "temperature": "DKD.T", "warmup_epochs": "DKD.WARMUP"}
_GAMMA = {"gamma": "CD.GAMMA"}
_READ: dict[str, dict[str, str]] = {
    "kd": _KD_KEYS,
    "sdd_kd": _KD_KEYS,
    "cd_sdd_kd": {**_KD_KEYS, **_GAMMA},
    "dkd": {**_DKD_KEYS, "warmup_epochs": "DKD.WARMUP"},
    "sdd_dkd": _DKD_KEYS,
    "cd_sdd_dkd": {**_DKD_KEYS, **_GAMMA},
    "nkd": {"ce_weight": "DKD.CE_WEIGHT", "warmup_epochs": "DKD.WARMUP"},
    "sdd_nkd": _NKD_KEYS,
    "cd_sdd_nkd": {**_NKD_KEYS, **_GAMMA},
    "fitnet": {
        "hint_stage": "FITNET.HINT_LAYER",
        "ce_weight": "FITNET.LOSS.CE_WEIGHT",
        "feature_weight": "FITNET.LOSS.FEAT_WEIGHT",
    },
}
"""Method -> setting -> the key that the reference's code reads it from. Its SDD_DKD and CD_SDD_DKD take the warm-up
from the command line, and its NKD has constants for temperature and beta."""
_NO_METHOD_SECTIONS = ("EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG")
_FROM_THE_GRID = ("seed", "out")


@dataclass(frozen=True)
class Imported:
    """A cell, and the warnings about its file."""

    cell: GridCell
    warnings: tuple[str, ...]


def read(path: Path, *, name: str | None = None, family: str = "gamma2", scales: str | None = None) -> Imported:
    """Read a configuration as a cell.

    Args:
        path: a YAML file of the mdistiller family, or a run's config.json.
        name: the name of the cell; by default it is made from the file.
        family: the paper whose beta and gamma are taken where a YAML file states none.
        scales: the patch grids, which a YAML file does not state; 1,2,4 by default.

    Raises:
        ArtifactError: the file is missing, is not YAML, or is hostile.
        UsageError: it is not such a configuration, or names what icdctl does not have.
    """
    if family not in FAMILIES:
        raise unknown_name("family", family, FAMILIES, listing="icdctl recipes import --help")
    content = _parsed(path)
    if "DISTILLER" in content:
        options, warnings = _from_reference(_Stated(path, content), family, scales)
    elif "command" in content and "student" in content:
        if scales is not None:
            raise UsageError(f"`{path}` states its scales itself", hint="leave out `--scales`")
        options, warnings, made_name = _from_run(path, content)
        return Imported(make_cell(name or made_name, options, origin=f"`{path}`"), tuple(warnings))
    else:
        raise UsageError(
            f"`{path}` has neither a section `DISTILLER`, as files of mdistiller, SDD and iCD, nor is it a run's "
            "config.json",
            hint="for a params.yaml, take its `cells` over by hand",
        )
    return Imported(make_cell(name or _usual_name(options), options, origin=f"`{path}`"), tuple(warnings))


def _parsed(path: Path) -> dict[str, object]:
    """The mapping in a file that is not trusted."""
    hint = "name a configuration of mdistiller, SDD or iCD, or a run's config.json"
    if path.is_file() and path.stat().st_size > _LARGEST_BYTES:
        raise ArtifactError(f"`{path}` is refused: larger than {_LARGEST_BYTES // 1024} KiB", hint=hint)
    content = files.read_foreign(path, what="configuration", example="res32x4_mv2.yaml", again=hint)
    try:
        value = yaml_reading.parse_yaml(content.decode("utf-8"), aliases=False)
    except ValueError as error:
        raise ArtifactError(f"`{path}` can't be read as YAML: {error}", hint=hint) from error
    if not isinstance(value, dict):
        raise UsageError(f"`{path}` does not hold a mapping", hint=hint)
    return value


class _Stated:
    """The content of a YAML file, which remembers what was read."""

    def __init__(self, path: Path, content: Mapping[str, object]) -> None:
        self.path = path
        self._content = content
        self._read: set[str] = set()

    def take(self, key: str) -> object:
        """The value of a dotted key; None where it is not stated."""
        self._read.add(key)
        value: object = self._content
        for part in key.split("."):
            if not isinstance(value, dict):
                raise self.wrong(key, value, "a section")
            if part not in value:
                return None
            value = value[part]
        return value

    def text(self, key: str) -> str | None:
        """The text of a dotted key; None where it is not stated."""
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, value, "a name")
        return value

    def number(self, key: str) -> float | None:
        """The finite number of a dotted key; None where it is not stated."""
        value = self.take(key)
        if isinstance(value, str):  # YAML reads 1e-4, without a point, as text
            try:
                value = float(value)
            except ValueError:
                raise self.wrong(key, value, "a number") from None
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self.wrong(key, value, "a number")
        if value is not None and not (abs(value) < 1e300 and math.isfinite(value)):
            raise self.wrong(key, value, "a finite number")
        return value

    def rest(self) -> Iterator[tuple[str, object]]:
        """Dotted keys that were not read, with their values, without empty ones."""
        return (
            (key, value) for key, value in _leaves(self._content) if key not in self._read and value not in ("", None)
        )

    def wrong(self, key: str, value: object, expected: str) -> UsageError:
        """The error for a value of the wrong kind."""
        return UsageError(f"`{key}` in `{self.path}` is `{_shown(value)}`, expected {expected}", hint="fix the file")


def _leaves(content: Mapping[str, object], before: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _from_reference(stated: _Stated, family: str, scales: str | None) -> tuple[dict[str, object], list[str]]:
    """Options of a run, and warnings."""
    method, names = _method_and_models(stated)
    row = methods.get(method)
    warnings: list[str] = []
    dataset = _dataset(stated, warnings)
    options: dict[str, object] = {"dataset": dataset, **names, "method": method}
    if not row.needs_teacher and "teacher" in options:
        warnings.append(f"DISTILLER.TEACHER {options.pop('teacher')} is left out: `{method}` reads no teacher")
    if row.needs_patches:
        if scales is None:
            warnings.append(
                "such a file does not state scales (that code takes `--M`): 1,2,4 are used; `--scales` gives others"
            )
        parsed = SCALES if scales is None else methods.parse_scales(scales)
        options["scales"] = list(parsed)
        plain = [key for key in ("TEACHER", "STUDENT") if not str(stated.text(f"DISTILLER.{key}")).endswith("_sdd")]
        if plain:
            warnings.append(
                f"DISTILLER.{' and DISTILLER.'.join(plain)} named without `_sdd`: that code reads no patches of such "
                "models; here all have them"
            )
    elif scales is not None:
        raise UsageError(f"`{method}` reads no patches", hint="leave out `--scales`")
    settings = _settings(stated, method, family, warnings)
    if settings:
        options["settings"] = settings
    options |= _solver(stated, options, warnings)
    warnings += _contradictions(stated, method, settings)
    for key, value in stated.rest():
        is_method = key.partition(".")[0] not in _NO_METHOD_SECTIONS
        reason = f"`{method}` never reads it" if is_method else "it can't be taken over"
        warnings.append(f"{key} {_shown(value)} is left out: {reason}")
    resolved(options)
    return options, [f"{stated.path}: {warning}" for warning in warnings]


def _method_and_models(stated: _Stated) -> tuple[str, dict[str, str]]:
    """The method, and the models by role; the first name that is not known is an error."""
    kind = stated.text("DISTILLER.TYPE")
    student = stated.text("DISTILLER.STUDENT")
    teacher = stated.text("DISTILLER.TEACHER")
    if kind is None or student is None:
        missing = "TYPE" if kind is None else "STUDENT"
        raise UsageError(f"`{stated.path}` states no `DISTILLER.{missing}`", hint="fix the file")
    method = "ce" if kind.upper() == "NONE" else methods.resolve(kind)
    names = {"student": models.resolve(student)}
    if teacher is None and methods.get(method).needs_teacher:
        raise UsageError(f"`{stated.path}` states no `DISTILLER.TEACHER`", hint="fix the file")
    return method, {**({} if teacher is None else {"teacher": models.resolve(teacher)}), **names}


def _dataset(stated: _Stated, warnings: list[str]) -> str:
    given = stated.text("DATASET.TYPE") if stated.take("DATASET") is not None else None
    dataset = data.resolve(given or "cifar100")
    folders = [part.lower() for part in stated.path.absolute().parts[:-1]]
    other = next((name for name in data.DATASETS if name in folders and name != dataset), None)
    said = "is not stated, which is cifar100 in that code" if given is None else f"is {given}"
    if other is not None and dataset not in folders:
        warnings.append(f"DATASET.TYPE {said}, though the file lies under {other}/: {dataset} is used")
    return dataset


def _settings(stated: _Stated, method: str, family: str, warnings: list[str]) -> dict[str, float]:
    """Settings of the method: always beta and gamma, as in the papers' cells; others that are not defaults."""
    defaults = methods.get(method).defaults
    of_family = paper.load().families
    found: dict[str, float] = {}
    for setting, default in defaults.items():
        key = _READ.get(method, {}).get(setting)
        value = None if key is None else stated.number(key)
        is_named = setting in ("beta", "gamma")
        if key is not None and value is None and is_named:
            value = getattr(of_family[family], setting)
            others = [
                f"{getattr(row, setting):g} by `--family {name}`" for name, row in of_family.items() if name != family
            ]
            warnings.append(f"{key} is not stated: {value:g}, the default of {family}; {', '.join(others)}")
        value = default if value is None else value
        if is_named or value != default:
            found[setting] = float(value)
    methods.check_settings(method, found)
    return found


def _solver(stated: _Stated, options: Mapping[str, object], warnings: list[str]) -> dict[str, object]:
    """Options that differ from the recipe of the data set."""
    usual = resolved(options).model_dump(mode="json")
    found: dict[str, object] = {}
    for key, (option, default) in _SOLVER.items():
        name = f"SOLVER.{key}"
        given: object = _stages(stated, name) if option == "lr_decay_epochs" else stated.number(name)
        value = default if given is None else given
        if value == usual[option]:
            continue
        found[option] = value
        if given is None:
            warnings.append(
                f"{name} is not stated: {value}, which is the default of that code; the recipe `{usual['recipe']}` has "
                f"{usual[option]}"
            )
        elif option == "lr":
            warnings.append(
                f"{name} {value:g} is kept; the recipe `{usual['recipe']}` has {usual['lr']:g} for `{usual['student']}`"
            )
    optimizer = (stated.text("SOLVER.TYPE") or "SGD").lower()
    if optimizer != usual["optimizer"]:
        found["optimizer"] = optimizer
    trainer = stated.text("SOLVER.TRAINER")
    if trainer not in (None, "base"):
        warnings.append(f"SOLVER.TRAINER {trainer} is left out: there is one way to train here, which is its `base`")
    return found


def _stages(stated: _Stated, key: str) -> list[int] | None:
    value = stated.take(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise stated.wrong(key, value, "a list of epochs")
    return list(value)


def _contradictions(stated: _Stated, method: str, settings: Mapping[str, float]) -> Iterator[str]:
    """Warnings about names of the experiment that contradict its numbers."""
    for key in ("PROJECT", "TAG", "NAME"):
        name = f"EXPERIMENT.{key}"
        value = str(stated.take(name) or "") if stated.take("EXPERIMENT") is not None else ""
        shown = f"{name} {_shown(value)}"
        faults = []
        for said in re.findall(r"gamma(\d+(?:\.\d+)?)", value):
            if "gamma" not in settings:
                faults.append(f"{shown} names a gamma, and `{method}` has none")
            elif float(said) != settings["gamma"]:
                faults.append(f"{shown} contradicts gamma {settings['gamma']:g}, which is used")
        named = value.partition(",")[0].strip().lower()
        if named in METHODS and named != method:
            faults.append(f"{shown} names another method than `{method}`, which is used")
        yield from faults or ([f"{shown} is left out: it can't be taken over"] if value else [])


def _usual_name(options: Mapping[str, Any]) -> str:
    """A name like those of the papers' cells: unusual values follow the method."""
    taken = ("dataset", "teacher", "student", "method", "scales", "settings")
    overrides = {key: value for key, value in options.items() if key not in taken}
    numbers = {key: value for key, value in overrides.items() if isinstance(value, int | float)}
    scales = tuple(options.get("scales", ()))
    cell = Cell(
        options["dataset"],
        options.get("teacher"),
        options["student"],
        options["method"],
        settings=options.get("settings", {}),
        scales=scales,
        overrides=numbers,
    )
    rest = [f"{key.replace('_', '')}{_joined(value)}" for key, value in overrides.items() if key not in numbers]
    return "-".join([name_of(cell), *rest])


def _joined(value: object) -> str:
    return "_".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _from_run(path: Path, content: Mapping[str, object]) -> tuple[dict[str, object], list[str], str]:
    """Options of a run, warnings, and the name of the cell, without what its recipe already states."""
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        raise sources.from_validation(error, lambda key: f"`{key}` in `{path}`") from error
    for role in ("student", "teacher"):
        if getattr(config, role) == CUSTOM_MODEL:
            raise UsageError(
                f"the {role} of `{path}` is a custom module, which a params.yaml can't name",
                hint="run it with the library",
            )
    stated = sources.options_of(config.model_dump(mode="json"))
    own: dict[str, object] = {"dataset": config.dataset, "student": config.student, "method": config.method}
    if config.teacher is not None:
        own["teacher"] = config.teacher
    if config.scales:
        own["scales"] = list(config.scales)
    if config.recipe != recipes.default_for(config.dataset):
        own["recipe"] = config.recipe
    usual = sources.options_of(resolved(own).model_dump(mode="json"))
    options = {
        key: value
        for key, value in stated.items()
        if key not in (*own, *_FROM_THE_GRID, "settings", "recipe") and value != usual.get(key)
    }
    of_method = resolved({**own, **options}).settings  # its warm-up may depend on the epochs
    settings = {key: value for key, value in config.settings.items() if value != of_method.get(key)}
    options = {**own, **({"settings": settings} if settings else {}), **options}
    if config.teacher is not None:
        options["teacher"] = stated["teacher"]
    resolved(options)
    warnings = [
        f"{path}: {key} {_shown(stated[key])} is left out: the grid gives each run its own" for key in _FROM_THE_GRID
    ]
    marked = f"-{config.method}-s{config.seed}"
    name = resolving.default_run_name(config).replace(marked, f"-{config.method}", 1)
    return options, warnings, re.sub(r"[^A-Za-z0-9._-]+", "_", f"{data.public_name(config.dataset)}-{name}")
