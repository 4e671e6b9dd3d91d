"""Modules of one's own: trained, kept under their own keys, measured, and exported to a verified graph."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import CommandLine
from safetensors.torch import load_file
from torch import Tensor, nn

import icdctl as library
from icdctl import data, models
from icdctl.config.dataset_request import dataset_request
from icdctl.errors import UsageError
from icdctl.registry.trained import CustomModuleError

SMALL: dict[str, Any] = {"dataset": "digits100", "train_images": 200, "test_images": 100, "epochs": 1, "device": "cpu"}


class WithState(nn.Linear):
    """Keeps more than tensors."""

    def get_extra_state(self) -> Any:
        return {"made": "by hand"}

    def set_extra_state(self, state: Any) -> None:
        pass


class NormAndReLU(nn.BatchNorm2d):
    """A batch norm that does more than its class says, as those of other libraries do."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).relu()


class Own(nn.Module):
    """Three kinds of batch norm, and a linear head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), NormAndReLU(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.third = nn.BatchNorm2d(width, affine=False)
        self.classify = nn.Linear(width, 100)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.third(self.second(self.first(images))).mean(dim=(2, 3)))
        return logits


def folder_of_images(folder: Path) -> str:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
    return f"imagefolder:{folder}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Own, float]:
    out = tmp_path_factory.mktemp("own") / "run"
    module = Own()
    result = library.train(model=module, **SMALL, out=str(out))
    return out, module.eval(), result.top1


def test_weights_go_by_the_modules_own_keys(trained: tuple[Path, Own, float], tmp_path: Path) -> None:
    out, module, _ = trained
    fresh = Own()
    fresh.load_state_dict(load_file(out / "student.safetensors"))
    assert torch.equal(fresh.classify.weight, module.classify.weight)
    again = Own()
    library.train(
        model=again, **SMALL, init_weights=str(out / "student.safetensors"), lr=1e-9, out=str(tmp_path / "on")
    )
    assert torch.allclose(again.classify.weight, module.classify.weight, atol=1e-6)


def test_a_run_is_measured_with_the_module_that_it_is_of(trained: tuple[Path, Own, float]) -> None:
    out, _, top1 = trained
    fresh = Own()
    before = fresh.classify.weight.detach().clone()
    assert library.evaluate(out, model=fresh, device="cpu").numbers.top1 == top1
    assert torch.equal(fresh.classify.weight, before), "the module that was handed over is left as it is"
    with pytest.raises(library.IcdctlError, match="do not fit `Own`"):
        library.evaluate(out, model=Own(width=4), device="cpu")


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_a_module_of_ones_own_becomes_a_verified_graph(
    trained: tuple[Path, Own, float], tmp_path: Path, kind: Any
) -> None:
    out, module, top1 = trained
    exported = library.export(out, tmp_path / "onnx", model=Own(), input_kind=kind)
    assert exported.report.passed
    assert exported.accuracy == {"top1": top1, "images": 100}
    assert exported.description.model == "Own"
    held = data.load(dataset_request("digits100", train_images=200, test_images=100))
    normalised = held.preprocessing.normalise(held.test_images)
    given = held.test_images if kind == "uint8" else normalised
    session = onnxruntime.InferenceSession(str(exported.model_file), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = module(normalised).numpy()
    np.testing.assert_allclose(session.run(["logits"], {"image": given.numpy()})[0], expected, rtol=1e-4, atol=1e-4)


def test_weights_from_elsewhere_are_exported_with_their_module(tmp_path: Path) -> None:
    torch.save(Own().state_dict(), tmp_path / "mine.pth")
    assert library.export(tmp_path / "mine.pth", model=Own(), dataset="digits100").report.passed
    photos = folder_of_images(tmp_path / "photos")
    act: Any
    for act in (library.evaluate, library.export):
        with pytest.raises(UsageError, match="nothing says what size of images the module reads"):
            act(tmp_path / "mine.pth", model=Own(), dataset=photos)
        with pytest.raises(UsageError, match="`model` is a type"):
            act(tmp_path / "mine.pth", model=Own, dataset="digits100")
    with pytest.raises(UsageError, match="100 logits, the data set has 200 classes"):
        library.export(tmp_path / "mine.pth", tmp_path / "other", model=Own(), dataset="cub200")


def test_without_the_module_the_message_says_what_is_missing(
    trained: tuple[Path, Own, float], tmp_path: Path, icdctl: CommandLine
) -> None:
    out, _, _ = trained
    with pytest.raises(CustomModuleError, match="a custom module"):
        library.export(out, tmp_path / "onnx")
    with pytest.raises(CustomModuleError):
        library.distill(method="kd", teacher=str(out), student="res8", **SMALL, out=str(tmp_path / "student"))
    with pytest.raises(UsageError, match="`Own` is a module, expected what holds its weights"):
        library.export(Own())  # type: ignore[arg-type]  # the mistake that is told
    with pytest.raises(UsageError, match="the configuration is a Own"):
        library.train(Own(), **SMALL)  # type: ignore[arg-type]  # the same mistake
    code, _, err = icdctl("eval", out)
    assert (code, "holds weights of a custom module" in err, "model=MODULE" in err) == (2, True, True)
    code, told, _ = icdctl("validate", out)
    assert (code, "weights  skipped" in told) == (0, True)


def test_a_student_of_a_module_is_registered_like_any_other(
    trained: tuple[Path, Own, float], tmp_path: Path, icdctl: CommandLine
) -> None:
    _, module, _ = trained
    student = tmp_path / "student"
    library.distill(method="cd_sdd_kd", teacher=module, student="res8", **SMALL, out=str(student))
    code, told, err = icdctl("registry", "add", student)
    assert (code, told) == (0, "digits100/res8-cd_sdd_kd@v1\n"), err
    assert "distilled from custom" in icdctl("registry", "show", "res8-cd_sdd_kd")[1]
    assert models.hash_weights(module) in icdctl("registry", "show", "res8-cd_sdd_kd")[1]
    again = {"method": "cd_sdd_kd", "student": "res8", **SMALL, "out": str(student), "resume": True}
    assert library.distill(**again, teacher=module).finished
    with pytest.raises(library.IcdctlError, match="teacher_sha256"):
        library.distill(**again, teacher=Own())


def test_a_module_that_can_not_be_run_in_float64_is_refused(tmp_path: Path) -> None:
    class Fixed(Own):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.float())

    torch.save(Fixed().state_dict(), tmp_path / "fixed.pth")
    with pytest.raises(library.IcdctlError, match="can't be run in float64"):
        library.export(tmp_path / "fixed.pth", model=Fixed(), dataset="digits100")


def test_a_module_with_another_answer_in_training_mode_is_refused(tmp_path: Path) -> None:
    Answer = namedtuple("Answer", ["logits", "auxiliary"])

    class WithAuxiliary(Own):
        def forward(self, images: Tensor) -> Any:
            logits = super().forward(images)
            return Answer(logits, logits) if self.training else logits

    with pytest.raises(UsageError, match="gives a Answer in training mode"):
        library.train(model=WithAuxiliary(), **SMALL, out=str(tmp_path / "run"))


def test_a_module_whose_state_is_more_than_tensors_is_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), WithState(3072, 100))
    with pytest.raises(UsageError, match=r"`1\._extra_state` of the module's state is a dict, expected tensors alone"):
        library.distill(method="kd", teacher=module, student="res8", **SMALL, out=str(tmp_path / "taught"))
    with pytest.raises(UsageError, match="expected tensors alone"):
        library.train(model=module, **SMALL, out=str(tmp_path / "trained"))
    assert not (tmp_path / "trained").exists()
