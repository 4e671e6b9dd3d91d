"""Downloads and archives against servers, archives and disks that misbehave.

After every one of them: a clear error, nothing half-written, and the next run succeeds.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fetch_support
import pytest
from fetch_support import QUICK, Origin, cifar_members, release_of, remote, running_origin, tar_of

from icdctl.data import archive, download, release
from icdctl.data.archive import Limits
from icdctl.data.release import Release
from icdctl.errors import ArtifactError, UsageError

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def origin() -> Iterator[Origin]:
    with running_origin() as running:
        yield running


def visible(folder: Path) -> list[str]:
    """What a person sees in a folder: partial and lock files are hidden."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def partials(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".part" in path.name or ".new-" in path.name)


@pytest.mark.parametrize(
    "behaviour",
    [
        {},
        {"length": False},
        {"ranges": False},
        {"etag": None},
        {"statuses": [500, 503]},
        {"cut_at": 0.4},
        {"cut_at": 0.4, "ranges": False},
        {"cut_at": 0.4, "etag": None},
        {"cut_at": 0.4, "length": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("redirected", [False, True], ids=["direct", "redirected"])
def test_what_origins_do_is_coped_with(
    origin: Origin, tmp_path: Path, behaviour: dict[str, Any], redirected: bool
) -> None:
    url = origin.serve("/file.bin", CONTENT, **behaviour)
    if redirected:
        url = origin.serve("/moved", b"", redirect=url)
    target = tmp_path / "file.bin"
    if behaviour == {"cut_at": 0.4, "length": False}:  # such a cut looks like an end; only the pins tell
        with pytest.raises(ArtifactError, match="size 419430, expected 1048576; deleted"):
            download.fetch(remote(CONTENT, url), target, patience=QUICK)
        assert visible(tmp_path) == partials(tmp_path) == []
    found = download.fetch(remote(CONTENT, url), target, patience=QUICK)
    assert (target.read_bytes() == CONTENT, found.url, partials(tmp_path)) == (True, url, [])
    asked = len(origin.requests)
    assert download.fetch(remote(CONTENT, url), target, patience=QUICK).url is None
    assert len(origin.requests) == asked, "what is there and right is not asked for again"


def test_a_cut_download_is_gone_on_with_where_it_was_cut(origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/file.bin", CONTENT, cut_at=0.4)
    seen: list[tuple[int, int | None]] = []
    download.fetch(
        remote(CONTENT, url), tmp_path / "f", patience=QUICK, on_bytes=lambda here, total: seen.append((here, total))
    )
    assert [asked for _, asked in origin.requests] == [None, f"bytes={int(len(CONTENT) * 0.4)}-"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_another_version_on_the_server_is_not_glued_to_the_first(origin: Origin, tmp_path: Path) -> None:
    old = CONTENT[::-1]
    url = origin.serve("/file.bin", old, cut_at=0.4, cuts=9, etag='"old"', ranges=False)
    with pytest.raises(ArtifactError, match="the connection was cut, 3 times in a row"):
        download.fetch(remote(CONTENT, url), tmp_path / "f", patience=QUICK)
    assert partials(tmp_path) == [".f.part", ".f.part.json"]
    origin.serve("/file.bin", CONTENT, etag='"new"')
    download.fetch(remote(CONTENT, url), tmp_path / "f", patience=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert origin.requests[-1][1] == f"bytes={int(len(CONTENT) * 0.4)}-"


def test_wrong_bytes_are_deleted_and_the_next_mirror_is_asked(origin: Origin, tmp_path: Path) -> None:
    wrong = b"x" + CONTENT[1:]
    urls = (origin.serve("/wrong", wrong), f"{origin.url}/absent", origin.serve("/right", CONTENT))
    assert download.fetch(remote(CONTENT, *urls), tmp_path / "f", patience=QUICK).url == urls[-1]
    (tmp_path / "f").unlink()
    with pytest.raises(ArtifactError) as caught:
        download.fetch(remote(CONTENT, *urls[:2]), tmp_path / "f", patience=QUICK)
    file = remote(CONTENT)
    got = remote(wrong).md5
    assert f"{urls[0]}: what it sends is not the published one `file.bin`: md5 {got}, expected {file.md5}; deleted" in (
        caught.value.message
    )
    assert f"{urls[1]}: it answers 404" in caught.value.message
    assert "1,048,576 bytes" in caught.value.hint
    assert str(file.sha256) in caught.value.hint
    assert visible(tmp_path) == partials(tmp_path) == []


def test_longer_files_are_not_even_downloaded(origin: Origin, tmp_path: Path) -> None:
    for url in (origin.serve("/a", CONTENT + b"x"), origin.serve("/b", CONTENT + b"x", length=False)):
        with pytest.raises(ArtifactError, match="bytes or more, expected 1,048,576 at most"):
            download.fetch(remote(CONTENT, url), tmp_path / "f", patience=QUICK)
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"stall": True}, "no answer in time, 3 times in a row"),
        ({"statuses": [500] * 9}, "it answers 500 Internal Server Error, 3 times in a row"),
        ({"statuses": [403]}, "it answers 403"),
        ({"redirect": "/file.bin"}, "redirects"),
    ],
    ids=["stalled", "500", "403", "circle"],
)
def test_a_source_that_never_works_is_given_up(
    origin: Origin, tmp_path: Path, behaviour: dict[str, Any], message: str
) -> None:
    url = origin.serve("/file.bin", CONTENT, **behaviour)
    with pytest.raises(ArtifactError, match=message):
        download.fetch(remote(CONTENT, url), tmp_path / "f", patience=QUICK)
    origin.serve("/file.bin", CONTENT)
    download.fetch(remote(CONTENT, url), tmp_path / "f", patience=QUICK)


def test_nobody_there_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    with pytest.raises(ArtifactError, match=r"127.0.0.1:9/f: there is no connection to it"):
        download.fetch(remote(CONTENT, "http://somebody:secret@127.0.0.1:9/f?key=1"), tmp_path / "f")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(ArtifactError, match="there is no connection to it"):
        download.fetch(remote(CONTENT, "http://files.invalid/f"), tmp_path / "f")
    assert time.monotonic() - begun < 3


def test_mirrors_come_first_and_may_be_folders(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = origin.serve("/published", CONTENT)
    share = tmp_path / "my share"
    share.mkdir()
    (share / "file.bin").write_bytes(CONTENT)
    monkeypatch.setenv("ICDCTL_MIRROR", share.as_uri())
    mirrors = download.mirrors_in_order(f"{origin.url}/mirror/")
    found = download.fetch(remote(CONTENT, url), tmp_path / "f", mirrors=mirrors, patience=QUICK)
    assert found.url == f"{share.as_uri()}/file.bin"
    assert [path for path, _ in origin.requests] == ["/mirror/file.bin"]
    (tmp_path / "f").unlink()
    assert download.fetch(remote(CONTENT, url), tmp_path / "f", mirrors=mirrors, offline=True).url == found.url
    assert len(origin.requests) == 1, "offline asks no server"
    for wrong in ("ftp://host/x", "host/x", "http://", "file:relative", "file://host/x"):
        with pytest.raises(UsageError, match="is not a mirror"):
            download.mirrors_in_order(wrong)


def test_offline_names_what_is_missing(tmp_path: Path) -> None:
    file = remote(CONTENT, "http://127.0.0.1:9/f")
    with pytest.raises(ArtifactError, match="`--offline` forbids") as caught:
        download.fetch(file, tmp_path / "f", offline=True)
    assert str(tmp_path / "f") in caught.value.message
    assert f"`file.bin`, 1,048,576 bytes, md5 {file.md5}, sha256 {file.sha256}" in caught.value.hint


def test_a_member_of_a_published_archive_is_a_source(origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/all.tar", tar_of({"all/a/x.pth": CONTENT, "all/b/x.pth": b"other"}))
    for name, content in (("a", CONTENT), ("b", b"other")):
        file = remote(content, f"{origin.url}/gone", f"{url}#all/{name}/x.pth")
        assert download.fetch(file, tmp_path / name, patience=QUICK).url == f"{url}#all/{name}/x.pth"
        assert (tmp_path / name).read_bytes() == content
    assert [path for path, _ in origin.requests].count("/all.tar") == 1
    with pytest.raises(ArtifactError, match=r"holds no `all/c/x\.pth`"):
        download.fetch(remote(b"c", f"{url}#all/c/x.pth"), tmp_path / "c", patience=QUICK)
    assert visible(tmp_path) == ["a", "b"]


FETCH = """
import sys
from pathlib import Path
from icdctl.data.download import RemoteFile, fetch
url, target, sha256, size = sys.argv[1:]
print(fetch(RemoteFile("file.bin", (url,), int(size), sha256), Path(target)).url)
"""


def start_fetch(url: str, target: Path) -> subprocess.Popen[str]:
    arguments = [url, str(target), str(remote(CONTENT).sha256), str(len(CONTENT))]
    return subprocess.Popen([sys.executable, "-c", FETCH, *arguments], stdout=subprocess.PIPE, text=True)


def wait_for(there: Callable[[], bool]) -> None:
    for _ in range(3000):
        if there():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_two_processes_at_once_download_once(origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/file.bin", CONTENT, slow=0.03)
    both = [start_fetch(url, tmp_path / "f") for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    assert said == ["None", url]
    assert len(origin.requests) == 1
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_killed_download_is_gone_on_with(origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/file.bin", CONTENT, slow=0.2)
    process = start_fetch(url, tmp_path / "f")
    wait_for(lambda: (tmp_path / ".f.part").exists() and (tmp_path / ".f.part").stat().st_size > 100_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert visible(tmp_path) == []
    origin.serve("/file.bin", CONTENT)
    download.fetch(remote(CONTENT, url), tmp_path / "f", patience=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert str(origin.requests[-1][1]).startswith("bytes=")


def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"x") -> Callable[[Any], None]:
    """A function that adds one member to a tar file."""

    def extra(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        info.size = len(content) if kind == tarfile.REGTYPE else 0
        tar.addfile(info, io.BytesIO(content))

    return extra


def many(tar: tarfile.TarFile) -> None:
    for number in range(100_000):
        tar.addfile(tarfile.TarInfo(f"cifar-100-python/{number}"))


def long_header(tar: tarfile.TarFile) -> None:
    """A header that would take 64 MB of memory."""
    info = tarfile.TarInfo("cifar-100-python/x")
    info.pax_headers = {"comment": "0" * 64_000_000}
    tar.addfile(info)


HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "absolute": (add("/cifar-100-python/x"), "lies outside"),
    "parent": (add("cifar-100-python/../../x"), "lies outside"),
    "elsewhere": (add("other/x"), "lies outside"),
    "link out": (add("cifar-100-python/x", tarfile.SYMTYPE, "/etc/passwd"), "link or a device"),
    "hard link": (add("cifar-100-python/x", tarfile.LNKTYPE, "cifar-100-python/meta"), "link or a device"),
    "device": (add("cifar-100-python/x", tarfile.CHRTYPE), "link or a device"),
    "pipe": (add("cifar-100-python/x", tarfile.FIFOTYPE), "link or a device"),
    "many": (many, "more than 16 members"),
    "bomb": (add("cifar-100-python/x", content=bytes(50_000_000)), "unpacks to more than"),
    "header": (long_header, "unpacks to more than"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_and_leave_nothing(origin: Origin, tmp_path: Path, kind: str) -> None:
    extra, message = HOSTILE[kind]
    members = cifar_members()
    content = tar_of(members, extra=extra)
    there = tmp_path / "data"
    with pytest.raises(ArtifactError, match=message):
        release.install(release_of(members, content, origin.serve("/bad", content)), there, patience=QUICK)
    assert visible(there) == ["cifar-100-python.tar.gz"], "the archive is what was pinned; it is what it holds"
    assert visible(tmp_path) == ["data"]
    assert partials(there) == []
    (there / "cifar-100-python.tar.gz").unlink()
    good = tar_of(members)
    release.install(release_of(members, good, origin.serve("/good", good)), there, patience=QUICK)
    assert release.look(release_of(members, good), there) == ("right", "")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_broken_archives_are_named(tmp_path: Path, share: float) -> None:
    whole = tar_of(cifar_members())
    path = tmp_path / "a.tar.gz"
    path.write_bytes(whole[: int(len(whole) * share)])
    with (
        pytest.raises(ArtifactError, match=r"is not a complete tar archive|holds no folder"),
        archive.unpacked(path, tmp_path / "cifar-100-python", limits=Limits(16, 4_000_000)),
    ):
        raise AssertionError("it was unpacked")
    assert visible(tmp_path) == ["a.tar.gz"]


def test_files_of_the_archive_are_compared_one_by_one(tmp_path: Path) -> None:
    members = cifar_members()
    content = tar_of({**members, "cifar-100-python/test": b"other"})
    path = tmp_path / "copy.tar.gz"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="`test` in it is missing or is not the published file"):
        release.install(release_of(members, content), tmp_path / "data", from_file=path)
    assert visible(tmp_path / "data") == []


def test_what_is_missing_is_added_and_what_differs_is_left_alone(tmp_path: Path) -> None:
    members = cifar_members()
    content = tar_of(members)
    path = tmp_path / "copy.tar.gz"
    path.write_bytes(content)
    described = release_of(members, content)
    release.install(described, tmp_path, from_file=path)
    train = tmp_path / "cifar-100-python" / "train"
    train.unlink()
    (train.parent / "notes").write_text("mine")
    assert release.install(described, tmp_path, from_file=path).source == "copy.tar.gz"
    assert visible(train.parent) == ["meta", "notes", "test", "train"]
    train.write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"train` is not the published file"):
        release.install(described, tmp_path, from_file=path)
    assert train.read_bytes() == b"other"


INSTALL = """
import sys
from pathlib import Path
import fetch_support
from icdctl.data import release
members = fetch_support.cifar_members(train=4000)
content = Path(sys.argv[1]).read_bytes()
described = fetch_support.release_of(members, content, unpacked_bytes=20_000_000)
print("ready", flush=True)
release.install(described, Path(sys.argv[2]), from_file=Path(sys.argv[1]))
"""


def start_install(path: Path, folder: Path) -> subprocess.Popen[str]:
    here = str(Path(fetch_support.__file__).parent)
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    command = [sys.executable, "-c", INSTALL, str(path), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings)


def big_release(tmp_path: Path) -> tuple[Release, Path]:
    members = cifar_members(train=4000)
    path = tmp_path / "copy.tar.gz"
    path.write_bytes(tar_of(members))
    return release_of(members, path.read_bytes(), unpacked_bytes=20_000_000), path


def test_a_killed_unpacking_leaves_no_data_set_and_the_next_run_clears_up(tmp_path: Path) -> None:
    described, path = big_release(tmp_path)
    there = tmp_path / "data"
    process = start_install(path, there)
    wait_for(lambda: there.is_dir() and any(there.glob(".cifar-100-python.new-*/*/*")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert visible(there) == []
    assert partials(there) != []
    release.install(described, there, from_file=path)
    assert release.look(described, there) == ("right", "")
    assert partials(there) == []


@pytest.mark.parametrize("pinned", [True, False], ids=["size known", "size unknown"])
def test_a_full_disk_is_said_and_given_back(origin: Origin, small_disk: Path, pinned: bool) -> None:
    content = CONTENT * 2
    url = origin.serve("/file.bin", content)
    file = remote(content, url) if pinned else remote(content, url, num_bytes=None)
    with pytest.raises(ArtifactError, match=r"f` can't be written: .*[Nn]o space left"):
        download.fetch(file, small_disk / "f", patience=QUICK)
    assert visible(small_disk) == partials(small_disk) == []


def test_a_disk_that_fills_while_unpacking_is_given_back(tmp_path: Path, small_disk: Path) -> None:
    described, path = big_release(tmp_path)
    with pytest.raises(ArtifactError, match="No space left"):
        release.install(described, small_disk, from_file=path)
    assert visible(small_disk) == partials(small_disk) == []


def test_a_limit_on_file_sizes_is_as_a_full_disk(origin: Origin, tmp_path: Path) -> None:
    url = origin.serve("/file.bin", CONTENT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(ArtifactError, match="File too large"):
            download.fetch(remote(CONTENT, url), tmp_path / "f", patience=QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert visible(tmp_path) == partials(tmp_path) == []
    download.fetch(remote(CONTENT, url), tmp_path / "f", patience=QUICK)


def test_proxies_of_the_environment_are_used(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", origin.url)
    origin.serve("http://files.invalid/file.bin", CONTENT)
    download.fetch(remote(CONTENT, "http://files.invalid/file.bin"), tmp_path / "f", patience=QUICK)
    assert origin.requests[0][0] == "http://files.invalid/file.bin"
