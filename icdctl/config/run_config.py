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
from icdctl.config.lookup import SETTINGS, names_in_identity
from icdctl.config.settings import DatasetSettings, Settings
from icdctl.config.values import seconds_of
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
        return Request(
            name=self.dataset,
            folder=files.data_folder() if self.data_dir is None else files.user_path(self.data_dir),
            room_to_crop=self.crop_scale is not None,
            unlabeled=methods.get(self.method).needs_teacher and data.DatasetName.parse(self.dataset).is_image_folder,
            **{key: getattr(self, key) for key in DatasetSettings.model_fields},
        )

    @property
    def checkpoint_steps(self) -> int | None:
        """Steps after which the state is saved within an epoch; None where it is saved by time."""
        return int(self.checkpoint_every) if self.checkpoint_every.strip().isdecimal() else None

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds after which the state is saved within an epoch, where it is not saved by steps."""
        return seconds_of(self.checkpoint_every)

    @property
    def identity(self) -> dict[str, JsonValue]:
        """All that changes the numbers: runs with equal ones, on the same images, may continue each other.

        It holds no path, because folders are moved. The teacher's mode and precision are not part of it: `auto` is
        decided when the run begins, and the checkpoint keeps the decision.
        """
        return self._numbers | {"dataset": data.public_name(self.dataset)}

    @property
    def legacy_fingerprint(self) -> str:
        """The name of its checkpoint in earlier versions: a hash of what changes the numbers, and of the run folder."""
        held = self._numbers | {"out": str(Path(self.out).resolve())}
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:20]

    @property
    def _numbers(self) -> dict[str, JsonValue]:
        usual = {key for key in names_in_identity(Identity.WHEN_CHANGED) if getattr(self, key) == SETTINGS[key].default}
        return self.model_dump(mode="json", exclude=names_in_identity(Identity.NEVER) | usual)


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
    seconds = seconds_of(str(given))
    if seconds <= 0:
        raise UsageError(
            f"time limit `{str(given)[:_LONGEST_SHOWN]}` is not a duration above 0",
            hint="e.g. `--time-limit 90m`, `1h30m` or `45s`",
        )
    return seconds
