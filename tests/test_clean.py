"""`icdctl clean`: what real runs leave in the state folder, listed, and deleted where nobody needs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CommandLine
from grid_support import started, wait_until
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import icdctl as library
from icdctl import cleanup, files
from icdctl.cleanup import CACHES, KINDS
from icdctl.errors import ArtifactError

DIGITS: dict[str, Any] = {"dataset": "digits100", "train_images": 250, "test_images": 50, "epochs": 1, "device": "cpu"}
ANSWERS: dict[str, Any] = {"crop_padding": 4, "teacher_mode": "cache", "teacher_precision": "fp32"}
"""81 views of each image: a table large enough to be kept."""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 48 images of two classes."""
    random = np.random.default_rng(0)
    for number in range(48):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def listed(icdctl: CommandLine, *arguments: str) -> list[dict[str, Any]]:
    code, out, err = icdctl("clean", "--list", "--json", *arguments)
    assert code == 0, err
    told = json.loads(out)
    rows: list[dict[str, Any]] = told["entries"]
    assert told["bytes"] == sum(row["bytes"] for row in rows)
    return rows


def kinds_of(icdctl: CommandLine, *arguments: str) -> list[str]:
    return [row["kind"] for row in listed(icdctl, *arguments)]


def cleaned(icdctl: CommandLine, *arguments: str) -> dict[str, Any]:
    code, out, err = icdctl("clean", "--json", *arguments)
    assert code == 0, err
    told: dict[str, Any] = json.loads(out)
    assert told["bytes"] == sum(row["bytes"] for row in told["freed"])
    return told


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def train(out: str, **changes: Any) -> Path:
    return library.train(model="res8", **{**DIGITS, **changes}, out=out).out


def test_nothing_is_kept_before_the_first_run(icdctl: CommandLine, state: Path) -> None:
    code, out, err = icdctl("clean", "--list")
    assert (code, out, "holds nothing to delete" in err) == (0, "", True)
    assert cleaned(icdctl) == {"dry_run": False, "freed": [], "bytes": 0, "in_use": []}
    assert not state.exists()


def test_what_runs_keep_is_listed_and_freed_but_for_their_states(
    icdctl: CommandLine, state: Path, photos: Path
) -> None:
    train("teacher")
    given = {**DIGITS, **ANSWERS, "method": "kd", "teacher": "teacher", "student": "res8"}
    library.distill(**given, out="student")
    library.train(model="res8", dataset=f"imagefolder:{photos}", epochs=1, batch_size=8, device="cpu", out="photos-run")
    first = Path("student/student.safetensors").read_bytes()
    found = listed(icdctl)
    by_kind = {kind: [row for row in found if row["kind"] == kind] for kind in KINDS}
    assert {kind: len(rows) for kind, rows in by_kind.items() if rows} == {"images": 3, "answers": 1, "finished": 3}
    assert by_kind["answers"][0]["of"] == "res8 on digits100"
    assert sorted({row["of"] for row in by_kind["images"]}) == sorted([str(photos), "digits100"])
    assert {Path(row["of"]).name for row in by_kind["finished"]} == {"teacher", "student", "photos-run"}
    assert not any(row["in_use"] for row in found)
    text = icdctl("clean", "--list")[1]
    assert len(text.splitlines()) == 1 + len(found)

    before = size_of(state)
    dry = cleaned(icdctl, "--dry-run")
    assert ({row["kind"] for row in dry["freed"]}, size_of(state)) == ({"images", "answers"}, before)
    done = cleaned(icdctl)
    assert (done["freed"], done["bytes"]) == (dry["freed"], before - size_of(state))
    assert done["bytes"] == sum(row["bytes"] for row in found if row["kind"] in CACHES)
    assert kinds_of(icdctl) == ["finished"] * 3
    assert cleaned(icdctl)["freed"] == []
    shutil.rmtree("student")
    (state_of_student,) = [row for row in listed(icdctl) if row["of"].endswith("student")]
    assert (state_of_student["kind"], state_of_student["note"]) == ("resume", "finished, its run folder is gone")
    library.distill(**given, out="student", resume=True)  # as a pipeline that deleted its outputs
    assert Path("student/student.safetensors").read_bytes() == first
    assert cleaned(icdctl, "--kind", "finished")["freed"] != []
    library.distill(**given, out="student-again")  # everything is made anew, to the same result
    assert Path("student-again/student.safetensors").read_bytes() == first
    assert kinds_of(icdctl) == ["images", "answers", "finished"]


def test_numbers_of_a_report_are_shown_together_and_measured_again(icdctl: CommandLine) -> None:
    train("runs/a/s0")
    train("runs/a/s1", seed=1)
    given = ("report", "runs/a", "--out", "page", "--device", "cpu")
    assert icdctl(*given)[0] == 0
    kept = listed(icdctl, "--kind", "numbers")
    assert sorted(row["note"] for row in kept) == ["evaluated", "evaluated", "latency"]
    lines = icdctl("clean", "--list", "--kind", "numbers")[1].splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["numbers", "evaluated"], ["numbers", "latency"]]
    assert len(cleaned(icdctl, "--kind", "numbers")["freed"]) == 3
    assert icdctl(*given)[0] == 0
    assert len(listed(icdctl, "--kind", "numbers")) == 3


def test_the_state_of_an_unfinished_run_goes_only_where_it_is_named(icdctl: CommandLine) -> None:
    given: dict[str, Any] = {"epochs": 3}
    train("run", **given, time_limit="0.001s")
    (row,) = listed(icdctl, "--kind", "resume")
    assert (row["note"], Path(row["of"])) == ("epoch 1 of 3", Path("run").absolute())
    for kind in (kind for kind in KINDS if kind != "resume"):
        cleaned(icdctl, "--kind", kind)
    assert [row["note"] for row in listed(icdctl)] == ["epoch 1 of 3"]
    assert len(cleaned(icdctl, "--kind", "resume", "--dry-run")["freed"]) == 1
    train("run", **given, time_limit="0.001s", resume=True)
    assert [row["note"] for row in listed(icdctl, "--kind", "resume")] == ["epoch 2 of 3"]
    code, out, err = icdctl("clean", "--kind", "resume")
    assert (code, "epoch 2 of 3" in out, "freed" in err) == (0, True, True)
    assert listed(icdctl, "--kind", "resume") == []
    history = Path("run/history.csv").read_text()
    with pytest.raises(ArtifactError, match="the state of the run in `run` is lost: it stopped after epoch 2"):
        train("run", **given, resume=True)
    assert Path("run/history.csv").read_text() == history


def test_a_finished_run_without_its_state_stays_whole_where_it_is_interrupted(
    icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("run")
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    cleaned(icdctl, "--kind", "finished")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("icdctl.engine.run._Session._train_all", interrupted)
        given = [f"--{key.replace('_', '-')}={value}" for key, value in DIGITS.items()]
        assert icdctl("train", "--model", "res8", *given, "--out", "run", "--resume")[0] == 130
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()}.keys() == before.keys()
    assert Path("run/student.safetensors").read_bytes() == before["student.safetensors"]


def test_what_a_running_process_uses_is_left(icdctl: CommandLine, photos: Path) -> None:
    given = ("--dataset", f"imagefolder:{photos}", "--device", "cpu", "--batch-size", "8", "--set", "crop_scale=none")
    train_teacher = ("train", "--model", "res8", *given, "--epochs", "1", "--out", "teacher")
    assert icdctl(*train_teacher)[0] == 0
    student = ("--method", "kd", "--teacher", "teacher", "--student", "res8", "--set", "crop_padding=8")
    cached = ("--teacher-mode", "cache", "--teacher-precision", "fp32", "--epochs", "5000", "--out", "run")
    every = [part for kind in KINDS for part in ("--kind", kind)]
    with started("distill", *given, *student, *cached) as running:
        wait_until(Path("run/history.csv").exists, what="the first epoch")
        in_use = sorted((row["kind"], row["in_use"]) for row in listed(icdctl))
        assert in_use == [("answers", True), ("finished", False), ("images", True), ("images", True), ("resume", True)]
        code, _, err = icdctl("clean")
        assert (code, err.count("kept, because a process uses it")) == (0, 3)
        told = cleaned(icdctl, *every)
        assert [row["kind"] for row in told["freed"]] == ["finished"]
        assert sorted(row["kind"] for row in told["in_use"]) == ["answers", "images", "images", "resume"]
        epochs = len(Path("run/history.csv").read_text().splitlines())
        wait_until(lambda: len(Path("run/history.csv").read_text().splitlines()) > epochs + 1, what="two more epochs")
        assert running.process.poll() is None
    assert not any(row["in_use"] for row in listed(icdctl))
    assert sorted(row["kind"] for row in cleaned(icdctl, *every)["freed"]) == ["answers", "images", "images", "resume"]
    assert listed(icdctl) == []


LOAD = """
import sys, time
from icdctl import data
from icdctl.config.dataset_request import dataset_request
found = set()
for _ in range(40):
    held = data.load(dataset_request("imagefolder:" + sys.argv[1], image_size=32, test_split=0.25))
    found.add((held.sha256, int(held.train_images.sum())))
    held = None
    time.sleep(0.005)
print(len(found))
"""


def test_processes_that_read_do_not_notice_what_is_deleted(photos: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", LOAD, str(photos)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    freed = 0
    while any(process.poll() is None for process in processes):
        done = cleanup.clean(cleanup.chosen([], None, among=cleanup.entries()))
        assert done.failed == ()
        freed += len(done.freed)
        time.sleep(0.02)
    assert [(process.communicate()[0], process.returncode) for process in processes] == [("1\n", 0)] * 2
    assert freed > 2


def age(path: Path, days: float) -> None:
    for file in (path, *path.rglob("*")):
        os.utime(file, (time.time() - days * 86400,) * 2)


def test_age_is_counted_from_the_last_use(icdctl: CommandLine, state: Path, photos: Path) -> None:
    given: dict[str, Any] = {"dataset": f"imagefolder:{photos}", "epochs": 1, "batch_size": 8, "device": "cpu"}
    library.train(model="res8", **given, out="first")
    train("digits")
    age(state / "cache", 40)
    assert [row["kind"] for row in listed(icdctl, "--older-than", "30d")] == ["images"] * 3
    assert cleaned(icdctl, "--older-than", "41d")["freed"] == []
    library.train(model="res8", **given, out="second")  # reads the photos
    assert [row["of"] for row in cleaned(icdctl, "--older-than", "30d")["freed"]] == ["digits100"]
    assert "40 days ago" not in icdctl("clean", "--list", "--kind", "images")[1]
    age(state / "cache", 40)
    train("digits-again")
    assert len(cleaned(icdctl, "--older-than", "5w")["freed"]) == 2
    assert kinds_of(icdctl) == ["images", *["finished"] * 4]


def test_what_killed_processes_left_goes(icdctl: CommandLine, state: Path) -> None:
    train("run")
    images, answers = state / "cache" / "images", state / "cache" / "answers"
    (run_state,) = (state / "checkpoints").iterdir()
    for path in (
        images / ".cub-0123.part",
        answers / ".4567.part" / "logits.npy",
        run_state / ".state.safetensors.ab12cd_9",
        state / "cache" / ".trash-77-abcd" / "digits100.safetensors",
    ):
        files.write_bytes(path, b"x" * 1000)
    files.write_bytes(run_state / ".state.safetensors.young_00", b"x")
    age(run_state / ".state.safetensors.ab12cd_9", 2)
    assert [row["bytes"] for row in listed(icdctl, "--kind", "remains")] == [1000] * 4
    with files.waited_lock(images / ".cub-0123.lock"):  # one is still at work
        told = cleaned(icdctl, "--kind", "remains")
        assert ([row["name"] for row in told["in_use"]], told["bytes"]) == ([".cub-0123.part"], 3000)
    assert cleaned(icdctl, "--kind", "remains")["bytes"] == 1000
    assert sorted(path.name for path in run_state.iterdir()) == [".state.safetensors.young_00", "state.safetensors"]
    assert not list(state.rglob(".trash*"))
    assert kinds_of(icdctl) == ["images", "finished"]


def test_a_download_that_was_cut_is_shown_as_such(icdctl: CommandLine, state: Path) -> None:
    home = state / "cache" / "teachers"
    for name in (".a.pth.part", ".a.pth.part.json", "archive.tar", ".archive.tar.lock"):
        files.write_bytes(home / name, b"123")
    found = listed(icdctl)
    assert [(row["kind"], row["name"], row["bytes"], row["note"]) for row in found] == [
        ("downloads", "a.pth", 6, "interrupted; the next download continues it"),
        ("downloads", "archive.tar", 3, ""),
    ]
    with files.waited_lock(home / ".a.pth.lock"):
        assert [row["name"] for row in cleaned(icdctl)["freed"]] == ["archive.tar"]
    assert [row["name"] for row in cleaned(icdctl)["freed"]] == ["a.pth"]


def without_its_run(path: Path) -> None:
    with safe_open(path, framework="pt") as stored:
        said = stored.metadata()
    save_file(load_file(path), path, {key: value for key, value in said.items() if key != "config"})


@pytest.mark.parametrize(
    ("change", "note"), [(without_its_run, "finished"), (lambda path: path.write_bytes(b"no state"), "can't be read")]
)
def test_a_state_that_names_no_run_is_kept_while_any_run_goes_on(
    icdctl: CommandLine, state: Path, change: Callable[[Path], None], note: str
) -> None:
    out = train("run")
    (path,) = (state / "checkpoints").glob("*/state.safetensors")
    change(path)
    (row,) = listed(icdctl, "--kind", "resume")
    assert (note in row["note"], row["of"]) == (True, "")
    other = files.sha256_bytes(str(out.with_name("other").resolve()).encode())[:20]
    with files.locked(state / "locks" / f"{other}.lock", busy="", hint=""):
        assert len(cleaned(icdctl, "--kind", "resume")["in_use"]) == 1
    assert len(cleaned(icdctl, "--kind", "resume")["freed"]) == 1
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clean", "--kind", "image"), "did you mean `images`?"),
        (("clean", "--list", "--kind", "all"), "unknown kind `all`"),
        (("clean", "--older-than", "soon"), "`--older-than soon` is not an age"),
        (("clean", "--older-than", "-1d"), "is not an age"),
    ],
)
def test_what_can_not_be_meant_is_told(icdctl: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    train("run")
    code, out, err = icdctl(*arguments)
    assert (code, out, message in err) == (2, "", True), err
    assert kinds_of(icdctl) == ["images", "finished"]


def test_who_looks_at_a_lock_for_a_moment_stops_nobody(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.touch()

    def look() -> None:
        with files.unless_locked(path) as is_free:
            assert is_free
            looking.set()
            time.sleep(0.2)

    looking = threading.Event()
    thread = threading.Thread(target=look)
    thread.start()
    looking.wait()
    with files.locked(path, busy="busy", hint=""):
        pass
    thread.join()


def test_two_do_not_clean_at_once(icdctl: CommandLine, state: Path) -> None:
    train("run")
    with files.locked(state / "locks" / "cache.lock", busy="", hint=""):
        code, _, err = icdctl("clean")
    assert (code, "another process is cleaning the caches" in err) == (1, True)
    assert kinds_of(icdctl) == ["images", "finished"]


def test_doctor_says_how_much_there_is(icdctl: CommandLine, state: Path) -> None:
    files.write_bytes(state / "cache" / "teachers" / "archive.tar", bytes(10**6))
    with (state / "cache" / "teachers" / "archive.tar").open("r+b") as file:
        file.truncate(2_340_000_000)
    checks = json.loads(icdctl("doctor", "--json")[1])["checks"]
    (found,) = [check["found"] for check in checks if check["what"] == "state"]
    assert "2.3 GB in caches and states of runs" in found
