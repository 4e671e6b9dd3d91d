"""Names of models of other libraries: `torchvision:NAME`, `timm:NAME` and `package.module:callable`, read and spelled.

No library is imported to read a name; `icdctl.models.backbones` builds what it names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

from pydantic import JsonValue

from icdctl import files
from icdctl.errors import UsageError

_NAME = re.compile(
    r"(?P<source>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<model>[A-Za-z_][\w.]*)(?:\((?P<arguments>.*)\))?",
    re.ASCII | re.DOTALL,
)
_OTHER_PREFIXES = ("registry", "imagefolder")
_FILE_ENDINGS = ("pth", "pt", "safetensors", "ckpt", "bin", "tar")
"""Ends of `FILE:KEY`, which looks like a callable."""
_RESERVED = {
    "torchvision": ("weights", "weights_backbone", "pretrained", "progress", "num_classes"),
    "timm": (
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "features_only",
        "num_classes",
    ),
}
"""Arguments that icdctl gives itself, or that would read other files."""
_LONGEST_LABEL = 48


@dataclass(frozen=True)
class Backbone:
    """The name of a model of another library, taken apart."""

    source: str
    """`torchvision`, `timm` or the module of a callable."""
    model: str
    """The library's name of the model, or the callable's."""
    arguments: Mapping[str, JsonValue] = field(default_factory=dict)
    """Keyword arguments for the library's builder, and `linear_head`."""

    def __str__(self) -> str:
        """The only spelling that is stored: arguments in alphabetical order."""
        given = f"({json.dumps(self.arguments, sort_keys=True)})" if self.arguments else ""
        return f"{self.source}:{self.model}{given}"

    @property
    def is_callable(self) -> bool:
        """Whether it is code of the user's, not a model of a known library."""
        return self.source not in _RESERVED

    @property
    def package(self) -> str:
        """The top-level package that is imported."""
        return self.source.partition(".")[0]

    @property
    def version(self) -> str | None:
        """The installed version of that package; None where it has none."""
        try:
            names = [self.package] if not self.is_callable else metadata.packages_distributions()[self.package]
            return metadata.version(names[0])
        except (metadata.PackageNotFoundError, KeyError):
            return None


def is_backbone(name: str) -> bool:
    """Whether a name has the form of a model of another library, or of a callable."""
    match = _NAME.fullmatch(name.strip())
    if match is None or match["source"] in _OTHER_PREFIXES:
        return False
    return match["source"].rpartition(".")[2] not in _FILE_ENDINGS


def parse(name: str) -> Backbone:
    """The parts of a name for which `is_backbone` holds; no library is imported.

    Raises:
        UsageError: its arguments are no JSON object, or one of them is not the user's to give.
    """
    match = _NAME.fullmatch(name.strip())
    assert match is not None
    source, model = match["source"], match["model"]
    arguments: object = {}
    if (match["arguments"] or "").strip():
        try:
            arguments = files.parse_json(match["arguments"])
        except ValueError as error:
            raise UsageError(
                f"the arguments of `{source}:{model}` are not JSON: {error}", hint=_arguments_hint()
            ) from error
    if not isinstance(arguments, dict):
        raise UsageError(f"the arguments of `{source}:{model}` are not a JSON object", hint=_arguments_hint())
    taken = [key for key in arguments if key in _RESERVED.get(source, ())]
    if taken:
        raise UsageError(
            f"`{taken[0]}` is not an argument that `{source}:{model}` takes here",
            hint="the data set gives the classes, `--pretrained` and `--init-weights` give the first weights",
        )
    return Backbone(source, model, arguments)


def _arguments_hint() -> str:
    return "keyword arguments stand in parentheses, in quotes of the shell: `'timm:resnet18({\"drop_rate\": 0.1})'`"


def short_label(name: str) -> str:
    """A name in the characters of file names: `timm:resnet18({"drop_rate": 0.1})` is `timm_resnet18_drop_rate_0.1`."""
    if not is_backbone(name):
        return name
    label = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")
    if len(label) <= _LONGEST_LABEL:
        return label
    return f"{label[:_LONGEST_LABEL]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def has_pretrained(name: str) -> bool:
    """Whether `--pretrained` can be asked for: the weights of a callable are its own matter."""
    return is_backbone(name) and not parse(name).is_callable
