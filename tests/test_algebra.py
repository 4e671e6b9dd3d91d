"""Methods made of methods: how they are spelt, what they compute, which make no sense, and that they train."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from step_support import make_step
from test_engine import Stop
from torch import Tensor
from torch.testing import assert_close

import icdctl as library
from icdctl import methods, models
from icdctl.engine import run as engine
from icdctl.engine.teacher import InlineTeacher
from icdctl.errors import UsageError
from icdctl.grid.cells import read_grid
from icdctl.methods import METHODS, check_settings, distillation_terms, pool_regions
from icdctl.methods.method import Objective

SMALL: dict[str, Any] = {"dataset": "digits100", "train_images": 200, "test_images": 100, "device": "cpu"}
ROWS = [name for name, row in METHODS.items() if isinstance(row, methods.LogitMethod) and not row.patches]
COMBINED = ["kd+ls", "dkd+ea", "kd+ls+ea", "sdd_dkd+ls", "cd_sdd_rld", "sdd_ttm+ea", "dist+kd", "cd_sdd_dkd+ls+skd"]
ON_LOGITS = [*sorted(methods.LOGIT_METHODS.keys() - {"ce"}), "dist", "skd", *COMBINED]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("KD", "kd"),
        ("CD-SDD-DKD", "cd_sdd_dkd"),
        ("kd+LS", "kd+ls"),
        ("kd+ea+ls", "kd+ls+ea"),
        (" kd + fitnet ", "fitnet+kd"),
        ("kd+ls+fitnet", "fitnet+kd+ls"),
        ("sdd_rld+dist", "dist+sdd_rld"),
        ("cd-sdd-wttm", "cd_sdd_wttm"),
    ],
)
def test_one_method_has_one_name(typed: str, name: str) -> None:
    assert methods.resolve(typed) == name
    assert methods.resolve(name) == name
    assert methods.get(typed).defaults == methods.get(name).defaults


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kdd", "did you mean `kd`"),
        ("sdd_ce", "`ce` compares nothing with a teacher"),
        ("sdd_dist", "`dist` is not one"),
        ("cd_kd", "choose `cd_sdd_kd`"),
        ("fitnet+ls", "`fitnet` is not one"),
        ("cat+ls", "`cat` is not one"),
        ("dist+ea", "`dist` is not one"),
        ("normkd+ls", "it is `kd+ls`"),
        ("kd+ls+ls", "has `ls` twice"),
        ("kd+dkd+kd", "has `kd` twice"),
        ("kd+kd+ls", "has `kd` twice"),
        ("ls+kd", "changes the method to its left"),
        ("kd++ls", "empty part"),
        ("+", "empty part"),
        ("ce+kd", "every method has its cross-entropy"),
        ("kd+nothing", "unknown method `nothing`"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        methods.resolve(name)
    assert words in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("name", ROWS)
def test_every_loss_per_row_has_sdd_and_the_cluster_term(name: str) -> None:
    plain, decoupled, clustered = (methods.get(prefix + name) for prefix in ("", "sdd_", "cd_sdd_"))
    assert [row.patches + row.cluster for row in (plain, decoupled, clustered)] == [0, 1, 2]
    assert {row.family for row in (plain, decoupled, clustered)} == {name}
    assert clustered.defaults.keys() - plain.defaults.keys() == {"gamma"}
    assert methods.builds_on(f"cd_sdd_{name}") == [f"sdd_{name}", name, "ce"]


def test_what_methods_build_on() -> None:
    assert methods.builds_on("ce") == []
    assert methods.builds_on("cd_sdd_kd+ls") == ["sdd_kd+ls", "kd+ls", "kd", "ce"]
    assert methods.builds_on("fitnet+kd+ls") == ["fitnet", "kd+ls", "ce"]


def test_settings_of_a_sum_are_those_of_its_parts() -> None:
    settings = check_settings("fitnet+kd", {"kd.temperature": 2, "fitnet.weight": 0.5})
    assert settings["kd.temperature"] == 2
    assert settings["fitnet.weight"] == 0.5
    assert settings["ce_weight"] == 1
    assert "kd.ce_weight" not in settings
    for key in ("temperature", "crd.weight", "kd.gamma"):
        with pytest.raises(UsageError, match="unknown setting"):
            check_settings("fitnet+kd", {key: 1})
    with pytest.raises(UsageError, match=r"setting `kd\.temperature` is 0, expected a number from 0\.001"):
        check_settings("fitnet+kd", {"kd.temperature": 0})


def inputs(batch: int = 6, num_classes: int = 7, *, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        2 * torch.randn(batch, num_classes, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return {
        "student_logits": student.mean(dim=(2, 3)).to(dtype),
        "teacher_logits": teacher.mean(dim=(2, 3)).to(dtype),
        "student_patches": pool_regions(student, (1, 2, 4)).to(dtype),
        "teacher_patches": pool_regions(teacher, (1, 2, 4)).to(dtype),
        "labels": torch.arange(batch) % num_classes,
        "scales": (1, 2, 4),
    }


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([term.double() for term in terms.values()]).sum()


@pytest.mark.parametrize("variant", methods.VARIANTS)
@pytest.mark.parametrize(("batch", "num_classes"), [(6, 7), (2, 7), (1, 7), (6, 2)])
@pytest.mark.parametrize("method", ON_LOGITS)
def test_terms_are_finite_and_their_gradient_reaches_the_student_alone(
    method: str, batch: int, num_classes: int, variant: str
) -> None:
    given = inputs(batch, num_classes, dtype=torch.float32)
    tensors: dict[str, Tensor] = {
        key: value.requires_grad_() for key, value in given.items() if key.endswith(("logits", "patches"))
    }
    terms = distillation_terms(method, **given, settings={"variant": variant}, epoch=3)
    torch.autograd.backward(total(terms))
    assert all(term.dim() == 0 and torch.isfinite(term) for term in terms.values())
    for key, tensor in tensors.items():
        if key.startswith("teacher"):
            assert tensor.grad is None
        elif tensor.grad is not None:
            assert torch.isfinite(tensor.grad).all()
    assert tensors["student_logits"].grad is not None


@pytest.mark.parametrize("method", ON_LOGITS)
def test_the_order_of_the_images_does_not_matter(method: str) -> None:
    given = inputs()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved: dict[str, Any] = {key: value[order] if isinstance(value, Tensor) else value for key, value in given.items()}
    assert_close(distillation_terms(method, **moved), distillation_terms(method, **given), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ON_LOGITS)
def test_a_student_in_half_precision_loses_only_its_digits(method: str) -> None:
    model = models.create("res8", 10)
    teacher = models.create("res8", 10).eval()
    reads = methods.get(method).teacher_reads(check_settings(method, {}))
    answers = InlineTeacher(teacher, reads=reads, device=torch.device("cpu"))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    step = make_step(
        method,
        model,
        teacher,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        steps_per_epoch=1,
        device=torch.device("cpu"),
        autocast=True,
    )
    step.start_epoch(1)
    step(0, images, torch.arange(4), answers(images))
    assert step.log.isfinite().all()


@pytest.mark.parametrize("method", ["dkd+kd", "cd_sdd_rld+dist", "gdkd+ls+skd"])
def test_a_sum_is_its_parts_with_one_cross_entropy(method: str) -> None:
    given = inputs()
    parts = {part: methods.resolve(part) for part in _parts(method)}
    bases = {part: part.split("+")[0] for part in parts}
    settings = {f"{base}.weight": float(number + 2) for number, base in enumerate(bases.values())}
    found = distillation_terms(method, **given, settings={**settings, "ce_weight": 3.0})
    expected = {}
    for part, base in bases.items():
        own = distillation_terms(part, **given)
        own.pop("ce")
        for term, value in own.items():
            expected[base if len(own) == 1 else f"{base}.{term}"] = settings[f"{base}.weight"] * value
    ce = distillation_terms("ce", student_logits=given["student_logits"], labels=given["labels"])["ce"]
    assert_close(found, {"ce": 3 * ce, **expected})


def _parts(method: str) -> list[str]:
    return [name for name in methods.builds_on(methods.resolve(method)) if name != "ce"]


def test_modifiers_change_the_method_to_their_left() -> None:
    given = inputs()
    moved = {**given, "student_logits": 3 * given["student_logits"] + 5}
    for method, changes in (("kd", True), ("kd+ls", False)):
        first, second = (
            distillation_terms(method, **each, settings={"variant": "corrected"})["kd"].item()
            for each in (given, moved)
        )
        assert (first != pytest.approx(second, rel=1e-9)) == changes
    sure = {**given, "teacher_logits": 1e4 * given["teacher_logits"]}
    assert distillation_terms("kd+ea", **sure, settings={"variant": "corrected"})["kd"].item() == pytest.approx(0)
    assert distillation_terms("kd", **sure)["kd"].item() > 1


def test_published_dskd_gives_every_patch_the_mean_weight() -> None:
    given = inputs()
    values = {
        (method, variant): distillation_terms(method, **given, settings={"variant": variant}, epoch=20)["kd"].item()
        for method in ("sdd_dkd", "sdd_dkd+ls", "sdd_dkd+ls")
        for variant in methods.VARIANTS
    }
    assert values["sdd_dkd", "published"] == pytest.approx(values["sdd_dkd", "corrected"], rel=1e-12)
    # 1 / K and 1 / (K - 1) alone would be a few per cent at 7 classes, of both weights alike.
    assert values["sdd_dkd+ls", "published"] != pytest.approx(values["sdd_dkd+ls", "corrected"], rel=1e-3)


def test_a_single_method_is_built_as_ever_and_parts_in_their_order() -> None:
    def built(method: str) -> Objective:
        torch.manual_seed(5)
        probe = methods.ModelProbe(models.create("res8", 10), (32, 32))
        torch.manual_seed(6)
        return methods.get(method).build(
            probe, probe, check_settings(method, {}), scales=(), supervision=methods.Supervision()
        )

    alone, summed = built("fitnet").state_dict(), built("kd+fitnet").state_dict()
    assert {f"parts.fitnet.{key}": value.tolist() for key, value in alone.items()} == {
        key: value.tolist() for key, value in summed.items()
    }


def test_parts_that_see_other_views_or_another_teacher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "two", replace(METHODS["kd"], num_views=2))
    monkeypatch.setitem(METHODS, "batchwise", replace(METHODS["kd"], teacher_in_eval_mode=False))
    with pytest.raises(UsageError, match="`dkd` sees 1 views of each image and `two` 2"):
        methods.resolve("dkd+two")
    with pytest.raises(UsageError, match="`batchwise` wants a teacher that normalises"):
        methods.check_settings("dkd+batchwise", {})
    with pytest.raises(UsageError, match="`ofd` wants a teacher that normalises"):
        methods.check_settings("kd+ofd", {})
    assert methods.check_settings("kd+ofd", {"variant": "corrected"})["ofd.weight"] == 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("algebra") / "teacher"
    library.train(model="res8", epochs=1, **SMALL, out=str(out))
    return out


def test_new_methods_and_combinations_train_side_by_side(teacher: Path, tmp_path: Path) -> None:
    chosen = [*(name for name in ROWS if name not in ("kd", "dkd", "nkd")), "dist", "skd", "cat", *COMBINED[-4:]]
    results = library.distill_many(
        method=chosen, teacher=str(teacher), student="res8", max_steps=3, epochs=1, **SMALL, out=str(tmp_path / "runs")
    )
    for name, result in zip(chosen, results, strict=True):
        assert not isinstance(result, engine.Failure), name


def test_a_sum_trains_is_resumed_to_the_same_bytes_and_names_its_terms(
    icdctl: CommandLine, teacher: Path, tmp_path: Path
) -> None:
    given = ["distill", "--method", "sdd_kd+ls+FitNet", "--teacher", teacher, "--student", "res8", "--epochs", "2"]
    given += [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    given += ["--set", "fitnet.weight=0.5", "--set", "sdd_kd.temperature=3", "--deterministic"]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert icdctl(*given, "--out", whole)[0] == 0
    assert (whole / "history.csv").read_text().startswith("epoch,lr,ce,fitnet,sdd_kd,")
    config = json.loads((whole / "config.json").read_text())
    assert config["method"] == "fitnet+sdd_kd+ls"
    assert config["settings"]["sdd_kd.temperature"] == 3
    options = {key: config[key] for key in ("method", "settings", "student", "epochs")}
    for stop in (Stop(after_epoch=0, images_later=100), Stop(after_epoch=1)):
        with pytest.raises(engine.Interrupted):
            library.distill(
                **options, **SMALL, teacher=str(teacher), deterministic=True, out=str(parts), resume=True, observer=stop
            )
    assert icdctl(*given, "--out", parts, "--resume")[0] == 0
    assert (parts / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


def test_a_grid_has_folders_without_plus_signs(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(
        "pairs: {'digits100/res8:res8': {}}\n"
        "methods: {kd+ls: {temperature: 3}, fitnet+kd: {fitnet.weight: 2}, sdd_rld: {}}\n"
    )
    grid = read_grid(tmp_path)
    assert [(cell.name, cell.method) for cell in grid.cells] == [
        ("digits100-res8-res8-kd_ls-temperature3", "kd+ls"),
        ("digits100-res8-res8-fitnet_kd-fitnet_weight2", "fitnet+kd"),
        ("digits100-res8-res8-sdd_rld", "sdd_rld"),
    ]
    assert grid.cells[1].options["settings"] == {"fitnet.weight": 2.0}


def test_a_map_that_four_regions_can_not_give_is_refused(teacher: Path, tmp_path: Path) -> None:
    given = {**SMALL, "method": "cat+kd", "teacher": str(teacher), "student": "res8", "max_steps": 1}
    with pytest.raises(UsageError, match=r"`map_resolution` is 3, which can't be averaged from the 4 x 4 regions"):
        library.distill(**given, settings={"cat.map_resolution": 3}, out=str(tmp_path / "run"))
