"""Trained models by any name: what `resolve`, `identify` and `load` make of a run folder, a file, a registered name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from icdctl import api, data, models, registry
from icdctl.config.dataset_request import dataset_request
from icdctl.data import DatasetInfo
from icdctl.errors import ArtifactError, UsageError
from icdctl.registry.trained import TrainedModel, identify, resolve

SMALL: dict[str, Any] = {"dataset": "digits100", "train_images": 40, "test_images": 20, "epochs": 1, "device": "cpu"}


class Net(nn.Module):
    """A custom module: no model of icdctl has its keys."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, stride=2)
        self.classify = nn.Linear(4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.body(images).mean(dim=(2, 3)))
        return logits


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of res8, registered as versions 1 and 2, and a run of a custom module."""
    here = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("ICDCTL_HOME", str(here / "state"))
        for seed in (0, 1):
            api.train(model="res8", **SMALL, seed=seed, out=str(here / f"seed{seed}"))
            registry.add(here / "registry", here / f"seed{seed}", name="res8")
        api.train(model=Net(), **SMALL, out=str(here / "custom"))
    return here


@pytest.fixture
def run(project: Path, tmp_path: Path) -> Path:
    """A copy of a finished run folder, to be changed."""
    return Path(shutil.copytree(project / "seed0", tmp_path / "run"))


def dataset_of(name: str) -> DatasetInfo:
    return data.describe(dataset_request(name))


def assert_is_run(found: TrainedModel, run: Path) -> None:
    assert (found.model, found.dataset, found.num_classes) == ("res8", "digits100", 100)
    assert found.class_names == dataset_of("digits100").class_names
    assert found.preprocessing == dataset_of("digits100").preprocessing
    assert found.sha256 == json.loads((run / "metrics.json").read_text())["weights_sha256"]
    model = found.load()
    assert not model.training
    expected = models.read_weights(run / "student.safetensors").tensors
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_a_run_folder_and_its_weights_file_are_the_same_model(project: Path, run: Path) -> None:
    for target in (run, run / "student.safetensors"):
        found = resolve(str(target))
        assert_is_run(found, project / "seed0")
        assert (found.path, found.origin) == (run / "student.safetensors", str(target))
        assert (found.source, found.licence) == ("trained with icdctl on `digits100`", None)


def test_a_run_folder_without_weights_says_whether_its_run_is_finished(run: Path, tmp_path: Path) -> None:
    (run / "student.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"`student\.safetensors`") as unfinished:
        resolve(str(run))
    assert f"--resume --out {run}" in unfinished.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"`student\.safetensors`") as empty:
        resolve(str(tmp_path / "empty"))
    assert "--resume" not in empty.value.hint


def test_weights_that_changed_since_their_run_are_refused_by_folder_and_taken_by_file(run: Path) -> None:
    weights = models.read_weights(run / "student.safetensors")
    changed = {**weights.tensors, "fc.bias": weights.tensors["fc.bias"] + 1}
    sha256 = models.save_weights(run / "student.safetensors", changed, weights.metadata)
    with pytest.raises(ArtifactError, match=f"has sha256 {sha256[:12]}.*metrics.json.*{weights.sha256[:12]}") as caught:
        resolve(str(run))
    assert f"`{run / 'student.safetensors'}`" in caught.value.hint
    assert resolve(str(run / "student.safetensors")).sha256 == sha256


def test_a_file_replaced_after_it_was_found_is_not_loaded(project: Path, run: Path) -> None:
    found = resolve(str(run))
    shutil.copy(project / "seed1" / "student.safetensors", found.path)
    with pytest.raises(ArtifactError, match=r"student\.safetensors` changed while it was being read"):
        found.load()


def test_registered_names_are_the_newest_version_or_the_one_named(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project / "registry"
    for target, seed in (("res8", 1), ("digits100/res8", 1), ("res8@v2", 1), ("res8@v1", 0)):
        found = resolve(f"registry:{target}", registry_folder=folder)
        assert found.origin == f"registry:{target}"
        assert_is_run(found, project / f"seed{seed}")
    with pytest.raises(ArtifactError, match="no version 3 of `digits100/res8`"):
        resolve("registry:res8@v3", registry_folder=folder)
    with pytest.raises(ArtifactError, match="res14"):
        resolve("registry:res14", registry_folder=folder)
    monkeypatch.chdir(project)
    assert_is_run(resolve("registry:res8@v1"), project / "seed0")


@pytest.mark.parametrize("kind", ["bare", "wrapped"])
def test_a_pth_file_needs_its_data_set_and_is_identified(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "teacher.pth"
    state = models.create("wrn16_1", 100).state_dict()
    torch.save(state if kind == "bare" else {"epoch": 240, "model": state}, path)
    with pytest.raises(UsageError, match=r"teacher\.pth") as caught:
        resolve(str(path))
    assert "--dataset cifar100" in caught.value.hint
    found = resolve(str(path), dataset=dataset_of("cifar100"))
    assert (found.model, found.dataset, found.num_classes) == ("wrn16_1", "cifar100", 100)
    assert found.source == "a file without a record"
    assert all(torch.equal(value, state[key]) for key, value in found.load().state_dict().items())


def test_safetensors_without_metadata_are_identified_and_metadata_that_say_too_little_are_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "w.safetensors"
    model = models.create("res14", 100)
    models.save_weights(path, model, {})
    assert resolve(str(path), dataset=dataset_of("cifar100")).model == "res14"
    complete = dataset_of("cifar100").weights_metadata("res14")
    for left_out in ("class_names", "dataset", "model", "preprocessing"):
        models.save_weights(path, model, {key: value for key, value in complete.items() if key != left_out})
        with pytest.raises(ArtifactError, match=left_out):
            resolve(str(path))
    models.save_weights(path, model, {**complete, "class_names": ["one"]})
    with pytest.raises(ArtifactError, match="1 class names"):
        resolve(str(path))


def test_weights_of_another_number_of_classes_are_refused(tmp_path: Path) -> None:
    torch.save(models.create("res8", 10).state_dict(), tmp_path / "ten.pth")
    with pytest.raises(ArtifactError, match=r"10 classes.*`cifar100` has 100") as caught:
        resolve(str(tmp_path / "ten.pth"), dataset=dataset_of("cifar100"))
    assert "--dataset" in caught.value.hint


@pytest.mark.parametrize(("name", "dataset"), [("res8", "cifar100"), ("res8x4", "cub200"), ("shuv2", "cub200")])
def test_every_model_is_told_by_keys_and_shapes_alone(name: str, dataset: str) -> None:
    known = dataset_of(dataset)
    state = models.create(name, known.num_classes, image_size=known.preprocessing.size).state_dict()
    assert identify(Path("w.pth"), state, dataset=known) == (name, known.num_classes)


def test_weights_that_fit_no_model_are_refused() -> None:
    small_images = models.create("res8", 200).state_dict()
    headless = {key: value for key, value in models.create("res8", 100).state_dict().items() if key != "fc.weight"}
    for tensors, dataset in ((Net().state_dict(), "cifar100"), (headless, "cifar100"), (small_images, "cub200")):
        with pytest.raises(ArtifactError, match=rf"`w\.pth` fit none of the {len(models.MODELS)} models"):
            identify(Path("w.pth"), tensors, dataset=dataset_of(dataset))


def test_weights_of_a_custom_module_need_the_module(project: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(str(project / "custom"))
    assert "model=MODULE" in caught.value.hint
    module = Net()
    before = module.classify.weight.detach().clone()
    found = resolve(str(project / "custom"), module=module)
    assert (found.model, found.dataset, found.num_classes) == ("Net", "digits100", 100)
    loaded = models.read_weights(project / "custom" / "student.safetensors").tensors
    assert torch.equal(found.load().head.weight, loaded["classify.weight"])
    assert torch.equal(module.classify.weight, before), "the module that was handed over is left as it is"
    with pytest.raises(UsageError, match="`model` is a type"):
        resolve(str(project / "custom"), module=Net)  # type: ignore[arg-type]  # the class, as many would pass it


def test_weights_without_metadata_take_a_custom_module_and_a_data_set(tmp_path: Path) -> None:
    module = Net()
    torch.save(module.state_dict(), tmp_path / "net.pth")
    with pytest.raises(UsageError) as caught:
        resolve(str(tmp_path / "net.pth"), module=module)
    assert "--dataset" in caught.value.hint
    with pytest.raises(ArtifactError, match="fit none"):
        resolve(str(tmp_path / "net.pth"), dataset=dataset_of("digits100"))
    found = resolve(str(tmp_path / "net.pth"), dataset=dataset_of("digits100"), module=Net())
    assert (found.model, found.dataset) == ("Net", "digits100")
    assert torch.equal(found.load().head.weight, module.classify.weight)
    with pytest.raises(UsageError, match=r"100 logits.*200 classes"):
        resolve(str(tmp_path / "net.pth"), dataset=dataset_of("cub200"), module=Net()).load()


@pytest.mark.parametrize("target", ["nowhere", "nowhere.pth", "registry:nothing", "registry:No Name"])
def test_what_is_not_there_is_named(target: str) -> None:
    with pytest.raises((ArtifactError, UsageError), match=target.removeprefix("registry:")) as caught:
        resolve(target)
    assert caught.value.hint
