"""The room's own JSON files: read from the package and checked against their models."""

from __future__ import annotations

import importlib.resources
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from icdctl.errors import ArtifactError


class StrictModel(BaseModel):
    """A value that never changes and accepts no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_package_file(name: str) -> bytes:
    """Content of a file that lies beside this module, in a checkout or in an installed wheel."""
    return importlib.resources.files("icdctl.science").joinpath(name).read_bytes()


Content = TypeVar("Content", bound=StrictModel)


def parse_package_file(model: type[Content], content: bytes, *, what: str) -> Content:
    """The content of one of these files as a model.

    Args:
        model: the format that the file must have.
        content: the bytes of the file.
        what: the words for it in an error message, e.g. `list of published results`.

    Raises:
        ArtifactError: the content does not have this format; the message names the first problem.
    """
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"the {what} is broken at `{place}`: {first['msg']}", hint="install icdctl again"
        ) from error
