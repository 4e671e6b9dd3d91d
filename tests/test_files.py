"""Files that are written whole, what a killed writer leaves, and locks that lie beside what they guard."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
from conftest import CommandLine

from icdctl import cleanup, files
from icdctl.errors import ArtifactError
from icdctl.grid import params_file
from icdctl.teachers import published_teachers, read_lock
from icdctl.teachers.published_teachers import LockEntry


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "registry").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    return tmp_path


# --- locks ---


def write_a_cell() -> None:
    params_file.write_entries(Path("params.yaml"), {"cells": {"b": {"student": "res8"}}})


def record_a_teacher(name: str = "cifar100/vgg13") -> None:
    entry = LockEntry(sha256="a" * 64, converted_sha256="b" * 64, url="file:vgg13.pth", first_use="2026-01-01")
    published_teachers.record(name, entry)


@pytest.mark.parametrize(
    ("write", "guarded"), [(write_a_cell, "params.yaml"), (record_a_teacher, "registry/teachers.lock")]
)
def test_users_with_state_folders_of_their_own_wait_for_each_other(
    write: Callable[[], None], guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(guarded)
    with files.lock_beside(path):
        monkeypatch.setenv("ICDCTL_HOME", "another")
        thread = threading.Thread(target=write)
        thread.start()
        thread.join(0.3)
        assert (thread.is_alive(), path.exists()) == (True, False)
    thread.join(10)
    assert path.is_file()
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".")] == []


def test_the_lock_of_a_link_is_that_of_its_file(project: Path) -> None:
    (project / "shared").mkdir()
    Path("params.yaml").symlink_to("shared/params.yaml")
    with files.lock_beside(Path("params.yaml")):
        assert filelock.FileLock("shared/.params.yaml.lock", blocking=False).lock_file
        assert [path.name for path in (project / "shared").iterdir()] == [".params.yaml.lock"]


def test_a_folder_that_takes_no_lock_is_named(project: Path) -> None:
    (project / "registry" / ".teachers.lock.lock").mkdir()  # stands for a folder without permission, which root has
    with pytest.raises(ArtifactError, match=r"teachers\.lock` can't be changed: its lock") as caught:
        record_a_teacher()
    assert f"`{project / 'registry'}`" in caught.value.hint
    assert read_lock() == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_registry_is_read_and_not_written(project: Path) -> None:
    record_a_teacher()
    (project / "registry").chmod(0o500)
    with pytest.raises(ArtifactError, match="can't be changed"):
        record_a_teacher("cifar100/res56")
    assert list(read_lock()) == ["cifar100/vgg13"]


# --- what killed processes leave ---

KILLED = """
import os, signal, sys
from pathlib import Path
from icdctl import files
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
place = Path(sys.argv[1])
if sys.argv[2] == "file":
    files.write_bytes(place, b"half")
with files.temporary_beside(place, is_folder=True) as folder:
    files.write_bytes(folder / "model.onnx", b"half")
"""


def leave(place: str, kind: str) -> Path:
    """What a writer that is killed leaves beside `place`."""
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    known = set(Path(place).parent.iterdir())
    done = subprocess.run([sys.executable, "-c", KILLED, place, kind], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = set(Path(place).parent.iterdir()) - known
    return left


def remains() -> list[Path]:
    return sorted(entry.paths[0] for entry in cleanup.entries() if entry.kind == "remains")


def test_what_killed_writers_leave_is_listed_and_deleted_and_nothing_else(icdctl: CommandLine, project: Path) -> None:
    left = [
        leave("runs/s/config.json", "file"),
        leave("runs/s/onnx", "folder"),
        leave("registry/digits100/res8-ce/version", "folder"),
        leave("params.yaml", "file"),
        leave("state/checkpoints/0123/state.safetensors", "file"),
    ]
    for lock in ("registry/.teachers.lock.lock", ".params.yaml.lock"):
        Path(lock).touch()
        left.append(Path(lock))
    kept = ["runs/s/.config.json.original", "runs/s/.notes.tmp", "runs/.mine.lock", ".mine.lock", "runs/s/config.json"]
    for name in kept:
        Path(name).write_text("mine")

    assert remains() == sorted(path.absolute() for path in left)
    code, out, err = icdctl("clean", "--kind", "remains")

    assert (code, err.count("6 of the files lay elsewhere in the project")) == (0, 1)
    assert [path.name for path in left if path.name not in out] == []
    assert [path for path in left if path.exists()] == []
    assert [name for name in kept if not Path(name).is_file()] == []
    assert remains() == []


def test_the_files_of_a_writer_at_work_and_held_locks_stay(icdctl: CommandLine) -> None:
    place = Path("runs/s/onnx")
    with files.temporary_beside(place, is_folder=True) as folder, files.locked(Path("runs/.s.lock"), busy="", hint=""):
        files.write_bytes(folder / "model.onnx", b"whole")
        with files.temporary_beside(place.with_name("metrics.json")) as file:
            assert remains() == []
            assert json.loads(icdctl("clean", "--json")[1])["freed"] == []
            assert file.is_file()
        folder.rename(place)
    assert [path.name for path in place.parent.iterdir()] == ["onnx"]
    assert (place / "model.onnx").read_bytes() == b"whole"


@pytest.mark.parametrize(
    "name",
    ["runs/s/.metrics.json.ab12cd_9", "registry/digits100/a/.new-77-0123abcd", "registry/.teachers.lock.abcdef_h"],
)
def test_unmarked_files_of_earlier_versions_go_after_a_day(name: str) -> None:
    files.write_bytes(Path(name) / "card.md" if ".new" in name else Path(name), b"half")
    assert remains() == []
    for path in (Path(name), *Path(name).rglob("*")):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    assert remains() == [Path(name).absolute()]


def test_the_folder_of_a_run_elsewhere_is_known_by_its_state(icdctl: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "run"
    given = ("--dataset", "digits100", "--train-images", "200", "--test-images", "100", "--device", "cpu")
    assert icdctl("train", "--model", "res8", *given, "--epochs", "1", "--out", out)[0] == 0
    left = leave(str(out / "metrics.json"), "file")
    assert remains() == [left]


def test_a_file_that_was_deleted_before_it_was_marked_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    opened: list[Path] = []

    def gone(path: Path, *arguments: int) -> int:
        descriptor = real(path, *arguments)
        if files.TEMPORARY_NAME.fullmatch(Path(path).name) and not opened:
            opened.append(path)
            Path(path).unlink()
        return descriptor

    monkeypatch.setattr(os, "open", gone)
    files.write_bytes(Path("runs/metrics.json"), b"whole")
    assert len(opened) == 1
    assert [path.name for path in Path("runs").iterdir()] == ["metrics.json"]


def test_a_folder_that_was_just_made_is_not_taken_for_abandoned(tmp_path: Path) -> None:
    # Several `registry add` at once: each removes what killed ones left, while others are just making theirs.
    add = importlib.import_module("icdctl.registry.add")
    stop, num_made = time.monotonic() + 1.5, [0]
    lost: list[str] = []

    def make() -> None:
        while time.monotonic() < stop:
            try:
                with files.temporary_beside(tmp_path / "new", is_folder=True) as building:
                    for number in range(5):
                        (building / str(number)).write_text("whole")
                    if len(list(building.iterdir())) != 5:
                        lost.append("files are gone")
                num_made[0] += 1
            except OSError as error:
                lost.append(str(error))

    def remove() -> None:
        while time.monotonic() < stop:
            add._remove_left(tmp_path)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=target) for target in (make, make, remove, remove)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert (lost, num_made[0] > 10) == ([], True)


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_is_abandoned_is_deleted_under_its_mark(tmp_path: Path, is_folder: bool) -> None:
    path = tmp_path / ".new.tmp.0123abcd"
    if is_folder:
        path.mkdir()
    else:
        path.touch()
    marked: list[bool] = []

    def seen(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.remove", "shutil.rmtree") and arguments[0] in (path, str(path)) and not marked:
            marked.append(files.is_locked(path))

    sys.addaudithook(seen)
    files.remove_abandoned(path)
    assert (marked, path.exists()) == ([True], False)
    other = tmp_path / ".somebody's"
    other.touch()
    files.remove_abandoned(other)
    assert other.exists(), "a hidden file of another program"
