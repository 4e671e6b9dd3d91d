"""Flags that follow from the declarations of the settings."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from icdctl.errors import UsageError

if TYPE_CHECKING:
    from icdctl.config.declare import Command
    from icdctl.config.lookup import Declared


class WithSettings(TyperCommand):
    """A command with parameters that say nothing but the name of a setting: they get its flag and its help.

    The declarations are read when the command runs or shows its help, not when it is listed: they import pydantic, and
    `icdctl --help` must come at once.
    """

    _own: Sequence[Any] = ()
    _all: list[Any] | None = None

    @property
    def params(self) -> list[Any]:
        """Typer's parameters; the setter takes those of the function."""
        if self._all is None:
            self._all = self._completed()
        return self._all

    @params.setter
    def params(self, own: list[Any]) -> None:
        self._own = own

    def _completed(self) -> list[Any]:
        declared = {parameter.name: parameter for parameter in _parameters("distill")}
        has_panels = any(each.rich_help_panel for each in self._own)
        for own in self._own:
            if own.help is None and own.name in declared:
                declared[own.name].default = own.default
                if not has_panels:
                    declared[own.name].rich_help_panel = None
        return [declared.get(own.name, own) if own.help is None else own for own in self._own]


class WithAllSettings(WithSettings):
    """`train` or `distill`: the flags of all its settings, then the parameters of its function.

    The function takes the context and asks `given_settings` for what was given.
    """

    def _completed(self) -> list[Any]:
        return [*_parameters("train" if self.name == "train" else "distill"), *self._own]

    def invoke(self, ctx: Any) -> Any:
        """Call the function with its own parameters. Typer keeps the type of the context to itself."""
        names = {parameter.name for parameter in self._own}
        return ctx.invoke(self.callback, **{name: value for name, value in ctx.params.items() if name in names})


def given_settings(context: typer.Context) -> dict[str, object]:
    """The options of a run that the flags of `train` or `distill` give; a flag that was not typed gives none.

    Raises:
        UsageError: `--set` is not KEY=VALUE, or names a key twice.
    """
    from icdctl.config.lookup import OPTIONS

    flags = {name: context.params.get(name) for name in OPTIONS}
    settings = parse_settings(flags.pop("settings"))
    return {**{name: value for name, value in flags.items() if value is not None}, **settings}


def parse_settings(given: Sequence[str] | None) -> dict[str, object]:
    """`["gamma=8", "flip=false"]` as options of a run: settings without a flag by their names, the rest as `settings`.

    Raises:
        UsageError: one is not KEY=VALUE, or a key is given twice.
    """
    from icdctl.config.declare import Given
    from icdctl.config.lookup import OPTIONS

    settings: dict[str, object] = {}
    for item in given or []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise UsageError(f"setting `{item}` is not KEY=VALUE", hint="e.g. `--set gamma=8`")
        if key in settings:
            raise UsageError(f"setting `{key}` is given twice", hint="give it once")
        settings[key] = value
    of_run = {key for key in settings if key in OPTIONS and OPTIONS[key].setting.given is Given.SET}
    options = {key: settings.pop(key) for key in list(settings) if key in of_run}
    return {**options, **({"settings": settings} if settings else {})}


def _parameters(command: Command) -> list[Any]:
    """The parameters that Typer makes from a function with an argument for each flag."""
    from icdctl.config.declare import Panel
    from icdctl.config.lookup import OPTIONS

    def stand_in() -> None:
        """Typer reads its signature; it is never called."""

    by_panel = sorted(OPTIONS.items(), key=lambda item: list(Panel).index(item[1].setting.panel))
    made = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(each, flag))
        for name, each in by_panel
        if (flag := each.flag(command)) is not None
    ]
    described: Any = stand_in
    described.__signature__ = inspect.Signature(made)
    app = typer.Typer(add_completion=False)
    app.command()(described)
    return list(typer.main.get_command(app).params)


def _annotation(declared: Declared, flag: str) -> Any:
    """`Annotated[int | None, typer.Option("--epochs", ...)]`."""
    from icdctl.config.lookup import Owner

    setting = declared.setting
    if setting.shown_default is not None:
        default: str | bool = setting.shown_default
    elif setting.datasets:
        default = ", ".join(str(value) for value in setting.datasets.values() if value is not False) or False
    elif declared.owner is Owner.RECIPE:
        default = "from the recipe"
    else:
        default = False if declared.default is None or declared.default is False else str(declared.default)
    option = typer.Option(
        f"{flag}/--no-{flag.removeprefix('--')}" if setting.negative else flag,
        metavar=setting.metavar,
        help=setting.help,
        show_default=default,
        rich_help_panel=setting.panel.value,
    )
    return Annotated[declared.typed | None, option]
