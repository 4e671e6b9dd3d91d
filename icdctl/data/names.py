"""Names of data sets, taken apart: `cifar100` is a kind alone, `imagefolder:photos` a kind and a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

IMAGE_FOLDER = "imagefolder"
"""The kind of a folder of the user's own images."""


@dataclass(frozen=True)
class DatasetName:
    """A data set's name in its two parts; `str()` joins them again."""

    kind: str
    """A key of `DATASETS`, or a name that icdctl does not know, from a weights file of another program."""
    folder: str | None = None
    """What stands after the colon: the folder's absolute path in a resolved name, its last part in a public one."""

    @staticmethod
    def parse(text: str) -> DatasetName:
        """A name in any form: as typed, as resolved, or as in weights and reports. Nothing is checked."""
        kind, colon, folder = text.partition(":")
        return DatasetName(kind, folder if colon else None)

    def __str__(self) -> str:
        return self.kind if self.folder is None else f"{self.kind}:{self.folder}"

    @property
    def is_image_folder(self) -> bool:
        """Whether it names a folder of the user's own images."""
        return self.kind == IMAGE_FOLDER and self.folder is not None

    @property
    def public(self) -> DatasetName:
        """The name for weights and reports: a folder without its path, which is private and may change."""
        return self if self.folder is None else DatasetName(self.kind, Path(self.folder).name)
