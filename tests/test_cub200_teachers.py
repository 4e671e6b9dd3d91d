"""Teachers for CUB-200-2011, and what is trained with them: from a published file to a registered student."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandLine
from cub200_support import (
    PUBLISHED,
    cached,
    fetched,
    own_state,
    put_data,
    shared_state,
)
from fetch_support import CUB_TRAIN, jpeg

from icdctl import api, data, models, registry, teachers
from icdctl.api.export_inputs import facts_of
from icdctl.config.dataset_request import dataset_request
from icdctl.data import cub200
from icdctl.data.decode import decode_image
from icdctl.errors import ArtifactError
from icdctl.registry import trained
from icdctl.registry.artifact import read_manifest
from icdctl.teachers import fetch, published_teachers

__all__ = ["fetched", "own_state", "shared_state"]


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
