"""Checkpoints of other programs: any nesting, wrappers, averages, counters; and first weights of other classes."""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CommandLine
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import icdctl as library
from icdctl import data, files, models
from icdctl.config.dataset_request import dataset_request
from icdctl.engine.observer import SilentObserver
from icdctl.errors import ArtifactError, IcdctlError
from icdctl.registry.trained import identify, resolve

State = dict[str, Tensor]
DATASET = data.describe(dataset_request("digits100"))
WRAPPERS = ("module.", "_orig_mod.", "model.")
SMALL: dict[str, Any] = {"dataset": "digits100", "train_images": 128, "test_images": 100, "epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def model() -> models.Classifier:
    torch.manual_seed(0)
    found = models.create("res8", 100)
    found.state_dict()["bn1.num_batches_tracked"].fill_(7)
    return found.requires_grad_(False)


@pytest.fixture(scope="module")
def state(model: models.Classifier) -> State:
    return dict(model.state_dict())


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def assert_read(path: Path | str, state: State) -> models.Weights:
    """The file is recognised as res8, and gives this state."""
    found = models.read_weights(path)
    assert identify(Path(path), found.tensors, dataset=DATASET) == ("res8", 100)
    other = models.create("res8", 100)
    loaded = models.load_weights(other, path)
    for key, value in other.state_dict().items():
        expected = state.get(key, torch.zeros((), dtype=torch.int64))
        assert torch.equal(value, expected), key
    return loaded


@pytest.mark.parametrize(
    "wrappers", [chosen for count in (1, 2, 3) for chosen in itertools.permutations(WRAPPERS, count)], ids="".join
)
def test_prefixes_of_wrappers_in_any_order(tmp_path: Path, state: State, wrappers: tuple[str, ...]) -> None:
    loaded = assert_read(saved(tmp_path / "w.pth", {"state_dict": prefixed(state, "".join(wrappers))}), state)
    assert loaded.notes == ()


def test_a_student_inside_a_wrapped_distiller(tmp_path: Path, state: State) -> None:
    teacher = models.create("res14", 100).state_dict()
    whole = prefixed(state, "_orig_mod.module.student._orig_mod.") | prefixed(teacher, "_orig_mod.module.teacher.")
    assert_read(saved(tmp_path / "w.pth", {"model": whole}), state)


def test_a_layer_that_was_compiled_alone(tmp_path: Path, state: State) -> None:
    compiled = {key.replace("layer1.", "layer1._orig_mod."): value for key, value in state.items()}
    assert compiled.keys() != state.keys()
    assert_read(saved(tmp_path / "w.pth", compiled), state)


def test_the_keys_of_a_module_that_has_such_names_itself(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(3, 2)

    first, second = Named(), Named()
    for content in (first.state_dict(), prefixed(first.state_dict(), "module."), first.model.state_dict()):
        nn.init.zeros_(second.model.weight)
        models.load_weights(second, saved(tmp_path / "w.pth", content))
        assert torch.equal(second.model.weight, first.model.weight)


def test_batch_norms_that_did_not_count_batches_yet(tmp_path: Path, state: State) -> None:
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    assert_read(saved(tmp_path / "w.pth", {"model": old}), old)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"net": state, "acc": 93.2, "epoch": 7},
        lambda state: {"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {}, "loss": 0.3},
        lambda state: {"anything at all": state},
        lambda state: {"checkpoint": {"model": state, "epoch": 1}},
        lambda state: {"model": state, "criterion": {"centers": torch.zeros(3)}},
        lambda state: {"net": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}},
        lambda state: {"net": state, "lr_scheduler": {"last": torch.zeros(1)}, "rng": {"cpu": torch.zeros(1)}},
    ],
)
def test_the_one_set_of_weights_is_found_under_any_key(
    tmp_path: Path, state: State, wrap: Callable[[State], object]
) -> None:
    assert_read(saved(tmp_path / "w.pth", wrap(state)), state)


@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("net", "ema")])
def test_an_average_beside_the_weights_is_asked_for_by_name(
    tmp_path: Path, state: State, names: tuple[str, str]
) -> None:
    average = {key: value + 1 for key, value in state.items()}
    path = saved(tmp_path / "w.pth", {names[0]: state, names[1]: prefixed(average, "module.")})
    with pytest.raises(ArtifactError, match="several sets of weights") as caught:
        models.read_weights(path)
    assert all(f"`{name}`" in caught.value.message for name in names)
    assert f"{path}:{names[1]}" in caught.value.hint

    first, second = assert_read(f"{path}:{names[0]}", state), assert_read(f"{path}:{names[1]}", average)
    assert f"taken are the weights under `{names[1]}`" in second.notes[0]
    assert len({first.sha256, second.sha256, files.sha256_file(path)}) == 3
    with pytest.raises(ArtifactError, match="no weights under `other`"):
        models.read_weights(f"{path}:other")


def test_an_average_alone_is_taken_and_said(tmp_path: Path, state: State) -> None:
    loaded = assert_read(saved(tmp_path / "w.pth", {"model_ema": state, "epoch": 3}), state)
    assert loaded.notes == (f"`{tmp_path / 'w.pth'}`: taken are the weights under `model_ema`",)


def test_two_models_of_no_usual_name_are_not_told_apart(tmp_path: Path, state: State) -> None:
    with pytest.raises(ArtifactError, match="several sets of weights: `first`, `second`"):
        models.read_weights(saved(tmp_path / "w.pth", {"first": state, "second": state}))


def test_a_name_with_a_colon_is_a_file_where_there_is_one(tmp_path: Path, state: State) -> None:
    saved(tmp_path / "w.pth", {"model": state, "ema": state})
    assert_read(saved(tmp_path / "w.pth:ema", state), state)
    with pytest.raises(ArtifactError, match=r"`.*none\.pth:ema` does not exist"):
        models.read_weights(tmp_path / "none.pth:ema")


def test_counters_of_profilers_and_averages_are_left_out_and_said(
    tmp_path: Path, model: models.Classifier, state: State
) -> None:
    averaged = AveragedModel(model).state_dict()
    counted = {**averaged, "module.total_ops": torch.zeros(1).double(), "module.fc.total_params": torch.ones(1)}
    for content in (averaged, {"model_ema": averaged}, prefixed(counted, "_orig_mod."), counted):
        loaded = assert_read(saved(tmp_path / "w.pth", content), state)
        assert "left out are counters that are no weights: `" in loaded.notes[-1]
    assert all(name in loaded.notes[-1] for name in ("n_averaged", "module.total_ops", "module.fc.total_params"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_training_scripts_keep_beside_the_weights(tmp_path: Path, state: State, zipped: bool) -> None:
    history: defaultdict[str, Any] = defaultdict(list, loss=[1.0, 0.5], counts=defaultdict(int, a=1))
    beside = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("runs/a"), pure=pathlib.PurePosixPath("b")),
        "simple": types.SimpleNamespace(best=np.float32(70.5)),
        "history": history,
        "numbers": [np.bool_(True), np.int8(1), np.uint8(1), np.int32(1), np.uint64(1), np.float16(1), np.float64(1)],
        "ordered": OrderedDict(a=1),
        "shape": torch.Size([1, 2]),
    }
    torch.save({**beside, "model": OrderedDict(state)}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert_read(tmp_path / "w.pth", state)


def test_built_in_types_may_be_named_but_not_called(tmp_path: Path) -> None:
    class Calls:
        def __reduce__(self) -> tuple[object, ...]:
            return list, ("abc",)

    with pytest.raises(ArtifactError):
        models.read_weights(saved(tmp_path / "w.pth", {"model": {"w": torch.zeros(1)}, "more": Calls()}))


def test_what_fits_none_names_the_nearest_model_and_where_it_differs(tmp_path: Path) -> None:
    state = dict(models.create("res20", 100).state_dict())
    state["layer1.1.conv1.weight"] = torch.zeros(16, 16, 5, 5)
    state["fc.weight"] = torch.zeros(100, 32)
    with pytest.raises(ArtifactError) as caught:
        identify(Path("w.pth"), state, dataset=DATASET)
    assert "the nearest is `res20` for images of 32 x 32, but" in caught.value.message
    assert "`layer1.1.conv1.weight` is [16, 16, 5, 5], expected [16, 16, 3, 3]" in caught.value.message
    assert "`fc.weight` is [100, 32], expected [100, 64]" in caught.value.message

    del state["bn1.weight"]
    state["extra.weight"] = torch.zeros(3)
    with pytest.raises(ArtifactError, match=r"but `bn1\.weight` is missing; `extra\.weight` is not part"):
        identify(Path("w.pth"), state, dataset=DATASET)


def test_eval_says_which_weights_it_took(icdctl: CommandLine, tmp_path: Path, state: State) -> None:
    path = saved(tmp_path / "w.pth", {"model": state, "model_ema": state})
    given = ("--dataset", "digits100", "--test-images", "20", "--json")
    code, _, err = icdctl("eval", path, *given)
    assert (code, f"hint: name one of them after a colon, e.g. `{path}:model_ema`" in err) == (1, True)
    code, out, err = icdctl("eval", f"{path}:model_ema", *given)
    assert (code, json.loads(out)["num_images"]) == (0, 20)
    assert err == f"`{path}`: taken are the weights under `model_ema`; it also holds `model`\n"
    plan = (
        "distill",
        "--method",
        "kd",
        "--teacher",
        f"{path}:model_ema",
        "--student",
        "res8",
        "--dataset",
        "digits100",
    )
    code, out, _ = icdctl(*plan, "--dry-run")
    assert (code, json.loads(out)["teacher"]) == (0, "res8")


def test_first_weights_of_other_classes_give_all_but_the_head(tmp_path: Path) -> None:
    torch.manual_seed(5)
    start = models.create("res8", 7)
    models.save_weights(tmp_path / "seven.safetensors", start, {})
    said: list[str] = []

    class Said(SilentObserver):
        def message(self, text: str) -> None:
            said.append(text)

    given = {**SMALL, "init_weights": str(tmp_path / "seven.safetensors"), "lr": 1e-12, "model": "res8"}
    result = library.train(**given, out=str(tmp_path / "new"), observer=Said())

    found, expected = result.model.state_dict(), start.state_dict()
    torch.testing.assert_close(found["layer3.0.conv1.weight"], expected["layer3.0.conv1.weight"])
    assert found["fc.weight"].shape == (100, 64)
    assert [text for text in said if "head" in text] == [
        f"`{tmp_path / 'seven.safetensors'}`: all but the head is taken, which is new: "
        "the file has 7 classes, the data set 100"
    ]
    assert result.metrics["head_is_new"] is True
    again = library.train(**given, out=str(tmp_path / "again"))
    assert (again.out / "student.safetensors").read_bytes() == (result.out / "student.safetensors").read_bytes()


def test_first_weights_of_a_custom_module_with_other_classes(tmp_path: Path) -> None:
    def module(num_classes: int) -> nn.Module:
        pool = [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*pool, nn.Linear(4, num_classes))

    models.save_weights(tmp_path / "w.safetensors", module(3), {})
    given = {**SMALL, "init_weights": str(tmp_path / "w.safetensors"), "model": module(100)}
    assert library.train(**given, out=str(tmp_path / "new")).metrics["head_is_new"] is True


@pytest.mark.parametrize("kind", ["folder", "file", "registry"])
def test_first_weights_by_any_name(icdctl: CommandLine, tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    models.save_weights(run / "student.safetensors", models.create("res8", 100), DATASET.weights_metadata("res8"))
    named = {"folder": run, "file": run / "student.safetensors", "registry": "registry:res8-ce"}[kind]
    if kind == "registry":
        assert icdctl("train", "--model", "res8", *flags(SMALL), "--out", "made", "--as-teacher")[0] == 0
    code, out, err = icdctl("train", "--model", "res8", "--dataset", "digits100", "--init-weights", named, "--dry-run")
    assert code == 0, err
    config = json.loads(out)
    assert Path(config["init_weights"]).name == "student.safetensors"
    assert config["init_sha256"] == files.sha256_file(Path(config["init_weights"]))


def test_first_weights_of_a_run_that_is_not_finished_or_has_changed(icdctl: CommandLine, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    given = ("train", "--model", "res8", "--dataset", "digits100", "--init-weights", run, "--dry-run")
    code, _, err = icdctl(*given)
    assert (code, "its run is not finished" in err) == (1, True)
    models.save_weights(run / "student.safetensors", models.create("res8", 100), {})
    files.write_json(run / "metrics.json", {"weights_sha256": "0" * 64})
    code, _, err = icdctl(*given)
    assert (code, "it has changed since its run wrote it" in err) == (1, True)


def test_first_weights_that_differ_in_more_than_the_head_are_refused(tmp_path: Path) -> None:
    models.save_weights(tmp_path / "w.safetensors", models.create("res14", 7), {})
    with pytest.raises(IcdctlError, match="do not fit `res8`"):
        library.train(**SMALL, model="res8", init_weights=str(tmp_path / "w.safetensors"), out=str(tmp_path / "x"))


def test_a_weights_file_that_is_evaluated_keeps_its_own_head(tmp_path: Path) -> None:
    models.save_weights(tmp_path / "w.safetensors", models.create("res8", 7), {})
    with pytest.raises(IcdctlError, match="7 classes"):
        resolve(str(tmp_path / "w.safetensors"), dataset=DATASET)


def flags(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
