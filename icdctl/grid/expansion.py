"""The cells that the hand-made part of a params.yaml describes: pairs x methods, ablations, and custom cells.

    methods: {kd: {}, cd_sdd_kd: {gamma: 2, scales: [1, 2, 4]}}
    pairs: {cifar100/res32x4:mv2: {kd: {temperature: 2}}}
    ablations: {gamma: {pairs: cifar100/res32x4:mv2, methods: cd_sdd_kd, gamma: [1, 4]}}

stand for `cifar100-res32x4-mv2-kd-temperature2`, `cifar100-res32x4-mv2-cd_sdd_kd-gamma2`, and the same with gamma 1
and gamma 4. A method's values hold for all pairs, a pair's for that pair, an ablation's for the ablation; what is
stated later in this list wins. Each cell becomes a plain set of options, which nothing else in the file can change.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from icdctl import methods
from icdctl.config.expand import settings_of
from icdctl.config.lookup import OPTIONS
from icdctl.errors import UsageError, unknown_name
from icdctl.methods import SCALES

Cells = dict[str, dict[str, object]]
"""Name of a cell -> options of its runs, and what a pipeline makes before it (`AFTER`)."""

PLAIN = "ce"
"""The method that trains without a teacher."""
AFTER = "after"
"""Key for the file or folder that `dvc.yaml` makes before a cell."""
TEACHERS, DATASETS, CELLS = "teachers", "datasets", "cells"
DATA = "data"
"""Folder of a project's data sets."""
_METHODS, _PAIRS, _ABLATIONS = "methods", "pairs", "ablations"
_PAIR = re.compile(r"(?:(?P<dataset>.+)/)?(?P<teacher>[\w.-]+):(?P<student>[\w.-]+)", re.ASCII)
_PAIR_HINT = "write DATASET/TEACHER:STUDENT, e.g. `cifar100/res32x4:mv2`, or TEACHER:STUDENT where `train` has the data"


@dataclass(frozen=True)
class Pair:
    """A teacher, a student, and the data set that they are trained on."""

    dataset: str | None
    """None where the `train` section names the data set of all runs."""
    teacher: str
    """A model, or a key of the section `teachers`."""
    student: str


def has_cells(content: Mapping[str, object]) -> bool:
    """Whether a params.yaml has any section that describes cells."""
    return any(content.get(section) for section in (_PAIRS, _ABLATIONS, CELLS))


def expand(content: Mapping[str, object], *, origin: str) -> Cells:
    """All cells of a params.yaml, in its order; a custom cell replaces another one of its name.

    Args:
        content: the whole file.
        origin: the file, for messages.

    Raises:
        UsageError: it has no cells, or a section or an entry has a form that can't be read.
    """
    made = combined(content, origin=origin)
    own = _section(content, CELLS, origin)
    seen: set[str] = set()
    for key, options in content_items(own):
        if not isinstance(options, dict):
            raise UsageError(f"cell `{key}` in {origin} is not a mapping of options", hint="e.g. `{method: kd, ...}`")
        if key in seen:
            raise UsageError(f"two cells in {origin} are called `{key}`", hint="call one of them otherwise")
        seen.add(key)
        made[key] = placed(options, content)
    if not made:
        raise UsageError(
            f"{origin} names no cells",
            hint="write e.g. `cells: {mine: {method: kd, teacher: res20, ...}}`, or `pairs` and `methods`",
        )
    return made


def combined(content: Mapping[str, object], *, origin: str) -> Cells:
    """The cells that pairs, methods and ablations make; arguments and errors as for `expand`."""
    return _Combiner(content, origin).cells()


def pairs_of(content: Mapping[str, object], *, origin: str) -> list[Pair]:
    """All pairs of the sections `pairs` and `ablations`, each once.

    Raises:
        UsageError: one can't be read.
    """
    found = [*_section(content, _PAIRS, origin)]
    for name, ablation in content_items(_section(content, _ABLATIONS, origin)):
        found += _names(_entry(ablation, f"ablation `{name}`", origin), _PAIRS, f"ablation `{name}`", origin)
    return [parse_pair(str(text), origin) for text in dict.fromkeys(found)]


def parse_pair(text: str, origin: str) -> Pair:
    """`cifar100/res32x4:mv2` as a pair.

    Raises:
        UsageError: it has another form.
    """
    match = _PAIR.fullmatch(text)
    if match is None:
        raise UsageError(f"pair `{text}` in {origin} can't be read", hint=_PAIR_HINT)
    return Pair(match["dataset"], match["teacher"], match["student"])


def teacher_key(pair: Pair, content: Mapping[str, object], *, origin: str) -> str | None:
    """The key of the pair's teacher in the section `teachers`; None where it is not there.

    Raises:
        UsageError: several entries have that model and data set.
    """
    entries = dict(content_items(_section(content, TEACHERS, origin)))
    if pair.teacher in entries:
        return pair.teacher
    found = [
        key
        for key, entry in entries.items()
        if isinstance(entry, dict)
        and entry.get("model") == pair.teacher
        and pair.dataset in (None, entry.get("dataset"))
    ]
    if len(found) > 1:
        named = ", ".join(f"`{key}`" for key in found)
        raise UsageError(
            f"`{TEACHERS}` in {origin} has several teachers `{pair.teacher}`: {named}",
            hint=f"name the data set and the one that is meant, e.g. `DATASET/{found[0]}:{pair.student}`",
        )
    return found[0] if found else None


def placed(options: Mapping[str, object], content: Mapping[str, object]) -> dict[str, object]:
    """Options with what the sections `datasets` and `teachers` add: what is made before, and where the data are."""
    datasets = content.get(DATASETS)
    dataset = datasets.get(options.get("dataset")) if isinstance(datasets, dict) else None
    folder = dataset.get("folder") if isinstance(dataset, dict) else None
    teacher = options.get("teacher")
    after = options.get(AFTER)
    if after is None and "/" in str(teacher):
        after = teacher
    elif after is None and folder is not None:
        after = f"{DATA}/{folder}"
    own = {str(key): value for key, value in options.items() if key != AFTER}
    before = {} if after is None else {AFTER: after}
    data_dir = {} if folder is None or "data_dir" in own else {"data_dir": DATA}
    return {**before, **own, **data_dir}


def content_items(section: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    """The entries of a section by their names as text; YAML may have read one as a number."""
    return ((str(key), value) for key, value in section.items())


class _Combiner:
    """The hand-made sections of one file."""

    def __init__(self, content: Mapping[str, object], origin: str) -> None:
        self._content = content
        self._origin = origin
        self._methods = {
            name: _entry(values, f"method `{name}`", origin)
            for name, values in content_items(_section(content, _METHODS, origin))
        }
        self._pairs = {
            name: _entry(values, f"pair `{name}`", origin)
            for name, values in content_items(_section(content, _PAIRS, origin))
        }
        self._ablations = {
            name: _entry(values, f"ablation `{name}`", origin)
            for name, values in content_items(_section(content, _ABLATIONS, origin))
        }

    def cells(self) -> Cells:
        """Add every combination, once."""
        made: Cells = {}
        for pair, own in self._pairs.items():
            for method in own:
                if method not in self._methods:
                    raise unknown_name(
                        f"method of pair `{pair}` in {self._origin}", method, self._methods, listing="its `methods`"
                    )
            for method in self._methods:
                self._add(made, pair, method, {})
        for name, ablation in self._ablations.items():
            for pair, method, values in self._combinations(name, ablation):
                self._add(made, pair, method, values)
        return made

    def _combinations(
        self, name: str, ablation: Mapping[str, object]
    ) -> Iterator[tuple[str, str, Mapping[str, object]]]:
        """All combinations of a pair, a method and a value of an ablation."""
        where = f"ablation `{name}`"
        named = [_names(ablation, key, where, self._origin) for key in (_PAIRS, _METHODS)]
        axes = {key: value for key, value in ablation.items() if key not in (_PAIRS, _METHODS)}
        for key, value in axes.items():
            if key == "scales" and isinstance(value, list) and not all(isinstance(each, list | str) for each in value):
                raise UsageError(
                    f"`scales` of {where} in {self._origin} is `{value}`, expected a list of lists",
                    hint="e.g. `[[1], [2], [1, 2]]` for three sets of scales, `[[1, 2]]` for one",
                )
        listed = [value if isinstance(value, list) else [value] for value in axes.values()]
        for pair, method in itertools.product(*named):
            for values in itertools.product(*listed):
                yield pair, method, dict(zip(axes, values, strict=True))

    def _add(self, made: Cells, text: str, method: str, values: Mapping[str, object]) -> None:
        """Add one cell, unless the same one is there."""
        pair = parse_pair(text, self._origin)
        of_pair = _entry(self._pairs.get(text, {}).get(method), f"`{method}` of pair `{text}`", self._origin)
        stated = {**self._methods.get(method, {}), **of_pair, **values}
        settings, options = self._split(method, stated)
        name = _name(pair, method, settings, options)
        taught = {} if method == PLAIN else {"teacher": self._teacher(pair)}
        scales = {key: value for key, value in options.items() if key == "scales"}
        rest = {key: value for key, value in options.items() if key != "scales"}
        cell = placed(
            {
                **({} if pair.dataset is None else {"dataset": pair.dataset}),
                **taught,
                "student": pair.student,
                "method": method,
                **scales,
                **({"settings": settings} if settings else {}),
                **rest,
            },
            self._content,
        )
        if made.setdefault(name, cell) != cell:
            raise UsageError(
                f"{self._origin} makes two cells `{name}` with different options", hint="list one of them under `cells`"
            )

    def _teacher(self, pair: Pair) -> str:
        key = teacher_key(pair, self._content, origin=self._origin)
        return pair.teacher if key is None else f"{TEACHERS}/{key}"

    def _split(self, method: str, stated: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
        """Settings of the method, and options of the run."""
        methods.resolve(method)
        of_method = settings_of(method)
        settings: dict[str, object] = {}
        options: dict[str, object] = {}
        for key, value in stated.items():
            if key in of_method:
                settings[key] = float(value) if type(value) is int else value
            elif key == "scales":
                options[key] = _scales(value)
            elif key in OPTIONS:
                options[key] = value
            else:
                known = [*sorted(of_method), *OPTIONS]
                raise unknown_name(
                    f"setting of `{method}` in {self._origin}", key, known, listing="icdctl list methods"
                )
        return settings, options


def _section(content: Mapping[str, object], name: str, origin: str) -> Mapping[object, object]:
    """A section of the file; empty where it is not there."""
    section = content.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UsageError(
            f"`{name}` in {origin} is not a mapping, found {type(section).__name__}", hint=f"e.g. `{name}: {{}}`"
        )
    return section


def _entry(value: object, what: str, origin: str) -> dict[str, object]:
    """The values of an entry; an empty one has none."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{what} in {origin} is `{value}`, expected a mapping", hint="e.g. `{gamma: 2}`, or `{}`")
    return dict(content_items(value))


def _names(ablation: Mapping[str, object], key: str, where: str, origin: str) -> list[str]:
    """One name or a list of names."""
    value = ablation.get(key)
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) for name in names):
        example = "pairs: cifar100/res32x4:mv2" if key == _PAIRS else "methods: cd_sdd_kd"
        raise UsageError(f"{where} in {origin} names no `{key}`", hint=f"e.g. `{example}`, or a list")
    return [str(name) for name in names]


def _scales(value: object) -> list[int]:
    """Scales as a list; text as `1,2,4` is read too.

    Raises:
        UsageError: they are not valid.
    """
    if isinstance(value, str):
        return list(methods.parse_scales(value))
    if not isinstance(value, list):
        raise UsageError(f"scales `{value}` are not a list", hint="e.g. `scales: [1, 2, 4]`")
    return list(methods.check_scales(value))


def _name(pair: Pair, method: str, settings: Mapping[str, object], options: Mapping[str, object]) -> str:
    """The name of a cell and of the folder of its runs: what it is, then what is stated in addition."""
    parts = [pair.dataset] if pair.dataset is not None else []
    parts += [] if method == PLAIN else [pair.teacher]
    parts += [pair.student, method]
    scales = options.get("scales")
    if isinstance(scales, list) and tuple(scales) != SCALES:
        parts.append("scales" + "".join(map(str, scales)))
    rest = {key: value for key, value in options.items() if key != "scales"}
    for values in (settings, rest):
        parts += [f"{key.replace('_', '')}{_short(values[key])}" for key in sorted(values)]
    name = "-".join(parts).replace("/", "-")
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)  # DVC reads a dot as a level of its own


def _short(value: object) -> str:
    """A value as a part of a name."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "_".join(map(_short, value))
    return str(value)
