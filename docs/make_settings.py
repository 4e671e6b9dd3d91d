"""Writes docs/settings.md from the declarations of the settings. Run it as `python docs/make_settings.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args, get_origin

from icdctl.config.declare import Given
from icdctl.config.lookup import SETTINGS, Declared, Owner
from icdctl.config.settings import DatasetSettings, ExecutionSettings, RecipeSettings, TaskSettings
from icdctl.methods import DECLARED, METHODS, VARIANTS

HEAD = """\
# Settings

Everything that decides a run, in the order of its `config.json`. `docs/make_settings.py` makes this page
from the declarations in `icdctl/config/settings.py`.

A value comes from the first of these that has one:

1. a flag, `--set NAME=VALUE`, or a keyword in Python;
2. `--config FILE`, the `config.json` of a run that is to be repeated;
3. a variable, `ICDCTL_` and the name in capital letters: `ICDCTL_LR=0.1`;
4. the section `train` of the project's `params.yaml`;
5. the recipe, or the data set, for what they own;
6. the default.

**Sweep** says whether `icdctl grid run --sweep` may change a setting. **Identity** says whether a run can only be
continued with the same value: `--resume` refuses another one.
"""
TITLES = {
    TaskSettings: "What is trained",
    RecipeSettings: "How it is trained: the recipe's settings",
    DatasetSettings: "Which images",
    ExecutionSettings: "How the run is carried out",
}
COLUMNS = ("name", "values", "default", "given by", "sweep", "identity", "what it does")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for group, title in TITLES.items():
        rows = [_row(SETTINGS[name]) for name in group.model_fields]
        parts.append(f"## {title}\n\n{_table(COLUMNS, rows)}")
    parts.append(_methods())
    return "\n".join(parts)


def _row(declared: Declared) -> Sequence[str]:
    named = "" if declared.option == declared.name else f", given as `{declared.option}`"
    return (
        f"`{declared.name}`{named}",
        _values(declared),
        _default(declared),
        _given_by(declared),
        "yes" if declared.swept else "",
        declared.setting.identity.value,
        declared.setting.help,
    )


def _values(declared: Declared) -> str:
    """Type and bounds in words: `number above 0, up to 1`."""
    if declared.choices:
        return ", ".join(f"`{choice}`" for choice in declared.choices)
    if declared.is_list:
        entries = get_args(declared.type)
        whole = entries[-1] is Ellipsis
        return "whole numbers, as in `1,2,4`" if whole else f"{len(entries)} numbers above 0, as in `0.5,1`"
    if get_origin(declared.type) is dict:
        return "names and values"
    words = [{bool: "yes or no", int: "whole number", float: "number", str: "text"}[declared.type]]
    phrases = {"ge": "{} or above", "gt": "above {}", "le": "up to {}", "lt": "below {}"}
    words += [phrases[key].format(_number(bound)) for key, bound in declared.bounds.items()]
    return ", ".join(words)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(declared: Declared) -> str:
    if declared.owner is Owner.DATASET:
        return ", ".join(f"`{_text(value)}` for `{name}`" for name, value in declared.setting.datasets.items())
    if declared.owner is Owner.RECIPE:
        stated = declared.field.is_required()
        return "the recipe's" if stated else f"the recipe's, or `{_text(declared.default)}`"
    if declared.setting.shown_default is not None:
        return declared.setting.shown_default
    return "" if declared.default is None else f"`{_text(declared.default)}`"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _given_by(declared: Declared) -> str:
    setting = declared.setting
    if setting.given is Given.COMPUTED:
        return "icdctl itself"
    if setting.given is Given.KEYWORD:
        return "`config.json`"
    if setting.given is Given.SET:
        return f"`--set {declared.option}=...`"
    shown = f"`{declared.flag()}`"
    if setting.negative:
        shown += f" or `{str(declared.flag()).replace('--', '--no-', 1)}`"
    if setting.flag_of_train is not None:
        return f"{shown}, `{setting.flag_of_train}` of `train`"
    return f"{shown}, `{setting.commands[0]}` alone" if len(setting.commands) == 1 else shown


def _methods() -> str:
    rows = [
        [f"`{name}`", ", ".join(f"`{key}={value:g}`" for key, value in method.defaults.items())]
        for name, method in METHODS.items()
    ]
    choices = " or ".join(f"`{variant}`" for variant in VARIANTS)
    meanings = [[f"`{name}`", setting.bounds, setting.help] for name, setting in DECLARED.items()]
    meanings.append(["`variant`", choices, "Compute as the reference code does, or with its errors corrected."])
    return (
        "## Settings of the methods\n\n"
        "`--set NAME=VALUE` changes these too; [methods.md](methods.md) has the formulas.\n\n"
        f"{_table(['setting', 'values', 'what it does'], meanings)}\n"
        "The settings of each method, with their defaults; every method also has `variant`, by default\n"
        f"`{VARIANTS[0]}`:\n\n"
        f"{_table(['method', 'settings'], rows)}"
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(page(), encoding="utf-8")
