"""CUB-200-2011 with a stand-in of generated images in place of the real one.

The stand-in is described as exactly as the real archive, and goes through the very same code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fetch_support import (
    CUB_TEST,
    CUB_TRAIN,
    Origin,
    close_network,
    cub_archive,
    cub_members,
    cub_release_of,
    running_origin,
)

from icdctl import data, files
from icdctl.data import cub200, release
from icdctl.data.release import Release
from icdctl.teachers import published_teachers

MEMBERS = cub_members()
ARCHIVE = cub_archive(MEMBERS)
RELEASE = cub_release_of(MEMBERS, ARCHIVE)
NAME = "CUB_200_2011.tgz"
REAL, NUM_REAL = cub200.RELEASE, (cub200.NUM_TRAIN, cub200.NUM_TEST)
KNOWN = list(REAL.member_md5)
PUBLISHED = published_teachers.load_list()
CPU = torch.device("cpu")


@pytest.fixture
def origin() -> Iterator[Origin]:
    with running_origin() as running:
        yield running


def swap_release(monkeypatch: pytest.MonkeyPatch, described: Release) -> None:
    """CUB-200-2011 as an archive of generated images."""
    row = data.DATASETS["cub200"]
    changed = dataclasses.replace(row, release=described, train_images=CUB_TRAIN, test_images=CUB_TEST)
    monkeypatch.setitem(data.DATASETS, "cub200", changed)
    for name, value in (("RELEASE", described), ("NUM_TRAIN", CUB_TRAIN), ("NUM_TEST", CUB_TEST)):
        monkeypatch.setattr(cub200, name, value)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in, a state folder of the test's own; and whatever asks for another machine gets no answer."""
    close_network(monkeypatch)
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    swap_release(monkeypatch, RELEASE)
    return tmp_path / "state"


@pytest.fixture(scope="module")
def shared_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with the stand-in in its place, for tests that change nothing of it."""
    home = tmp_path_factory.mktemp("shared") / "state"
    put_data(home / "data")
    return home


@pytest.fixture
def fetched(shared_state: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in is there, decoded once for all tests."""
    monkeypatch.setenv("ICDCTL_HOME", str(shared_state))
    return shared_state / "data" / cub200.FOLDER


def put_data(folder: Path) -> Path:
    """The stand-in unpacked in a folder of data sets."""
    files.make_folder(folder)
    copy = folder / "copy.tgz"
    copy.write_bytes(ARCHIVE)
    found = release.install(RELEASE, folder, from_file=copy)
    copy.unlink()
    return found.path


def cached() -> list[str]:
    """What lies in the cache of decoded images."""
    return sorted(path.name for path in (files.state_folder() / "cache" / "images").glob("*.npy"))
