"""The errors that leave the library: icdctl's own, whatever a custom module or an allocator raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from icdctl.errors import memory_reported
from icdctl.models.external import module_errors_reported


@contextmanager
def known_errors() -> Iterator[None]:
    """Decorates a function of the library: what it raises is an `IcdctlError`, or a bug."""
    with memory_reported(), module_errors_reported():
        yield
