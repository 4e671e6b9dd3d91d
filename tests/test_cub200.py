"""CUB-200-2011 from its archive to a registered student, with a stand-in of generated images in place of the real one.

The stand-in is described as exactly as the real archive, and goes through the very same code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fetch_support
import numpy as np
import pytest
import torch
from conftest import CommandLine
from fetch_support import CUB_TEST, CUB_TRAIN, Origin, cub_archive, cub_members, cub_release_of, jpeg, running_origin
from PIL import Image
from test_download import add, partials, visible, wait_for
from torchvision import transforms

from icdctl import api, data, files, models, registry, teachers
from icdctl.api.export_inputs import facts_of
from icdctl.config.dataset_request import dataset_request
from icdctl.data import Augmentation, ImageStore, cub200, release
from icdctl.data.decode import decode_image
from icdctl.data.release import Release
from icdctl.errors import ArtifactError
from icdctl.registry import trained
from icdctl.registry.artifact import read_manifest
from icdctl.teachers import fetch, published_teachers

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
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
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


# The description


def test_the_pins_are_the_published_ones() -> None:
    archive = REAL.archive
    assert (archive.name, archive.num_bytes) == (NAME, 1_150_585_339)
    assert archive.md5 == "97eceeb196236b17998738112f37df78"
    assert archive.sha256 == "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"
    assert [url.partition("/files")[0] for url in archive.urls] == [
        "https://data.caltech.edu/records/65de6-vp158",
        "https://data.caltech.edu/api/records/65de6-vp158",
    ]
    assert len(REAL.member_md5) == 4
    assert NUM_REAL == (5994, 5794)
    assert len(set(cub200.CLASS_NAMES)) == len(cub200.CLASS_NAMES) == 200
    assert [cub200.CLASS_NAMES[index] for index in (0, 1, 197, 199)] == [
        Path(name).parts[1].partition(".")[2] for name in KNOWN
    ]


# Getting it


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


# Its own lists


def write_lists(folder: Path, **changes: Callable[[list[str]], list[str]]) -> None:
    """The four lists without the images; `changes` are what becomes of the lines of `<key>.txt`."""
    (folder / cub200.FOLDER).mkdir(parents=True)
    for name in ("images", "image_class_labels", "train_test_split", "classes"):
        lines = MEMBERS[f"{cub200.FOLDER}/{name}.txt"].decode().splitlines()
        lines = changes[name](lines) if name in changes else lines
        (folder / cub200.FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")


def test_the_lists_divide_the_images(tmp_path: Path) -> None:
    write_lists(tmp_path)
    train, test = cub200.read_lists(tmp_path)
    assert (len(train.names), len(test.names)) == (CUB_TRAIN, CUB_TEST)
    assert train.names[:2] == (
        f"{KNOWN[0].removeprefix('images/')}",
        "001.Black_footed_Albatross/Black_footed_Albatross_0002_1.jpg",
    )
    assert train.labels.bincount().tolist() == [2] * 40 + [1] * 160
    assert test.labels.tolist() == list(range(4, 200, 5))


@pytest.mark.parametrize("name", ["images", "image_class_labels", "train_test_split", "classes"])
@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "words", "twice"])
def test_a_list_that_is_missing_or_malformed_is_named(tmp_path: Path, name: str, kind: str) -> None:
    write_lists(tmp_path)
    path = tmp_path / cub200.FOLDER / f"{name}.txt"
    lines = path.read_text()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"binary": b"\xff\xfe", "words": b"one two\n", "twice": (lines * 2).encode()}[kind])
    expected = "does not exist" if kind == "missing" else "is not a file of CUB-200-2011"
    with pytest.raises(ArtifactError, match=f"{name}.txt` {expected}") as caught:
        data.load(dataset_request("cub200", folder=tmp_path))
    assert "`icdctl fetch-data cub200`" in caught.value.hint


def without(number: int) -> Callable[[list[str]], list[str]]:
    return lambda lines: lines[:number] + lines[number + 1 :]


def with_line(number: int, line: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[:number], line, *lines[number + 1 :]]


CONTRADICTIONS: dict[str, tuple[str, Callable[[list[str]], list[str]], str, str]] = {
    "image without a label": ("image_class_labels", without(3), "image_class_labels", "image `4` .* not in both"),
    "image without a side": ("train_test_split", without(3), "train_test_split", "image `4` .* not in both"),
    "label without an image": ("image_class_labels", lambda lines: [*lines, "999 1"], "image_class_labels", "`999`"),
    "label out of range": ("image_class_labels", with_line(0, "1 201"), "image_class_labels", "the label `201`"),
    "label zero": ("image_class_labels", with_line(0, "1 0"), "image_class_labels", "the label `0`"),
    "label of another class": ("image_class_labels", with_line(0, "1 2"), "image_class_labels", "the label `2`"),
    "side out of range": ("train_test_split", with_line(4, "5 2"), "train_test_split", "side `2`"),
    "no test image": (
        "train_test_split",
        lambda lines: [f"{line[:-1]}1" for line in lines],
        "train_test_split",
        "there are no training images or no test images",
    ),
    "classes in another order": ("classes", lambda lines: [*lines[1:], "1 001.Wren"], "classes", "200 species"),
    "a class too few": ("classes", without(199), "classes", "200 species"),
    "image outside": ("images", with_line(0, "1 ../../x.jpg"), "images", "not a path below `images`"),
    "image elsewhere": ("images", with_line(0, "1 /etc/x.jpg"), "images", "not a path below `images`"),
    "image with a zero byte": (
        "images",
        with_line(0, "1 001.Black_footed_Albatross/\0.jpg"),
        "images",
        "not a path below `images`",
    ),
    "image twice": ("images", with_line(1, f"2 {KNOWN[0].removeprefix('images/')}"), "images", "names an image twice"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_lists_that_contradict_each_other_are_refused(tmp_path: Path, kind: str) -> None:
    changed, change, named, message = CONTRADICTIONS[kind]
    write_lists(tmp_path, **{changed: change})
    with pytest.raises(ArtifactError, match=rf"{named}\.txt` is not a file of CUB-200-2011: .*{message}") as caught:
        cub200.read_lists(tmp_path)
    assert f"move `{tmp_path / cub200.FOLDER}` away" in caught.value.hint


# Its images


def mode_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def pil_of(name: str) -> Image.Image:
    return Image.open(io.BytesIO(MEMBERS[f"{cub200.FOLDER}/images/{name}"])).convert("RGB")


def cached() -> list[str]:
    return sorted(path.name for path in (files.state_folder() / "cache" / "images").glob("*.npy"))


def test_pixels_are_those_of_torchvision_and_stay_on_disk(fetched: Path) -> None:
    found = data.load(dataset_request("cub200"))
    assert (found.caveat, found.val_images, found.num_classes) == (None, None, 200)
    assert (found.train_images.shape, found.train_images.dtype) == ((CUB_TRAIN, 256, 256, 3), torch.uint8)
    assert (found.test_images.shape, found.test_images.dtype) == ((CUB_TEST, 224, 224, 3), torch.uint8)
    train, test = cub200.read_lists(fetched.parent)
    assert torch.equal(found.train_labels, train.labels)
    assert torch.equal(found.test_labels, test.labels)
    resize, crop = transforms.Resize((256, 256)), transforms.CenterCrop(224)
    modes = set()
    for row in range(0, CUB_TRAIN, 7):
        modes.add(mode_of(fetched / "images" / train.names[row]))
        assert np.array_equal(found.train_images[row].numpy(), np.asarray(resize(pil_of(train.names[row]))))
    for row, name in enumerate(test.names):
        modes.add(mode_of(fetched / "images" / name))
        assert np.array_equal(found.test_images[row].numpy(), np.asarray(crop(resize(pil_of(name)))))
    assert modes == {"RGB", "L"}
    mapped = Path("/proc/self/maps").read_text()
    assert all(name in mapped for name in cached())
    assert [name.rpartition("-")[0] for name in cached()] == ["cub200-test", "cub200-train"]


def test_training_views_are_crops_of_224_and_tests_see_the_centre(fetched: Path) -> None:
    found = data.load(dataset_request("cub200"))
    store = ImageStore(found.train_images, found.preprocessing, Augmentation(flip=True), device=CPU)
    assert store.num_views == 33 * 33 * 2
    views = store.epoch(seed=0, epoch=1)
    assert (int(views.top.min()), int(views.top.max()), int(views.left.max())) == (0, 32, 32)
    part = views[:6]
    pixels = store.pixels(part)
    assert pixels.shape == (6, 224, 224, 3)
    for place in range(6):
        top, left = int(part.top[place]), int(part.left[place])
        expected = found.train_images[part.index[place], top : top + 224, left : left + 224]
        assert torch.equal(pixels[place], expected.flip(1) if part.flip[place] else expected)


def test_images_are_held_out_of_the_training_images_and_cut_to_their_centre(fetched: Path) -> None:
    whole = data.load(dataset_request("cub200"))
    found = data.load(dataset_request("cub200", val_split=0.5))
    assert found.val_images is not None
    assert found.val_labels is not None
    assert torch.equal(found.test_images, whole.test_images)
    assert found.train_images.shape == (CUB_TRAIN - 40, 256, 256, 3)
    assert found.val_images.shape == (40, 224, 224, 3)
    assert found.val_labels.tolist() == list(range(40)), "classes with a single image keep it"
    names = cub200.read_lists(fetched.parent)[0].names
    crop = transforms.Compose([transforms.Resize((256, 256)), transforms.CenterCrop(224)])
    for row in range(0, 40, 9):
        choices = [np.asarray(crop(pil_of(name))) for name in names if name.startswith(f"{row + 1:03d}.")]
        assert any(np.array_equal(found.val_images[row].numpy(), choice) for choice in choices)


def test_published_images_are_decoded_once_by_the_hash_of_their_archive(
    own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = put_data(own_state / "data")
    told: list[int] = []
    request = dataset_request("cub200")
    first = data.load(request, on_images=lambda done, total: told.append(done))
    assert told == [*range(1, CUB_TRAIN + 1), *range(1, CUB_TEST + 1)]
    train, _ = cub200.read_lists(place.parent)
    for name in train.names:
        if f"images/{name}" not in KNOWN:
            (place / "images" / name).unlink()
    told.clear()
    again = data.load(request, on_images=lambda done, total: told.append(done))
    assert (told, again.sha256, again.caveat) == ([], first.sha256, None)
    archive = dataclasses.replace(RELEASE.archive, sha256="0" * 64)
    swap_release(monkeypatch, dataclasses.replace(RELEASE, archive=archive))
    with pytest.raises(ArtifactError, match=r"images/001\.Black_footed_Albatross/.*` does not exist") as caught:
        data.load(request)
    assert f"move `{place}` away; `icdctl fetch-data cub200`" in caught.value.hint


def test_other_images_are_used_with_a_caveat_and_told_apart(own_state: Path) -> None:
    place = put_data(own_state / "data")
    (place / KNOWN[0]).write_bytes(jpeg(seed=999))
    first = data.load(dataset_request("cub200"))
    assert first.caveat == f"`{place}` is not the published CUB-200-2011: results can't be compared"
    assert not np.array_equal(first.train_images[0].numpy(), np.asarray(pil_of(KNOWN[0].removeprefix("images/"))))
    (place / KNOWN[0]).write_bytes(jpeg(seed=1000))
    assert data.load(dataset_request("cub200")).sha256 != first.sha256


def test_a_broken_image_is_named_and_a_mended_one_is_read(own_state: Path) -> None:
    place = put_data(own_state / "data")
    broken = place / "images" / "100.Brown_Pelican" / "Brown_Pelican_test.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:300])
    with pytest.raises(ArtifactError, match=r"1 of 40 images .*`100\.Brown_Pelican/Brown_Pelican_test\.jpg`") as caught:
        data.load(dataset_request("cub200"))
    assert "--skip-broken" not in caught.value.hint
    assert f"move `{place}` away; `icdctl fetch-data cub200`" in caught.value.hint
    broken.write_bytes(whole)
    assert data.load(dataset_request("cub200")).test_images.shape[0] == CUB_TEST


# Teachers


def checkpoint(model: str = "res32x4", *, num_classes: int = 200, side: int = 224, seed: int = 0) -> bytes:
    """A teacher in CRD's layout."""
    torch.manual_seed(seed)
    buffer = io.BytesIO()
    state = models.create(model, num_classes, image_size=(side, side)).state_dict()
    torch.save({"epoch": 240, "model": state, "best_acc": torch.tensor(66.17)}, buffer)
    return buffer.getvalue()


def small_teacher(monkeypatch: pytest.MonkeyPatch, *, top1: float) -> published_teachers.PublishedTeacher:
    """A published teacher that classifies 224 x 224 images in milliseconds."""
    known = next(row for row in PUBLISHED if row.name == "cub200/res32x4")
    teacher = known.model_copy(update={"model": "res8", "reference": "resnet8", "top1": top1})
    monkeypatch.setattr(published_teachers, "load_list", lambda: (*PUBLISHED, teacher))
    return teacher


def row_of(icdctl: CommandLine, name: str) -> dict[str, Any]:
    rows = json.loads(icdctl("list", "teachers", "--json")[1])["teachers"]
    return next(row for row in rows if row["name"] == name)


def test_published_teachers_are_taken_from_a_file_alone(icdctl: CommandLine, tmp_path: Path, own_state: Path) -> None:
    page = "https://pan.baidu.com/s/1uxyG3ZZO67i_dbXwuFB2yQ?pwd=bzc6"
    for way in ((), ("--offline",)):
        code, _, err = icdctl("fetch-teachers", "cub200/res32x4", *way)
        assert code == 1
        assert f"resnet32x4_vanilla/resnet32x4_best.pth` is on {page}, which programs can't download from" in err
        assert "`icdctl fetch-teachers cub200/res32x4 --from FILE`" in err
        assert "`icdctl train --model res32x4 --dataset cub200 --as-teacher`" in err
    code, _, err = icdctl("fetch-teachers", "cub200/res32x4", "--from", tmp_path / "absent.pth")
    assert (code, "absent.pth" in err, "as published" in err) == (1, True, False)
    row = row_of(icdctl, "cub200/res32x4")
    assert (row["state"], row["hash"], row["source"]) == ("by hand, from its page", "first use", page)
    assert (row["top-1"], row["licence"]) == (66.17, "none stated")

    path = tmp_path / "resnet32x4_best.pth"
    path.write_bytes(checkpoint())
    code, out, err = icdctl("fetch-teachers", "CUB_200/resnet32x4", "--from", path, "--json")
    assert code == 0
    assert "its accuracy is not checked yet" in err
    assert "`icdctl fetch-data cub200`" in err
    (found,) = json.loads(out)["teachers"]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found["name"], found["sha256"], found["gate"]) == ("cub200/res32x4", sha256, "open")
    assert json.loads(Path("registry/teachers.lock").read_text())["cub200/res32x4"]["sha256"] == sha256
    row = row_of(icdctl, "cub200/res32x4")
    assert (row["state"], row["hash"], row["licence"]) == ("fetched", "recorded", "none stated")

    target = teachers.find("res32x4", dataset=data.describe(dataset_request("cub200")))
    assert (target.model, target.preprocessing.size, target.preprocessing.resize) == ("res32x4", (224, 224), (256, 256))
    assert (target.source, target.licence) == ("SDD, a page that asks for a login", "none stated")
    torch.manual_seed(0)
    expected = models.create("res32x4", 200, dataset="cub200").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in target.load().state_dict().items())

    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint(seed=1))
    before = Path("registry/teachers.lock").read_bytes()
    code, _, err = icdctl("fetch-teachers", "cub200/res32x4", "--from", other)
    assert (code, "recorded at first use" in err) == (1, True)
    assert Path("registry/teachers.lock").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 32}, "`conv1.weight` is [32, 3, 3, 3], expected [32, 3, 7, 7]"),
        ({"num_classes": 100}, "`fc.weight` is [100, 256], expected [200, 256]"),
        ({"model": "res8x4"}, "`layer1.1.conv1.weight` is missing"),
        ({"model": "vgg13"}, "`conv1.weight` is missing"),
    ],
    ids=["32 x 32", "100 classes", "smaller", "another family"],
)
def test_other_teachers_do_not_fit(
    icdctl: CommandLine, tmp_path: Path, own_state: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "given.pth"
    path.write_bytes(checkpoint(**changes))
    code, out, err = icdctl("fetch-teachers", "cub200/res32x4", "--from", path)
    assert (code, out) == (1, "")
    assert f"weights in `{path}` do not fit `res32x4`: {message}" in err
    assert "download that again from https://pan.baidu.com/s/" in err
    assert "--dataset" not in err
    assert not Path("registry/teachers.lock").exists()
    assert not list(own_state.rglob("*.safetensors"))


def test_the_accuracy_is_measured_on_the_stand_in(
    tmp_path: Path, fetched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.pth"
    path.write_bytes(checkpoint("res8"))
    torch.manual_seed(0)
    model = models.create("res8", 200, image_size=(224, 224)).eval()
    reached = api.evaluate(model, dataset="cub200", device="cpu").numbers.top1
    away = small_teacher(monkeypatch, top1=reached + 0.16)
    place = fetch.place_of(away)
    try:
        with pytest.raises(ArtifactError, match=r"allowed difference 0\.15\); it is not accepted") as caught:
            fetch.fetch_teacher(away, fetch.FetchOptions(from_file=path))
        assert "fetch-teachers cub200/res8 --accept-accuracy" in caught.value.hint
        assert not Path("registry/teachers.lock").exists()
        assert not place.exists()
        found = fetch.fetch_teacher(away, fetch.FetchOptions(from_file=path, accept_accuracy=True))
        assert (found.gate, found.entry.measured_top1, found.data_caveat) == ("accepted", reached, None)
        Path("registry/teachers.lock").unlink()
        place.unlink()
        near = small_teacher(monkeypatch, top1=reached + 0.15)
        assert fetch.fetch_teacher(near, fetch.FetchOptions(from_file=path)).gate == "passed"
    finally:
        place.unlink(missing_ok=True)


def test_a_missing_teacher_is_told_with_all_ways_to_get_one(
    icdctl: CommandLine, fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("distill", "--method", "kd", "--student", "mv2", "--dataset", "cub200")
    code, _, err = icdctl(*given, "--teacher", "res32x4")
    assert code == 1
    assert "`icdctl fetch-teachers cub200/res32x4 --from FILE`" in err
    assert "https://pan.baidu.com/s/" in err
    assert "`icdctl train --model res32x4 --dataset cub200 --as-teacher`" in err
    assert "fetch-data" not in err, "the data are there"
    code, _, err = icdctl(*given, "--teacher", "res8")
    assert (code, "fetch-teachers" in err) == (1, False)
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    place = put_data(tmp_path / "state" / "data")
    code, _, err = icdctl(*given, "--teacher", "res32x4")
    assert (code, "`icdctl train --model res32x4" in err, cached()) == (1, True, []), "nothing was decoded for that"
    shutil.rmtree(place)
    code, _, err = icdctl(*given, "--teacher", "res32x4")
    assert code == 1
    assert "`icdctl fetch-teachers cub200/res32x4 --from FILE`" in err
    assert "`icdctl fetch-data cub200`" in err


def test_weights_without_a_full_record_say_what_is_known_of_their_source(tmp_path: Path) -> None:
    known = data.describe(dataset_request("cub200"))
    path = tmp_path / "t.pth"
    path.write_bytes(checkpoint("res8"))
    found = trained.resolve(str(path), dataset=known)
    assert (found.model, found.source, found.licence) == ("res8", "a file without a record", None)
    said = known.weights_metadata("res8")
    for origin, source in (
        ({"url": "https://127.0.0.1/t.pth"}, "https://127.0.0.1/t.pth"),
        (None, "icdctl on `cub200`"),
    ):
        models.save_weights(tmp_path / "t.safetensors", found.load(), {**said, "origin": origin} if origin else said)
        found_again = trained.resolve(str(tmp_path / "t.safetensors"))
        assert found_again.source.endswith(source)
        assert found_again.licence is None


# Training


def test_the_recipe_is_the_references(icdctl: CommandLine) -> None:
    for model, rate in (("res32x4", 0.05), ("vgg13", 0.05), ("vgg8", 0.05), ("mv2", 0.01), ("shuv1", 0.01)):
        code, out, _ = icdctl("train", "--model", model, "--dataset", "cub200", "--as-teacher", "--dry-run")
        config = json.loads(out)
        assert (code, config["recipe"], config["lr"], config["epochs"]) == (0, "cub200", rate, 240)
        assert (config["optimizer"], config["momentum"], config["nesterov"]) == ("sgd", 0.9, False)
        assert (config["schedule"], config["lr_decay_epochs"], config["lr_decay_rate"]) == (
            "step",
            [150, 180, 210],
            0.1,
        )
        assert (config["weight_decay"], config["batch_size"], config["clip_norm"]) == (5e-4, 64, 40.0)
        assert (config["drop_last"], config["flip"], config["crop_padding"]) == (True, True, 0)
        assert config["crop_scale"] is None


TINY = ("--epochs", "1", "--batch-size", "4", "--max-steps", "2", "--device", "cpu", "--json")


def test_a_teacher_is_trained_registered_and_found(icdctl: CommandLine, fetched: Path) -> None:
    code, out, err = icdctl("train", "--model", "res8", "--dataset", "cub200", "--as-teacher", *TINY)
    assert (code, "warning" in err) == (0, False), err
    trained = json.loads(out)
    assert (trained["artifact"], trained["train_images"], trained["steps"]) == ("cub200/res8-ce@v1", CUB_TRAIN, 2)
    weights = models.read_weights(Path(trained["out"]) / "student.safetensors")
    assert weights.metadata["preprocessing"]["size"] == [224, 224]
    assert weights.metadata["preprocessing"]["resize"] == [256, 256]
    assert (
        weights.tensors["conv1.weight"].shape
        == models.create("res8", 200, dataset="cub200").state_dict()["conv1.weight"].shape
    )
    given = ("distill", "--method", "sdd_kd", "--teacher", "res8", "--student", "res14", "--dataset", "cub200")
    config = json.loads(icdctl(*given, "--dry-run")[1])
    assert config["teacher_sha256"] == weights.sha256
    assert config["scales"] == [1, 2, 4]
    row = row_of(icdctl, "cub200/res8-ce@v1")
    assert (row["source"], row["state"]) == ("trained here", "registered")
    assert "non-commercial" in row["licence"]
    numbers = json.loads(icdctl("eval", "registry:cub200/res8-ce", "--device", "cpu", "--json")[1])
    assert numbers["top1"] == trained["final_top1"]


def test_whose_the_teachers_weights_are_goes_with_the_student(
    icdctl: CommandLine,
    fetched: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "t.pth"
    path.write_bytes(checkpoint("res8"))
    teacher = small_teacher(monkeypatch, top1=1.0)
    place = fetch.place_of(teacher)
    assert icdctl("fetch-teachers", "cub200/res8", "--from", path, "--accept-accuracy")[0] == 0
    given = ("distill", "--method", "sdd_kd", "--teacher", "res8", "--student", "res8", "--dataset", "cub200")
    code, out, err = icdctl(*given, "--val-split", "0.5", *TINY, "--out", "run")
    fetched_model = trained.resolve(str(place))
    exported_teacher = facts_of(fetched_model)
    place.unlink()
    assert code == 0, err
    source, licence = "SDD, a page that asks for a login", "none stated"
    assert (json.loads(out)["teacher_source"], json.loads(out)["teacher_licence"]) == (source, licence)
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert (metrics["teacher_source"], metrics["teacher_licence"]) == (source, licence)
    assert "best_val_top1" in metrics
    assert (exported_teacher["weights_source"], exported_teacher["weights_licence"]) == (source, licence)

    exported = api.export("run", dataset=None)
    card = (exported.folder / "README.md").read_text()
    assert f"| teacher_source | {source} |" in card
    assert f"| teacher_licence | {licence} |" in card
    assert "| data_licence | none stated; images for non-commercial" in card
    assert "Images must be resized to 256 x 256 and cropped to the central 224 x 224 by the caller" in card
    assert exported.report.passed

    artifact = registry.add(registry.default_folder(), Path("run"), export_folder=exported.folder)
    assert artifact.manifest.teacher is not None
    assert (artifact.manifest.teacher.source, artifact.manifest.teacher.licence) == (source, licence)
    text = (artifact.folder / "card.md").read_text()
    assert f"- Source of its weights: {source}" in text
    assert f"- Licence of its weights: {licence}" in text
    manifest_path = artifact.folder / "manifest.json"
    stated = json.loads(manifest_path.read_text())
    del stated["teacher"]["source"], stated["teacher"]["licence"]
    del stated["serial"], stated["card_sha256"], stated["sha256"]  # such a manifest had no hashes either
    manifest_path.write_text(json.dumps(stated))
    old = read_manifest(manifest_path).teacher
    assert old is not None
    assert (old.model, old.source, old.licence) == ("res8", None, None)
    assert "sdd_kd" in icdctl("registry", "show", artifact.reference)[1]

    check_snippet(exported.folder, card, tmp_path, monkeypatch, capsys)


def check_snippet(
    folder: Path, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program in the card names the class that icdctl names, from the very pixels that icdctl reads."""
    found = trained.resolve("run")
    model = found.load()
    snippet = card.partition("```python\n")[2].partition("```")[0]
    program = compile(snippet, "card", "exec")
    for seed in (1, 7, 11):
        path = tmp_path / f"{seed}.jpg"
        path.write_bytes(jpeg(seed=seed, grey=seed == 7))
        shutil.copy(path, folder / "image.png")
        pixels = decode_image(path, resize=(256, 256), crop=(224, 224))
        with torch.no_grad():
            logits = model(found.preprocessing.normalise(torch.from_numpy(pixels)[None]))
        names: dict[str, Any] = {}
        capsys.readouterr()
        with monkeypatch.context() as inside:
            inside.chdir(folder)
            exec(program, names)
        assert np.array_equal(names["image"][0], pixels)
        assert capsys.readouterr().out.strip() == cub200.CLASS_NAMES[int(logits.argmax())]
        assert np.allclose(names["logits"], logits.numpy(), atol=1e-4)
