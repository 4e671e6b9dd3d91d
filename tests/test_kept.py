"""What is kept is what was written: a changed number of a run, version or report is refused, and says what to do."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine

import icdctl as library
from icdctl import files, run_files
from icdctl.config.declare import Identity
from icdctl.config.lookup import names_in_identity
from icdctl.errors import ArtifactError
from icdctl.grid.cells import GridCell, GridRun

SMALL: dict[str, Any] = {"dataset": "digits100", "train_images": 200, "test_images": 100, "device": "cpu"}
HASHES = (run_files.METRICS_HASH_KEY, run_files.HISTORY_HASH_KEY, run_files.CONFIG_HASH_KEY, run_files.HASH_KEY)
TIMES = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `run`, a finished run of two epochs, and `state`, its state folder."""
    here = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("ICDCTL_HOME", str(here / "state"))
        library.train(model="res8", **SMALL, epochs=2, out="run")
        yield here


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run in a project of its own."""
    (tmp_path / "registry").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ICDCTL_HOME", str(tmp_path / "state"))
    return Path(shutil.copytree(finished / "run", tmp_path / "run")).relative_to(tmp_path)


def read(path: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return held


def other(value: object) -> object:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case list():
            return [*value, 1]
        case dict():
            return {**value, "x": 1}
    return "x"


def check(run: Path) -> None:
    run_files.check_numbers(run, read(run / "metrics.json"))


def assert_refused(run: Path, changed: str) -> None:
    with pytest.raises(ArtifactError, match=r"has changed since (its|the) run wrote it") as caught:
        check(run)
    assert changed in caught.value.message
    assert f"--resume --out {run}" in caught.value.hint


# --- a run's numbers ---


def test_each_changed_value_of_the_metrics_is_refused(run: Path) -> None:
    check(run)
    whole = read(run / "metrics.json")
    for key in whole.keys() - {run_files.HASH_KEY}:  # that hash is compared with the weights
        files.write_json(run / "metrics.json", {**whole, key: other(whole[key])})
        assert_refused(run, "metrics.json")
    files.write_json(run / "metrics.json", {**whole, "more": 1})
    assert_refused(run, "metrics.json")


def test_each_changed_value_of_the_history_is_refused(run: Path) -> None:
    path = run / "history.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, key in ((number, key) for number in range(2) for key in rows[0]):
        changed = [{**row, key: f"{float(row[key]) + 1}"} if at == number else row for at, row in enumerate(rows)]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(changed)
        assert_refused(run, "history.csv")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert_refused(run, "history.csv")
    path.unlink()
    with pytest.raises(ArtifactError, match=r"history\.csv` can't be read"):
        check(run)


def test_each_changed_setting_of_the_result_is_refused_and_a_moved_run_is_not(run: Path) -> None:
    whole = read(run / "config.json")
    for key in whole:
        files.write_json(run / "config.json", {**whole, key: other(whole[key])})
        if key in run_files.NOT_OF_THE_RESULT:
            check(run)
        else:
            assert_refused(run, "config.json")
    assert set(run_files.NOT_OF_THE_RESULT) == {"out", *names_in_identity(Identity.NEVER)}


def test_the_same_command_gives_the_same_hashes(finished: Path, run: Path) -> None:
    again = library.train(model="res8", **SMALL, epochs=2, out="again").metrics
    first = read(run / "metrics.json")
    assert {key: value for key, value in again.items() if key not in TIMES} == {
        key: value for key, value in first.items() if key not in TIMES
    }
    assert all(len(first[key]) == 64 for key in HASHES)


def fails(done: tuple[int, str, str]) -> str:
    code, out, err = done
    assert (code, "Traceback" in err) == (1, False), err
    assert "hint:" in err
    return out + err


@pytest.mark.parametrize(
    "command",
    [("registry", "add", "run"), ("report", "run", "--no-latency"), ("validate", "run"), ("export", "run")],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("file", ["metrics.json", "history.csv", "config.json"])
def test_commands_refuse_a_run_with_a_changed_number(
    icdctl: CommandLine, run: Path, command: tuple[str, ...], file: str
) -> None:
    if file == "history.csv":
        (run / file).write_text((run / file).read_text().replace("\n1,", "\n1.0,"))
    else:
        key = "final_top5" if file == "metrics.json" else "seed"
        files.write_json(run / file, {**read(run / file), key: 3})
    said = fails(icdctl(*command))
    assert f"`run/{file}` has changed since its run wrote it" in said
    assert not list(Path("registry").iterdir())
    assert not (run / "onnx").exists()


def test_a_grid_refuses_the_number_of_a_changed_run(run: Path) -> None:
    done = GridRun(GridCell("c", {}, "ce"), 0, run)
    assert done.metrics() == read(run / "metrics.json")
    files.write_json(run / "metrics.json", {**read(run / "metrics.json"), "final_top1": 99.0})
    with pytest.raises(ArtifactError, match="has changed since"):
        done.metrics()


def test_the_run_writes_a_changed_file_again(
    icdctl: CommandLine, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setenv("ICDCTL_HOME", str(finished / "state"))
    before = {name: Path("run", name).read_bytes() for name in ("metrics.json", "history.csv", "student.safetensors")}
    files.write_json(Path("run/metrics.json"), {**read(Path("run/metrics.json")), "final_top1": 99.0})
    assert library.train(model="res8", **SMALL, epochs=2, out="run", resume=True).finished
    assert {name: Path("run", name).read_bytes() for name in before} == before


def without_hashes(run: Path) -> dict[str, Any]:
    """Make a run one of the version that wrote the hash of the weights alone."""
    whole = read(run / "metrics.json")
    kept = {key: value for key, value in whole.items() if key not in HASHES[:3]}
    files.write_json(run / "metrics.json", kept)
    return kept


def test_a_run_without_hashes_is_read_and_says_so_and_its_accuracy_is_compared(icdctl: CommandLine, run: Path) -> None:
    held = without_hashes(run)
    assert icdctl("registry", "add", "run")[0] == 0
    code, out, _ = icdctl("report", "run", "--out", "page", "--no-latency", "--json")
    (note,) = json.loads(out)["notes"]
    assert (code, "1 of 1 runs have no hashes" in note, "run" in note) == (0, True, True)
    code, out, _ = icdctl("validate", "run")
    assert (code, "an earlier version of icdctl wrote no hashes" in out) == (0, True)
    files.write_json(run / "metrics.json", {**held, "final_top1": 99.0})
    said = fails(icdctl("registry", "add", "run", "--name", "again"))
    assert "`run/metrics.json` states final_top1 99.0, `run/history.csv` ends with test_top1" in said
