"""Where the options of a run come from: flags or keywords, a config.json, the environment, params.yaml.

The first of these that has a value wins, and an option remembers where it came from, so that an error can say what to
change. `icdctl.config.run` turns options into the frozen configuration, and checks the values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from icdctl import files
from icdctl.errors import IcdctlError, UsageError, combine, unknown_name

_VARIABLE_PREFIX = "ICDCTL_"
WITHOUT_FLAG = frozenset(
    {
        "class_weights",
        "clip_norm",
        "crop_padding",
        "crop_ratio",
        "crop_scale",
        "drop_last",
        "ema_decay",
        "flip",
        "label_smoothing",
        "lr_decay_epochs",
        "lr_decay_rate",
        "lr_warmup_share",
        "momentum",
        "nesterov",
        "on_nonfinite",
        "randaugment_magnitude",
        "randaugment_ops",
        "schedule",
        "weight_decay",
    }
)
"""The recipe's fields that have no flag of their own: `--set KEY=VALUE`, files, variables and keywords give them."""
NONE = "none"
"""What a person writes to switch off a setting of the recipe."""
_LONGEST_SHOWN = 80
_MOST_TOLD = 10
_MOST_YAML_VALUES = 1_000_000
"""More than any params.yaml has, with what its aliases stand for written out."""


class Options(BaseSettings):
    """What a person gave, by flag, file or variable; None where nothing was given. `RunConfig` checks the values."""

    model_config = SettingsConfigDict(env_prefix=_VARIABLE_PREFIX, extra="forbid", frozen=True)

    method: str | None = None
    dataset: str | None = None
    student: str | None = None
    teacher: str | None = None
    teacher_sha256: str | None = None
    """What the teacher's weights must have, where a configuration is repeated."""
    scales: tuple[int, ...] | str | None = None
    settings: dict[str, Any] | None = None
    recipe: str | None = None
    seed: Any = None
    epochs: Any = None
    batch_size: Any = None
    lr: Any = None
    optimizer: Any = None
    momentum: Any = None
    nesterov: Any = None
    weight_decay: Any = None
    clip_norm: Any = None
    schedule: Any = None
    lr_decay_epochs: Any = None
    lr_decay_rate: Any = None
    lr_warmup_share: Any = None
    crop_padding: Any = None
    flip: Any = None
    crop_scale: Any = None
    crop_ratio: Any = None
    randaugment_ops: Any = None
    randaugment_magnitude: Any = None
    label_smoothing: Any = None
    class_weights: Any = None
    drop_last: Any = None
    train_images: Any = None
    test_images: Any = None
    image_size: Any = None
    test_split: Any = None
    skip_broken: Any = None
    val_split: Any = None
    split_seed: Any = None
    data_dir: str | None = None
    device: str | None = None
    precision: Any = None
    teacher_mode: Any = None
    teacher_precision: Any = None
    deterministic: Any = None
    compile: Any = None
    on_nonfinite: Any = None
    ema_decay: Any = None
    init_weights: str | None = None
    init_sha256: str | None = None
    max_steps: Any = None
    time_limit: Any = None
    out: str | None = None

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def origin(self, key: str) -> str:
        """What to change where a value is wrong: a flag, a variable or a file."""
        return self._origins.get(key, f"`{key}`")


def gather(given: Mapping[str, Any], *, config_file: Path | None = None, command: str | None = None) -> Options:
    """The options of a run from keywords, a config.json, the environment and params.yaml.

    Args:
        given: by flag or keyword; None means not given.
        config_file: a run's `config.json`, to repeat it.
        command: "train" or "distill", which the file must be of.

    Raises:
        UsageError: an unknown key, an empty value, or one of the wrong shape, from any of them.
        ArtifactError: a file can't be read.
    """
    keywords = {key: value for key, value in given.items() if value is not None}
    _refuse_unknown(keywords, "option")
    for key in ("out", "data_dir"):
        if keywords.get(key) == "":
            raise UsageError(f"{flag_of(key)} is empty", hint="name a folder, or leave it out")
    stated = _from_config_file(config_file, command) if config_file is not None else {}
    for key, pinned in (("teacher", "teacher_sha256"), ("init_weights", "init_sha256")):
        if key in keywords:
            stated.pop(pinned, None)
    if "settings" in keywords:
        keywords["settings"] = {**(stated.get("settings") or {}), **keywords["settings"]}
    variables = {key for key in Options.model_fields if f"{_VARIABLE_PREFIX}{key.upper()}" in os.environ}
    tracked = _params_yaml()
    origins = {key: f"`{key}` in `params.yaml`" for key in tracked}
    origins |= {key: f"the variable `{_VARIABLE_PREFIX}{key.upper()}`" for key in variables}
    origins |= {key: f"`{key}` in `{config_file}`" for key in stated}
    origins |= {key: flag_of(key) for key in keywords}
    values = {**{key: value for key, value in tracked.items() if key not in variables}, **stated, **keywords}
    try:
        options = Options(**values)
    except ValidationError as error:
        raise from_validation(error, lambda key: origins.get(key, f"`{key}`")) from error
    except SettingsError as error:  # a variable that should hold JSON
        raise UsageError(str(error), hint=f"write the `{_VARIABLE_PREFIX}...` variable as JSON") from error
    options._origins.update(origins)
    return options


def flag_of(key: str) -> str:
    """How a keyword is written: as a flag where there is one."""
    if key in WITHOUT_FLAG:
        return f"`--set {key}`"
    if key in ("teacher_sha256", "init_sha256"):
        return f"`{key}`"
    return "`--set`" if key == "settings" else f"`--{key.replace('_', '-')}`"


def _refuse_unknown(options: Mapping[str, Any], kind: str) -> None:
    unknown = [key for key in options if key not in Options.model_fields]
    if unknown:
        listing = "icdctl distill --dry-run"
        raise combine([unknown_name(kind, key, Options.model_fields, listing=listing) for key in unknown])


def _params_yaml() -> dict[str, Any]:
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
            f"`{path}` holds no mapping `train`, found {type(section).__name__}",
            hint="write e.g. `train: {epochs: 240}` in it",
        )
    _refuse_unknown({str(key): value for key, value in section.items()}, f"key of `{path}`")
    return {key: value for key, value in section.items() if value is not None}


def read_yaml(path: Path) -> Any:
    """What a YAML file says. It is parsed once for many runs: whoever gets the value leaves it as it is.

    Raises:
        FileNotFoundError: there is none.
        UsageError: it is no YAML, names a key twice, or refers to itself.
    """
    try:
        state = path.stat()
        return _parsed(path, state.st_mtime_ns, state.st_size, state.st_ino)
    except FileNotFoundError:
        raise
    except (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # The last four come out of values that only look like dates, numbers or words of YAML, and of deep nesting.
        raise UsageError(f"`{path}` can't be read as YAML: {_yaml_problem(error)}", hint=f"mend `{path}`") from error


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
    """Refuse keys that stand twice, of which YAML would take the last, and values without an end.

    Args:
        node: with all below it.
        sizes: of the nodes that were seen; 0 for one that is being looked at.

    Returns:
        How many values it is, with aliases written out.

    Raises:
        yaml.YAMLError: it is so.
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
                raise yaml.MarkedYAMLError(problem=f"the key `{key.value}` stands twice", problem_mark=key.start_mark)
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
    """In one line, with its place where it is known."""
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


def _from_config_file(path: Path, command: str | None) -> dict[str, Any]:
    """The options that a config.json states; its run folder is not taken over, for it is in use."""
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


def options_of(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The options that lead to a resolved configuration, from its fields."""
    options = {key: value for key, value in stated.items() if key != "command" and value is not None}
    if not options.get("scales"):
        options.pop("scales", None)
    if weights := options.pop("teacher_weights", None):
        options["teacher"] = weights
    if (seconds := options.pop("time_limit_seconds", None)) is not None:
        options["time_limit"] = seconds
    if "crop_scale" in stated and stated["crop_scale"] is None:  # said, for the recipe may have one
        options["crop_scale"] = NONE
    return options


def from_validation(error: ValidationError, origin: Callable[[str], str] = lambda key: f"`{key}`") -> UsageError:
    """All that pydantic found wrong, a line a key.

    Args:
        error: of a validation.
        origin: what to change, by key.
    """
    problems: dict[str, IcdctlError] = {}
    for item in error.errors():
        key = str(item["loc"][0]) if item["loc"] else "configuration"
        if key in problems:
            continue
        if not item["loc"]:  # of several keys together
            problems[key] = UsageError(str(item["ctx"]["error"]), hint="`icdctl list recipes` shows the usual")
        elif item["type"] == "extra_forbidden":
            problems[key] = unknown_name("key", key, Options.model_fields, listing="icdctl distill --dry-run")
        elif item["type"] == "missing" and len(item["loc"]) == 1:
            problems[key] = UsageError(f"`{key}` is missing", hint=f"give {origin(key)}")
        else:
            value = str(item["input"])
            shown = value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}..."
            message = item["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            problems[key] = UsageError(f"`{key}` is `{shown}`: {message}", hint=f"change {origin(key)}")
    told = combine(list(problems.values())[:_MOST_TOLD])
    return UsageError(told.message, hint=told.hint)
