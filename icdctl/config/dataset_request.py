"""The settings of a data set: which it has, their defaults and bounds, and the request for its images that results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from icdctl import data, files
from icdctl.config.lookup import SETTINGS, Declared, Owner, names_owned_by
from icdctl.config.settings import DatasetSettings
from icdctl.config.sources import from_validation
from icdctl.data import IMAGE_FOLDER, DatasetName, Request
from icdctl.errors import UsageError


def check_dataset_settings(name: str, given: Mapping[str, object]) -> DatasetSettings:
    """Check the settings of a data set, and fill in its defaults.

    Args:
        name: the data set's name, as resolved.
        given: values of some of the settings; None means not given. Text, as from a variable, is converted.

    Raises:
        UsageError: the data set does not have a given setting, or a value is out of range.
    """
    kind = DatasetName.parse(name).kind
    chosen = {key: value for key, value in given.items() if value is not None}
    for key in names_owned_by(Owner.DATASET):
        owners = SETTINGS[key].setting.datasets
        if kind in owners:
            chosen.setdefault(key, owners[kind])
        elif key in chosen:
            raise _not_of(name, SETTINGS[key])
    try:
        return DatasetSettings.model_validate(chosen)
    except ValidationError as error:
        raise from_validation(error, lambda key: SETTINGS[key].shown() if key in SETTINGS else f"`{key}`") from error


def dataset_request(
    name: str,
    *,
    folder: Path | None = None,
    room_to_crop: bool = False,
    unlabeled: bool = False,
    **settings: object,
) -> Request:
    """Check what is wanted of a data set; `data.describe` and `data.load` take the result.

    Args:
        name: the data set's name, as typed.
        folder: holds the folders of published data sets; by default `ICDCTL_DATA`, else `data` in the state folder.
        room_to_crop: see `Request`.
        unlabeled: see `Request`.
        **settings: see `DatasetSettings`; None means not given.

    Raises:
        UsageError: no data set has this name, the data set does not have a given setting, or a value is out of range.
    """
    resolved = data.resolve(name)
    return Request(
        name=resolved,
        folder=folder or files.data_folder(),
        room_to_crop=room_to_crop,
        unlabeled=unlabeled,
        **dict(check_dataset_settings(resolved, settings)),
    )


def _not_of(name: str, declared: Declared) -> UsageError:
    """The error for a setting that a data set does not have."""
    owner = next(iter(declared.setting.datasets))
    return UsageError(
        f"{declared.shown()} is given, but `{name}` has no such setting",
        hint="leave it out, in the `train` section of params.yaml too; it belongs to "
        f"`--dataset {owner}{':DIR' if owner == IMAGE_FOLDER else ''}`",
    )
