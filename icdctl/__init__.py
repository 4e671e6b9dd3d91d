"""Knowledge distillation of image classifiers.

>>> import icdctl
>>> result = icdctl.distill(method="cd_sdd_dkd", teacher="runs/teacher", student="res8", dataset="digits100")

Importing this package imports nothing heavy: what is named here is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from icdctl import methods, models
    from icdctl.api import distill, distill_many, evaluate, export, predict, train
    from icdctl.errors import IcdctlError

__all__ = [
    "IcdctlError",
    "__version__",
    "distill",
    "distill_many",
    "evaluate",
    "export",
    "methods",
    "models",
    "predict",
    "train",
]

_HOMES = {
    "IcdctlError": "icdctl.errors",
    "distill": "icdctl.api",
    "distill_many": "icdctl.api",
    "evaluate": "icdctl.api",
    "export": "icdctl.api",
    "predict": "icdctl.api",
    "train": "icdctl.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # here, not above: a tenth of the time of `icdctl --help`

        return metadata.version("icdctl")
    if name in ("methods", "models"):
        return import_module(f"icdctl.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'icdctl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
