"""Lists among the options of a run: `--method kd,dkd --seeds 0-4 --set gamma=1,2,4` as one set of options a run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from icdctl import methods
from icdctl.config.lookup import OPTIONS
from icdctl.errors import UsageError, unknown_name

_LISTED = tuple(name for name, each in OPTIONS.items() if each.setting.listed)
_MOST_RUNS = 1000
_LONGEST_SHOWN = 80


def expand(options: Mapping[str, object], *, seeds: str | None = None) -> list[dict[str, object]]:
    """Every combination of the listed values.

    A setting goes to the methods that have it; one that none of them has is an error.

    Args:
        options: options by name, as in `icdctl.config.lookup.OPTIONS`; `method`, `student` and values of `settings`
            may be lists (`a,b` or a sequence), `scales` a list with `;` between its entries.
        seeds: `0-4`, `0,2,5` or both.

    Returns:
        At least one set of options, each without lists, in the order of the lists.

    Raises:
        UsageError: an empty or repeated entry, a setting that no method has, both `seed` and `seeds`, too many runs.
    """
    if seeds is not None and options.get("seed") is not None:
        raise UsageError("`--seed` and `--seeds` are both given", hint="give one of them")
    axes: dict[str, list[object]] = {}
    for key in _LISTED:
        if options.get(key) is not None:
            axes[key] = _entries(key, options[key])
    if seeds is not None:
        axes["seed"] = list(parse_seeds(seeds))
    given = options.get("settings")
    settings = {key: _entries(key, value) for key, value in given.items()} if isinstance(given, Mapping) else {}
    _check_settings_known(settings, axes.get("method"))
    expanded: list[dict[str, object]] = []
    for values in itertools.product(*axes.values()):
        chosen = {**options, **dict(zip(axes, values, strict=True))}
        own = _own_settings(settings, chosen.get("method"), num_methods=len(axes.get("method", [None])))
        for combination in itertools.product(*own.values()):
            held = dict(zip(own, combination, strict=True))
            expanded.append({**chosen, "settings": held or (None if isinstance(given, Mapping) else given)})
            if len(expanded) > _MOST_RUNS:
                raise UsageError(f"these lists make more than {_MOST_RUNS:,} runs", hint="give fewer values")
    return [{key: value for key, value in one.items() if value is not None} for one in expanded]


def parse_seeds(text: str) -> list[int]:
    """`0-4`, `0,2,5` or both, as a list.

    Raises:
        UsageError: it is none of these, or names a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,10})(?:\s*-\s*([0-9]{1,10}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + _MOST_RUNS:
            raise UsageError(
                f"seeds `{text[:_LONGEST_SHOWN]}` are not a list of whole numbers",
                hint="e.g. `--seeds 0-4` or `--seeds 0,2,5`",
            )
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds `{text}` name one twice", hint="give each once")
    return seeds


def _entries(key: str, value: object) -> list[object]:
    """The entries of a list, or the one value that it is."""
    one_is_a_list = key in _LISTED and OPTIONS[key].is_list
    if isinstance(value, str):
        entries: list[object] = [part.strip() for part in _split(value, ";" if one_is_a_list else ",")]
    elif isinstance(value, Sequence) and not one_is_a_list:
        entries = list(value)
    else:
        return [value]
    flag = f"--{key}" if key in _LISTED else f"--set {key}"
    named = f"list of models `{value}`" if key == "student" else f"`{flag} {value}`"  # `train` has it as `--model`
    if len(entries) > 1 and "" in entries:
        raise UsageError(f"{named} has an empty entry", hint="put a value between all commas")
    if len({str(entry) for entry in entries}) < len(entries):
        raise UsageError(f"{named} names one twice", hint="give each once")
    return entries


def _split(text: str, separator: str) -> list[str]:
    """The parts of a list, whose separators don't count inside parentheses: those hold arguments of a model."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _check_settings_known(settings: Mapping[str, list[object]], names: list[object] | None) -> None:
    """Check that every setting belongs to one of several methods; those of a single method are checked later."""
    if names is None or len(names) < 2:
        return
    known = {key: None for name in names for key in settings_of(name)}
    for key in settings:
        if key not in known:
            raise unknown_name("setting of these methods", key, known, listing="icdctl list methods")


def _own_settings(settings: Mapping[str, list[object]], method: object, *, num_methods: int) -> dict[str, list[object]]:
    if num_methods < 2:
        return dict(settings)
    known = settings_of(method)
    return {key: values for key, values in settings.items() if key in known}


def settings_of(method: object) -> set[str]:
    """Names of a method's settings; none for an unknown method, which is reported later."""
    try:
        return {*methods.get(str(method)).defaults, "variant"}
    except UsageError:
        return set()
