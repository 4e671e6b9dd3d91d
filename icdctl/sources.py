"""Where the options of a run come from: flags or keywords, a config.json, the environment, params.yaml.

The first of these that has a value wins, and an option remembers where it came from, so that an error can say what to
change. `icdctl.config` turns options into the frozen configuration, and checks the values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        first_line = str(error).splitlines()[0]
        raise UsageError(f"`{path}` can't be read as YAML: {first_line}", hint=f"mend `{path}`") from error
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
