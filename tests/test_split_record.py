"""What a model was trained on travels with its weights, and no test image is one of them without a word."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from test_imagefolder import flat, in_parts, load, metrics_of, picture

import icdctl as library
from icdctl import data, models
from icdctl.config.dataset_request import dataset_request
from icdctl.data import Dataset, SplitRecord
from icdctl.data.part_files import PartFiles, duplicates
from icdctl.data.split_record import PartRecord
from icdctl.engine.observer import SilentObserver
from icdctl.exporting import OnnxClassifier, verify_file
from icdctl.registry import trained
from icdctl.registry.artifact import read_manifest

OPTIONS: dict[str, Any] = {"epochs": 1, "batch_size": 8, "device": "cpu"}
SPLIT: dict[str, Any] = {"test_split": 0.3, "split_seed": 5}


@dataclasses.dataclass(frozen=True)
class Made:
    """A folder of images, and a run with a split of its own; tests copy what they change."""

    photos: Path
    run: Path
    onnx: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = tmp_path_factory.mktemp("made")
    found = Made(flat(base / "photos", count=10), base / "run", base / "run" / "onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICDCTL_HOME", str(tmp_path_factory.getbasetemp() / "state"))
        library.train(model="res8", dataset=f"imagefolder:{found.photos}", out=str(found.run), **OPTIONS, **SPLIT)
        library.export(found.run)
    return found


def evaluated(target: Path, photos: Path | None = None) -> tuple[int, float, tuple[str, ...]]:
    """Number of test images, top-1 and warnings."""
    dataset = None if photos is None else f"imagefolder:{photos}"
    found = library.evaluate(target, dataset=dataset, device="cpu")
    return found.num_images, found.numbers.top1, found.warnings


def record_of(dataset: Dataset) -> SplitRecord:
    assert dataset.split is not None
    return dataset.split


def seen(dataset: Dataset, split: SplitRecord | None) -> str | None:
    return dataset.seen_by("`it`", dataset.name, split)


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_record_is_read_back() -> None:
    parts = {"train": PartRecord(3, "0" * 64), "test": PartRecord(1, "a" * 64)}
    for record in (SplitRecord(0.1, 7, 0.25, parts), SplitRecord(0.0, 0)):
        assert SplitRecord.from_json(json.loads(json.dumps(record.as_json()))) == record
    assert SplitRecord(0.1, 7, 0.25).flags == "--test-split 0.25 --val-split 0.1 --split-seed 7"


@pytest.mark.parametrize(
    "value",
    [
        5,
        [],
        {},
        {"val_split": 0.1},
        {"val_split": 1.5, "split_seed": 0},
        {"val_split": True, "split_seed": 0},
        {"val_split": float("nan"), "split_seed": 0},
        {"val_split": 0, "split_seed": -1},
        {"val_split": 0, "split_seed": 0.5},
        {"val_split": 0, "split_seed": 0, "test_split": "most"},
        {"val_split": 0, "split_seed": 0, "train": 5},
        {"val_split": 0, "split_seed": 0, "train": {"images": -1, "sha256": "0" * 64}},
        {"val_split": 0, "split_seed": 0, "train": {"images": 1, "sha256": "0"}},
    ],
)
def test_a_malformed_record_is_refused_with_icdctls_error(tmp_path: Path, value: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        SplitRecord.from_json(value)
    said = load(flat(tmp_path / "photos")).weights_metadata("res8")
    text = json.loads(json.dumps({**said, "split": None}).replace("NaN", "null")) | {"split": value}
    models.save_weights(tmp_path / "a.safetensors", models.create("res8", 3), json.loads(_finite(text)))
    with pytest.raises(library.IcdctlError, match="do not say how its images were divided"):
        trained.resolve(str(tmp_path / "a.safetensors"))


def _finite(value: object) -> str:
    """JSON in which NaN, which no weights file can hold, is a text."""
    return json.dumps(value).replace("NaN", '"NaN"')


def test_the_hash_of_a_part_is_of_its_images_and_classes_alone(tmp_path: Path) -> None:
    first = record_of(load(in_parts(tmp_path / "a", "train", "val")))
    assert {use: part.images for use, part in first.parts.items()} == {"train": 18, "test": 9}
    Path(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    (tmp_path / "b" / "train" / "cat" / "0.png").rename(tmp_path / "b" / "train" / "cat" / "renamed.png")
    assert record_of(load(tmp_path / "b")) == first
    assert record_of(load(tmp_path / "b", image_size=24, room_to_crop=True)) == first
    (tmp_path / "b" / "train" / "cat" / "renamed.png").rename(tmp_path / "b" / "train" / "dog" / "moved.png")
    moved = record_of(load(tmp_path / "b"))
    assert (moved.parts["train"] == first.parts["train"], moved.parts["test"] == first.parts["test"]) == (False, True)


def test_published_data_sets_record_the_settings_of_the_split_alone() -> None:
    wanted = dataset_request("digits100", train_images=200, test_images=100, val_split=0.5, split_seed=3)
    held = data.load(wanted)
    assert held.weights_metadata("res8")["split"] == {"val_split": 0.5, "split_seed": 3}
    assert seen(held, None) is None
    assert "split" not in data.describe(wanted).weights_metadata("res8")


# --- images that are there twice --------------------------------------------------------------------------------------


def part(use: str, *files: tuple[str, str, str]) -> PartFiles:
    names, classes, hashes = ([file[place] for file in files] for place in range(3))
    return PartFiles(use, tuple(names), tuple(classes) if use != "unlabelled" else (), tuple(hashes))


A, B, C = ("a.png", "cat", "1"), ("b.png", "cat", "2"), ("c.png", "dog", "3")
TWICE: list[tuple[list[PartFiles], list[str]]] = [
    ([part("training", A, B), part("testing", C)], []),
    ([part("training", A, ("again.png", "cat", "1")), part("testing", C)], []),
    (
        [part("training", A, B), part("testing", C, ("t.png", "cat", "2"))],
        ["1 of 2 images for testing is for training too, e.g. `t.png` is the same file as `b.png`"],
    ),
    (
        [part("training", A), part("unlabelled", B), part("testing", ("t.png", "cat", "2"))],
        ["1 of 1 images for testing is for training too"],
    ),
    (
        [part("training", A), part("testing", C), part("validation", ("v.png", "cat", "1"), ("w.png", "dog", "3"))],
        ["1 of 2 images for validation is for training too", "1 of 1 images for testing is for validation too"],
    ),
    (
        [part("training", A, C, ("d.png", "dog", "1")), part("testing", ("t.png", "owl", "3"))],
        ["1 of 1 images for testing", "2 images are in two classes, e.g. `a.png` is the same file as `d.png`"],
    ),
]


@pytest.mark.parametrize(("parts", "expected"), TWICE)
def test_an_image_in_two_parts_or_two_classes_is_found(parts: list[PartFiles], expected: list[str]) -> None:
    found = duplicates(parts)
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_training_eval_and_validate_say_that_an_image_is_there_twice(icdctl: CommandLine, tmp_path: Path) -> None:
    folder = in_parts(tmp_path / "pets", "train", "val")
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "val" / "dog" / "same.png")
    leak = "1 of 10 images for testing is for training too, e.g. `val/dog/same.png` is the same file as"
    mistake = "1 image is in two classes, e.g. `train/cat/0.png` is the same file as `val/dog/same.png`"
    name = f"imagefolder:{folder}"
    code, _, err = icdctl("train", "--model", "res8", "--dataset", name, "--max-steps", "1", "--out", tmp_path / "run")
    assert code == 0
    assert f"warning: {leak}" in err
    assert f"warning: {mistake}" in err
    code, out, err = icdctl("eval", tmp_path / "run", "--json")
    assert f"warning: {leak}" in err
    assert [text[:20] for text in json.loads(out)["warnings"]] == [leak[:20], mistake[:20]]
    code, out, err = icdctl("validate", name, "--json")
    assert (code, err) == (0, "")
    (check,) = [check for check in json.loads(out)["checks"] if check["what"] == "duplicates"]
    assert check["sound"] is None
    assert leak in check["found"]
    assert mistake in check["found"]
    (folder / "val" / "dog" / "same.png").unlink()
    checks = json.loads(icdctl("validate", name, "--json")[1])["checks"]
    assert [check["found"] for check in checks if check["what"] == "duplicates"] == ["no image is there twice"]


# --- test images that a model has seen --------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [{"split_seed": 1}, {"test_split": 0.5}, {"test_split": 0.4, "val_split": 0.3}])
@pytest.mark.parametrize("then", [{}, {"val_split": 0.25, "split_seed": 4}, {"test_split": 0.1}])
def test_the_test_images_that_another_split_trained_on_are_counted(
    tmp_path: Path, then: dict[str, Any], now: dict[str, Any]
) -> None:
    folder = flat(tmp_path / "photos", count=12)
    first, second = load(folder, **then), load(folder, **now)
    names = [{part.use: set(part.names) for part in held.parts} for held in (first, second)]
    count = len(names[0]["training"] & names[1]["testing"])
    assert count > 0
    found = str(seen(second, first.split))
    assert found.startswith(
        f"`it` was trained on {count} of the {len(names[1]['testing'])} test images of `imagefolder:"
    )
    assert f"now with `{record_of(second).flags}`" in found
    assert seen(second, second.split) is None


def test_another_share_for_validation_takes_no_test_images(tmp_path: Path) -> None:
    folder = flat(tmp_path / "photos")
    assert seen(load(folder, val_split=0.3), load(folder).split) is None
    assert seen(load(folder), load(folder, val_split=0.3).split) is None


def new_images(folder: Path) -> None:
    for number in range(6):
        picture(970 + number).save(folder / "cat" / f"new{number}.png")


def images_less(folder: Path) -> None:
    for number in range(4):
        (folder / "cat" / f"{number}.png").unlink()


def other_images(folder: Path) -> None:
    for path in (folder / "cat").iterdir():
        picture(992 + int(path.stem)).save(path)


@pytest.mark.parametrize("change", [new_images, images_less, other_images])
def test_images_that_changed_since_are_said(tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = flat(tmp_path / "photos")
    before = load(folder).split
    change(folder)
    found = str(seen(load(folder, split_seed=0), before))
    assert "`it` was trained on other images than `imagefolder:photos` has for training now (15 then, " in found


def test_new_test_images_alone_are_not_said(tmp_path: Path) -> None:
    folder = in_parts(tmp_path / "photos", "train", "val")
    before = load(folder).split
    new_images(folder / "val")
    assert seen(load(folder), before) is None


def test_a_model_without_a_record_says_nothing_and_that_is_said(tmp_path: Path) -> None:
    held = load(flat(tmp_path / "photos"))
    assert "`it` does not say which images it was trained on, so some of the 3 test images" in str(seen(held, None))
    assert held.seen_by("`it`", "cifar100", None) is None


# --- commands ---------------------------------------------------------------------------------------------------------


def test_weights_and_graph_say_the_same_as_the_data(made: Made) -> None:
    expected = record_of(load(made.photos, **SPLIT))
    assert trained.resolve(str(made.run)).split == expected
    assert OnnxClassifier(made.onnx / "model.onnx").description.split == expected
    assert json.loads((made.onnx / "model.json").read_text())["split"] == expected.as_json()
    tensors = models.read_weights(made.run / "student.safetensors")
    assert tensors.metadata["split"]["test_split"] == 0.3


@pytest.mark.parametrize("name", ["student.safetensors", "onnx/model.onnx"])
def test_copied_files_are_tested_on_the_images_that_their_run_held_out(
    icdctl: CommandLine, tmp_path: Path, made: Made, name: str
) -> None:
    copy = Path(shutil.copy(made.run / name, tmp_path))
    assert evaluated(made.run) == (9, metrics_of(made.run)["final_top1"], ())
    assert evaluated(copy, made.photos) == evaluated(made.run)
    code, out, err = icdctl("eval", copy, "--dataset", f"imagefolder:{made.photos}")
    assert (code, out.splitlines()[0]) == (0, "images      9 test images of imagefolder:photos")
    assert "images are divided as `" in err
    assert "it was trained: `--test-split 0.3 --split-seed 5`" in err


def test_images_added_since_the_training_are_said_by_eval_and_export(
    icdctl: CommandLine, tmp_path: Path, made: Made
) -> None:
    photos = Path(shutil.copytree(made.photos, tmp_path / "photos"))
    weights = Path(shutil.copy(made.run / "student.safetensors", tmp_path))
    new_images(photos)
    (warning,) = evaluated(weights, photos)[2]
    assert "was trained on other images than `imagefolder:photos` has for training now (21 then, 25 now)" in warning
    code, out, err = icdctl("export", weights, "--dataset", f"imagefolder:{photos}", "--out", tmp_path / "onnx")
    assert (code, err.count("Traceback")) == (0, 0)
    assert "top-1       not measured: `" in out
    assert "on other images" in out
    assert json.loads((tmp_path / "onnx" / "model.json").read_text())["accuracy"] is None


def test_images_added_for_training_alone_are_a_note(icdctl: CommandLine, tmp_path: Path) -> None:
    photos, run = in_parts(tmp_path / "photos", "train", "val"), tmp_path / "run"
    library.train(model="res8", dataset=f"imagefolder:{photos}", out=str(run), **OPTIONS)
    new_images(photos / "train")
    code, out, err = icdctl("eval", run, "--json")
    assert (code, json.loads(out)["warnings"]) == (0, [])
    assert "for training have changed since `" in err
    assert "18 then, 24 now; the test images have not" in err


def test_a_teacher_that_has_seen_test_images_is_said(tmp_path: Path, made: Made) -> None:
    said: list[str] = []

    class Listener(SilentObserver):
        def message(self, text: str) -> None:
            said.append(text)

    options = {"dataset": f"imagefolder:{made.photos}", "student": "res8", "max_steps": 1, **OPTIONS}
    for name, split, expected in (("same", SPLIT, 0), ("other", {"split_seed": 1}, 1)):
        said.clear()
        given = {"method": "kd", "teacher": str(made.run), "out": str(tmp_path / name), **options, **split}
        library.distill(given, observer=Listener())
        assert sum(text.startswith(f"warning: teacher `{made.run}` was trained on ") for text in said) == expected
    said.clear()
    first = {"init_weights": str(made.run / "student.safetensors"), "out": str(tmp_path / "first")}
    library.train({**options, **first, "split_seed": 1}, observer=Listener())
    assert sum(text.startswith("warning: the model with the first weights `") for text in said) == 1


def test_eval_says_that_the_teacher_it_compares_with_has_seen_test_images(tmp_path: Path, made: Made) -> None:
    other = library.train(model="res8", dataset=f"imagefolder:{made.photos}", out=str(tmp_path / "other"), **OPTIONS)
    (warning,) = library.evaluate(made.run, teacher=other.out, device="cpu").warnings
    assert warning.startswith(f"`{other.out}` was trained on ")
    assert "of the 9 test images" in warning


def test_verify_compares_how_the_images_were_divided(made: Made) -> None:
    model = trained.resolve(str(made.run))
    assert verify_file(made.onnx / "model.onnx", model).passed
    assert verify_file(made.onnx / "model.onnx", dataclasses.replace(model, split=None)).passed
    assert model.split is not None
    other = dataclasses.replace(model, split=dataclasses.replace(model.split, split_seed=6))
    (failure,) = verify_file(made.onnx / "model.onnx", other).failures
    assert "images divided in another way" in failure.detail


def test_a_report_does_not_measure_on_images_that_have_changed(icdctl: CommandLine, tmp_path: Path) -> None:
    photos, run = flat(tmp_path / "photos"), tmp_path / "runs" / "run"
    library.train(model="res8", dataset=f"imagefolder:{photos}", out=str(run), **OPTIONS)
    images_less(photos)
    code, _, err = icdctl("report", tmp_path / "runs", "--out", tmp_path / "report", "--no-latency")
    assert code == 0, err
    notes = json.loads((tmp_path / "report" / "report.json").read_text())["notes"]
    assert any(note.startswith(f"{run} was not measured: `{run}` was trained on other images") for note in notes)


def test_a_manifest_holds_the_record(icdctl: CommandLine, made: Made) -> None:
    code, out, err = icdctl("registry", "add", made.run, "--json")
    assert code == 0, err
    name, version = json.loads(out)["reference"].split("@")
    manifest = read_manifest(Path("registry", name, version, "manifest.json"))
    assert manifest.dataset.split == record_of(load(made.photos, **SPLIT)).as_json()


def test_a_run_of_an_earlier_version_is_checked_by_the_hash_of_its_pixels(tmp_path: Path, made: Made) -> None:
    photos, run = flat(tmp_path / "photos"), tmp_path / "run"
    library.train(model="res8", dataset=f"imagefolder:{photos}", out=str(run), **OPTIONS)
    content = models.read_weights(run / "student.safetensors")
    said = {key: value for key, value in content.metadata.items() if key != "split"}
    sha256 = models.save_weights(run / "student.safetensors", content.tensors, said)
    (run / "metrics.json").write_text(json.dumps({**metrics_of(run), "weights_sha256": sha256}))
    assert evaluated(run)[2] == ()
    picture(990).save(photos / "cat" / "1.png")
    (warning,) = evaluated(run)[2]
    assert "does not say which images it was trained on" in warning


# --- what can't be read is not as if it were not there ----------------------------------------------------------------

BROKEN_CONFIGS: dict[str, Callable[[str], str]] = {
    "cut short": lambda text: text[: len(text) // 2],
    "another type": lambda text: "[]",
    "empty": lambda text: "",
    "a letter for a digit": lambda text: text.replace('"seed": 0', '"seed": O', 1),
    "a wrong value": lambda text: text.replace('"split_seed": 5', '"split_seed": "five"'),
    "without a setting": lambda text: text.replace('"student": "res8"', '"studnet": "res8"'),
}


@pytest.mark.parametrize("kind", BROKEN_CONFIGS)
def test_a_run_whose_configuration_can_not_be_read_is_not_measured(
    icdctl: CommandLine, tmp_path: Path, made: Made, kind: str
) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    text = BROKEN_CONFIGS[kind]((run / "config.json").read_text())
    assert text != (run / "config.json").read_text()
    (run / "config.json").write_text(text)
    for command in (("eval", run), ("export", run, "--out", tmp_path / "onnx")):
        code, out, err = icdctl(*command)
        assert (code, out) == (1, "")
        assert "config.json" in err
        assert "hint: restore it" in err


def test_metrics_that_can_not_be_read_are_an_error_too(icdctl: CommandLine, tmp_path: Path, made: Made) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    (run / "metrics.json").write_text("{")
    code, out, err = icdctl("eval", run / "student.safetensors")
    assert (code, out) == (1, "")
    assert "metrics can't be read" in err


def test_a_config_json_of_another_program_does_not_matter(tmp_path: Path, made: Made) -> None:
    shutil.copy(made.run / "student.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["ResNet"]}')
    assert evaluated(tmp_path / "student.safetensors", made.photos)[0] == 9


def test_an_export_says_why_no_accuracy_was_measured(icdctl: CommandLine, tmp_path: Path) -> None:
    photos = flat(tmp_path / "photos")
    library.train(model="res8", dataset=f"imagefolder:{photos}", out=str(tmp_path / "run"), **OPTIONS)
    photos.rename(tmp_path / "gone")
    code, out, err = icdctl("export", tmp_path / "run")
    assert code == 0, err
    assert f"agreement   not measured: image folder `{photos}` can't be read: No such file or directory" in out
