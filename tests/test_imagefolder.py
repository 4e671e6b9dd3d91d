"""Folders of one's own images: every layout, every kind of file, splits, unlabelled images, and what goes wrong."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandLine
from PIL import Image
from test_data import write_cifar

import icdctl as library
from icdctl import data, models
from icdctl.api import planning
from icdctl.config.dataset_request import dataset_request
from icdctl.data import UNLABELED
from icdctl.data.decode import decode_image
from icdctl.errors import ArtifactError, UsageError
from icdctl.exporting import OnnxClassifier

QUICK = ("--batch-size", "8", "--device", "cpu")
ONE = (*QUICK, "--epochs", "1")
CLASSES = ("bird", "cat", "dog")


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (3, 4, 3)).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def fill(folder: Path, count: int, *, seed: int = 0) -> None:
    """A folder of `count` PNG files of different sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(seed * 1000 + index, 24 + 5 * index, 50 - 3 * index).save(folder / f"{index}.png")


def grow(base: Path, counts: Mapping[str, int], *, seed: int = 0) -> Path:
    for place, (name, count) in enumerate(counts.items()):
        fill(base / name, count, seed=seed + place)
    return base


def flat(base: Path, *, count: int = 6) -> Path:
    return grow(base, dict.fromkeys(CLASSES, count))


def in_parts(base: Path, *parts: str) -> Path:
    for place, part in enumerate(parts):
        grow(base / part, dict.fromkeys(CLASSES, 6 if part == "train" else 3), seed=10 * place)
    return base


def request(folder: Path | str, **settings: Any) -> data.Request:
    return dataset_request(f"imagefolder:{folder}", **settings)


def load(folder: Path | str, **settings: Any) -> data.Dataset:
    return data.load(request(folder, **settings))


def history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def metrics_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_a_flat_folder_is_split_into_training_and_testing(tmp_path: Path) -> None:
    found = load(flat(tmp_path / "pets", count=10))
    assert (found.name, found.class_names) == ("imagefolder:pets", CLASSES)
    assert found.train_images.shape == (24, 32, 32, 3)
    assert found.test_images.shape == (6, 32, 32, 3)
    assert torch.bincount(found.train_labels).tolist() == [8, 8, 8]
    assert torch.bincount(found.test_labels).tolist() == [2, 2, 2]
    assert found.val_images is None
    assert any("20% of each class" in note for note in found.notes)
    shares = load(tmp_path / "pets", test_split=0.5, val_split=0.4)
    assert shares.val_labels is not None
    held = (shares.train_labels, shares.val_labels, shares.test_labels)
    assert [torch.bincount(labels).tolist() for labels in held] == [[3, 3, 3], [2, 2, 2], [5, 5, 5]]


def test_train_and_val_are_for_training_and_testing(tmp_path: Path) -> None:
    found = load(in_parts(tmp_path, "train", "val"))
    assert (len(found.train_labels), len(found.test_labels), found.val_images) == (18, 9, None)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_train_val_and_test_are_for_what_they_say(tmp_path: Path, name: str) -> None:
    found = load(in_parts(tmp_path, "train", name, "test"))
    assert found.val_images is not None
    assert (len(found.train_labels), len(found.val_images), len(found.test_labels)) == (18, 9, 9)
    assert not torch.equal(found.val_images, found.test_images)


def test_train_and_test_alone_leave_validation_to_a_split(tmp_path: Path) -> None:
    found = load(in_parts(tmp_path, "train", "test"), val_split=0.3)
    assert found.val_labels is not None
    assert (len(found.train_labels), len(found.val_labels), len(found.test_labels)) == (12, 6, 9)


def test_train_alone_is_split(tmp_path: Path) -> None:
    found = load(in_parts(tmp_path, "train"))
    assert (len(found.train_labels), len(found.test_labels)) == (15, 3)


@pytest.mark.parametrize("name", ["unlabeled", "unlabelled", "Unlabeled"])
@pytest.mark.parametrize("layout", ["flat", "parts"])
def test_unlabelled_images_are_no_class(tmp_path: Path, name: str, layout: str) -> None:
    folder = flat(tmp_path) if layout == "flat" else in_parts(tmp_path, "train", "val")
    fill(folder / name / "below", 4, seed=50)
    without = load(folder)
    assert without.class_names == CLASSES
    assert not without.has_unlabeled
    assert any("no teacher: 4" in note for note in without.notes)
    found = load(folder, unlabeled=True)
    assert found.has_unlabeled
    assert found.train_labels[-4:].tolist() == [UNLABELED] * 4
    assert torch.equal(found.train_images[:-4], without.train_images)
    assert torch.equal(found.test_images, without.test_images)


def test_pixels_are_the_whole_image_squeezed_to_a_square(tmp_path: Path) -> None:
    found = load(in_parts(tmp_path, "train", "val"), image_size=24)
    expected = picture(1, 29, 47).resize((24, 24), Image.Resampling.BILINEAR)
    assert np.array_equal(found.train_images[1].numpy(), np.asarray(expected))


def test_training_images_are_kept_an_eighth_larger_where_cuts_are_made_of_them(tmp_path: Path) -> None:
    folder = flat(tmp_path)
    for side, larger in ((32, 36), (28, 32), (224, 256)):
        found = load(folder, image_size=side, room_to_crop=True, val_split=0.2)
        assert found.val_images is not None
        assert found.train_images.shape[1:3] == (larger, larger)
        assert found.test_images.shape[1:3] == found.val_images.shape[1:3] == (side, side)


def test_images_lie_at_any_depth_and_other_files_do_not_matter(tmp_path: Path) -> None:
    folder = flat(tmp_path)
    fill(folder / "cat" / "2021" / "may", 2, seed=9)
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / ".hidden.png").write_text("no image")
    (folder / ".git").mkdir()
    fill(folder / "cat" / ".thumbnails", 3)
    (folder / "LICENCE").write_text("mine")
    shutil.copy(folder / "cat" / "0.png", folder / "cat" / "UPPER.PNG")
    found = load(folder)
    assert len(found.train_labels) + len(found.test_labels) == 18 + 3


def test_another_seed_holds_out_other_images(tmp_path: Path) -> None:
    folder = flat(tmp_path)
    first, again, other = (load(folder, split_seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    assert not torch.equal(first.test_images, other.test_images)


def test_the_same_images_elsewhere_are_the_same_data_set(tmp_path: Path) -> None:
    first = load(flat(tmp_path / "a" / "pets"))
    shutil.copytree(tmp_path / "a" / "pets", tmp_path / "b" / "pets")
    assert load(tmp_path / "b" / "pets").sha256 == first.sha256


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "pets", tmp_path / "store"
    flat(folder)
    fill(elsewhere, 5, seed=70)
    (folder / "fish").symlink_to(elsewhere)
    (folder / "cat" / "self").symlink_to(folder / "cat")
    (folder / "dog" / "up").symlink_to(folder)  # would bring the cats among the dogs
    (elsewhere / "up").symlink_to(tmp_path)
    (folder / "bird" / "dangling").symlink_to(tmp_path / "nowhere")
    found = load(folder)
    counts = torch.bincount(torch.cat((found.train_labels, found.test_labels))).tolist()
    assert dict(zip(found.class_names, counts, strict=True)) == {"bird": 6, "cat": 6, "dog": 6, "fish": 5}


@pytest.mark.parametrize("name", ["my photos", "fotos für Zoë", 'it\'s "quoted"', "a:b", "back`tick", "100%", "-x"])
def test_any_name_of_a_folder_and_of_classes_will_do(icdctl: CommandLine, tmp_path: Path, name: str) -> None:
    folder = grow(tmp_path / name, {"first class": 4, "zweite Klasse ü": 4, 'the "3rd"': 4})
    code, stdout, err = icdctl("train", "--model", "res8", "--dataset", f"imagefolder:{folder}", *ONE, "--json")
    assert code == 0, err
    out = Path(json.loads(stdout)["out"])
    assert out.parent.name == f"imagefolder-{name}"
    code, stdout, err = icdctl("eval", out, "--json")
    assert (code, json.loads(stdout)["dataset"]) == (0, f"imagefolder:{name}")
    code, stdout, err = icdctl("registry", "add", out, "--json")
    assert code == 0, err
    assert json.loads(stdout)["reference"].endswith("/res8-ce@v1")


def test_a_folder_is_called_by_its_own_name_however_it_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat(tmp_path / "pets")
    (tmp_path / "link").symlink_to(tmp_path / "pets")
    monkeypatch.chdir(tmp_path / "pets")
    for typed, name in ((".", "pets"), ("../pets", "pets"), ("cat/..", "pets"), ("../link", "pets"), ("./", "pets")):
        assert data.describe(request(typed)).name == f"imagefolder:{name}"
    assert data.describe(request(tmp_path / "link")).name == "imagefolder:link"


# --- what is refused --------------------------------------------------------------------------------------------------


def no_folder(folder: Path) -> None:
    pass


def a_file(folder: Path) -> None:
    folder.write_text("no folder")


def nothing(folder: Path) -> None:
    folder.mkdir()


def one_class(folder: Path) -> None:
    fill(folder / "cat", 3)


def only_unlabelled(folder: Path) -> None:
    fill(folder / "unlabeled", 3)


def an_empty_class(folder: Path) -> None:
    flat(folder)
    (folder / "emu").mkdir()


def a_class_that_links_upwards(folder: Path) -> None:
    flat(folder)
    (folder / "emu").symlink_to(folder)


def val_without_train(folder: Path) -> None:
    in_parts(folder, "val", "test")


def unknown_classes(folder: Path) -> None:
    in_parts(folder, "train", "val")
    fill(folder / "val" / "emu", 1)


def an_empty_val(folder: Path) -> None:
    in_parts(folder, "train")
    (folder / "val" / "cat").mkdir(parents=True)


def an_empty_val_beside_test(folder: Path) -> None:
    in_parts(folder, "train", "test")
    (folder / "val").mkdir()


def two_vals(folder: Path) -> None:
    in_parts(folder, "train", "val", "valid")


def one_image_a_class(folder: Path) -> None:
    flat(folder, count=1)


def a_name_with_a_line_break(folder: Path) -> None:
    flat(folder)
    fill(folder / "e\nmu", 2)


def a_name_of_other_bytes(folder: Path) -> None:
    flat(folder)
    fill(folder / os.fsdecode(b"em\xff"), 2)


REFUSED: list[tuple[Callable[[Path], None], str, str]] = [
    (no_folder, "can't be read: No such file or directory", "with one folder per class"),
    (a_file, "can't be read: Not a directory", "with one folder per class"),
    (nothing, "has 0 folders of images", "into a separate folder"),
    (one_class, "has 1 folders of images, a classifier needs 2", "into a separate folder"),
    (only_unlabelled, "has 0 folders of images", "into a separate folder"),
    (an_empty_class, "1 of 4 classes .* have no training images: `emu`", r"images end in .*\.bmp"),
    (a_class_that_links_upwards, "1 of 4 classes .* have no training images: `emu`", "remove these folders"),
    (val_without_train, "has a folder `test` but no folder `train`", "into `train/`"),
    (unknown_classes, "classes that the training images do not have: emu", "the same class folders everywhere"),
    (an_empty_val, "`.*/val` holds no images", "20% of each class then become"),
    (an_empty_val_beside_test, "`.*/val` holds no images", "no images are then held out"),
    (two_vals, "has both `val/` and `valid/`", "into one of them"),
    (one_image_a_class, "has one image per class: none is left for testing", "beside `train/`"),
    (a_name_with_a_line_break, r"name can't be printed: 'e\\nmu'", "rename"),
    (a_name_of_other_bytes, r"name can't be printed: 'em\\udcff'", "rename"),
]


@pytest.mark.parametrize(("make", "message", "hint"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_folder_that_can_not_be_used_is_explained(
    tmp_path: Path, make: Callable[[Path], None], message: str, hint: str
) -> None:
    make(tmp_path / "pets")
    with pytest.raises(ArtifactError, match=message) as caught:
        load(tmp_path / "pets")
    assert re.search(hint, caught.value.hint)


def test_a_val_folder_and_a_split_are_one_too_many(tmp_path: Path) -> None:
    in_parts(tmp_path, "train", "val", "test")
    with pytest.raises(ArtifactError, match="`--val-split` asks for others"):
        load(tmp_path, val_split=0.1)


def test_single_training_images_leave_none_for_validation(tmp_path: Path) -> None:
    grow(tmp_path / "train", dict.fromkeys(CLASSES, 1))
    grow(tmp_path / "val", dict.fromkeys(CLASSES, 1), seed=5)
    with pytest.raises(ArtifactError, match="has no image for validation") as caught:
        load(tmp_path, val_split=0.1)
    assert "--val-split" in caught.value.hint
    with pytest.raises(ArtifactError, match="one training image per class"):
        data.load(dataset_request("digits100", train_images=100, test_images=10, val_split=0.1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_without_permission_is_not_left_out(tmp_path: Path) -> None:
    flat(tmp_path)
    (tmp_path / "cat" / "below").mkdir(mode=0)
    with pytest.raises(ArtifactError, match=r"below` can't be read: Permission denied"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagefolder", "names no folder"),
        ("imagefolder:", "names no folder"),
        ("image_folders:x", "unknown data set `image_folders:x`"),
        ("cifar100:x", "takes no folder"),
        ("", "unknown data set ``"),
    ],
)
def test_a_wrong_name_is_explained(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        data.resolve(name)


@pytest.mark.parametrize("name", ["imagefolder:pets", "ImageFolder:pets", "image-folder:pets", " imagefolder:pets "])
def test_spellings_are_forgiven(name: str) -> None:
    assert data.resolve(name) == f"imagefolder:{Path.cwd() / 'pets'}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "`image_size` is `0`: .* greater than or equal to 8"),
        ({"image_size": 99999}, "`image_size` is `99999`: .* less than or equal to 1024"),
        ({"image_size": "large"}, "`image_size` is `large`: .*integer"),
        ({"image_size": 32.5}, "`image_size` is `32.5`: .*integer"),
        ({"image_size": True}, "`image_size` is `True`"),
        ({"test_split": 0}, "`test_split` is `0`: .* greater than 0"),
        ({"test_split": 1}, "`test_split` is `1`"),
        ({"test_split": "most"}, "`test_split` is `most`"),
        ({"test_split": float("nan")}, "`test_split` is `nan`"),
        ({"val_split": 2}, "`val_split` is `2`"),
        ({"skip_broken": "perhaps"}, "`skip_broken` is `perhaps`: .*boolean"),
        ({"train_images": 10}, "`--train-images` is given, but `imagefolder:.*` has no such setting"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        request("pets", **settings)


def test_settings_of_folders_are_of_folders_alone() -> None:
    settings: list[dict[str, Any]] = [{"image_size": 32}, {"test_split": 0.1}, {"skip_broken": True}]
    for given in settings:
        with pytest.raises(UsageError, match="no such setting") as caught:
            dataset_request("cifar100", **given)
        assert "imagefolder:DIR" in caught.value.hint


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--set", "crop_scale=0.5,2"), ("no cut has more than the whole image",)),
        (("--set", "crop_scale=0.5,0.2"), ("the first must not be the larger",)),
        (("--set", "crop_scale=0.5"), ("`crop_scale` is `0.5`: expected two numbers", "--set crop_scale")),
        (("--set", "crop_scale=a,b"), ("`crop_scale` is `a`", "--set crop_scale")),
        (("--set", "crop_scale=0,1"), ("greater than 0",)),
        (("--set", "crop_padding=4"), ("two ways to crop", "--set crop_scale=none")),
        (("--set", "crop_ratio=2,0.5"), ("`crop_ratio` is 2.0 to 0.5",)),
        (("--set", "flip=maybe"), ("`flip` is `maybe`", "--set flip")),
        (("--set", "randaugment_ops=99"), ("`randaugment_ops` is `99`",)),
        (("--set", "randaugment_magnitude=31"), ("`randaugment_magnitude` is `31`",)),
        (("--set", "label_smoothing=1"), ("`label_smoothing` is `1`",)),
        (("--set", "class_weights=all"), ("'none' or 'balanced'",)),
        (("--set", "lr_decay_epochs=1,x"), ("`lr_decay_epochs` is `x`",)),
        (("--set", "label_smothing=0.1"), ("unknown setting", "label_smoothing")),
        (("--set", "image_size=64"), ("unknown setting of `ce` `image_size`", "`--image-size`")),
        (("--set", "flip"), ("not KEY=VALUE",)),
        (("--set", "flip=true", "--set", "flip=false"), ("given twice",)),
        (("--image-size", "0"), ("`image_size` is `0`: input should be greater than or equal to 8", "--image-size")),
        (("--image-size", "99999"), ("`image_size` is `99999`",)),
        (("--val-split", "1"), ("`val_split` is `1.0`", "--val-split")),
        (("--val-split", "2"), ("`val_split` is `2.0`", "--val-split")),
        (("--val-split", "-0.1"), ("`val_split` is `-0.1`",)),
        (("--val-split", "x"), ("--val-split",)),
        (("--test-split", "0"), ("`test_split` is `0.0`",)),
        (("--split-seed", "-1"), ("`split_seed` is `-1`",)),
        (("--train-images", "10"), ("--train-images",)),
    ],
)
def test_a_wrong_value_is_wrong_usage(icdctl: CommandLine, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    given = ("train", "--model", "res8", "--dataset", "imagefolder:pets", "--dry-run", *flags)
    code, stdout, err = icdctl(*given)
    assert (code, stdout) == (2, "")
    assert "error: " in err
    assert "hint: " in err
    assert "Traceback" not in err
    assert all(word in err for word in words), err


def test_settings_of_the_recipe_are_given_by_set(icdctl: CommandLine) -> None:
    wanted = {
        "crop_scale=none": ("crop_scale", None),
        "crop_padding=4": ("crop_padding", 4),
        "crop_ratio=0.5,2": ("crop_ratio", [0.5, 2.0]),
        "flip=false": ("flip", False),
        "randaugment_ops=2": ("randaugment_ops", 2),
        "label_smoothing=0.1": ("label_smoothing", 0.1),
        "class_weights=balanced": ("class_weights", "balanced"),
        "lr_decay_epochs=3,5": ("lr_decay_epochs", [3, 5]),
        "weight_decay=1e-4": ("weight_decay", 1e-4),
    }
    flags = [word for setting in wanted for word in ("--set", setting)]
    plan = ("train", "--model", "res8", "--dataset", "imagefolder:pets", *flags, "--dry-run")
    code, stdout, _ = icdctl(*plan)
    assert code == 0
    stated = json.loads(stdout)
    assert {key: stated[key] for key, _ in wanted.values()} == dict(wanted.values())
    Path("config.json").write_text(stdout)
    again = json.loads(icdctl("train", "--config", "config.json", "--dry-run")[1])
    assert again == stated


def test_variables_are_read_as_what_they_say(
    icdctl: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Runs
) -> None:
    monkeypatch.setenv("ICDCTL_IMAGE_SIZE", "32")
    monkeypatch.setenv("ICDCTL_TEST_SPLIT", "0.25")
    monkeypatch.setenv("ICDCTL_SKIP_BROKEN", "no")
    monkeypatch.setenv("ICDCTL_VAL_SPLIT", "0.5")
    given = ("--method", "kd", "--teacher", runs.teacher, "--student", "res8", "--dataset", f"imagefolder:{runs.pets}")
    code, stdout, err = icdctl("distill", *given, "--dry-run")
    assert (code, err) == (0, "")
    stated = json.loads(stdout)
    assert [stated[key] for key in ("image_size", "test_split", "skip_broken", "val_split")] == [32, 0.25, False, 0.5]


# --- whole runs -------------------------------------------------------------------------------------------------------


class Runs:
    """A folder of images of every kind, and a teacher that was trained on it; nothing changes them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.pets = mixed(base / "pets")
        self.teacher = base / "teacher"


def mixed(base: Path) -> Path:
    """Three classes of files of all sizes, modes and formats."""
    upright = Image.Exif()
    upright[0x0112] = 6
    grey16 = np.linspace(0, 65535, 20 * 34).reshape(20, 34).astype(np.uint16)
    for place, name in enumerate(CLASSES):
        folder = base / name
        folder.mkdir(parents=True)
        seed = 100 * place
        picture(seed, 61, 37).save(folder / "a.jpg", quality=90)
        picture(seed + 1, 20, 55).convert("L").save(folder / "b.jpeg")
        picture(seed + 2, 33, 33).convert("RGBA").save(folder / "c.png")
        picture(seed + 3, 40, 21).convert("CMYK").save(folder / "d.jpg")
        picture(seed + 4, 32, 32).quantize(16).save(folder / "e.gif")
        picture(seed + 5, 17, 19).convert("1").save(folder / "f.png")
        Image.fromarray(np.roll(grey16, place * 7)).save(folder / "g.png")
        picture(seed + 6, 50, 25).save(folder / "h.jpg", exif=upright)
        picture(seed + 7, 100, 80).save(folder / "i.webp")
        picture(seed + 8, 9, 90).save(folder / "j.bmp")
    return base


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("runs"))
    options: dict[str, Any] = {"epochs": 1, "batch_size": 8, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICDCTL_HOME", str(tmp_path_factory.getbasetemp() / "state"))
        library.train(model="res8", dataset=f"imagefolder:{made.pets}", out=str(made.teacher), **options)
    return made


def distilled(icdctl: CommandLine, dataset: Path | str, teacher: Path | str, *more: str | Path) -> Path:
    """A finished distillation's folder."""
    name = f"imagefolder:{dataset}" if isinstance(dataset, Path) else dataset
    given = ("--method", "kd", "--teacher", teacher, "--student", "res8", "--dataset", name)
    code, stdout, err = icdctl("distill", *given, *ONE, *more, "--json")
    assert code == 0, err
    return Path(json.loads(stdout)["out"])


def measured(icdctl: CommandLine, target: Path | str, *more: str | Path) -> float:
    code, stdout, err = icdctl("eval", target, *more, "--json")
    assert code == 0, err
    return float(json.loads(stdout)["top1"])


def test_the_whole_job_on_a_folder_of_mixed_files(icdctl: CommandLine, tmp_path: Path) -> None:
    folder = mixed(tmp_path / "pets")
    name = f"imagefolder:{folder}"
    teacher = ("train", "--model", "res8", "--dataset", name, "--as-teacher", "--out", tmp_path / "teacher")
    code, stdout, err = icdctl(*teacher, *ONE)
    assert code == 0, err
    assert "imagefolder-pets/res8-ce@v1, found by `--teacher res8`" in stdout
    assert "images are resized to 32 x 32: `--image-size`" in err
    assert "3 classes, 24 images for training, 6 images for testing\n" in err
    for place, told in enumerate((tmp_path / "teacher", "res8", "registry:imagefolder-pets/res8-ce")):
        out = tmp_path / f"student{place}"
        student = ("--method", "cd_sdd_dkd", "--teacher", told, "--student", "mv2", "--dataset", name)
        assert icdctl("distill", *student, *QUICK, "--epochs", "2", "--out", out)[0] == 0
        assert [row["epoch"] for row in history(out)] == ["1", "2"]
    first, second = ((tmp_path / f"student{place}" / "student.safetensors").read_bytes() for place in (0, 1))
    assert first == second
    metrics = metrics_of(tmp_path / "student0")
    assert (metrics["train_images"], metrics["skipped_images"], metrics["unlabeled_images"]) == (24, 0, 0)
    assert icdctl("validate", tmp_path / "student0")[0] == 0
    (registered, *_) = json.loads(icdctl("list", "teachers", "--json")[1])["teachers"]
    assert registered["dataset"] == "imagefolder:pets"
    assert registered["top-1"] == round(metrics_of(tmp_path / "teacher")["final_top1"], 2) != 0


def test_a_file_that_can_not_be_decoded_is_named_or_skipped_and_counted(
    icdctl: CommandLine, tmp_path: Path, runs: Runs
) -> None:
    folder = Path(shutil.copytree(runs.pets, tmp_path / "pets"))
    (folder / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (folder / "dog" / "k.png").write_bytes((folder / "dog" / "c.png").read_bytes()[:300])
    given = ("--method", "kd", "--teacher", runs.teacher, "--student", "mv2", "--dataset", f"imagefolder:{folder}")
    command = ("distill", *given, *ONE, "--test-split", "0.1", "--out", tmp_path / "out")
    code, stdout, err = icdctl(*command)
    assert (code, stdout) == (1, "")
    assert re.search(r"images can't be decoded: `cat/broken\.jpg`: .*`dog/k\.png`: ", err)
    assert "--skip-broken" in err
    assert not (tmp_path / "out").exists()
    code, stdout, err = icdctl(*command, "--skip-broken")
    assert code == 0, err
    assert "warning: 2 images left out that can't be decoded: `" in err
    assert metrics_of(tmp_path / "out")["skipped_images"] == 2
    assert re.search(r"skipped +2 images", stdout)
    assert measured(icdctl, tmp_path / "out") == metrics_of(tmp_path / "out")["final_top1"]


def test_a_class_of_which_nothing_can_be_decoded_is_refused(tmp_path: Path) -> None:
    in_parts(tmp_path, "train", "val")
    for path in (tmp_path / "train" / "cat").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ArtifactError, match="no training image of class `cat`"):
        load(tmp_path, skip_broken=True)


LAYOUTS = {
    "flat": ((), ()),
    "flat, split": ((), ("--val-split", "0.2", "--test-split", "0.3", "--split-seed", "7")),
    "train, val": (("train", "val"), ()),
    "train, val, split": (("train", "val"), ("--val-split", "0.2")),
    "train, val, test": (("train", "val", "test"), ()),
    "small": (("train", "val"), ("--image-size", "24")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_finds_the_very_number_of_the_run_for_every_layout_and_form(
    icdctl: CommandLine, tmp_path: Path, layout: str
) -> None:
    parts, flags = LAYOUTS[layout]
    folder = in_parts(tmp_path / "pets", *parts) if parts else flat(tmp_path / "pets", count=10)
    fill(folder / "unlabeled", 5, seed=80)
    size = flags if "--image-size" in flags else ()
    teacher = tmp_path / "teacher"
    train = ("train", "--model", "res8", "--dataset", f"imagefolder:{folder}", *ONE, "--out", teacher)
    assert icdctl(*train, *size)[0] == 0
    out = distilled(icdctl, folder, teacher, *flags, "--out", tmp_path / "out")
    metrics = metrics_of(out)
    assert metrics["unlabeled_images"] == 5
    has_val = "--val-split" in flags or "test" in parts
    assert ("val_top1" in history(out)[0], "test_top1" in history(out)[0]) == (has_val, not has_val)
    assert (metrics["best_top1"] is None) == has_val
    caches = set((Path(os.environ["ICDCTL_HOME"]) / "cache" / "images").iterdir())
    assert measured(icdctl, out) == metrics["final_top1"]
    assert json.loads(icdctl("eval", out, "--json")[1])["loss"] == metrics["final_loss"]
    assert measured(icdctl, out, "--dataset", f"imagefolder:{folder}") == metrics["final_top1"]
    code, stdout, err = icdctl("export", out, "--json")
    assert code == 0, err
    assert json.loads(stdout)["accuracy"]["top1"] == metrics["final_top1"]
    assert measured(icdctl, out / "onnx" / "model.onnx") == metrics["final_top1"]
    assert measured(icdctl, out / "onnx") == metrics["final_top1"]
    reference = icdctl("registry", "add", out, "--onnx", out / "onnx")[1].strip()
    assert measured(icdctl, f"registry:{reference}") == metrics["final_top1"]
    assert icdctl("validate", out)[0] == 0
    # Nothing was decoded twice.
    assert set((Path(os.environ["ICDCTL_HOME"]) / "cache" / "images").iterdir()) == caches


def test_weights_that_left_their_run_need_the_folder_named(icdctl: CommandLine, tmp_path: Path, runs: Runs) -> None:
    shutil.copy(runs.teacher / "student.safetensors", tmp_path / "moved.safetensors")
    code, _, err = icdctl("eval", tmp_path / "moved.safetensors")
    assert code == 2
    assert "trained on the image folder `pets`, and nothing says where it is" in err
    expected = metrics_of(runs.teacher)["final_top1"]
    found = measured(icdctl, tmp_path / "moved.safetensors", "--dataset", f"imagefolder:{runs.pets}")
    assert found == expected


def test_a_folder_that_has_gone_is_named(icdctl: CommandLine, tmp_path: Path) -> None:
    flat(tmp_path / "pets")
    command = ("train", "--model", "res8", "--dataset", f"imagefolder:{tmp_path / 'pets'}", *ONE, "--out", "run")
    assert icdctl(*command)[0] == 0
    shutil.rmtree(tmp_path / "pets")
    code, _, err = icdctl("eval", "run")
    assert code == 1
    assert f"image folder `{tmp_path / 'pets'}` can't be read" in err


def test_validation_images_are_watched_in_place_of_the_test_images(
    icdctl: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path / "data", train=400, test=100)
    flat(tmp_path / "pets", count=10)
    shared = ("--set", "crop_padding=2", "--set", "crop_scale=none")
    digits = ("--train-images", "400", "--test-images", "100")
    for name, more in (
        ("digits100", digits),
        ("cifar100", ("--data-dir", str(tmp_path / "data"))),
        (f"imagefolder:{tmp_path / 'pets'}", shared),
    ):
        out = tmp_path / name.partition(":")[0]
        given = ("--model", "res8", "--dataset", name, "--device", "cpu", "--epochs", "2", "--val-split", "0.25")
        code, stdout, err = icdctl("train", *given, "--batch-size", "64", *more, "--out", out)
        assert code == 0, err
        assert re.search(r"final epoch \(validation \d+\.\d\d, best \d+\.\d\d in epoch \d\)", stdout)
        metrics, rows = metrics_of(out), history(out)
        assert [key for key in rows[0] if key.startswith(("val_", "test_"))] == ["val_top1", "val_top5", "val_loss"]
        assert metrics["best_top1"] is None
        assert metrics["final_val_top1"] == float(rows[-1]["val_top1"])
        assert metrics["best_val_top1"] == max(float(row["val_top1"]) for row in rows)
        assert measured(icdctl, out, *more[:2] if name == "cifar100" else ()) == metrics["final_top1"]
        code, stdout, _ = icdctl("validate", out)
        assert code == 0
        assert "val_top1" in stdout
        code, stdout, err = icdctl("registry", "add", out, "--json")
        assert code == 0, err
        card = Path("registry", *json.loads(stdout)["reference"].split("@")) / "card.md"
        assert "the test images were used once" in card.read_text()


def test_a_module_is_compared_with_at_the_size_of_what_it_is_compared_to(tmp_path: Path) -> None:
    folder = flat(tmp_path / "pets")
    given: dict[str, Any] = {"dataset": f"imagefolder:{folder}", "epochs": 1, "device": "cpu", "batch_size": 4}
    library.train(model="res8", **given, out=str(tmp_path / "run"))
    num_classes = len(load(folder).class_names)
    assert library.evaluate(tmp_path / "run", teacher=models.create("res8", num_classes)).agreement is not None


def test_validate_looks_at_a_folder_before_it_is_trained_on(icdctl: CommandLine, tmp_path: Path) -> None:
    folder = in_parts(tmp_path / "pets", "train", "val")
    fill(folder / "unlabeled", 2)
    code, out, err = icdctl("validate", f"imagefolder:{folder}", "--json")
    assert (code, err) == (0, "")
    found = {check["what"]: check["found"] for check in json.loads(out)["checks"]}
    division = load(folder)
    counts = torch.bincount(division.train_labels).tolist()
    assert found["classes"].startswith(f"{len(counts)} classes of {min(counts)} (`")
    assert f"to {max(counts)} images for training; {len(division.test_labels)} images for testing; 2 without" in out
    assert found["images"] == f"all {len(division.train_labels) + len(division.test_labels) + 2} images can be decoded"
    first = next((folder / "train").rglob("*.png"))
    first.write_bytes(first.read_bytes()[:50])
    code, out, err = icdctl("validate", f"imagefolder:{folder}")
    assert code == 1
    assert "BROKEN" in out
    assert f"`{first.relative_to(folder)}`: " in err
    assert "--skip-broken" in err
    code, _, err = icdctl("validate", folder)
    assert code == 1
    assert f"to check a folder of images, write `imagefolder:{folder}`" in err
    assert icdctl("validate", f"imagefolder:{tmp_path / 'nowhere'}")[0] == 1


@pytest.mark.parametrize("name", ["digits100", "cifar100"])
def test_a_split_of_a_published_data_set_is_stratified_and_takes_from_training(tmp_path: Path, name: str) -> None:
    write_cifar(tmp_path, train=1000, test=100)
    settings: dict[str, Any] = {"train_images": 1000, "test_images": 100} if name == "digits100" else {}
    whole = data.load(dataset_request(name, folder=tmp_path, **settings))
    found = data.load(dataset_request(name, folder=tmp_path, val_split=0.2, **settings))
    assert found.val_labels is not None
    assert torch.bincount(found.val_labels).tolist() == [2] * 100
    assert torch.bincount(found.train_labels).tolist() == [8] * 100
    assert torch.equal(found.test_images, whole.test_images)
    assert found.sha256 == whole.sha256  # the same images
    other = data.load(dataset_request(name, folder=tmp_path, val_split=0.2, split_seed=1, **settings))
    assert other.val_images is not None
    assert found.val_images is not None
    assert not torch.equal(other.val_images, found.val_images)


def numbers(out: Path) -> dict[str, Any]:
    """What a run left, but for the times."""
    metrics = {key: value for key, value in metrics_of(out).items() if "seconds" not in key and "per_second" not in key}
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in history(out)]
    return {"weights": (out / "student.safetensors").read_bytes(), "metrics": metrics, "history": rows}


RICH = (
    *("--set", "randaugment_ops=1", "--set", "label_smoothing=0.1", "--set", "class_weights=balanced"),
    *("--val-split", "0.2", "--epochs", "3"),
)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(icdctl: CommandLine, tmp_path: Path, runs: Runs) -> None:
    folder = Path(shutil.copytree(runs.pets, tmp_path / "pets"))
    fill(folder / "unlabeled", 4, seed=90)
    given = ("--method", "dkd", "--teacher", runs.teacher, "--student", "res8", "--dataset", f"imagefolder:{folder}")
    command = ("distill", *given, *QUICK, *RICH)
    assert icdctl(*command, "--out", tmp_path / "whole")[0] == 0
    code, stdout, err = icdctl(*command, "--out", tmp_path / "halves", "--time-limit", "0.001s")
    assert code == 0, err
    assert "stopped" in stdout
    code, _, err = icdctl(*command, "--out", tmp_path / "halves", "--resume")
    assert code == 0, err
    assert "continuing after epoch 1 of 3" in err
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "whole")


def test_a_killed_run_goes_on_to_the_same_bytes(icdctl: CommandLine, tmp_path: Path) -> None:
    folder = flat(tmp_path / "pets")
    command = ("train", "--model", "res8", "--dataset", f"imagefolder:{folder}", *QUICK, *RICH)
    program = (
        "import os, sys\n"
        "from icdctl.cli import main\n"
        "from icdctl.engine.checkpoint import CheckpointWriter\n"
        "saved = CheckpointWriter.save\n"
        "def save_and_die(*given):\n"
        "    saved(*given)\n"
        "    os.kill(os.getpid(), 9)\n"
        "CheckpointWriter.save = save_and_die\n"
        "main(sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", program, *map(str, command), "--out", str(out)]
    killed = subprocess.run(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert killed.returncode == -9
    assert icdctl(*command, "--out", out, "--resume")[0] == 0
    assert icdctl(*command, "--out", tmp_path / "whole")[0] == 0
    assert numbers(out) == numbers(tmp_path / "whole")


def test_a_run_does_not_go_on_with_other_images(icdctl: CommandLine, tmp_path: Path) -> None:
    folder = flat(tmp_path / "pets")
    command = ("train", "--model", "res8", "--dataset", f"imagefolder:{folder}", *QUICK, "--epochs", "2")
    out = ("--out", tmp_path / "out")
    assert icdctl(*command, *out, "--time-limit", "0.001s")[0] == 0
    kept = (folder / "cat" / "1.png").read_bytes()
    picture(999).save(folder / "cat" / "1.png")
    code, stdout, err = icdctl(*command, *out, "--resume")
    assert (code, stdout) == (1, "")
    assert "have changed since this run began" in err
    (folder / "cat" / "1.png").write_bytes(kept)  # another time of change, the same image
    assert icdctl(*command, *out, "--resume")[0] == 0


def test_a_teacher_for_other_images_or_classes_is_refused(icdctl: CommandLine, tmp_path: Path, runs: Runs) -> None:
    def refused(folder: Path, *more: str) -> str:
        given = ("--method", "kd", "--teacher", runs.teacher, "--student", "res8", "--dataset", f"imagefolder:{folder}")
        code, stdout, err = icdctl("distill", *given, *ONE, *more)
        assert (code, stdout) == (1, "")
        assert "icdctl train --model res8 --dataset imagefolder:DIR" in err
        return err

    assert "takes images of 32 x 32, but this run has 48 x 48" in refused(runs.pets, "--image-size", "48")
    assert "--image-size 32" in refused(runs.pets, "--image-size", "48")
    other = grow(tmp_path / "other", {"bird": 3, "cow": 3, "dog": 3})
    assert "has other classes: `cat` in the place where `imagefolder:other` has `cow`" in refused(other)
    assert "has 3 classes, `imagefolder:more` has 4" in refused(grow(tmp_path / "more", dict.fromkeys("abcd", 3)))
    given = ("--method", "kd", "--teacher", runs.teacher, "--student", "res8", "--dataset", "digits100")
    code, _, err = icdctl("distill", *given, *ONE)
    assert code == 1
    assert "was trained on `imagefolder:pets`, but this run uses `digits100`" in err


def test_models_for_images_of_other_sizes_are_not_compared(icdctl: CommandLine, tmp_path: Path, runs: Runs) -> None:
    other = tmp_path / "other"
    train = ("train", "--model", "res8", "--dataset", f"imagefolder:{runs.pets}", *ONE, "--image-size", "24")
    assert icdctl(*train, "--out", other)[0] == 0
    code, _, err = icdctl("eval", runs.teacher, "--teacher", other)
    assert code == 1
    assert "reads images of 24 x 24, those of `imagefolder:pets` are 32 x 32" in err
    named = ("--dataset", f"imagefolder:{runs.pets}")
    assert measured(icdctl, other, "--teacher", other, *named) == metrics_of(other)["final_top1"]


def test_a_module_of_ones_own_is_measured_at_the_size_that_it_reads(tmp_path: Path, runs: Runs) -> None:
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)
    )
    name = f"imagefolder:{runs.pets}"
    assert planning.plan("train", {"student": module, "dataset": name}).image_size == 224
    size: dict[str, Any] = {"dataset": name, "image_size": 48, "device": "cpu"}
    result = library.train(student=module, epochs=1, batch_size=8, out=str(tmp_path / "out"), **size)
    found = library.evaluate(result.model, **size).numbers
    assert (found.top1, found.loss) == (result.top1, result.metrics["final_loss"])
    with pytest.raises(UsageError, match="what size of images"):
        library.evaluate(module, dataset=name)


def test_without_a_teacher_no_image_is_decoded_before_that_is_said(icdctl: CommandLine, tmp_path: Path) -> None:
    folder = flat(tmp_path / "pets")
    (folder / "cat" / "0.png").write_bytes(b"no image")
    given = ("--method", "kd", "--teacher", "res20", "--student", "res8", "--dataset", f"imagefolder:{folder}")
    code, _, err = icdctl("distill", *given, *ONE)
    assert code == 1
    assert "teacher `res20` for `imagefolder:pets` is not there" in err
    assert "icdctl train --model res20 --dataset imagefolder:DIR --as-teacher" in err
    assert "decoded" not in err


@pytest.mark.parametrize(("batch_size", "is_left_out"), [(17, True), (16, False), (18, False), (9, False)])
def test_an_image_alone_in_the_last_batch_is_left_out_and_that_is_said(
    icdctl: CommandLine, tmp_path: Path, batch_size: int, is_left_out: bool
) -> None:
    folder = in_parts(tmp_path / "pets", "train", "val")
    given = ("train", "--model", "vgg8", "--dataset", f"imagefolder:{folder}", "--image-size", "16", "--epochs", "1")
    code, _, err = icdctl(*given, "--batch-size", str(batch_size), "--out", tmp_path / "run")
    assert code == 0, err
    assert ("each epoch leaves out one of the 18 training images" in err) == is_left_out
    assert (f"alone in the last batch of {batch_size}" in err) == is_left_out


def test_images_too_small_for_a_model_are_refused(icdctl: CommandLine, tmp_path: Path) -> None:
    folder = flat(tmp_path / "pets")
    command = ("train", "--model", "mv2", "--dataset", f"imagefolder:{folder}", *ONE, "--image-size", "8")
    code, stdout, err = icdctl(*command, "--out", "run")
    assert (code, stdout) == (2, "")
    assert "images of 8 x 8 are too small for `mv2`, which needs 16 x 16" in err
    assert "--image-size 16" in err
    assert not Path("run").exists()


def test_unlabelled_images_change_what_a_student_learns_from_a_teacher_alone(
    icdctl: CommandLine, tmp_path: Path, runs: Runs
) -> None:
    folder = Path(shutil.copytree(runs.pets, tmp_path / "pets"))
    before = distilled(icdctl, folder, runs.teacher, "--out", tmp_path / "before")
    plain = ("train", "--model", "res8", "--dataset", f"imagefolder:{folder}", *ONE)
    assert icdctl(*plain, "--out", tmp_path / "plain")[0] == 0
    fill(folder / "unlabeled", 8, seed=95)
    after = distilled(icdctl, folder, runs.teacher, "--out", tmp_path / "after")
    code, _, err = icdctl(*plain, "--out", tmp_path / "again")
    assert code == 0
    assert "left out because there is no teacher: 8" in err
    assert metrics_of(after)["train_images"] == metrics_of(before)["train_images"] + 8
    assert numbers(tmp_path / "again") == numbers(tmp_path / "plain")
    assert 0 <= float(history(after)[0]["train_top1"]) <= 100


SNIPPET_FILES = {"large.jpg": (301, 199), "small.png": (11, 60), "turned.jpg": (90, 45), "deep.png": (50, 40)}


@pytest.mark.parametrize("file", SNIPPET_FILES)
def test_the_cards_program_gives_the_class_that_icdctl_gives(
    icdctl: CommandLine, tmp_path: Path, runs: Runs, file: str
) -> None:
    out = tmp_path / "export"
    assert icdctl("export", runs.teacher, "--out", out)[0] == 0
    image = picture(5, *SNIPPET_FILES[file])
    exif = Image.Exif()
    exif[0x0112] = 6 if file == "turned.jpg" else 1
    if file == "deep.png":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        assert image.mode == "I;16"
    image.save(out / file, exif=exif)
    program = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert program is not None
    command = [sys.executable, "-c", program[1].replace("image.png", file)]
    said = subprocess.run(command, cwd=out, capture_output=True, text=True, check=True).stdout.strip()
    model = OnnxClassifier(out / "model.onnx")
    pixels = torch.from_numpy(decode_image(out / file, resize=(32, 32), crop=None))[None]
    assert said == CLASSES[int(model.logits(pixels).argmax())]
    shown = program[1].replace("image.png", file) + "\nimport sys\nsys.stdout.buffer.write(image.tobytes())"
    done = subprocess.run([sys.executable, "-c", shown], cwd=out, capture_output=True, check=True)
    assert done.stdout.endswith(pixels.numpy().tobytes()), "the very pixels"
