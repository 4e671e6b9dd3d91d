"""The registry: what is added comes back whole under a number of its own, and what has changed is found out."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from icdctl import files, registry
from icdctl.errors import ArtifactError, UsageError

DATASET_SHA256 = "d" * 64
COMMIT = "c" * 40
RUN_FILES = ["config.json", "environment.json", "history.csv", "metrics.json", "student.safetensors"]


MakeRun = Callable[..., Path]
MakeExport = Callable[[Path], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A finished run folder, as `icdctl train` and `icdctl distill` leave them; `weight` makes its weights its own."""

    def make(weight: float = 1.0, *, metrics: dict[str, Any] | None = None, **config: Any) -> Path:
        run = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        run.mkdir()
        save_file({"head.weight": np.full((100, 8), weight, np.float32)}, run / "student.safetensors")
        resolved: dict[str, Any] = {
            "command": "distill",
            "method": "cd_sdd_dkd",
            "dataset": "digits100",
            "student": "res8",
            "teacher": "res32",
            "teacher_weights": "teacher.safetensors",
            "teacher_sha256": "e" * 64,
            "scales": [1, 2, 4],
            "seed": 3,
            "epochs": 20,
            "settings": {"temperature": 4.0, "variant": "paper"},
            "recipe": "digits100",
            "out": str(run),
        }
        files.write_json(run / "config.json", resolved | config)
        numbers: dict[str, Any] = {
            "final_top1": 71.25,
            "final_top5": 92.5,
            "best_top1": 71.75,
            "best_epoch": 18,
            "epochs": 20,
            "seconds": 12.5,
            "params": 83_364,
            "variant": "paper",
            "dataset_sha256": DATASET_SHA256,
        }
        files.write_json(run / "metrics.json", numbers | (metrics or {}))
        environment = {
            "versions": {"python": "3.11.9", "dvc": None},
            "device": {"type": "cpu"},
            "git": {"commit": COMMIT, "dirty": True},
            "command_line": ["icdctl", "distill"],
        }
        files.write_json(run / "environment.json", environment)
        files.write_text(run / "history.csv", "epoch,lr,test_top1\n1,0.05,71.25\n")
        return run

    return make


@pytest.fixture
def make_teacher(make_run: MakeRun) -> MakeRun:
    """A finished run without a teacher."""

    def make(weight: float = 1.0, **config: Any) -> Path:
        facts = {"command": "train", "method": "ce", "student": "res32", "teacher": None, "teacher_sha256": None}
        return make_run(weight, **(facts | {"settings": {}} | config))

    return make


@pytest.fixture
def make_export(tmp_path: Path) -> MakeExport:
    """An export folder of a run, as `icdctl export` leaves it, its models shortened to a few bytes."""

    def make(run: Path) -> Path:
        made = tmp_path / "export"
        for name in ("model.onnx", "model.fp16.onnx", "README.md"):
            files.write_text(made / name, name)
        weights = files.sha256_file(run / "student.safetensors")
        files.write_json(made / "model.json", {"weights_sha256": weights, "opset": 18})
        verdict = {"passed": True, "max_error": 2e-6, "tolerance": 1e-5, "agreement": 100.0, "checks": []}
        files.write_json(made / "verify.json", verdict)
        list_export(made)
        files.write_text(made / ".hidden", "not registered")
        return made

    return make


def list_export(folder: Path) -> None:
    """Write the manifest of an export folder."""
    paths = sorted(path for path in folder.glob("[!.]*") if path.name != "manifest.json")
    rows = {path.name: {"sha256": files.sha256_file(path), "bytes": path.stat().st_size} for path in paths}
    files.write_json(folder / "manifest.json", {"schema": "icdctl-export/1", "files": rows})


def edit(path: Path, **values: Any) -> None:
    """Change keys of a JSON file."""
    files.write_json(path, json.loads(path.read_text()) | values)


# --- adding ---


def test_a_version_holds_manifest_card_and_copies_of_the_run(folder: Path, make_run: MakeRun) -> None:
    run = make_run()

    artifact = registry.add(folder, run)

    assert artifact.reference == "digits100/res8-cd_sdd_dkd@v1"
    assert artifact.folder == folder / "digits100" / "res8-cd_sdd_dkd" / "v1"
    assert sorted(path.name for path in artifact.folder.iterdir()) == ["card.md", "files", "manifest.json"]
    assert sorted(path.name for path in artifact.folder.parent.iterdir()) == ["v1"]
    for name in RUN_FILES:
        assert artifact.file(name).read_bytes() == (run / name).read_bytes()


def test_the_manifest_says_what_the_run_was(folder: Path, make_run: MakeRun) -> None:
    artifact = registry.add(folder, make_run())

    held = json.loads((artifact.folder / "manifest.json").read_text())
    assert held == artifact.manifest.as_json()
    assert held.pop("files").keys() == set(RUN_FILES)
    assert held.pop("metrics")["best_epoch"] == 18
    assert held.pop("created").endswith("Z")
    assert held.pop("card_sha256") == files.sha256_file(artifact.folder / "card.md")
    assert len(held.pop("sha256")) == 64
    dataset = held.pop("dataset")
    assert (dataset["name"], dataset["sha256"]) == ("digits100", DATASET_SHA256)
    assert dataset["source"]
    assert dataset["licence"]
    assert held == {
        "schema": 1,
        "name": "digits100/res8-cd_sdd_dkd",
        "version": 1,
        "serial": 1,
        "model": "res8",
        "method": "cd_sdd_dkd",
        "variant": "paper",
        "teacher": {"model": "res32", "sha256": "e" * 64, "artifact": None, "source": None, "licence": None},
        "scales": [1, 2, 4],
        "seed": 3,
        "settings": {"temperature": 4.0, "variant": "paper"},
        "recipe": "digits100",
        "epochs": 20,
        "onnx": None,
        "git": {"commit": COMMIT, "dirty": True},
        "versions": {"python": "3.11.9", "dvc": None},
    }


def test_hashes_and_sizes_are_those_of_the_files(folder: Path, make_run: MakeRun) -> None:
    artifact = registry.add(folder, make_run())

    for name, record in artifact.manifest.files.items():
        path = artifact.folder / "files" / name
        assert (record.sha256, record.bytes) == (files.sha256_file(path), path.stat().st_size)


def test_an_export_is_registered_below_onnx_with_its_verdict(
    folder: Path, make_run: MakeRun, make_export: MakeExport
) -> None:
    run = make_run()

    artifact = registry.add(folder, run, export_folder=make_export(run))

    onnx = {name for name in artifact.manifest.files if name.startswith("onnx/")}
    expected = {"model.onnx", "model.fp16.onnx", "model.json", "verify.json", "README.md", "manifest.json"}
    assert onnx == {f"onnx/{name}" for name in expected}
    assert artifact.manifest.onnx is not None
    verdict = {"passed": True, "max_error": 2e-6, "tolerance": 1e-5, "agreement": 100.0}
    assert artifact.manifest.onnx.model_dump() == verdict
    assert artifact.file("onnx/model.onnx").read_text() == "model.onnx"


@pytest.mark.parametrize("broken", [{"max_error": "small"}, {"passed": None}])
def test_an_export_without_a_verdict_is_refused(
    folder: Path, make_run: MakeRun, make_export: MakeExport, broken: dict[str, Any]
) -> None:
    run = make_run()
    export = make_export(run)
    edit(export / "verify.json", **broken)

    with pytest.raises(ArtifactError, match=r"verify\.json` is broken"):
        registry.add(folder, run, export_folder=export)
    assert not folder.exists()


def test_an_incomplete_export_is_refused(folder: Path, make_run: MakeRun, make_export: MakeExport) -> None:
    run = make_run()
    export = make_export(run)
    (export / "model.onnx").unlink()

    with pytest.raises(ArtifactError, match=r"is not an export: it has no `model\.onnx`"):
        registry.add(folder, run, export_folder=export)


def test_a_changed_export_is_refused(folder: Path, make_run: MakeRun, make_export: MakeExport) -> None:
    run = make_run()
    export = make_export(run)
    files.write_text(export / "model.onnx", "tampered")

    with pytest.raises(ArtifactError, match=r"model\.onnx` has changed since it was exported"):
        registry.add(folder, run, export_folder=export)
    assert registry.list_artifacts(folder) == []


def test_an_export_of_another_run_is_refused(folder: Path, make_run: MakeRun, make_export: MakeExport) -> None:
    export = make_export(make_run(1.0))

    with pytest.raises(ArtifactError, match="was made from other weights"):
        registry.add(folder, make_run(2.0), export_folder=export)
    assert not folder.exists()


def test_an_export_that_lists_files_elsewhere_is_refused(
    folder: Path, make_run: MakeRun, make_export: MakeExport
) -> None:
    run = make_run()
    export = make_export(run)
    held = json.loads((export / "manifest.json").read_text())["files"]
    edit(export / "manifest.json", files=held | {"../secret": held["model.onnx"]})

    with pytest.raises(ArtifactError, match=r"manifest\.json` is broken"):
        registry.add(folder, run, export_folder=export)
    assert not folder.exists()


def test_versions_count_up_within_a_name(folder: Path, make_run: MakeRun) -> None:
    first = registry.add(folder, make_run(1.0))
    second = registry.add(folder, make_run(2.0))
    other = registry.add(folder, make_run(1.0, method="kd"))

    assert [first.version, second.version, other.version] == [1, 2, 1]
    assert registry.list_artifacts(folder) == [first, second, other]


def test_a_run_is_one_version(folder: Path, make_run: MakeRun) -> None:
    run = make_run()
    registry.add(folder, run)

    with pytest.raises(ArtifactError, match="registered already, as `digits100/res8-cd_sdd_dkd@v1`") as caught:
        registry.add(folder, run)

    assert caught.value.hint == "`icdctl registry show digits100/res8-cd_sdd_dkd@v1` shows it"
    assert [path.name for path in (folder / "digits100" / "res8-cd_sdd_dkd").iterdir()] == ["v1"]


def test_a_run_comes_again_when_it_brings_its_export_or_goes_by_another_name(
    folder: Path, make_run: MakeRun, make_export: MakeExport
) -> None:
    run = make_run()
    export = make_export(run)
    registry.add(folder, run)

    assert registry.add(folder, run, export_folder=export).version == 2
    assert registry.add(folder, run, name="headline").reference == "digits100/headline@v1"
    with pytest.raises(ArtifactError, match="registered already, as `digits100/res8-cd_sdd_dkd@v2`"):
        registry.add(folder, run, export_folder=export)


def test_equal_weights_of_two_runs_are_two_versions(folder: Path, make_run: MakeRun) -> None:
    registry.add(folder, make_run())

    assert registry.add(folder, make_run(metrics={"seconds": 13.0})).version == 2


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"dataset": "imagefolder:/somewhere/My Birds"}, "imagefolder-my-birds/res8-cd_sdd_dkd"),
        ({"student": "timm:resnet10t.c3_in1k"}, "digits100/timm-resnet10t.c3_in1k-cd_sdd_dkd"),
        ({"student": "own.module:Net"}, "digits100/own.module-net-cd_sdd_dkd"),
    ],
)
def test_names_are_made_of_names_letters(folder: Path, make_run: MakeRun, config: dict[str, str], name: str) -> None:
    assert registry.add(folder, make_run(**config)).name == name


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/../b", "/a/b", "a/b/c", "a//b", "Res8/kd", "a b", ".new-1", "a/.new-1", "-a", "a/b@v1", "a\\b"],
)
def test_other_names_are_refused(folder: Path, make_run: MakeRun, name: str) -> None:
    with pytest.raises(UsageError, match="can't be the name of an artifact"):
        registry.add(folder, make_run(), name=name)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["student.safetensors", "metrics.json", "history.csv", "environment.json"])
def test_an_unfinished_run_is_refused(folder: Path, make_run: MakeRun, name: str) -> None:
    run = make_run()
    (run / name).unlink()

    with pytest.raises(ArtifactError, match=f"is not finished: it has no `{name}`") as caught:
        registry.add(folder, run)

    assert f"`--resume --out {run}`" in caught.value.hint
    assert not folder.exists()


def test_a_folder_that_is_no_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a run folder"):
        registry.add(folder, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", '{"method": "kd"', "can't be read"),
        ("config.json", '{"method": "kd"}', "`dataset`: Field required"),
        ("config.json", "[]", "is broken"),
        ("metrics.json", "{}", "`final_top1`: Field required"),
        ("metrics.json", '{"final_top1": NaN, "epochs": 1}', "not finite"),
        ("environment.json", "", "can't be read"),
        ("environment.json", '{"versions": {}, "git": {"commit": 1}}', r"`git\.commit`"),
        ("student.safetensors", "cut", "weights .* are broken"),
    ],
)
def test_a_broken_run_is_refused(folder: Path, make_run: MakeRun, name: str, content: str, reason: str) -> None:
    run = make_run()
    files.write_text(run / name, content)

    with pytest.raises(ArtifactError, match=reason):
        registry.add(folder, run)
    assert registry.list_artifacts(folder) == []
    assert not list(folder.rglob(".new-*"))


def test_weights_that_were_cut_off_are_refused(folder: Path, make_run: MakeRun) -> None:
    run = make_run()
    path = run / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ArtifactError, match="are broken"):
        registry.add(folder, run)


def test_a_run_outside_git_is_registered_without_a_commit(folder: Path, make_run: MakeRun) -> None:
    run = make_run()
    edit(run / "environment.json", git=None)

    assert registry.add(folder, run).manifest.git is None


def test_a_registry_that_can_not_be_written_is_a_known_failure(folder: Path, make_run: MakeRun) -> None:
    files.write_text(folder, "a file in the way")

    with pytest.raises(ArtifactError, match="can't be written"):
        registry.add(folder, make_run())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_registry_is_a_known_failure(folder: Path, make_run: MakeRun) -> None:
    folder.mkdir()
    folder.chmod(0o500)

    with pytest.raises(ArtifactError, match="can't be written"):
        registry.add(folder, make_run())


def test_an_interrupted_add_leaves_nothing(folder: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def interrupt_at_history(source: Path, target: Path) -> None:
        if source.name == "history.csv":
            raise KeyboardInterrupt
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", interrupt_at_history)
    with pytest.raises(KeyboardInterrupt):
        registry.add(folder, make_run())

    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert list((folder / "digits100" / "res8-cd_sdd_dkd").iterdir()) == []


def test_a_file_that_vanishes_on_the_way_is_named_and_nothing_is_left(
    folder: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def remove_history(source: Path, target: Path) -> None:
        if source.name == "history.csv":
            source.unlink()
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", remove_history)
    with pytest.raises(ArtifactError, match=r"history\.csv` can't be read"):
        registry.add(folder, make_run())

    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_what_a_killed_add_left_is_passed_over_and_in_the_end_removed(folder: Path, make_run: MakeRun) -> None:
    home = folder / "digits100" / "res8-cd_sdd_dkd"
    for name, hours in ((".new-1-old", 25), (".new-2-young", 1)):
        files.write_text(home / name / "manifest.json", "{")
        os.utime(home / name, (time.time() - hours * 3600,) * 2)

    assert registry.list_artifacts(folder) == []
    registry.add(folder, make_run())

    assert sorted(path.name for path in home.iterdir()) == [".new-2-young", "v1"]


def test_blobs_that_git_left_behind_are_no_version_and_are_not_overwritten(folder: Path, make_run: MakeRun) -> None:
    left = registry.add(folder, make_run(1.0)).folder
    for name in ("manifest.json", "card.md"):
        (left / name).unlink()

    assert registry.list_artifacts(folder) == []
    assert registry.add(folder, make_run(2.0)).version == 2
    assert (left / "files" / "student.safetensors").is_file()


# --- at the same time ---


def _add(arguments: tuple[Path, Path]) -> str:
    try:
        return registry.add(*arguments).reference
    except ArtifactError as error:
        return error.message


def _add_all(work: list[tuple[Path, Path]]) -> list[str]:
    pool = multiprocessing.get_context("fork").Pool(len(work))
    try:
        return pool.map(_add, work, chunksize=1)
    finally:
        pool.close()
        pool.join()


def test_24_adds_at_the_same_time_are_24_versions(folder: Path, make_run: MakeRun) -> None:
    runs = [make_run(float(index)) for index in range(24)]

    references = _add_all([(folder, run) for run in runs])

    assert sorted(references) == sorted(f"digits100/res8-cd_sdd_dkd@v{number}" for number in range(1, 25))
    for run, reference in zip(runs, references, strict=True):
        weights = registry.find(folder, reference).file("student.safetensors")
        assert weights.read_bytes() == (run / "student.safetensors").read_bytes()
    assert all(finding.sound and not finding.absent for finding in registry.verify(folder))
    assert not list(folder.rglob(".new-*"))


def test_one_run_added_8_times_at_the_same_time_is_one_version(folder: Path, make_run: MakeRun) -> None:
    run = make_run()

    answers = _add_all([(folder, run)] * 8)

    assert sorted(answers) == ["digits100/res8-cd_sdd_dkd@v1"] + 7 * [
        "this run is registered already, as `digits100/res8-cd_sdd_dkd@v1`"
    ]
    assert [artifact.version for artifact in registry.list_artifacts(folder)] == [1]


# --- finding ---


def test_a_name_is_its_newest_version_and_v2_is_before_v10(folder: Path, make_run: MakeRun) -> None:
    for index in range(11):
        registry.add(folder, make_run(float(index)))

    name = "digits100/res8-cd_sdd_dkd"
    assert registry.find(folder, name).version == 11
    assert registry.find(folder, f"{name}@v2").version == 2
    assert registry.find(folder, "res8-cd_sdd_dkd@v10").reference == f"{name}@v10"
    assert registry.find(folder, f"registry:{name}").version == 11
    assert [artifact.version for artifact in registry.list_artifacts(folder)] == list(range(1, 12))


@pytest.mark.parametrize("typed", ["res8-cd_sd_dkd", "digits100/res8-cd_sd_dkd"])
def test_an_unknown_name_gets_the_nearest_one(folder: Path, make_run: MakeRun, typed: str) -> None:
    registry.add(folder, make_run())

    with pytest.raises(ArtifactError, match=f"no artifact `{typed}`") as caught:
        registry.find(folder, typed)

    nearest = typed.replace("sd_dkd", "sdd_dkd")
    assert caught.value.hint == f"did you mean `{nearest}`? `icdctl registry list` shows all of them"


def test_an_unknown_version_gets_those_that_there_are(folder: Path, make_run: MakeRun) -> None:
    registry.add(folder, make_run())

    with pytest.raises(ArtifactError, match="no version 7 of `digits100/res8-cd_sdd_dkd`: it has v1"):
        registry.find(folder, "res8-cd_sdd_dkd@v7")


def test_a_short_name_of_two_is_refused(folder: Path, make_run: MakeRun) -> None:
    registry.add(folder, make_run())
    registry.add(folder, make_run(dataset="cifar100"))

    with pytest.raises(ArtifactError, match="is the name of 2 artifacts: `cifar100/res8-cd_sdd_dkd`, `digits100/"):
        registry.find(folder, "res8-cd_sdd_dkd")


@pytest.mark.parametrize("typed", ["../../etc/passwd", "a/b@3", "a/b@v0", "a/b@v1@v2", "", "@v1"])
def test_what_is_no_reference_is_wrong_usage(folder: Path, typed: str) -> None:
    with pytest.raises(UsageError, match="can't be the name of an artifact"):
        registry.find(folder, typed)


def test_an_empty_registry_lists_nothing_and_says_so(folder: Path) -> None:
    assert registry.list_artifacts(folder) == []
    assert registry.verify(folder) == []
    assert registry.find_teacher(folder, model="res32", dataset="digits100") is None
    with pytest.raises(ArtifactError, match="nothing is registered"):
        registry.find(folder, "res8-kd")


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "can't be read"), ("[]", "is broken"), ('{"schema": 2}', "has schema 2, this icdctl reads 1")],
)
def test_a_broken_manifest_is_named(folder: Path, make_run: MakeRun, content: str, reason: str) -> None:
    path = registry.add(folder, make_run()).folder / "manifest.json"
    files.write_text(path, content)

    with pytest.raises(ArtifactError, match=reason) as caught:
        registry.list_artifacts(folder)
    assert str(path) in caught.value.message
    (finding,) = registry.verify(folder)
    assert finding.problems == (caught.value.message,)
    assert not finding.sound


def test_a_manifest_that_reaches_out_of_its_folder_is_broken(folder: Path, make_run: MakeRun) -> None:
    path = registry.add(folder, make_run()).folder / "manifest.json"
    held = json.loads(path.read_text())["files"]
    edit(path, files=held | {"../../../outside": held["config.json"]})

    with pytest.raises(ArtifactError, match="is not a path below"):
        registry.find(folder, "res8-cd_sdd_dkd")


def test_a_teacher_is_the_newest_of_its_model_and_data_set_without_a_teacher(
    folder: Path, make_run: MakeRun, make_teacher: MakeRun
) -> None:
    registry.add(folder, make_teacher(1.0))
    newest = registry.add(folder, make_teacher(2.0), name="another")
    registry.add(folder, make_teacher(3.0, dataset="cifar100"))
    registry.add(folder, make_run(4.0, student="res32"))

    assert registry.find_teacher(folder, model="res32", dataset="digits100") == newest
    assert registry.find_teacher(folder, model="res56", dataset="digits100") is None


def test_a_line_of_the_list_is_json(folder: Path, make_run: MakeRun) -> None:
    line = json.loads(json.dumps(registry.add(folder, make_run()).as_json()))

    assert line["reference"] == "digits100/res8-cd_sdd_dkd@v1"
    assert (line["name"], line["version"]) == ("digits100/res8-cd_sdd_dkd", 1)
    assert (line["dataset"], line["model"], line["method"]) == ("digits100", "res8", "cd_sdd_dkd")
    assert (line["variant"], line["teacher"], line["final_top1"]) == ("paper", "res32", 71.25)
    assert Path(line["folder"]).is_dir()
    assert len(line["sha256"]) == 64


# --- lineage ---


def test_a_teacher_is_found_by_the_hash_of_its_weights(folder: Path, make_run: MakeRun, make_teacher: MakeRun) -> None:
    teacher = registry.add(folder, make_teacher(1.0))
    middle = registry.add(folder, make_run(2.0, teacher_sha256=teacher.sha256))
    student = registry.add(folder, make_run(3.0, student="mv2", teacher="res8", teacher_sha256=middle.sha256))

    assert student.manifest.teacher is not None
    assert student.manifest.teacher.artifact == middle.reference
    assert registry.lineage(folder, student) == [student.reference, middle.reference, teacher.reference]
    assert registry.lineage(folder, teacher) == [teacher.reference]


def test_of_two_artifacts_with_a_teachers_weights_the_newest_is_named(
    folder: Path, make_run: MakeRun, make_teacher: MakeRun
) -> None:
    run = make_teacher(1.0)
    registry.add(folder, run)
    newest = registry.add(folder, run, name="again")

    student = registry.add(folder, make_run(2.0, teacher_sha256=newest.sha256))

    assert student.manifest.teacher is not None
    assert student.manifest.teacher.artifact == "digits100/again@v1"


def test_an_unregistered_teacher_ends_the_line_with_its_hash(folder: Path, make_run: MakeRun) -> None:
    student = registry.add(folder, make_run())

    assert registry.lineage(folder, student) == [
        student.reference,
        "res32 (sha256 eeeeeeeeeeee…, not in this registry)",
    ]


def test_a_teacher_that_is_gone_is_a_note_and_no_damage(folder: Path, make_run: MakeRun, make_teacher: MakeRun) -> None:
    teacher = registry.add(folder, make_teacher(1.0))
    student = registry.add(folder, make_run(2.0, teacher_sha256=teacher.sha256))
    shutil.rmtree(teacher.folder)

    (finding,) = registry.verify(folder, student.reference)

    assert finding.sound
    assert finding.notes == (f"its teacher `{teacher.reference}` is no longer registered, or now has other weights",)


# --- verifying ---


def test_a_fresh_version_is_sound(folder: Path, make_run: MakeRun, make_export: MakeExport) -> None:
    run = make_run()
    artifact = registry.add(folder, run, export_folder=make_export(run))

    (finding,) = registry.verify(folder)

    assert finding.sound
    assert (finding.reference, set(finding.ok)) == (artifact.reference, set(artifact.manifest.files))
    assert (finding.changed, finding.absent, finding.extra, finding.problems, finding.notes) == ((), (), (), (), ())
    assert json.loads(json.dumps(finding.as_json()))["sound"] is True


def test_one_flipped_bit_is_found_and_the_file_is_not_handed_out(folder: Path, make_run: MakeRun) -> None:
    artifact = registry.add(folder, make_run())
    path = artifact.file("student.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    (finding,) = registry.verify(folder, artifact.reference)

    assert not finding.sound
    assert finding.changed == ("student.safetensors",)
    assert finding.summary == "4 ok; changed: student.safetensors"
    with pytest.raises(ArtifactError, match="has changed since it was registered"):
        artifact.file("student.safetensors")


def test_absent_is_not_corrupt(folder: Path, make_run: MakeRun) -> None:
    artifact = registry.add(folder, make_run())
    shutil.rmtree(artifact.folder / "files")

    (finding,) = registry.verify(folder)

    assert finding.sound
    assert sorted(finding.absent) == RUN_FILES
    with pytest.raises(ArtifactError, match="is not on this machine") as caught:
        artifact.file("student.safetensors")
    assert "`dvc pull`" in caught.value.hint


def test_a_file_that_was_not_registered_is_found(folder: Path, make_run: MakeRun) -> None:
    artifact = registry.add(folder, make_run())
    files.write_text(artifact.folder / "files" / "onnx" / "model.onnx", "slipped in")

    (finding,) = registry.verify(folder)

    assert (finding.sound, finding.extra) == (False, ("onnx/model.onnx",))
    with pytest.raises(ArtifactError, match=r"has no file `onnx/model\.onnx`"):
        artifact.file("onnx/model.onnx")


def test_a_version_that_was_moved_is_found(folder: Path, make_run: MakeRun) -> None:
    artifact = registry.add(folder, make_run())
    artifact.folder.rename(artifact.folder.with_name("v5"))

    (finding,) = registry.verify(folder)

    assert finding.problems == (
        "the manifest names `digits100/res8-cd_sdd_dkd@v1`, but the folder is that of `digits100/res8-cd_sdd_dkd@v5`",
    )


# --- the card ---


def test_the_card_says_what_a_reader_needs(
    folder: Path, make_run: MakeRun, make_teacher: MakeRun, make_export: MakeExport
) -> None:
    teacher = registry.add(folder, make_teacher(1.0))
    run = make_run(2.0, teacher_sha256=teacher.sha256)
    artifact = registry.add(folder, run, export_folder=make_export(run))

    text = (artifact.folder / "card.md").read_text()

    assert text == registry.card(artifact)
    assert text.startswith("# digits100/res8-cd_sdd_dkd@v1\n")
    assert "| top-1, final epoch | **71.25 %** |" in text
    assert "| best top-1 on the test images (epoch 18) | 71.75 % |" in text
    assert "`cd_sdd_dkd`, variant `paper`" in text
    assert f"registered as `{teacher.reference}`; sha256 of its weights `{teacher.sha256}`" in text
    assert f"icdctl eval registry:{artifact.reference}\n" in text
    assert f"icdctl distill --teacher registry:{artifact.reference} " in text
    assert f"- Licence: {artifact.manifest.dataset.licence}" in text
    assert "without a mean or a spread" in text
    assert all(record.sha256 in text for record in artifact.manifest.files.values())


def test_the_card_of_a_model_without_a_teacher_says_so(folder: Path, make_teacher: MakeRun) -> None:
    run = make_teacher(1.0, dataset="imagefolder:birds")
    (run / "metrics.json").write_text('{"final_top1": 71.25, "epochs": 1}')
    edit(run / "environment.json", git=None)

    text = registry.card(registry.add(folder, run))

    assert "trained without a teacher (`ce`)" in text
    assert "the model learnt from the labels alone" in text
    assert "- Licence: not known to icdctl" in text
    assert "top-5" not in text


def test_the_card_of_an_export_that_was_not_compared_with_images_says_what_there_is(
    folder: Path, make_run: MakeRun, make_export: MakeExport
) -> None:
    run = make_run()
    export = make_export(run)
    edit(export / "verify.json", passed=False, agreement=None)
    list_export(export)

    text = registry.card(registry.add(folder, run, export_folder=export))

    assert "| ONNX compared with the weights | NOT passed, largest error 2e-06, allowed 1e-05 |" in text


# --- DVC ---


def _dvc(project: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def dvc_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project outside git that uses DVC; it is the current folder."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "dvc-site"))
    project = tmp_path / "project"
    (project / "registry").mkdir(parents=True)
    _dvc(project, "init", "--no-scm", "-q")
    monkeypatch.chdir(project)
    return project


def test_in_a_dvc_project_dvc_keeps_the_files(dvc_project: Path, make_run: MakeRun, make_export: MakeExport) -> None:
    folder = registry.default_folder()
    assert folder == dvc_project / "registry"
    run = make_run()
    artifact = registry.add(folder, run, export_folder=make_export(run))
    assert (artifact.folder / "files.dvc").is_file()

    shutil.rmtree(artifact.folder / "files")
    with pytest.raises(ArtifactError, match="is not on this machine") as caught:
        artifact.file("student.safetensors")
    assert "dvc pull" in caught.value.hint
    assert str(artifact.folder / "files.dvc") in caught.value.hint

    _dvc(dvc_project, "checkout", str(artifact.folder / "files.dvc"))
    (finding,) = registry.verify(folder)
    assert finding.sound
    assert set(finding.ok) == set(artifact.manifest.files)


def test_a_registry_elsewhere_is_not_dvcs(dvc_project: Path, make_run: MakeRun) -> None:
    artifact = registry.add(dvc_project / "runs" / "demo" / "registry", make_run())

    assert sorted(path.name for path in artifact.folder.iterdir()) == ["card.md", "files", "manifest.json"]


def test_when_dvc_fails_nothing_is_registered(dvc_project: Path, make_run: MakeRun) -> None:
    files.write_text(dvc_project / ".dvc" / "config", "[core\n")

    with pytest.raises(ArtifactError, match=r"`dvc add registry/.*/v1/files` failed \(\d+\): "):
        registry.add(registry.default_folder(), make_run())

    assert [path for path in registry.default_folder().rglob("*") if path.is_file()] == []


# --- the module ---


def test_the_registry_is_read_without_torch() -> None:
    code = "import sys, icdctl.registry; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
