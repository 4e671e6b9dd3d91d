"""Benchmarks of tiny models."""

from __future__ import annotations

import pytest

from icdctl.benchmark import ceilings, speed

TINY = ("--batch-size", "8", "--device", "cpu")


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of the machine is not what is tested here."""
    monkeypatch.setitem(ceilings._MATMUL_SIDE, "cpu", 256)
    monkeypatch.setitem(ceilings._COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(speed, "_TRAIN_IMAGES", 1024)
