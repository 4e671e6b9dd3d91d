"""Registered artifacts: numbered, hashed and described copies of finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from icdctl import files


@dataclass(frozen=True)
class Artifact:
    """One version of a registered model."""

    name: str
    version: int
    folder: Path

    def file(self, name: str) -> Path:
        """A registered file."""
        return self.folder / "files" / name


def default_folder() -> Path:
    """The project's registry."""
    return files.project_root() / "registry"


def find(folder: Path, reference: str) -> Artifact:
    """The artifact that `reference` names."""
    raise NotImplementedError
