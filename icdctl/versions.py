"""Versions of installed packages."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of Python and of the named packages; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
