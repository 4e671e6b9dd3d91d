"""The archive that `data.dvc` pins, with real dvc and git, against a server on 127.0.0.1."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import CommandLine
from fetch_support import Origin, cifar_members, close_network, release_of, running_origin, tar_of

import icdctl as package
from icdctl import data, files
from icdctl.data import cifar100, pin, release
from icdctl.errors import ArtifactError

REPOSITORY = Path(package.__file__).parents[1]
COMMITTED = ("data.dvc", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore")
MEMBERS = cifar_members()
ARCHIVE = tar_of(MEMBERS)
RELEASE = release_of(MEMBERS, ARCHIVE)
MD5 = str(RELEASE.archive.md5)
PLACE = Path("data/raw") / RELEASE.archive.name
OBJECT = Path(".dvc/cache/files/md5") / MD5[:2] / MD5[2:]
CLEAN = "Data and pipelines are up to date."
STAGE_MD5 = """
from dvc.dvcfile import load_file
from dvc.repo import Repo
print(load_file(Repo("."), "data.dvc").stage.compute_md5())
"""


def run(*command: str, code: int = 0) -> str:
    """What a program prints in the current folder."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout.strip()


def dvc(*arguments: str) -> str:
    return run(sys.executable, "-m", "dvc", *arguments)


@functools.cache
def stand_in_pin() -> str:
    """The committed `data.dvc`, of the small archive; it is asked for where that file lies in a DVC project."""
    text = Path("data.dvc").read_text()
    for published, other in ((cifar100.ARCHIVE_MD5, MD5), (str(cifar100.RELEASE.archive.num_bytes), str(len(ARCHIVE)))):
        assert text.count(published) == 1
        text = text.replace(published, other)
    Path("data.dvc").write_text(text)
    (old,) = [line for line in text.splitlines() if line.startswith("md5: ")]
    return text.replace(old, f"md5: {run(sys.executable, '-c', STAGE_MD5)}")


def commit_all() -> None:
    run("git", "add", "--all")
    run("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "project")


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for another machine gets no answer; neither git nor dvc reads or writes anything of the user's."""
    close_network(monkeypatch)
    monkeypatch.delenv("ICDCTL_HOME")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with this one's files for DVC, not committed yet; it is the current folder."""
    project = tmp_path / "project"
    for name in COMMITTED:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, project / name)
    monkeypatch.chdir(project)
    run("git", "init", "--quiet")
    return project


@pytest.fixture
def project(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, committed, where CIFAR-100 is a small archive, in `data.dvc` as in the table of data sets."""
    row = dataclasses.replace(data.DATASETS["cifar100"], release=RELEASE)
    monkeypatch.setitem(data.DATASETS, "cifar100", row)
    Path("data.dvc").write_text(stand_in_pin())
    commit_all()
    return clone


@pytest.fixture
def origin() -> Iterator[Origin]:
    with running_origin() as running:
        running.serve(f"/{RELEASE.archive.name}", ARCHIVE)
        yield running


def unpacked() -> bool:
    return release.look(RELEASE, files.data_folder())[0] == "right"


def left_over(folder: Path) -> list[str]:
    """Files in `folder` besides locks, and what keeps git out of it."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return sorted(str(path.relative_to(folder)) for path in found if path.name != ".gitignore")


def test_a_fresh_clone_is_clean_and_lacks_the_archive_alone(clone: Path) -> None:
    commit_all()
    published = cifar100.RELEASE.archive
    found = pin.find_pin(published)
    assert found is not None
    assert (found.md5, found.place) == (published.md5, clone / PLACE)
    assert published.urls[0] in Path("data.dvc").read_text()
    assert f"md5: {run(sys.executable, '-c', STAGE_MD5)}" in Path("data.dvc").read_text().splitlines()
    assert dvc("status").split() == f"data.dvc: changed outs: not in cache: {PLACE}".split()
    assert run("git", "status", "--porcelain") == ""


def test_the_archive_is_fetched_once_kept_and_shared(
    icdctl: CommandLine, origin: Origin, project: Path, tmp_path: Path
) -> None:
    before = Path("data.dvc").read_bytes()
    command = ("fetch-data", "cifar100", "--mirror", origin.url)
    assert icdctl(*command)[::2] == (0, "")
    assert unpacked()
    assert PLACE.read_bytes() == ARCHIVE
    assert OBJECT.stat().st_mode & 0o777 == 0o444
    assert left_over(project / ".dvc" / "cache") == [str(OBJECT.relative_to(".dvc/cache"))]
    assert left_over(project / "data") == [str(PLACE.relative_to("data"))]
    assert left_over(files.data_folder()) == [f"{RELEASE.folder}/{name}" for name in ("meta", "test", "train")]

    dvc("remote", "add", "--local", "--default", "shared", str(tmp_path / "remote"))
    assert dvc("push", "data.dvc") == "1 file pushed"
    for folder in ("data", ".icdctl", ".dvc/cache"):
        shutil.rmtree(folder)
    assert "1 file added" in dvc("pull", "data.dvc")
    shutil.rmtree(".dvc/cache")
    assert icdctl(*command)[0] == 0  # from its place, and into the cache again
    assert OBJECT.read_bytes() == ARCHIVE
    for folder in ("data", ".icdctl"):
        shutil.rmtree(folder)
    assert icdctl("fetch-data", "cifar100", "--offline")[0] == 0  # from the cache
    assert (unpacked(), PLACE.read_bytes() == ARCHIVE) == (True, True)

    assert len(origin.requests) == 1
    assert dvc("status") == CLEAN
    assert Path("data.dvc").read_bytes() == before
    assert run("git", "status", "--porcelain") == ""


def test_a_copy_is_kept_too_and_what_the_cache_holds_is_not_believed(
    icdctl: CommandLine, project: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "carried-over.bin"
    copy.write_bytes(ARCHIVE)
    OBJECT.parent.mkdir(parents=True)
    OBJECT.write_bytes(ARCHIVE[:-1] + b"x")
    OBJECT.chmod(0o444)
    assert icdctl("fetch-data", "cifar100", "--offline")[0] == 1
    assert not PLACE.exists()
    assert icdctl("fetch-data", "cifar100", "--offline", "--from", copy)[0] == 0
    assert [path.read_bytes() == ARCHIVE for path in (OBJECT, PLACE, copy)] == [True] * 3
    assert unpacked()
    assert dvc("status") == CLEAN


@pytest.mark.parametrize("change", ["md5", "size", "none", "number", "broken"])
def test_a_pin_that_is_not_the_published_one_is_refused(
    icdctl: CommandLine, origin: Origin, project: Path, change: str
) -> None:
    text = Path("data.dvc").read_text()
    other = {
        "md5": text.replace(MD5, "0" * 31 + "a"),
        "size": text.replace(f"size: {len(ARCHIVE)}", "size: 7"),
        "none": text.replace(f"md5: {MD5}\n  ", ""),
        "number": text.replace(MD5, "0" * 32),
        "broken": "outs: [",
    }[change]
    assert other != text
    Path("data.dvc").write_text(other)
    code, _, err = icdctl("fetch-data", "cifar100", "--mirror", origin.url)
    assert (code, origin.requests, Path(".icdctl").exists()) == (1, [], False)
    assert "git checkout data.dvc" in err
    if change in ("md5", "size", "none"):
        assert f"expected md5 {MD5}, size {len(ARCHIVE)}" in " ".join(err.split())


def test_wrong_bytes_leave_nothing(icdctl: CommandLine, origin: Origin, project: Path) -> None:
    origin.serve(f"/{RELEASE.archive.name}", ARCHIVE[:-1] + b"x")
    code, _, err = icdctl("fetch-data", "cifar100", "--mirror", origin.url)
    wrong = hashlib.md5(ARCHIVE[:-1] + b"x").hexdigest()
    assert (code, f"md5 {wrong}, expected {MD5}; deleted" in " ".join(err.split())) == (1, True)
    assert [left_over(project / name) for name in ("data", ".icdctl", ".dvc/cache")] == [[], [], []]


def test_a_file_in_the_way_is_left_alone(icdctl: CommandLine, origin: Origin, project: Path) -> None:
    PLACE.parent.mkdir(parents=True)
    PLACE.write_bytes(b"mine")
    code, _, err = icdctl("fetch-data", "cifar100", "--mirror", origin.url)
    assert (code, origin.requests, PLACE.read_bytes()) == (1, [], b"mine")
    assert "hint: move it away" in err


def test_when_dvc_fails_its_reason_is_told(icdctl: CommandLine, origin: Origin, project: Path) -> None:
    Path(".dvc/config").write_text("[core\n")
    code, _, err = icdctl("fetch-data", "cifar100", "--mirror", origin.url)
    assert (code, "`dvc cache dir` failed (" in err, unpacked()) == (1, True, False)


@pytest.mark.parametrize("kind", ["no project", "another pin"])
def test_without_a_pin_the_archive_is_deleted(icdctl: CommandLine, origin: Origin, project: Path, kind: str) -> None:
    if kind == "no project":
        shutil.rmtree(".dvc")
    else:
        Path("data.dvc").write_text("outs:\n- md5: 1f.dir\n  path: data\n")
    assert icdctl("fetch-data", "cifar100", "--mirror", origin.url)[0] == 0
    assert (unpacked(), Path("data").exists(), Path(".dvc/cache").exists()) == (True, False, False)
    assert left_over(files.data_folder()) == [f"{RELEASE.folder}/{name}" for name in ("meta", "test", "train")]


def install(url: str, folder: str, copy: str) -> None:
    """What the processes of the tests below do; `copy` tells them what is published."""
    published = release_of(MEMBERS, Path(copy).read_bytes())
    release.install(published, Path(folder), mirrors=[url], pin=pin.find_pin(published.archive))
    assert "dvc" not in sys.modules  # it takes half a second, and every run reads data


@pytest.fixture
def installing(origin: Origin, project: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start a process that fetches into a folder, slowly; it is gone when the test ends."""
    origin.serve(f"/{RELEASE.archive.name}", ARCHIVE, slow=0.02)
    copy = tmp_path / "copy"
    copy.write_bytes(ARCHIVE)
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: str) -> subprocess.Popen[bytes]:
        code = f"import test_pin; test_pin.install({origin.url!r}, {folder!r}, {str(copy)!r})"
        started.append(subprocess.Popen([sys.executable, "-c", code], env=surroundings, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_two_processes_share_one_download(installing: Callable[[str], subprocess.Popen[bytes]], origin: Origin) -> None:
    both = [installing(folder) for folder in ("one", "two")]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert [release.look(RELEASE, Path(folder))[0] for folder in ("one", "two")] == ["right", "right"]
    assert len(origin.requests) == 1
    assert dvc("status") == CLEAN


@pytest.mark.parametrize("moment", ["downloading", "keeping", "unpacking"])
def test_a_killed_process_leaves_nothing_in_the_way(
    icdctl: CommandLine,
    installing: Callable[[str], subprocess.Popen[bytes]],
    origin: Origin,
    project: Path,
    moment: str,
) -> None:
    reached: dict[str, Callable[[], bool]] = {
        "downloading": lambda: PLACE.with_name(f".{PLACE.name}.part").exists(),
        "keeping": OBJECT.exists,
        "unpacking": lambda: any(Path("state").glob(f".{RELEASE.folder}.new-*")),
    }
    process = installing("state")
    while not reached[moment]() and process.poll() is None:
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):  # a busy machine may miss the moment
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not PLACE.exists() or PLACE.read_bytes() == ARCHIVE
    assert icdctl("fetch-data", "cifar100", "--mirror", origin.url, "--data-dir", "state")[0] == 0
    assert release.look(RELEASE, Path("state"))[0] == "right"
    assert left_over(Path("state")) == [f"{RELEASE.folder}/{name}" for name in ("meta", "test", "train")]
    assert left_over(project / ".dvc" / "cache") == [str(OBJECT.relative_to(".dvc/cache"))]
    assert dvc("status") == CLEAN


def test_a_copy_that_changes_meanwhile_is_not_kept(project: Path, tmp_path: Path) -> None:
    found = pin.find_pin(RELEASE.archive)
    assert found is not None
    changed = tmp_path / "changed"
    changed.write_bytes(ARCHIVE[:-1] + b"x")
    with pytest.raises(ArtifactError, match=f"expected {MD5}"):
        found.keep(changed)
    assert left_over(project / ".dvc" / "cache") == []
