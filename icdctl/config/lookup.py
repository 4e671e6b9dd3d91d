"""The declarations of `icdctl.config.settings` by name, with what follows from a type, a default or an owner."""

from __future__ import annotations

import types
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from icdctl.config.declare import Command, Given, Identity, Setting
from icdctl.config.settings import RecipeSettings, Settings


class Owner(Enum):
    """Where the default of a setting comes from."""

    RUN = "run"
    """Its declaration, or `icdctl.config.resolving`."""
    RECIPE = "recipe"
    DATASET = "data set"
    """Only some data sets have the setting."""


@dataclass(frozen=True)
class Declared:
    """A setting by its name."""

    name: str
    """The field of a run's configuration, and the key in `config.json`."""
    setting: Setting
    field: FieldInfo

    @property
    def owner(self) -> Owner:
        """Where its default comes from."""
        if self.setting.datasets:
            return Owner.DATASET
        return Owner.RECIPE if self.name in RecipeSettings.model_fields else Owner.RUN

    @property
    def option(self) -> str:
        """Name of the option that the user gives, in files, variables and keywords: mostly that of the setting."""
        return self.setting.option or self.name

    @property
    def default(self) -> object:
        """Its value where nothing gives one; None where something must."""
        return None if self.field.is_required() else self.field.get_default(call_default_factory=True)

    @property
    def swept(self) -> bool:
        """Whether `grid --sweep` may change it."""
        return self.setting.swept or self.owner is Owner.RECIPE

    @cached_property
    def type(self) -> Any:
        """The type of a value that is not None, without bounds: `int`, a `Literal`, `tuple[int, ...]`, ..."""
        return _plain_type(self.field.annotation)

    @property
    def is_list(self) -> bool:
        """Whether one value is a list itself, so that `;` stands between two of them."""
        return get_origin(self.type) is tuple

    @property
    def is_text(self) -> bool:
        """Whether any text is a value of it."""
        return self.type is str

    @property
    def typed(self) -> Any:
        """The type of what is typed after the flag: a number, a bool, or text that is read later."""
        if self.type in (bool, int, float) and self.option == self.name:
            return self.type
        return list[str] if get_origin(self.type) is dict else str

    @property
    def choices(self) -> tuple[str, ...]:
        """The only values that it can have, where they are few words."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def bounds(self) -> dict[str, float]:
        """`ge`, `gt`, `le` and `lt` of a number, those that it has."""
        keys = ("ge", "gt", "le", "lt")
        return {key: getattr(each, key) for each in self.field.metadata for key in keys if hasattr(each, key)}

    def flag(self, command: Command | None = None) -> str | None:
        """Its flag on the command line; None where that command has none, or no command where none is named."""
        setting = self.setting
        if setting.given is not Given.FLAG or (command is not None and command not in setting.commands):
            return None
        own = setting.flag_of_train if command == "train" else None
        return own or setting.flag or f"--{self.option.replace('_', '-')}"

    def shown(self, command: Command | None = None) -> str:
        """How a message names what the user is to change: `--lr`, `--set momentum`."""
        if self.setting.given is Given.SET:
            return f"`--set {self.option}`"
        return f"`{self.flag(command) or self.option}`"


def _plain_type(annotation: Any) -> Any:
    """Without None, and without what `Annotated` adds."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        given = [each for each in get_args(annotation) if each is not types.NoneType]
        return _plain_type(given[0]) if len(given) == 1 else annotation
    return annotation


def _declared() -> dict[str, Declared]:
    found = {}
    for name, field in Settings.model_fields.items():
        (setting,) = (each for each in field.metadata if isinstance(each, Setting))
        found[name] = Declared(name, setting, field)
    return found


SETTINGS: dict[str, Declared] = _declared()
"""All settings by their keys in `config.json`, in its order."""
OPTIONS: dict[str, Declared] = {
    each.option: each for each in SETTINGS.values() if each.setting.given is not Given.COMPUTED
}
"""Settings that the user gives, by the name of the option."""


def names_owned_by(owner: Owner) -> tuple[str, ...]:
    """Settings that a recipe, a data set or neither has the default of."""
    return tuple(each.name for each in SETTINGS.values() if each.owner is owner)


def names_in_identity(identity: Identity) -> set[str]:
    """Settings that are part of a run's identity always, never, or where they are not at their default."""
    return {each.name for each in SETTINGS.values() if each.setting.identity is identity}
