"""The frozen configuration of a run, which `config.json` holds, and how some of its values are read.

Every value comes from the first of these that has it: a flag (or keyword), `--config FILE`, the environment
(`ICDCTL_LR`, ...), the `train` section of the project's `params.yaml`, the recipe, the default.
`icdctl.config.settings` declares them all, `icdctl.config.sources` collects the first four, `icdctl.config.resolving`
makes the configuration. Nothing later reads a flag, a variable or a file of settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Self

from pydantic import JsonValue

from icdctl import data, files, methods
from icdctl.config.declare import Identity
from icdctl.config.lookup import SETTINGS, Owner, names_in_identity, names_owned_by
from icdctl.config.settings import Settings
from icdctl.data import Augmentation, Request
from icdctl.errors import UsageError

_LONGEST_SHOWN = 80


class RunConfig(Settings):
    """Everything that decides a run.

    A `config.json` without a setting is of a run that began before there was such a setting: it has the default.
    """

    @classmethod
    def stated(cls, value: object) -> Self:
        """The configuration that the JSON value of a `config.json` states.

        Raises:
            ValueError: it is none of this version; pydantic's ValidationError is one.
        """
        config = cls.model_validate(value)
        if "variant" not in config.settings:
            raise ValueError("its `settings` do not state the `variant`")
        return config

    @property
    def augmentation(self) -> Augmentation:
        """How training images are changed."""
        return Augmentation(
            crop_padding=self.crop_padding,
            flip=self.flip,
            crop_scale=self.crop_scale,
            crop_ratio=self.crop_ratio,
            randaugment_ops=self.randaugment_ops,
            randaugment_magnitude=self.randaugment_magnitude,
        )

    @property
    def images(self) -> Request:
        """Which images the run reads, and how they are divided."""
        return data.request(
            self.dataset,
            folder=files.user_path(self.data_dir) if self.data_dir is not None else None,
            val_split=self.val_split,
            split_seed=self.split_seed,
            room_to_crop=self.crop_scale is not None,
            unlabeled=methods.METHODS[self.method].needs_teacher
            and data.DatasetName.parse(self.dataset).is_image_folder,
            **{key: getattr(self, key) for key in names_owned_by(Owner.DATASET)},
        )

    @property
    def identity(self) -> dict[str, JsonValue]:
        """All that changes the numbers, and the run folder.

        The teacher's mode and precision are not part of it: `auto` is decided when the run begins, and the checkpoint
        keeps the decision.
        """
        usual = {key for key in names_in_identity(Identity.WHEN_CHANGED) if getattr(self, key) == SETTINGS[key].default}
        held = self.model_dump(mode="json", exclude=names_in_identity(Identity.NEVER) | usual)
        return held | {"out": str(Path(self.out).resolve())}

    @property
    def fingerprint(self) -> str:
        """Hash of `identity`: runs with equal ones may continue each other."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:20]


def check_device(name: str) -> str:
    """The name of a device, which need not exist.

    Raises:
        UsageError: it is none of `auto`, `cpu`, `cuda` and `cuda:N`.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"unknown device `{name[:_LONGEST_SHOWN]}`", hint="choose `auto`, `cpu`, `cuda` or `cuda:N`")
    return name


def parse_duration(given: object) -> float | None:
    """`90m`, `2h`, `45s`, `1h30m` or a number of seconds, in seconds.

    Raises:
        UsageError: it is none of these, or not above 0.
    """
    if given is None:
        return None
    match = re.fullmatch(
        r"(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,12}(?:\.[0-9]{1,20})?)s?)?", str(given).strip()
    )
    seconds = 0.0
    if match:
        hours, minutes, rest = (float(part or 0) for part in match.groups())
        seconds = hours * 3600 + minutes * 60 + rest
    if seconds <= 0:
        raise UsageError(
            f"time limit `{str(given)[:_LONGEST_SHOWN]}` is not a duration above 0",
            hint="e.g. `--time-limit 90m`, `1h30m` or `45s`",
        )
    return seconds
