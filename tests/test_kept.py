"""What is kept is what was written: a changed number of a run, version or report is refused, and says what to do."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine

import icdctl as library
from icdctl import data, files, registry, run_files
from icdctl.config.dataset_request import dataset_request
from icdctl.config.declare import Identity
from icdctl.config.lookup import names_in_identity
from icdctl.engine.observer import SilentObserver
from icdctl.errors import ArtifactError
from icdctl.grid.cells import GridCell, GridRun
from icdctl.registry import Artifact, trained
from icdctl.reporting import measure

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


# --- registered versions ---


def edit(path: Path, **changes: Any) -> None:
    files.write_json(path, {**read(path), **changes})


def as_an_earlier_version(artifact: Artifact) -> None:
    """Make a version one that was registered before manifests had hashes."""
    held = read(artifact.folder / "manifest.json")
    kept = {key: value for key, value in held.items() if key not in ("sha256", "card_sha256", "serial")}
    files.write_json(artifact.folder / "manifest.json", kept)


def test_each_changed_entry_of_a_manifest_is_refused(icdctl: CommandLine, run: Path) -> None:
    path = registry.add(Path("registry"), run).folder / "manifest.json"
    whole = read(path)
    for key in whole.keys() - {"created"}:
        files.write_json(path, {**whole, key: other(whole[key]) if key != "files" else {**whole["files"]} | FORGED})
        with pytest.raises(ArtifactError, match=r"manifest `.*` (has changed since|is broken|has schema)"):
            registry.list_artifacts(Path("registry"))
    edit(path, **{**whole, "metrics": {**whole["metrics"], "final_top1": 99.0}})
    for command in (("list",), ("show", "res8-ce"), ("verify",), ("add", "run")):
        said = fails(icdctl("registry", *command))
        assert "has changed since it was registered" in said
        assert "git checkout" in said
    assert "99.00" not in said
    files.write_json(path, {**whole, "created": "2001-01-01T00:00:00.000Z"})
    (finding,) = registry.verify(Path("registry"))
    assert ["says that it was registered at 2001" in problem for problem in finding.problems] == [True]


FORGED = {"environment.json": {"sha256": "0" * 64, "bytes": 3}}


def test_a_changed_card_is_refused_by_verify_and_named_by_show(icdctl: CommandLine, run: Path) -> None:
    card = registry.add(Path("registry"), run).folder / "card.md"
    text = card.read_text()
    top1 = f"**{read(run / 'metrics.json')['final_top1']:.2f} %**"
    card.write_text(text.replace(top1, "**99.00 %**"))
    assert "`card.md` has changed since it was registered" in fails(icdctl("registry", "verify"))
    code, out, err = icdctl("registry", "show", "res8-ce")
    assert (code, top1 in out, "99.00" in out, "warning: `card.md` has changed" in err) == (0, True, False, True)
    card.unlink()
    assert "`card.md` is missing" in fails(icdctl("registry", "verify"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("metrics", {"final_top1": 99.0}),
        ("seed", 7),
        ("settings", {"variant": "paper"}),
        ("versions", {"torch": "1.0"}),
        ("epochs", 240),
        ("model", "res20"),
        ("variant", "paper"),
    ],
)
def test_a_manifest_without_a_hash_is_compared_with_the_files_of_its_version(run: Path, key: str, value: Any) -> None:
    artifact = registry.add(Path("registry"), run)
    as_an_earlier_version(artifact)
    (finding,) = registry.verify(Path("registry"))
    assert (finding.sound, finding.notes) == (True, (UNHASHED,))
    edit(artifact.folder / "manifest.json", **{key: value})
    (finding,) = registry.verify(Path("registry"))
    assert finding.problems == (f"the manifest contradicts the registered files: `{key}`",)
    assert finding.notes == (UNHASHED, "`card.md` is not what this version of icdctl writes for its manifest")


UNHASHED = "an earlier version of icdctl registered it, without hashes of manifest and card"


def test_a_wrong_size_in_a_manifest_is_found(run: Path) -> None:
    artifact = registry.add(Path("registry"), run)
    as_an_earlier_version(artifact)
    held = read(artifact.folder / "manifest.json")["files"]
    held["history.csv"]["bytes"] += 1
    edit(artifact.folder / "manifest.json", files=held)
    (finding,) = registry.verify(Path("registry"))
    assert ["says that `history.csv` has" in problem for problem in finding.problems] == [True]


# --- the newest ---


def registered(run: Path, seed: int, name: str | None = None) -> Artifact:
    """A version of its own for each seed."""
    copy = Path(shutil.copytree(run, f"run-{seed}"))
    edit(copy / "config.json", seed=seed)
    kept = {key: value for key, value in read(copy / "metrics.json").items() if key not in HASHES[:3]}
    files.write_json(copy / "metrics.json", kept | run_files.hashes(copy, kept))
    return registry.add(Path("registry"), copy, name=name)


def backwards(artifacts: list[Artifact]) -> None:
    """Make each version's time earlier than that of the one before."""
    for number, artifact in enumerate(artifacts):
        edit(artifact.folder / "manifest.json", created=f"20{99 - number}-01-01T00:00:00.000Z")


def newest_teacher() -> str:
    found = registry.find_teacher(Path("registry"), model="res8", dataset="digits100")
    assert found is not None
    return found.reference


def test_the_newest_is_the_highest_version_whatever_the_clock_says(run: Path) -> None:
    backwards([registered(run, seed) for seed in range(11)])
    assert newest_teacher() == registry.find(Path("registry"), "res8-ce").reference == "digits100/res8-ce@v11"


def test_between_names_the_newest_is_the_one_that_was_registered_last(run: Path) -> None:
    names = ["b", "a", "a", "b", "c", "a"]
    made = [registered(run, seed, name) for seed, name in enumerate(names)]
    assert [artifact.manifest.serial for artifact in made] == [1, 2, 3, 4, 5, 6]
    backwards(made)
    assert newest_teacher() == "digits100/a@v3"
    for artifact in made:
        as_an_earlier_version(artifact)
    assert newest_teacher() == "digits100/b@v2"  # only the clock is left between names, and it went backwards
    assert registered(run, 7, "c").manifest.serial == 1
    assert newest_teacher() == "digits100/c@v2"


# --- a kill between a version and its tracking ---


@pytest.fixture
def dvc_project(run: Path) -> Path:
    """DVC, without git, in the run's project."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--no-scm", "-q"],
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return run


def test_an_add_that_was_killed_before_dvc_knew_it_is_completed_by_the_next(
    icdctl: CommandLine, dvc_project: Path
) -> None:
    artifact = registry.add(Path("registry"), dvc_project)
    tracked = artifact.folder / "files.dvc"
    content = tracked.read_bytes()
    assert registry.verify(Path("registry"))[0].notes == ()
    tracked.unlink()
    (finding,) = registry.verify(Path("registry"), artifact.reference)
    assert (finding.sound, "DVC does not track its files" in finding.notes[0]) == (True, True)
    code, out, err = icdctl("registry", "add", "run")
    assert (code, out) == (0, f"{artifact.reference}\n")
    assert "its registration was interrupted before DVC tracked the files" in err
    assert tracked.read_bytes() == content
    assert "registered already" in fails(icdctl("registry", "add", "run"))


# --- kept numbers of reports ---


def measured(run: Path, said: list[str]) -> tuple[float, float]:
    """The calibration error and the latency of a run's model, as a report takes them: measured, or kept by another."""
    found = trained.resolve(str(run))
    dataset = data.load(dataset_request("digits100", test_images=100, train_images=200))
    measurer = measure.ModelMeasurer(dataset, torch.device("cpu"), SilentObserver(), said.append)
    return measurer.measure(found, teacher=None).numbers.ece, measure.latency_ms(found, "a cpu", said.append)


def test_a_kept_number_that_has_changed_is_measured_again(run: Path) -> None:
    said: list[str] = []
    first = measured(run, said)
    assert (measured(run, said), said) == (first, [])
    evaluated, latency = (next(Path("state/cache", kind).iterdir()) for kind in ("evaluated", "latency"))
    numbers = read(evaluated)["numbers"]
    for path, change in (
        (evaluated, {"numbers": {**numbers, "ece": 77.77}}),
        (evaluated, {"of": {"weights": "others"}}),
        (latency, {"ms": 77.77}),
    ):
        edit(path, **change)
        assert 77.77 not in measured(run, said)
        line = f"`{path.absolute()}` has changed since a report kept it there: its numbers were measured again"
        assert (said.pop(), "77.77" in path.read_text()) == (line, False)
    assert (read(evaluated)["numbers"], said) == (numbers, [])

    for damaged in ({**numbers, "per_class": [1.0]}, {**numbers, "reliability": [""] * 15}):
        unchecked = {key: value for key, value in read(evaluated).items() if key != "sha256"}  # absent: not checked
        files.write_json(evaluated, {**unchecked, "numbers": damaged})
        assert measured(run, [])[0] == first[0]
        assert read(evaluated)["numbers"] == numbers

    files.write_json(latency, {"ms": 12.25, "of": read(latency)["of"]})  # as an earlier version kept it
    assert measured(run, said)[1] == 12.25
    assert ["kept numbers without hashes, which were not checked" in line for line in said] == [True]
