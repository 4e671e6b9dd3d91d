"""CUB-200-2011 from its archive to its place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fetch_support
import numpy as np
import pytest
from conftest import CommandLine
from cub200_support import (
    ARCHIVE,
    KNOWN,
    MEMBERS,
    NAME,
    REAL,
    RELEASE,
    origin,
    own_state,
    put_data,
    swap_release,
)
from fetch_support import Origin, cub_archive, cub_release_of, jpeg
from test_download import add, partials, visible, wait_for

from icdctl import data
from icdctl.data import cub200, release
from icdctl.errors import ArtifactError

__all__ = ["origin", "own_state"]


def test_it_is_fetched_once_and_found_everywhere(icdctl: CommandLine, origin: Origin, own_state: Path) -> None:
    rows = json.loads(icdctl("list", "datasets", "--json")[1])["datasets"]
    (row,) = [row for row in rows if row["name"] == "cub200"]
    assert (row["state"], row["classes"], row["image size"], row["hashes"]) == ("not fetched", 200, 224, "published")
    assert "non-commercial" in row["licence"]
    assert "Wah" in row["source"]
    origin.serve(f"/{NAME}", ARCHIVE, cut_at=0.4)
    code, out, err = icdctl("fetch-data", "CUB-200", "--mirror", origin.url, "--json")
    assert (code, err) == (0, "")
    assert [asked for _, asked in origin.requests] == [None, f"bytes={int(len(ARCHIVE) * 0.4)}-"], "it was cut"
    (found,) = json.loads(out)["datasets"]
    place = own_state / "data" / cub200.FOLDER
    assert (found["state"], found["path"], found["source"]) == ("fetched", str(place), f"{origin.url}/{NAME}")
    assert visible(own_state / "data") == [cub200.FOLDER], "what lay beside the folder is not taken"
    assert partials(own_state / "data") == []
    assert sum(path.is_file() for path in place.rglob("*")) == len(MEMBERS)
    code, out, _ = icdctl("fetch-data", "cub200", "--offline")
    assert (code, "already in" in out, len(origin.requests)) == (0, True, 2)
    rows = json.loads(icdctl("fetch-data", "--list", "--json")[1])["datasets"]
    (row,) = [row for row in rows if row["name"] == "cub200"]
    assert (row["state"], row["bytes"]) == ("right", len(ARCHIVE))
    assert row["sha256"] == hashlib.sha256(ARCHIVE).hexdigest()
    rows = json.loads(icdctl("list", "datasets", "--json")[1])["datasets"]
    assert next(row["state"] for row in rows if row["name"] == "cub200") == "there"
    checks = json.loads(icdctl("doctor", "--json")[1])["checks"]
    assert next(check for check in checks if check["what"] == "cub200")["status"] == "ok"


def test_it_is_taken_from_a_copy(icdctl: CommandLine, tmp_path: Path, own_state: Path) -> None:
    copy = tmp_path / "carried-over.bin"
    copy.write_bytes(ARCHIVE[:-1] + b"x")
    code, _, err = icdctl("fetch-data", "cub200", "--from", copy)
    assert (code, own_state.exists()) == (1, False)
    assert f"error: `{copy}` is not the published one `{NAME}`: md5 " in err
    copy.write_bytes(ARCHIVE)
    there = tmp_path / "elsewhere"
    assert icdctl("fetch-data", "cub200", "--from", copy, "--data-dir", there, "--offline")[0] == 0
    assert copy.exists()
    assert release.look(RELEASE, there) == ("right", "")


def test_what_can_not_be_had_is_named_with_size_and_hash(
    icdctl: CommandLine, own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(data.DATASETS, "cub200", dataclasses.replace(data.DATASETS["cub200"], release=REAL))
    monkeypatch.setattr(cub200, "RELEASE", REAL)
    facts = (NAME, "1,150,585,339 bytes", "97eceeb196236b17998738112f37df78", str(REAL.archive.sha256))
    code, _, err = icdctl("fetch-data", "cub200", "--offline")
    assert code == 1
    for fact in (*facts, str(own_state / "data" / NAME), "--from FILE"):
        assert fact in err
    code, _, err = icdctl("train", "--model", "res8", "--dataset", "cub200")
    assert code == 1
    for fact in (*facts, f"`{own_state / 'data' / cub200.FOLDER / 'images.txt'}` does not exist", "fetch-data cub200"):
        assert fact in err


def test_wrong_bytes_are_deleted(icdctl: CommandLine, origin: Origin, own_state: Path) -> None:
    origin.serve(f"/{NAME}", b"x" + ARCHIVE[1:])
    offered = dataclasses.replace(RELEASE, archive=dataclasses.replace(RELEASE.archive, urls=()))
    code, _, err = icdctl("fetch-data", "cub200", "--mirror", origin.url)
    assert (code, f"expected {offered.archive.md5}; deleted" in err) == (1, True)
    assert visible(own_state / "data") == partials(own_state / "data") == []
    origin.serve(f"/{NAME}", ARCHIVE)
    assert icdctl("fetch-data", "cub200", "--mirror", origin.url)[0] == 0


def many(tar: tarfile.TarFile) -> None:
    for number in range(1000):
        tar.addfile(tarfile.TarInfo(f"{cub200.FOLDER}/{number}"))


HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "absolute": (add(f"/{cub200.FOLDER}/x"), "lies outside"),
    "parent": (add(f"./{cub200.FOLDER}/../../x"), "lies outside"),
    "beside, unknown": (add("./other.txt"), "lies outside"),
    "beside, a link": (add("attributes.txt", tarfile.SYMTYPE, "/etc/passwd"), "lies outside"),
    "beside, a Mac's device": (add("./._x", tarfile.CHRTYPE), "lies outside"),
    "a Mac's, elsewhere": (add("other/._x"), "lies outside"),
    "link out": (add(f"{cub200.FOLDER}/x", tarfile.SYMTYPE, "/etc/passwd"), "link or a device"),
    "root, a link": (add(cub200.FOLDER, tarfile.SYMTYPE, "/tmp"), "link or a device"),
    "device": (add(f"{cub200.FOLDER}/x", tarfile.CHRTYPE), "link or a device"),
    "many": (many, "more than 600 members"),
    "bomb": (add(f"{cub200.FOLDER}/x", content=bytes(9_000_000)), "unpacks to more than"),
    "bomb beside": (add("attributes.txt", content=bytes(9_000_000)), "unpacks to more than"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_and_leave_nothing(
    icdctl: CommandLine, tmp_path: Path, own_state: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    extra, message = HOSTILE[kind]
    copy = tmp_path / "copy.tgz"
    copy.write_bytes(fetch_support.tar_of({f"{cub200.FOLDER}/{KNOWN[0]}": b"x"}, extra=extra))
    swap_release(monkeypatch, cub_release_of(MEMBERS, copy.read_bytes()))
    code, _, err = icdctl("fetch-data", "cub200", "--from", copy)
    assert (code, message in err) == (1, True), err
    assert visible(own_state / "data") == partials(own_state / "data") == []
    assert visible(tmp_path) == ["copy.tgz", "state"]
    swap_release(monkeypatch, RELEASE)
    copy.write_bytes(ARCHIVE)
    assert icdctl("fetch-data", "cub200", "--from", copy)[0] == 0


@pytest.mark.parametrize("name", [*KNOWN, "images.txt"])
def test_an_archive_with_another_image_or_without_a_list_is_refused(tmp_path: Path, name: str) -> None:
    changed = {**MEMBERS, f"{cub200.FOLDER}/{name}": jpeg(seed=999)}
    if name == "images.txt":
        del changed[f"{cub200.FOLDER}/{name}"]
    copy = tmp_path / "copy.tgz"
    copy.write_bytes(cub_archive(changed))
    described = cub_release_of(MEMBERS, copy.read_bytes())
    with pytest.raises(ArtifactError, match=f"`{name}` in it is missing or is not the published file"):
        release.install(described, tmp_path / "data", from_file=copy)
    assert visible(tmp_path / "data") == partials(tmp_path / "data") == []


def test_an_image_that_was_changed_in_its_place_is_left_alone(icdctl: CommandLine, own_state: Path) -> None:
    place = put_data(own_state / "data")
    (place / KNOWN[2]).write_bytes(jpeg(seed=999))
    code, _, err = icdctl("fetch-data", "cub200", "--offline")
    assert (code, f"`{place / KNOWN[2]}` is not the published file" in err) == (1, True)
    assert f"move `{place}` away" in err
    checks = json.loads(icdctl("doctor", "--json")[1])["checks"]
    found = next(check for check in checks if check["what"] == "cub200")
    assert (found["status"], KNOWN[2] in found["found"]) == ("other", True)


def test_what_is_missing_is_added(own_state: Path) -> None:
    place = put_data(own_state / "data")
    (place / "classes.txt").unlink()
    shutil.rmtree(place / "images" / "007.Parakeet_Auklet")
    (place / "notes").write_text("mine")
    put_data(own_state / "data")
    assert sum(path.is_file() for path in place.rglob("*")) == len(MEMBERS) + 1


def test_what_is_missing_is_not_taken_for_complete_before_it_is(own_state: Path) -> None:
    place = put_data(own_state / "data")
    (place / "classes.txt").unlink()
    in_the_way = place / "images" / "007.Parakeet_Auklet"
    shutil.rmtree(in_the_way)
    in_the_way.write_text("a file")
    with pytest.raises(ArtifactError, match="can't be written"):
        put_data(own_state / "data")
    assert release.look(RELEASE, own_state / "data") == ("absent", "classes.txt")
    in_the_way.unlink()
    put_data(own_state / "data")
    assert sum(path.is_file() for path in place.rglob("*")) == len(MEMBERS)


INSTALL = """
import sys
from pathlib import Path
import fetch_support
from icdctl.data import release
members = fetch_support.cub_members()
source = Path(sys.argv[1])
described = fetch_support.cub_release_of(members, source.read_bytes(), *sys.argv[3:], unpacked_bytes=40_000_000)
copy = None if sys.argv[3:] else source
print(release.install(described, Path(sys.argv[2]), from_file=copy).source, flush=True)
"""


def start_install(path: Path, folder: Path, *urls: str) -> subprocess.Popen[str]:
    here = str(Path(fetch_support.__file__).parent)
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    command = [sys.executable, "-c", INSTALL, str(path), str(folder), *urls]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings)


def test_two_processes_at_once_fetch_it_once(origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/archive", ARCHIVE, slow=0.05)
    copy = tmp_path / "copy.tgz"
    copy.write_bytes(ARCHIVE)
    both = [start_install(copy, tmp_path / "data", url) for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    assert said == ["None", url]
    assert len(origin.requests) == 1
    assert visible(tmp_path / "data") == [cub200.FOLDER]


def test_a_killed_unpacking_is_cleared_up_by_the_next(tmp_path: Path) -> None:
    copy, there = tmp_path / "copy.tgz", tmp_path / "data"
    late = {f"./{cub200.FOLDER}/parts/parts.txt": np.random.RandomState(0).bytes(20_000_000)}
    copy.write_bytes(cub_archive({**MEMBERS, **late}))
    process = start_install(copy, there)
    wait_for(lambda: there.is_dir() and any(there.glob(f".{cub200.FOLDER}.new-*/*/classes.txt")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert visible(there) == []
    assert partials(there) != []
    described = cub_release_of(MEMBERS, copy.read_bytes(), unpacked_bytes=40_000_000)
    release.install(described, there, from_file=copy)
    assert release.look(described, there) == ("right", "")
    assert partials(there) == []
