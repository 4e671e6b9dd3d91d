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

import yaml
from pydantic import ValidationError, create_model
from pydantic_settings import BaseSettings, SettingsConfigDict

from icdctl import files
from icdctl.config.declare import Identity
from icdctl.config.lookup import OPTIONS, SETTINGS, Declared, names_in_identity
from icdctl.config.settings import NONE
from icdctl.errors import IcdctlError, UsageError, combine, unknown_name

_VARIABLE_PREFIX = "ICDCTL_"
_LONGEST_SHOWN = 80
_MOST_PRINTED = 10
_MOST_YAML_VALUES = 1_000_000
"""More values than any params.yaml has, with its aliases written out."""


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
    for key, pinned in (("teacher", "teacher_sha256"), ("init_weights", "init_sha256")):
        if key in keywords:
            stated.pop(pinned, None)
    own, held = keywords.get("settings"), stated.get("settings")
    if isinstance(own, Mapping) and isinstance(held, Mapping):
        keywords["settings"] = {**held, **own}
    variables = {key for key in OPTIONS if f"{_VARIABLE_PREFIX}{key.upper()}" in os.environ}
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
    except (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # The last four come from values that only look like dates, numbers or words of YAML, and of deep nesting.
        raise UsageError(f"`{path}` can't be read as YAML: {_yaml_problem(error)}", hint=f"fix `{path}`") from error


@lru_cache(maxsize=8)
def _parsed(path: Path, *state: int) -> Any:
    """The content of a file in that state."""
    loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_nodes(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Refuse keys that appear twice, of which YAML would take the last, and values that contain themselves.

    Args:
        node: the node to check, with all nodes below it.
        sizes: sizes of the nodes seen so far, by id; 0 for one that is being checked.

    Returns:
        Number of values, with aliases written out.

    Raises:
        yaml.YAMLError: the node has such a key or value, or is too large.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.MarkedYAMLError(problem="a value refers to itself", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in keys:
                raise yaml.MarkedYAMLError(problem=f"the key `{key.value}` appears twice", problem_mark=key.start_mark)
            keys.add(name)
            inside += (key, value)
    elif isinstance(node, yaml.SequenceNode):
        inside = node.value
    size = 1 + sum(_check_nodes(each, sizes) for each in inside)
    if size > _MOST_YAML_VALUES:
        raise yaml.MarkedYAMLError(problem="there are too many values", problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size


def _yaml_problem(error: Exception) -> str:
    """The error in one line, with its place if that is known."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, LookupError | AttributeError):
        return "a value is not what its tag says"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return str(error.problem) + (f", in line {mark.line + 1}" if mark is not None else "")
    return (str(error).splitlines() or [type(error).__name__])[0]


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
            value = str(item["input"])
            shown = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}..."
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            problems[key] = UsageError(f"`{key}` is `{shown}`: {message}", hint=f"change {origin(key)}")
    return combine(list(problems.values())[:_MOST_PRINTED])
