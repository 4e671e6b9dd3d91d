"""`fetch-data` and `fetch-teachers` by their commands, against a server of the publishers' layout."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from fetch_support import Origin, cifar_members, close_network, release_of, remote, running_origin, tar_of
from test_data import Hostile

from icdctl import data, models, teachers
from icdctl.config.dataset_request import dataset_request
from icdctl.data import cifar100, release
from icdctl.errors import ArtifactError, UsageError
from icdctl.teachers import fetch, published_teachers

MEMBERS = cifar_members()
ARCHIVE = tar_of(MEMBERS)
NAME = "cifar-100-python.tar.gz"
PUBLISHED = published_teachers.load_list()
CIFAR100 = data.describe(dataset_request("cifar100"))


@pytest.fixture
def origin() -> Iterator[Origin]:
    with running_origin() as running:
        yield running


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of the test's own; and whatever asks for another machine gets no answer."""
    close_network(monkeypatch)
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-100 as a small archive of generated images, described as exactly as the real one."""
    row = dataclasses.replace(data.DATASETS["cifar100"], release=release_of(MEMBERS, ARCHIVE))
    monkeypatch.setitem(data.DATASETS, "cifar100", row)


def checkpoint(model: str = "wrn40_2", *, seed: int = 0, **more: Any) -> bytes:
    """A teacher in CRD's layout."""
    torch.manual_seed(seed)
    buffer = io.BytesIO()
    state = models.create(model, 100).state_dict()
    torch.save({"epoch": 240, "model": state, "best_acc": torch.tensor(75.61), **more}, buffer)
    return buffer.getvalue()


def visible(folder: Path) -> list[str]:
    """All files that are whole or look so."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if path.is_file())


def test_the_pins_of_cifar100_are_the_published_ones() -> None:
    assert cifar100.RELEASE.archive.num_bytes == 169_001_437
    assert cifar100.RELEASE.archive.md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert str(cifar100.RELEASE.archive.sha256).startswith("85cd44d02ba6437773c5bbd22e183051")
    assert set(cifar100.RELEASE.member_md5) == {"train", "test", "meta"}


@pytest.mark.usefixtures("stand_in")
def test_fetch_data_brings_it_once_and_training_finds_it(icdctl: CommandLine, origin: Origin, own_state: Path) -> None:
    origin.serve(f"/{NAME}", ARCHIVE)
    code, out, err = icdctl("fetch-data", "cifar100", "--mirror", origin.url + "/", "--json")
    assert (code, err) == (0, "")
    (found,) = json.loads(out)["datasets"]
    place = own_state / "data" / "cifar-100-python"
    assert (found["name"], found["state"], found["path"]) == ("cifar100", "fetched", str(place))
    assert visible(own_state / "data") == [f"cifar-100-python/{name}" for name in ("meta", "test", "train")]
    assert data.load(dataset_request("cifar100")).train_images.shape == (200, 32, 32, 3)
    code, out, err = icdctl("fetch-data", "cifar100", "--mirror", origin.url)
    assert (code, err) == (0, "")
    assert "already in" in out
    assert len(origin.requests) == 1
    assert json.loads(icdctl("fetch-data", "--list", "--json")[1])["datasets"][0]["state"] == "right"
    assert json.loads(icdctl("list", "datasets", "--json")[1])["datasets"][0]["state"] == "there"
    checks = json.loads(icdctl("doctor", "--json")[1])["checks"]
    assert next(check for check in checks if check["what"] == "cifar100")["status"] == "ok"


@pytest.mark.usefixtures("stand_in")
def test_fetch_data_from_a_copy_and_what_it_refuses(icdctl: CommandLine, tmp_path: Path, own_state: Path) -> None:
    copy = tmp_path / "carried-over.bin"
    copy.write_bytes(ARCHIVE[:-1] + b"x")
    code, _, err = icdctl("fetch-data", "cifar100", "--from", copy)
    assert (code, own_state.exists()) == (1, False)
    assert f"error: `{copy}` is not the published one `{NAME}`: md5 " in err
    for not_a_file in (tmp_path, tmp_path / "absent", Path("/dev/zero")):
        code, _, err = icdctl("fetch-data", "cifar100", "--from", not_a_file)
        assert (code, str(not_a_file) in err) == (1, True)
    copy.write_bytes(ARCHIVE)
    there = tmp_path / "elsewhere"
    assert icdctl("fetch-data", "cifar100", "--from", copy, "--data-dir", there, "--offline")[0] == 0
    assert copy.exists()
    assert data.load(dataset_request("cifar100", folder=there)).test_images.shape[0] == 100


def test_fetch_data_says_what_can_not_be_done(icdctl: CommandLine, tmp_path: Path) -> None:
    code, _, err = icdctl("fetch-data", "cifar100", "--offline")
    assert code == 1
    for fact in (NAME, "169,001,437 bytes", cifar100.ARCHIVE_MD5, "--from FILE"):
        assert fact in err
    code, out, _ = icdctl("fetch-data", "digits100")
    assert (code, "embedded" in out) == (0, True)
    for wrong, message in (
        (("fetch-data",), "nothing is named"),
        (("fetch-data", "cifar101"), "unknown data set `cifar101`"),
        (("fetch-data", "--all", "--from", "x"), "`--from` gives one file for 3 names"),
        (("fetch-data", "digits100", "--from", "x"), "nothing to read from a file"),
        (("fetch-data", "cifar100", "--mirror", "ftp://x"), "is not a mirror"),
        (("fetch-teachers",), "nothing is named"),
        (("fetch-teachers", "res8"), "no teacher `res8` for `cifar100` is published"),
        (("fetch-teachers", "resnet32x5"), "unknown model `resnet32x5`"),
        (("fetch-teachers", "imagenet/res50"), "unknown published teacher"),
    ):
        code, _, err = icdctl(*wrong)
        assert (code, message in err) == (2, True), err


@pytest.mark.usefixtures("stand_in")
def test_two_commands_at_once_and_a_refusal_for_what_is_in_the_way(
    icdctl: CommandLine, origin: Origin, tmp_path: Path
) -> None:
    place = tmp_path / "data" / "cifar-100-python"
    place.mkdir(parents=True)
    (place / "train").write_bytes(b"mine")
    origin.serve(f"/{NAME}", ARCHIVE)
    code, _, err = icdctl("fetch-data", "cifar100", "--mirror", origin.url, "--data-dir", tmp_path / "data")
    assert (code, (place / "train").read_bytes()) == (1, b"mine")
    assert f"move `{place}` away" in err


def test_the_hint_of_the_main_job_names_both_commands(icdctl: CommandLine) -> None:
    code, _, err = icdctl("distill", "--method", "cd_sdd_dkd", "--teacher", "res32x4", "--student", "mv2")
    assert code == 1
    assert "`icdctl fetch-teachers res32x4`" in err
    assert "`icdctl fetch-data cifar100`" in err


def test_the_list_of_teachers_is_whole(icdctl: CommandLine) -> None:
    rows = {row["name"]: row for row in json.loads(icdctl("fetch-teachers", "--list", "--json")[1])["teachers"]}
    assert len(rows) == 9
    assert rows["cifar100/res32x4"]["hash"] == "published"
    assert rows["cifar100/wrn40_2"]["hash"] == "first use"
    assert rows["cub200/vgg13"]["state"] == "by hand, from its page"
    assert published_teachers.find_published("WRN_40_2").remote(None).urls[0] == (
        "http://shape2prog.csail.mit.edu/repo/wrn_40_2_vanilla/ckpt_epoch_240.pth"
    )
    code, _, err = icdctl("fetch-teachers", "cub200/vgg13")
    assert (code, "https://pan.baidu.com/s/" in err) == (1, True)


@pytest.mark.parametrize(
    "text",
    [
        "[cifar100",
        '[cifar100]\nurls = []\nsource = "x"\nlicence = "x"\n[cifar100.teachers.res32x5]\nreference = "x"\ntop1 = 1\n'
        'sha256 = "first-use"',
        '[cifar100]\nurls = []\nsource = "x"\nlicence = "x"\n[cifar100.teachers.res56]\nreference = "x"\ntop1 = 101\n'
        'sha256 = "none"',
    ],
)
def test_a_broken_list_of_teachers_is_named(text: str) -> None:
    with pytest.raises(ArtifactError, match="the list of teachers is"):
        published_teachers.parse_list(text)


def test_a_teacher_is_fetched_pinned_converted_and_found(
    icdctl: CommandLine, origin: Origin, tmp_path: Path, own_state: Path
) -> None:
    content = checkpoint()
    url = origin.serve("/wrn_40_2_vanilla/ckpt_epoch_240.pth", content)
    code, out, err = icdctl("fetch-teachers", "wrn40_2", "--mirror", f"{origin.url}/", "--json")
    assert code == 0
    assert "its accuracy is not checked yet" in err
    (found,) = json.loads(out)["teachers"]
    sha256 = hashlib.sha256(content).hexdigest()
    assert (found["name"], found["sha256"], found["gate"]) == ("cifar100/wrn40_2", sha256, "open")
    place = own_state / "teachers" / "cifar100" / "wrn40_2" / "student.safetensors"
    assert visible(own_state) == ["teachers/cifar100/wrn40_2/student.safetensors"]
    said = models.read_weights(place).metadata
    assert (said["origin"]["url"], said["origin"]["sha256"]) == (url, sha256)
    assert "RepDistiller" in said["origin"]["source"]
    assert "BSD-2-Clause" in said["origin"]["licence"]
    assert (said["model"], said["dataset"], said["num_classes"]) == ("wrn40_2", "cifar100", 100)
    lock = json.loads(Path("registry/teachers.lock").read_text())
    assert lock["cifar100/wrn40_2"]["sha256"] == sha256

    code, out, _ = icdctl("fetch-teachers", "cifar100/wrn_40_2", "--offline")
    assert (code, "already in" in out, len(origin.requests)) == (0, True, 1)
    target = teachers.find("wrn40_2", dataset=CIFAR100)
    assert (target.path, target.model) == (place, "wrn40_2")
    torch.manual_seed(0)
    expected = models.create("wrn40_2", 100).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in target.load().state_dict().items())
    given = ("distill", "--method", "kd", "--teacher", "wrn40_2", "--student", "res8", "--dry-run")
    assert json.loads(icdctl(*given)[1])["teacher"] == "wrn40_2"
    rows = {row["name"]: row for row in json.loads(icdctl("list", "teachers", "--json")[1])["teachers"]}
    assert (rows["cifar100/wrn40_2"]["state"], rows["cifar100/wrn40_2"]["hash"]) == ("fetched", "recorded")

    place.write_bytes(place.read_bytes()[:-4] + b"\0\0\0\1")
    code, _, err = icdctl(*given)
    assert (code, "has been changed since it was fetched" in err) == (1, True)
    assert icdctl("fetch-teachers", "wrn40_2", "--mirror", origin.url)[0] == 0
    assert teachers.find("wrn40_2", dataset=CIFAR100).sha256 == found["converted_sha256"]


def test_other_bytes_than_the_first_are_refused(
    icdctl: CommandLine, origin: Origin, tmp_path: Path, own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_teachers, "load_list", lambda: (teacher_of("wrn40_2"),))
    path = "/wrn_40_2_vanilla/ckpt_epoch_240.pth"
    origin.serve(path, checkpoint())
    assert icdctl("fetch-teachers", "wrn40_2", "--mirror", origin.url)[0] == 0
    before = Path("registry/teachers.lock").read_bytes()
    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint(seed=1))
    code, _, err = icdctl("fetch-teachers", "wrn40_2", "--from", other)
    assert (code, "recorded at first use" in err) == (1, True)
    for file in (own_state / "teachers").rglob("*.safetensors"):
        file.unlink()
    origin.serve(path, other.read_bytes())
    code, _, err = icdctl("fetch-teachers", "wrn40_2", "--mirror", origin.url)
    assert (code, f"sha256 {remote(other.read_bytes()).sha256}, expected" in err) == (1, True)
    assert Path("registry/teachers.lock").read_bytes() == before
    assert visible(own_state) == []
    origin.serve(path, checkpoint())
    assert icdctl("fetch-teachers", "wrn40_2", "--mirror", origin.url)[0] == 0


def test_a_published_hash_is_the_only_one(icdctl: CommandLine, tmp_path: Path, own_state: Path) -> None:
    path = tmp_path / "ckpt_epoch_240.pth"
    path.write_bytes(checkpoint("res32x4"))
    code, _, err = icdctl("fetch-teachers", "res32x4", "--from", path, "--accept-accuracy")
    assert (code, "expected 22aa12e2b632b19d" in err) == (1, True)
    assert visible(own_state) == []
    forged = {"sha256": "0" * 64, "converted_sha256": "0" * 64, "url": "x", "first_use": "2026-01-01"}
    Path("registry").mkdir()
    Path("registry/teachers.lock").write_text(json.dumps({"cifar100/res32x4": forged}))
    code, _, err = icdctl("fetch-teachers", "res32x4", "--offline")
    assert (code, "published is 22aa12e2" in err) == (1, True)
    Path("registry/teachers.lock").write_text('{"cifar100/res32x4": {}}')
    code, _, err = icdctl("fetch-teachers", "--list")
    assert (code, "teachers.lock` is broken at" in err) == (1, True)


def bad_files(tmp_path: Path) -> dict[str, bytes]:
    whole = checkpoint()
    return {
        "hostile": checkpoint(opt=Hostile(tmp_path / "ran")),
        "truncated": whole[: len(whole) // 2],
        "other architecture": checkpoint("wrn40_1"),
        "web page": b"<!DOCTYPE html><html>please log in</html>",
        "empty": b"",
    }


@pytest.mark.parametrize("kind", ["hostile", "truncated", "other architecture", "web page", "empty"])
@pytest.mark.parametrize("way", ["mirror", "from"])
def test_bad_teachers_are_refused_and_leave_nothing(
    icdctl: CommandLine,
    origin: Origin,
    tmp_path: Path,
    own_state: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    way: str,
) -> None:
    monkeypatch.setattr(published_teachers, "load_list", lambda: (teacher_of("wrn40_2"),))
    content = bad_files(tmp_path)[kind]
    path = tmp_path / "given.pth"
    path.write_bytes(content)
    origin.serve("/wrn_40_2_vanilla/ckpt_epoch_240.pth", content)
    given = ("--mirror", origin.url) if way == "mirror" else ("--from", path)
    code, out, err = icdctl("fetch-teachers", "wrn40_2", *given)
    assert (code, out) == (1, "")
    assert "error:" in err
    assert "hint:" in err
    assert ".part" not in err
    assert not (tmp_path / "ran").exists()
    assert visible(own_state) == []
    assert not Path("registry/teachers.lock").exists()
    path.write_bytes(checkpoint())
    origin.serve("/wrn_40_2_vanilla/ckpt_epoch_240.pth", checkpoint())
    assert icdctl("fetch-teachers", "wrn40_2", *given)[0] == 0


def teacher_of(model: str, **changes: Any) -> published_teachers.PublishedTeacher:
    """A published teacher that the tests describe; it has no address."""
    known = next(row for row in PUBLISHED if row.name == f"cifar100/{model}")
    return known.model_copy(update={"urls": (), **changes})


def put_data(own_state: Path) -> None:
    copy = own_state.parent / "copy.tar.gz"
    copy.write_bytes(ARCHIVE)
    release.install(release_of(MEMBERS, ARCHIVE), own_state / "data", from_file=copy)


def top1_of(model: str) -> float:
    """What a checkpoint of `checkpoint(model)` reaches on the stand-in test set."""
    from icdctl import api

    torch.manual_seed(0)
    return api.evaluate(models.create(model, 100).eval(), dataset="cifar100", device="cpu").numbers.top1


def test_the_gate_lets_the_published_accuracy_through_alone(own_state: Path, tmp_path: Path) -> None:
    put_data(own_state)
    reached = top1_of("res56")
    path = tmp_path / "t.pth"
    path.write_bytes(checkpoint("res56"))
    away = teacher_of("res56", top1=reached + 0.16)
    with pytest.raises(ArtifactError, match="it is not accepted") as caught:
        fetch.fetch_teacher(away, fetch.FetchOptions(from_file=path))
    assert "--accept-accuracy" in caught.value.hint
    assert not Path("registry/teachers.lock").exists()
    assert not fetch.place_of(away).exists()
    near = teacher_of("res56", top1=reached + 0.15)
    found = fetch.fetch_teacher(near, fetch.FetchOptions(from_file=path, keep_original=True))
    assert (found.gate, found.entry.measured_top1, found.entry.accuracy_accepted) == ("passed", reached, False)
    assert (found.path.parent / "ckpt_epoch_240.pth").read_bytes() == path.read_bytes()
    assert "other md5" in str(found.data_caveat)


def test_a_gate_left_open_is_closed_when_the_data_come(own_state: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.pth"
    path.write_bytes(checkpoint("res56"))
    teacher = teacher_of("res56")
    assert fetch.fetch_teacher(teacher, fetch.FetchOptions(from_file=path)).gate == "open"
    assert fetch.find_fetched(teacher) is not None
    put_data(own_state)
    with pytest.raises(ArtifactError, match="it is not accepted"):
        fetch.fetch_teacher(teacher, fetch.FetchOptions())
    with pytest.raises(ArtifactError, match="it is not accepted"):
        fetch.find_fetched(teacher)
    assert fetch.fetch_teacher(teacher, fetch.FetchOptions(accept_accuracy=True)).gate == "accepted"
    assert fetch.fetch_teacher(teacher, fetch.FetchOptions()).gate == "accepted"
    assert fetch.find_fetched(teacher) == fetch.place_of(teacher)


def test_two_commands_at_once_pin_one_hash(origin: Origin, tmp_path: Path) -> None:
    origin.serve("/resnet56_vanilla/ckpt_epoch_240.pth", checkpoint("res56"), slow=0.02)
    command = [sys.executable, "-m", "icdctl", "fetch-teachers", "res56", "--mirror", origin.url]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(origin.requests) == 1
    assert list(json.loads(Path("registry/teachers.lock").read_text())) == ["cifar100/res56"]


def test_unknown_data_sets_have_no_published_teacher() -> None:
    with pytest.raises(UsageError, match="unknown published teacher"):
        published_teachers.find_published("digits100/res20")
