"""Many image files to one array: decoded once, by processes at the same time too, and a cache that can't go wrong."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_decode import photo

from icdctl import files
from icdctl.data import decode
from icdctl.data.decode import DecodedImage, decode_image
from icdctl.data.image_cache import Decoded, decode_files
from icdctl.errors import ArtifactError


@pytest.fixture(autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder that no other test has filled."""
    home = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("ICDCTL_HOME", str(home))
    return home


def write_photos(folder: Path, count: int) -> list[str]:
    names = [f"{index % 3}/{index:03d}.jpg" for index in range(count)]
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo(60, 50, seed=index).save(folder / name)
    return names


def decoded_of(folder: Path, names: list[str], **changes: Any) -> tuple[Decoded, int]:
    """The images, and how many files were decoded for them."""
    told: list[int] = []
    settings: dict[str, Any] = {
        "resize": (32, 40),
        "crop": (30, 30),
        "content_key": None,
        "label": "photos",
        "skip_broken": False,
        "on_images": lambda done, total: told.append(done),
    }
    decoded = decode_files(folder, names, **{**settings, **changes})
    assert told in ([], list(range(1, len(names) + 1)))
    return decoded, len(told)


def cache_files() -> list[str]:
    """What lies in the cache, locks apart."""
    home = files.state_folder() / "cache" / "images"
    return sorted(path.name for path in home.glob("*") if path.suffix != ".lock") if home.is_dir() else []


def test_many_files_are_one_array_in_order(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 70)
    decoded, count = decoded_of(tmp_path, names)
    assert count == 70
    assert (decoded.images.shape, decoded.images.dtype) == ((70, 30, 30, 3), torch.uint8)
    for row, name in enumerate(names):
        expected = decode_image(tmp_path / name, resize=(32, 40), crop=(30, 30))
        assert np.array_equal(decoded.images[row].numpy(), expected)
    assert torch.equal(decoded.rows, torch.arange(70))
    assert decoded.broken == ()
    assert decoded.sha256 == files.sha256_bytes(decoded.images.numpy().tobytes())
    array, facts = cache_files()[::-1]
    assert (Path(array).suffix, Path(facts).suffix) == (".npy", ".json")
    assert array.startswith("photos-")
    assert np.array_equal(np.load(files.state_folder() / "cache" / "images" / array), decoded.images.numpy())


def test_writing_to_the_images_does_not_reach_the_cache(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 3)
    first, _ = decoded_of(tmp_path, names)
    before = first.images.clone()
    first.images.zero_()
    again, count = decoded_of(tmp_path, names)
    assert count == 0
    assert torch.equal(again.images, before)


def test_with_a_content_key_the_cache_needs_no_files(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 5)
    first, _ = decoded_of(tmp_path, names, content_key="hash of the archive")
    for name in names:
        (tmp_path / name).unlink()
    again, count = decoded_of(tmp_path, names, content_key="hash of the archive")
    assert count == 0
    assert again.sha256 == first.sha256
    assert torch.equal(again.images, first.images)
    with pytest.raises(ArtifactError, match=r"0/000\.jpg` does not exist"):
        decoded_of(tmp_path, names, content_key="hash of another archive")


def test_without_one_the_cache_reads_no_file_and_a_touched_file_is_decoded_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_photos(tmp_path, 5)
    decoded_of(tmp_path, names)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
        assert decoded_of(tmp_path, names)[1] == 0
    os.utime(tmp_path / names[2], ns=(0, 1))
    assert decoded_of(tmp_path, names)[1] == 5
    (tmp_path / names[2]).unlink()
    with pytest.raises(ArtifactError, match=r"2/002\.jpg` does not exist"):
        decoded_of(tmp_path, names)


@pytest.mark.parametrize(
    "change",
    [
        {"resize": (33, 40)},
        {"crop": None},
        {"content_key": "another"},
        {"label": "others"},
        {"names": ["0/003.jpg", "0/000.jpg"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_images_changes_the_cache(tmp_path: Path, change: dict[str, Any]) -> None:
    names = write_photos(tmp_path, 5)
    decoded_of(tmp_path, names, content_key="one")
    settings = {"content_key": "one", **change}
    chosen = settings.pop("names", names)
    assert decoded_of(tmp_path, chosen, **settings)[1] == len(chosen)


def test_equal_names_sizes_and_times_in_two_folders_are_not_taken_for_one(tmp_path: Path) -> None:
    for folder, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 9), colour).save(tmp_path / folder / "a.bmp")
        os.utime(tmp_path / folder / "a.bmp", ns=(0, 0))
    one, _ = decoded_of(tmp_path / "one", ["a.bmp"])
    two, _ = decoded_of(tmp_path / "two", ["a.bmp"])
    assert one.images[0, 0, 0].tolist() == [255, 0, 0]
    assert two.images[0, 0, 0].tolist() == [0, 0, 255]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: flipped(content, len(content) // 2),
        lambda content: flipped(content, 20),
        lambda content: content[: len(content) // 2],
        lambda content: content + b"x",
        lambda content: b"",
        lambda content: b'{"sha256": 5, "broken": [5]}',
        lambda content: content.replace(b"      1,\n", b"      0,\n"),
        lambda content: content.replace(b"      1,\n", b"      9,\n"),
        None,
    ],
    ids=["middle bit", "early bit", "half", "longer", "empty", "something else", "other row", "no row", "deleted"],
)
def test_a_damaged_cache_is_decoded_anew(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes] | None) -> None:
    names = write_photos(tmp_path, 5)
    (tmp_path / names[1]).write_bytes(b"")
    first, _ = decoded_of(tmp_path, names, skip_broken=True)
    (path,) = (files.state_folder() / "cache" / "images").glob(f"*{suffix}")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    again, _ = decoded_of(tmp_path, names, skip_broken=True)
    assert again.sha256 == first.sha256
    assert again.rows.tolist() == [0, 2, 3, 4]
    assert [image.reason for image in again.broken] == ["the file is empty"]
    assert decoded_of(tmp_path, names, skip_broken=True)[1] == 0


def test_broken_files_are_all_counted_and_the_first_named(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 30)
    for row in (4, 7, 11, 29):
        (tmp_path / names[row]).write_bytes(b"no image")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ArtifactError) as caught:
            decoded_of(tmp_path, names)
        assert caught.value.message.startswith("4 of 30 images can't be decoded: `1/004.jpg`: not a JPEG, PNG")
        assert caught.value.message.endswith("; ...")
        assert "011.jpg" in caught.value.message
        assert "029.jpg" not in caught.value.message
        assert "--skip-broken" in caught.value.hint
    decoded, count = decoded_of(tmp_path, names, skip_broken=True)
    assert count == 0
    kept = [row for row in range(30) if row not in (4, 7, 11, 29)]
    assert decoded.rows.tolist() == kept
    assert decoded.images.shape == (26, 30, 30, 3)
    for place, row in enumerate(kept):
        expected = decode_image(tmp_path / names[row], resize=(32, 40), crop=(30, 30))
        assert np.array_equal(decoded.images[place].numpy(), expected)
    assert [image.path for image in decoded.broken] == [tmp_path / names[row] for row in (4, 7, 11, 29)]
    assert decoded.sha256 == files.sha256_bytes(decoded.images.numpy().tobytes())


def test_where_every_image_is_broken_or_there_is_none_nothing_can_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"1 of 1 images can't be decoded: `a.jpg`: the file is empty") as caught:
        decoded_of(tmp_path, ["a.jpg"], skip_broken=True)
    assert "--skip-broken" not in caught.value.hint
    with pytest.raises(ArtifactError, match="no image"):
        decoded_of(tmp_path, [])
    assert cache_files() == []


def test_a_file_that_may_not_be_read_is_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_photos(tmp_path, 3)

    def refuse(path: Path, **limits: int) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "read_regular", refuse)
    with pytest.raises(ArtifactError, match=r"0/000.jpg` can't be read: Permission denied"):
        decoded_of(tmp_path, names, skip_broken=True)
    assert cache_files() == []


def test_an_interrupt_stops_at_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_photos(tmp_path, 300)
    begun: list[Path] = []
    real = decode._decode

    def counted(path: Path, resize: tuple[int, int], crop: tuple[int, int] | None) -> DecodedImage:
        begun.append(path)
        return real(path, resize, crop)

    def interrupt(done: int, total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(decode, "_decode", counted)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        decoded_of(tmp_path, names, on_images=interrupt)
    assert len(begun) < 100
    assert cache_files() == []
    assert decoded_of(tmp_path, names)[1] == 300


DECODE = """
import sys, time
from pathlib import Path
from icdctl.data.image_cache import decode_files
folder = Path(sys.argv[1])
names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))

def told(done, total):
    print(done, flush=True)
    time.sleep(float(sys.argv[2]))

print("ready", flush=True)
sys.stdin.readline()
decoded = decode_files(folder, names, resize=(32, 40), crop=(30, 30), content_key=None, label="photos",
                              skip_broken=False, on_images=told)
print("sha256", decoded.sha256, flush=True)
"""


def start(folder: Path, *, seconds_each: float) -> subprocess.Popen[str]:
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", DECODE, str(folder), str(seconds_each)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings
    )


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_decode_once(tmp_path: Path) -> None:
    write_photos(tmp_path, 20)
    processes = [start(tmp_path, seconds_each=0.02) for _ in range(2)]
    for process in processes:
        go(process)
    ended = [process.communicate(timeout=60) for process in processes]
    assert [(process.returncode, err) for process, (_, err) in zip(processes, ended, strict=True)] == [(0, "")] * 2
    assert sorted(len(out.splitlines()) for out, _ in ended) == [1, 21]
    assert len({out.splitlines()[-1] for out, _ in ended}) == 1


def test_what_a_killed_run_left_is_cleared_by_the_next_of_any_images(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 20)
    process = start(tmp_path, seconds_each=0.2)
    go(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    home = files.state_folder() / "cache" / "images"
    (partial,) = home.glob(".*.part")
    decoded_of(tmp_path, names, content_key="others")  # a living run's file is left alone
    assert partial.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert partial.exists()
    (home / f"{partial.name.removesuffix('.part')}.json.abcd").write_text("{")
    (home / ".keep").write_text("somebody's")
    decoded_of(tmp_path, names, content_key="yet others")
    assert [name for name in cache_files() if name.startswith(".")] == [".keep"]
    assert decoded_of(tmp_path, names)[1] == 20


@pytest.mark.parametrize("reserving", [True, False], ids=["reserved", "found while writing"])
def test_a_full_disk_is_said_and_given_back(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, reserving: bool
) -> None:
    names = write_photos(tmp_path / "photos", 30)
    monkeypatch.setenv("ICDCTL_HOME", str(small_disk))
    told: list[int] = []
    if not reserving:
        monkeypatch.delattr(os, "posix_fallocate")
    with pytest.raises(ArtifactError, match=r"can't be written: No space left") as caught:
        decoded_of(
            tmp_path / "photos", names, resize=(200, 200), crop=None, on_images=lambda done, total: told.append(done)
        )
    assert bool(told) is not reserving
    assert "ICDCTL_HOME" in caught.value.hint
    assert cache_files() == []
    assert decoded_of(tmp_path / "photos", names, resize=(50, 50), crop=None)[1] == 30


def test_a_limit_on_file_sizes_is_as_a_full_disk(tmp_path: Path) -> None:
    names = write_photos(tmp_path, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ArtifactError, match="File too large"):
            decoded_of(tmp_path, names)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache_files() == []


def test_a_state_folder_that_can_not_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_photos(tmp_path, 2)
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / names[0]))
    with pytest.raises(ArtifactError, match="can't be written"):
        decoded_of(tmp_path, names)
