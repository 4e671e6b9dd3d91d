"""Files and folders get the permissions that the umask leaves, no more and no fewer."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fetch_support import cifar_members, tar_of

from icdctl import files, models
from icdctl.data import archive
from icdctl.data.archive import Limits
from icdctl.exporting import package


@pytest.fixture(params=[0o077, 0o007, 0o022, 0o002], ids="{:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    mask: int = request.param
    before = os.umask(mask)
    try:
        yield mask
    finally:
        os.umask(before)


def wrong_modes(folder: Path, mask: int) -> dict[str, str]:
    """Paths below `folder` whose permissions are not those of a plain `open` or `mkdir` under this umask."""
    found = {}
    for path in folder.rglob("*"):
        mode, expected = stat.S_IMODE(path.stat().st_mode), (0o777 if path.is_dir() else 0o666) & ~mask
        if mode != expected:
            found[str(path.relative_to(folder))] = f"{mode:03o}, expected {expected:03o}"
    return found


def test_written_files_and_their_folders(tmp_path: Path, umask: int) -> None:
    files.write_bytes(tmp_path / "a" / "bytes", b"1")
    files.write_json(tmp_path / "a" / "value.json", {})
    files.write_json(tmp_path / "a" / "value.json", {"over": "written"})
    models.save_weights(tmp_path / "b" / "student.safetensors", {"weight": torch.ones(2)}, {})

    assert len(list(tmp_path.rglob("*"))) == 5
    assert wrong_modes(tmp_path, umask) == {}


def test_locks_while_they_are_held(tmp_path: Path, umask: int) -> None:
    with (
        files.waited_lock(tmp_path / "state" / "waited.lock"),
        files.locked(tmp_path / "state" / "held.lock", busy="busy", hint="wait"),
    ):
        assert len(list(tmp_path.rglob("*"))) == 3
        assert wrong_modes(tmp_path, umask) == {}


def test_a_folder_that_is_built_beside_its_place_and_moved(tmp_path: Path, umask: int) -> None:
    out = tmp_path / "onnx"
    for _ in range(2):  # the second time over the first
        with files.temporary_beside(out, is_folder=True) as folder:
            files.write_bytes(folder / "model.onnx", b"1")
            package._move(folder, out)

    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model.onnx", "onnx"]
    assert wrong_modes(tmp_path, umask) == {}


def test_an_unpacked_archive_whatever_its_members_say(tmp_path: Path, umask: int) -> None:
    packed, place = tmp_path / "packed.tar", tmp_path / "out" / "cifar-100-python"
    packed.write_bytes(tar_of(cifar_members()))

    with archive.unpacked(packed, place, limits=Limits(16, 4_000_000)) as unpacked:
        unpacked.rename(place)

    assert (place / "train").is_file()
    assert wrong_modes(tmp_path, umask) == {}
