"""Methods made of methods: the grammar of `--method`, and what an expression means.

    EXPRESSION = PART ("+" PART)*        several parts are a sum with one cross-entropy
    PART       = METHOD ("+" MODIFIER)*  a modifier changes the method to its left
    METHOD     = a name in `METHODS`, or `sdd_NAME` or `cd_sdd_NAME` for any loss per row of logits
    MODIFIER   = "ls" | "ea"

`get` finds the method of any expression, `resolve` its one canonical spelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from icdctl.errors import UsageError, unknown_name
from icdctl.methods.logit_methods import LogitMethod, variants
from icdctl.methods.method import Method, Objective, Supervision
from icdctl.methods.method_settings import VARIANT, Settings
from icdctl.methods.reads import ModelProbe
from icdctl.methods.table import METHODS

MODIFIERS = {"ls": "https://arxiv.org/abs/2403.01427", "ea": "https://arxiv.org/abs/2311.13621"}
"""Modifier -> its paper, in canonical order: `ls` standardises the logits, `ea` weighs the rows by their entropies."""

_PREFIXES = ("cd_sdd_", "sdd_")
_LONGEST_SHOWN = 80
_HINT = "`icdctl list methods` shows the methods; e.g. `kd+ls`, `sdd_rld`, `fitnet+kd`"


@dataclass(frozen=True)
class Part:
    """A method of an expression, with its modifiers."""

    base: str
    """Its name without modifiers, which begins the names of its settings in a sum: `kd.temperature`."""
    modifiers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "+".join((self.base, *self.modifiers))


def resolve(name: str) -> str:
    """The canonical spelling of a method: lower case, modifiers in the order of `MODIFIERS`, parts by the alphabet.

    Raises:
        UsageError: there is no such method, or its parts do not go together.
    """
    folded = name.strip().lower().replace("-", "_")
    if folded in METHODS:
        return folded
    parts = _parse(folded, name)
    _method_of(parts, name)
    return "+".join(map(str, parts))


def get(name: str) -> Method:
    """The method of an expression, in any spelling.

    Raises:
        UsageError: there is no such method, or its parts do not go together.
    """
    named = METHODS.get(name)
    return named if named is not None else _method_of(parts_of(name), name)


def parts_of(name: str) -> tuple[Part, ...]:
    """The parts of an expression, in canonical order."""
    return _parse(name.strip().lower().replace("-", "_"), name)


def builds_on(name: str) -> list[str]:
    """The methods that a method adds something to, the nearest first; cross-entropy is last.

    `cd_sdd_kd+ls` adds to `sdd_kd+ls`, that to `kd+ls`, that to `kd`; a sum adds to each of its parts.
    """
    parts = _parse(name, name)
    if len(parts) > 1:
        return [*map(str, parts), "ce"]
    (part,) = parts
    found = []
    base = part.base
    for prefix, shorter in (("cd_sdd_", "sdd_"), ("sdd_", "")):
        if base.startswith(prefix):
            base = shorter + base.removeprefix(prefix)
            found.append(str(replace(part, base=base)))
    found += [str(replace(part, base=base, modifiers=part.modifiers[:end])) for end in range(len(part.modifiers))][::-1]
    return [*found, *(["ce"] if name != "ce" else [])]


def _parse(folded: str, shown: str) -> tuple[Part, ...]:
    """The parts of an expression in canonical order; whether they go together is not looked at."""
    parts: list[Part] = []
    for word in (word.strip() for word in folded.split("+")):
        if not word and "+" in folded:
            raise UsageError(f"method `{shown[:_LONGEST_SHOWN]}` has an empty part", hint=_HINT)
        if word not in MODIFIERS:
            parts.append(Part(word))
        elif not parts:
            raise UsageError(
                f"method `{shown[:_LONGEST_SHOWN]}` begins with `{word}`, which changes the method to its left",
                hint=f"e.g. `kd+{word}`",
            )
        elif word in parts[-1].modifiers:
            raise UsageError(f"`{parts[-1]}` has `{word}` twice", hint=f"choose `{parts[-1]}`")
        else:
            held = {*parts[-1].modifiers, word}
            parts[-1] = replace(parts[-1], modifiers=tuple(each for each in MODIFIERS if each in held))
    bases = [part.base for part in parts]
    for base in bases:
        if bases.count(base) > 1:
            raise UsageError(
                f"method `{shown[:_LONGEST_SHOWN]}` has `{base}` twice",
                hint=f"name it once, and set its weight: `--set {base}.weight=2`",
            )
    return tuple(sorted(parts, key=str))


def _method_of(parts: tuple[Part, ...], shown: str) -> Method:
    """The method that parts make; `shown` is what was typed."""
    methods = [_modified(part, part.base if "+" in shown else shown) for part in parts]
    if len(parts) == 1:
        return methods[0]
    for part, method in zip(parts, methods, strict=True):
        if not method.needs_teacher:
            raise UsageError(
                f"`{part}` is no part of a sum: every method has its cross-entropy",
                hint="leave it out, and set `ce_weight`: `--set ce_weight=1`",
            )
    first = methods[0]
    for part, method in zip(parts, methods, strict=True):
        if method.num_views != first.num_views:
            raise UsageError(
                f"`{parts[0]}` sees {first.num_views} views of each image and `{part}` {method.num_views}, so they "
                "can't be one method",
                hint=f"train one of them: `--method {part}`",
            )
    named = {part.base: method for part, method in zip(parts, methods, strict=True)}
    return SumMethod(
        parts=named,
        defaults={"ce_weight": 1.0, **_part_defaults(named)},
        source="a sum of methods",
        family="+".join(map(str, parts)),
        patches=any(method.patches for method in methods),
        cluster=any(method.cluster for method in methods),
        has_parameters=any(method.has_parameters for method in methods),
        num_views=first.num_views,
    )


def _part_defaults(parts: Mapping[str, Method]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, method in parts.items():
        found[f"{name}.weight"] = 1.0
        found.update({f"{name}.{key}": value for key, value in method.defaults.items() if key != "ce_weight"})
    return found


def _modified(part: Part, shown: str) -> Method:
    """The method of a part."""
    method = METHODS.get(part.base)
    if method is None:
        method = _decoupled(part.base, shown)
    if not part.modifiers:
        return method
    first = part.modifiers[0]
    if not isinstance(method, LogitMethod):
        raise UsageError(
            f"`{part}` makes no sense: `{first}` changes a loss per row of logits, and `{part.base}` is not one",
            hint=f"choose `{part.base}`, or e.g. `kd+{first}`",
        )
    if method.loss.no_modifiers and "ls" in part.modifiers:
        raise UsageError(
            f"`{part}` makes no sense: {method.loss.no_modifiers}", hint=f"choose `{part.base}`, or `kd+ls`"
        )
    defaults = dict(method.defaults)
    for modifier in part.modifiers:
        defaults.update(method.loss.modified.get(modifier, {}))
    if "ea" in part.modifiers:
        defaults["ea_temperature"] = 3.0
    return replace(
        method,
        standardised="ls" in part.modifiers,
        entropy_weighted="ea" in part.modifiers,
        defaults=defaults,
        source=MODIFIERS[part.modifiers[-1]],
        family="+".join((method.family, *part.modifiers)),
    )


def _decoupled(base: str, shown: str) -> Method:
    """`sdd_NAME` or `cd_sdd_NAME` of a loss per row that has no such row in `METHODS`."""
    prefix = next((prefix for prefix in _PREFIXES if base.startswith(prefix)), None)
    plain = METHODS.get(base.removeprefix(prefix or ""))
    if prefix is None or plain is None:
        cd_alone = base.removeprefix("cd_")
        if base.startswith("cd_") and cd_alone in METHODS:
            raise UsageError(
                f"no method `{base}`: the cluster term is added to SDD", hint=f"choose `cd_sdd_{cd_alone}`"
            )
        raise unknown_name("method", shown, METHODS, listing="icdctl list methods")
    if not isinstance(plain, LogitMethod):
        reason = "is not one" if plain.needs_teacher else "compares nothing with a teacher"
        raise UsageError(
            f"`{base}` makes no sense: SDD applies a loss per row of logits to each patch, "
            f"and `{plain.family}` {reason}",
            hint=f"choose `{plain.family}`, or e.g. `{prefix}kd`",
        )
    return variants(plain.loss, {})[base]


@dataclass(frozen=True, kw_only=True)
class SumMethod(Method):
    """Several methods' terms, with one cross-entropy."""

    parts: Mapping[str, Method]
    """Name of a part -> its method. Its settings are `NAME.SETTING`; `NAME.weight` is the factor of its terms."""

    @property
    def needs_patches(self) -> bool:
        """See `Method`."""
        return any(method.needs_patches for method in self.parts.values())

    def has_eval_mode_teacher(self, settings: Settings) -> bool:
        """See `Method`; refused where parts differ, since they have one teacher."""
        modes = {
            name: method.has_eval_mode_teacher(_settings_of(name, settings)) for name, method in self.parts.items()
        }
        if len(set(modes.values())) > 1:
            batchwise = next(name for name, in_eval_mode in modes.items() if not in_eval_mode)
            others = ", ".join(f"`{name}`" for name, in_eval_mode in modes.items() if in_eval_mode)
            raise UsageError(
                f"`{batchwise}` wants a teacher that normalises with the statistics of the batch, and {others} one "
                "that does not, so they can't be one method",
                hint=f"leave one of them out: `--method {batchwise}`; the corrected `ofd` goes with others: `--set "
                "variant=corrected`",
            )
        return all(modes.values())

    def teacher_reads(self, settings: Settings) -> frozenset[str]:
        """See `Method`: what any part reads."""
        return frozenset().union(
            *(method.teacher_reads(_settings_of(name, settings)) for name, method in self.parts.items())
        )

    def student_reads(self, settings: Settings) -> frozenset[str]:
        """See `Method`: what any part reads."""
        return frozenset().union(
            *(method.student_reads(_settings_of(name, settings)) for name, method in self.parts.items())
        )

    def build(
        self,
        student: ModelProbe,
        teacher: ModelProbe | None,
        settings: Settings,
        *,
        scales: tuple[int, ...],
        supervision: Supervision,
    ) -> Objective:
        """See `Method`; the parts are built in the order of their names."""
        built = {
            name: method.build(
                student,
                teacher,
                _settings_of(name, settings),
                scales=scales if method.needs_patches else (),
                supervision=supervision,
            )
            for name, method in self.parts.items()
        }
        return SumObjective(built, settings, supervision)


def _settings_of(part: str, settings: Settings) -> dict[str, float | str]:
    """A part's own settings, with those that all parts share."""
    own = {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
    return {**own, "ce_weight": settings["ce_weight"], VARIANT: settings[VARIANT]}


class SumObjective(Objective):
    """See `SumMethod`. A part with one term gives it its own name, `kd`; one with several `cd_sdd_kd.cluster`."""

    def __init__(self, parts: Mapping[str, Objective], settings: Settings, supervision: Supervision) -> None:
        super().__init__(settings, supervision)
        self.parts = nn.ModuleDict(parts)
        self._weights = {name: float(settings[f"{name}.weight"]) for name in parts}
        self._names = {
            (name, term): name if len(part.term_names) == 2 else f"{name}.{term}"
            for name, part in parts.items()
            for term in part.term_names
            if term != "ce"
        }
        self.term_names = ("ce", *self._names.values())

    def distillation_terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], labels: Tensor, epoch: int | Tensor
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        terms = {}
        for name, part in self.parts.items():
            assert isinstance(part, Objective)
            for term, value in part.distillation_terms(student, teacher, labels, epoch).items():
                terms[self._names[name, term]] = self._weights[name] * value
        return terms
