"""Where the options of a run come from: flags or keywords, a config.json, the environment, params.yaml.

The first of these that has a value wins, and an option remembers where it came from, so that an error can say what to
change. `icdctl.config.run_config` turns options into the frozen configuration, and checks the values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError, create_model
from pydantic_settings import BaseSettings, SettingsConfigDict

from icdctl import files
from icdctl.config.declare import Identity
from icdctl.config.lookup import OPTIONS, SETTINGS, Declared, names_in_identity
from icdctl.config.values import NONE
from icdctl.errors import IcdctlError, UsageError, combine, unknown_name
from icdctl.files import yaml_reading

_VARIABLE_PREFIX = "ICDCTL_"
_PINNED = (
    ("teacher", "teacher_sha256"),
    ("init_weights", "init_sha256"),
    ("student", "pretrained_sha256"),
    ("pretrained", "pretrained_sha256"),
)
"""Options, and the hashes in a config.json that hold no longer where the option is given."""
_LONGEST_SHOWN = 80
_MOST_PRINTED = 10


@dataclass(frozen=True)
class Options:
    """The options that the user gave, by flag, file or variable. `RunConfig` checks the values."""

    given: Mapping[str, object] = field(default_factory=dict)
    """Option -> its value; those that were not given are not in it."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Option -> where it came from."""

    def get(self, option: str) -> object:
        """Its value; None where it was not given.

        Raises:
            KeyError: no option has this name.
        """
        return self.given.get(OPTIONS[option].option)

    def text(self, option: str) -> str | None:
        """The value of an option that is text; None where it was not given."""
        value = self.get(option)
        return None if value is None else str(value)

    @property
    def settings(self) -> Mapping[str, object]:
        """Settings of the method."""
        given = self.get("settings")
        return given if isinstance(given, Mapping) else {}

    def origin(self, key: str) -> str:
        """What to change where a value is wrong: a flag, a variable or a file."""
        return self.origins.get(key, f"`{key}`")

    def without(self, option: str) -> Options:
        """The same options without this one."""
        return replace(self, given={key: value for key, value in self.given.items() if key != option})


def _form(declared: Declared) -> Any:
    """The type that a value has before it is checked: text is text, and the method's settings are a mapping."""
    if declared.is_text:
        return str | None
    return dict[str, Any] | None if get_origin(declared.type) is dict else Any


class _Variables(BaseSettings):
    """Reads variables for the options that were not given otherwise."""

    model_config = SettingsConfigDict(env_prefix=_VARIABLE_PREFIX, extra="forbid", frozen=True)


_FORMS: dict[str, Any] = {name: (_form(each), None) for name, each in OPTIONS.items()}
_Reader = create_model("_Reader", __base__=_Variables, **_FORMS)


def collect(given: Mapping[str, object], *, config_file: Path | None = None, command: str | None = None) -> Options:
    """The options of a run from keywords, a config.json, the environment and params.yaml.

    Args:
        given: options by flag or keyword; None means not given.
        config_file: a run's `config.json`, to repeat it.
        command: "train" or "distill"; the file must be a configuration of this command.

    Raises:
        UsageError: an unknown key, an empty value, or one of the wrong shape, from any of them.
        ArtifactError: a file can't be read.
    """
    keywords = {key: value for key, value in given.items() if value is not None}
    _refuse_unknown(keywords, "option")
    for key in ("out", "data_dir"):
        if keywords.get(key) == "":
            raise UsageError(f"{OPTIONS[key].shown()} is empty", hint="name a folder, or leave it out")
    stated = _from_config_file(config_file, command) if config_file is not None else {}
    for key, pinned in _PINNED:
        if key in keywords:
            stated.pop(pinned, None)
    own, held = keywords.get("settings"), stated.get("settings")
    if isinstance(own, Mapping) and isinstance(held, Mapping):
        keywords["settings"] = {**held, **own}
    variables = {key for key in OPTIONS if f"{_VARIABLE_PREFIX}{key.upper()}" in os.environ}
    for key in variables:
        _check_variable(key)
    tracked = _params_yaml()
    origins = {key: f"`{key}` in `params.yaml`" for key in tracked}
    origins |= {key: f"the variable `{_VARIABLE_PREFIX}{key.upper()}`" for key in variables}
    origins |= {key: f"`{key}` in `{config_file}`" for key in stated}
    origins |= {key: OPTIONS[key].shown() for key in keywords}
    values = {**{key: value for key, value in tracked.items() if key not in variables}, **stated, **keywords}
    try:
        read = _Reader(**values)
    except ValidationError as error:
        raise from_validation(error, lambda key: origins.get(key, f"`{key}`")) from error
    return Options({key: value for key, value in read if value is not None}, origins)


def _check_variable(key: str) -> None:
    """Check a variable that holds a mapping before pydantic parses it, which has no limits."""
    name = f"{_VARIABLE_PREFIX}{key.upper()}"
    text = os.environ[name]
    if get_origin(OPTIONS[key].type) is dict and text.lstrip().startswith(("{", "[")):
        try:
            files.parse_json(text)
        except ValueError as error:
            raise UsageError(
                f"`{key}` is `{text[:_LONGEST_SHOWN]}`: {error}", hint=f"change the variable `{name}`"
            ) from error


def _refuse_unknown(options: Iterable[str], kind: str) -> None:
    unknown = [key for key in options if key not in OPTIONS]
    if unknown:
        raise combine([unknown_name(kind, key, OPTIONS, listing="icdctl distill --dry-run") for key in unknown])


def _params_yaml() -> dict[str, object]:
    """The `train` section of the project's params.yaml; the file's other sections are the pipeline's."""
    path = files.project_root() / "params.yaml"
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        return {}
    section = content.get("train") if isinstance(content, dict) else content
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise UsageError(
            f"`{path}` does not hold a mapping `train`, found {type(section).__name__}",
            hint="write e.g. `train: {epochs: 240}` in it",
        )
    _refuse_unknown(map(str, section), f"key of `{path}`")
    return {key: value for key, value in section.items() if value is not None}


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. It is parsed once for many runs, so callers must not change it.

    Raises:
        FileNotFoundError: there is no such file.
        UsageError: it is not YAML, names a key twice, or refers to itself.
    """
    try:
        state = path.stat()
        return _parsed(path, state.st_mtime_ns, state.st_size, state.st_ino)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise UsageError(f"`{path}` can't be read as YAML: {reason}", hint=f"fix `{path}`") from error


@lru_cache(maxsize=8)
def _parsed(path: Path, *state: int) -> Any:
    """The content of a file in that state."""
    return yaml_reading.read_yaml(path)


def _from_config_file(path: Path, command: str | None) -> dict[str, object]:
    """The options that a config.json states; without its run folder, which is in use."""
    hint = "pass the `config.json` of a run folder"
    stated = files.read_json(path, what="config", hint=hint)
    if not isinstance(stated, dict):
        raise UsageError(f"`{path}` holds no JSON object", hint=hint)
    if command is not None and stated.get("command", command) != command:
        other = stated["command"]
        raise UsageError(
            f"`{path}` is a configuration of `icdctl {other}`", hint=f"run `icdctl {other} --config {path}`"
        )
    options = options_of(stated)
    options.pop("out", None)
    _refuse_unknown(options, f"key of `{path}`")
    return options


def options_of(stated: Mapping[str, object]) -> dict[str, object]:
    """The options that lead to a resolved configuration, from its fields.

    A setting that it does not state had its default: the run began before there was such a setting.
    """
    options = {key: value for key, value in stated.items() if key != "command" and value is not None}
    if not options.get("scales"):
        options.pop("scales", None)
    if weights := options.pop("teacher_weights", None):
        options["teacher"] = weights
    if (seconds := options.pop("time_limit_seconds", None)) is not None:
        options["time_limit"] = seconds
    if "crop_scale" in stated and stated["crop_scale"] is None:  # stated, because the recipe may have one
        options["crop_scale"] = NONE
    if "command" in stated:
        later = names_in_identity(Identity.WHEN_CHANGED) - stated.keys()
        options |= {key: SETTINGS[key].default for key in SETTINGS if key in later}
    return options


def _shown(value: object) -> str:
    """A value as text for a message, cut if it is long."""
    try:
        text = str(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def from_validation(error: ValidationError, origin: Callable[[str], str] = lambda key: f"`{key}`") -> IcdctlError:
    """All problems that pydantic found, one line for each key.

    Args:
        error: the error of a validation.
        origin: returns what to change for a key.
    """
    problems: dict[str, IcdctlError] = {}
    for item in error.errors():
        key = str(item["loc"][0]) if item["loc"] else "configuration"
        if key in problems:
            continue
        if not item["loc"]:  # of several keys together
            problems[key] = UsageError(str(item["ctx"]["error"]), hint="`icdctl list recipes` shows the usual")
        elif item["type"] == "extra_forbidden":
            problems[key] = unknown_name("key", key, OPTIONS, listing="icdctl distill --dry-run")
        elif item["type"] == "missing" and len(item["loc"]) == 1:
            problems[key] = UsageError(f"`{key}` is missing", hint=f"give {origin(key)}")
        else:
            shown = _shown(item["input"])
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            problems[key] = UsageError(f"`{key}` is `{shown}`: {message}", hint=f"change {origin(key)}")
    return combine(list(problems.values())[:_MOST_PRINTED])
