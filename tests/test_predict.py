"""`icdctl predict`: image files in, classes out, with the pixels that training and evaluation see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandLine
from PIL import Image
from torch import Tensor, nn

import icdctl as library
from icdctl import data
from icdctl.config.dataset_request import dataset_request

SMALL: dict[str, Any] = {"dataset": "digits100", "train_images": 600, "test_images": 200, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its export; it need not be right, but certain of some images."""
    out = tmp_path_factory.mktemp("trained") / "run"
    library.train(model="res8", **SMALL, epochs=2, out=str(out))
    library.export(out)
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images as files, in folders; and what is no image."""
    folder = tmp_path_factory.mktemp("pictures")
    held = data.load(dataset_request("digits100", train_images=600, test_images=200))
    for number, pixels in enumerate(held.test_images):
        path = folder / f"part{number % 3}" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


def number_of(path: str) -> int:
    return int(Path(path).stem)


@pytest.mark.parametrize("target", ["", "onnx", "onnx/model.onnx", "student.safetensors"])
def test_files_have_the_classes_that_evaluation_finds(
    icdctl: CommandLine, run: Path, pictures: Path, target: str
) -> None:
    code, out, err = icdctl("predict", run / target, pictures, "--top", "3", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["skipped"] == []
    rows = told["predictions"]
    assert sorted(number_of(row["image"]) for row in rows) == list(range(200))
    held = data.load(dataset_request("digits100", train_images=600, test_images=200))
    right = sum(row["class"] == held.class_names[held.test_labels[number_of(row["image"])]] for row in rows)
    assert right / 2 == pytest.approx(library.evaluate(run).numbers.top1)
    for row in rows:
        shares = [guess["probability"] for guess in row["top"]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1 + 1e-9
        assert row["top"][0] == {"class": row["class"], "probability": row["probability"]}


def test_a_line_an_image(icdctl: CommandLine, run: Path, pictures: Path) -> None:
    first, second = pictures / "part0" / "000.png", pictures / "part1" / "001.png"
    code, out, _ = icdctl("predict", run, first, second, "--top", "2")
    assert code == 0
    heading, *lines = out.splitlines()
    assert heading.split() == ["image", "class", "probability", "class", "2", "probability", "2"]
    assert [line.split()[0] for line in lines] == [str(first), str(second)]
    (told,) = library.predict(run, second, top=2).predictions
    assert lines[1].split()[1:3] == [told.top[0].class_name, f"{told.top[0].probability:.4f}"]


def test_any_mode_size_and_orientation_is_read_as_training_reads_it(run: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    grey = Image.fromarray(random.integers(0, 256, (50, 70), dtype=np.uint8))
    grey.save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "rgb.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    grey.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    sixteen = np.asarray(grey).astype(np.uint16) * 256
    Image.fromarray(sixteen).save(tmp_path / "sixteen.png")
    found = {each.image.stem: each.top for each in library.predict(run, tmp_path, top=100).predictions}
    assert len(found["grey"]) == 100
    assert found["grey"] == found["rgb"] == found["turned"] == found["sixteen"]


def test_broken_files_stop_it_or_are_left_out(icdctl: CommandLine, run: Path, pictures: Path, tmp_path: Path) -> None:
    whole = (pictures / "part0" / "000.png").read_bytes()
    for name, content in (("a.png", whole), ("b.png", whole[:200]), ("c.jpg", b""), ("d.png", whole)):
        (tmp_path / name).write_bytes(content)
    code, out, err = icdctl("predict", run, tmp_path)
    assert (code, out) == (1, "")
    assert f"error: 2 of 4 images can't be decoded: `{tmp_path / 'b.png'}`" in err
    assert "`--skip-broken`" in err
    code, out, err = icdctl("predict", run, tmp_path, "--skip-broken", "--json")
    assert code == 0
    told = json.loads(out)
    assert [Path(row["image"]).name for row in told["predictions"]] == ["a.png", "d.png"]
    assert [Path(row["image"]).name for row in told["skipped"]] == ["b.png", "c.jpg"]
    assert "warning: left out: " in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("RUN", "nowhere.png"), 1, "image `nowhere.png` does not exist"),
        (("RUN", "empty"), 1, "`empty` holds no images"),
        (("RUN", "empty", "--top", "0"), 2, "--top"),
        (("RUN",), 2, "missing argument 'IMAGE'"),
        (("nowhere", "empty"), 1, "`nowhere`"),
        (("RUN", "empty", "--device", "tpu"), 2, "unknown device `tpu`"),
    ],
)
def test_what_can_not_be_meant_is_told(
    icdctl: CommandLine,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    found, out, err = icdctl("predict", *(str(run) if argument == "RUN" else argument for argument in arguments))
    assert (found, out) == (code, "")
    assert message in err


class Constant(nn.Module):
    """Always of the last class."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 100)
        nn.init.zeros_(self.head.weight)
        with torch.no_grad():
            self.head.bias.copy_(torch.arange(100.0))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.mean(dim=(1, 2, 3))[:, None])
        return logits


def test_a_module_of_ones_own_predicts_too(pictures: Path) -> None:
    result = library.predict(Constant(), [pictures / "part0"], dataset="digits100")
    assert {each.top[0].class_name for each in result.predictions} == {"99"}
    with pytest.raises(library.IcdctlError, match="the data set is not named"):
        library.predict(Constant(), pictures)
    for classes in (10, 1000):
        other = Constant()
        other.head = nn.Linear(1, classes)
        with pytest.raises(library.IcdctlError, match=f"has {classes} classes, expected the 100 of its data set"):
            library.predict(other, pictures, dataset="digits100")
    broken = Constant()
    nn.init.constant_(broken.head.bias, torch.nan)
    with pytest.raises(library.IcdctlError, match="logits that are not finite"):
        library.predict(broken, pictures, dataset="digits100")
