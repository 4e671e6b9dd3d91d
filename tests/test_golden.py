"""The golden numbers: what the reference computes, on weights and inputs made from a formula.

The folder may be another one of the same format (`ICDCTL_GOLDEN`), so seeds, shapes and class counts come from its
files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import golden_support as golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icdctl import models
from icdctl.methods import patch_logits

MODEL_ENTRIES: dict[str, dict[str, Any]] = golden.read("models.json").get("entries", {})
TRAIN_STEPS = [
    (entry_id, step)
    for entry_id, entry in MODEL_ENTRIES.items()
    for step in ("train_step_plain", "train_step_sdd_124")
    if step in entry
]
WRN_STATISTICS_RULE = (
    "running statistics and num_batches_tracked of wrn train steps: the reference runs three batch norms twice a step, "
    "icdctl once"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def golden_model(entry: dict[str, Any]) -> models.Classifier:
    dataset = "cub200" if entry["cub200"] else None
    model = models.create(entry["model"], entry["num_classes"], dataset=dataset)
    golden.fill(model, fill_seed=entry["fill_seed"], gain=entry["gain"])
    return model


@pytest.mark.parametrize("entry_id", MODEL_ENTRIES)
def test_model_has_the_keys_order_and_shapes_of_the_reference(entry_id: str) -> None:
    entry = MODEL_ENTRIES[entry_id]
    model = golden_model(entry)
    state = model.state_dict()

    listed = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()]
    assert listed == entry["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == entry["params"]
    assert len(list(model.parameters())) == entry["param_tensors"]
    norms = entry["bn_before_relu_plain"]
    listed_norms = [] if "error" in norms else [norm["module"] for norm in norms]
    assert model.preactivation_norms() == listed_norms
    for key, expected in entry["fill_checksum"].items():
        assert hashlib.sha256(state[key].numpy().tobytes()).hexdigest() == expected["sha256"], key
    golden.record("models: state_dict", checked=1)


@pytest.mark.parametrize("entry_id", MODEL_ENTRIES)
def test_model_computes_what_the_reference_computes(entry_id: str) -> None:
    entry = MODEL_ENTRIES[entry_id]
    arrays = golden.read_arrays(entry["npz"] if "/" in entry["npz"] else f"models/{entry['npz']}")
    model = golden_model(entry).eval()
    with torch.no_grad():
        outputs = model.outputs(golden.normal_input(entry["input"]))
        patches = {
            spec["array"]: patch_logits(outputs.feature_map, model.head, scales=golden.scales_of(scales))
            for scales, spec in entry["sdd"].items()
        }

    golden.assert_near(outputs.logits, arrays["logits"], tolerance=1e-5, what="logits")
    golden.assert_near(outputs.pooled, arrays["pooled_feat"], tolerance=1e-5, what="pooled")
    for name, found in patches.items():
        golden.assert_near(found, arrays[name], tolerance=1e-5, what=name)
    assert_stages(outputs.stages, entry["feats"], "stage")
    if entry["preact_feats"] is None:
        assert outputs.preactivations == outputs.stages
    else:
        assert_stages(outputs.preactivations, entry["preact_feats"], "pre-activation")
    golden.record("models: eval forward", checked=1)


def assert_stages(found: tuple[Tensor, ...], expected: list[dict[str, Any]], what: str) -> None:
    for index, (stage, summary) in enumerate(zip(found, expected, strict=True)):
        golden.assert_summary(stage, summary, tolerance=1e-5, what=f"{what} {index}")


@pytest.mark.parametrize(("entry_id", "step"), TRAIN_STEPS)
def test_model_trains_one_step_as_the_reference_does(entry_id: str, step: str) -> None:
    entry = MODEL_ENTRIES[entry_id]
    expected = entry[step]
    model = golden_model(entry).double().train()
    outputs = model.outputs(golden.normal_input(expected["input"]).double())
    loss = F.cross_entropy(outputs.logits, torch.tensor(expected["target"]["values"]))
    patch_weight = re.search(r"([\d.]+) \* mean\(patch_logits \*\* 2\)", expected["loss_formula"])
    if patch_weight:
        patches = patch_logits(outputs.feature_map, model.head, scales=golden.scales_of(step))
        loss = loss + float(patch_weight[1]) * patches.square().mean()
    torch.autograd.backward(loss)

    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    golden.assert_summary(outputs.logits, expected["logits"], tolerance=1e-6, what="logits")
    total = expected["grad_l2_total"]
    parameters = list(model.named_parameters())
    for (name, parameter), wanted in zip(parameters, expected["grad_l2"], strict=True):
        assert parameter.grad is not None, name
        # The floor is for convolution biases before a batch norm, whose gradient is zero but for rounding.
        assert parameter.grad.norm().item() == pytest.approx(wanted, rel=1e-6, abs=1e-9 * total), name
    golden.record("models: train step", checked=1)
    if entry["family"] == "wrn":
        golden.record("models: train step", skipped_rule=WRN_STATISTICS_RULE)
    else:
        assert_statistics(model, expected)


def assert_statistics(model: models.Classifier, expected: dict[str, Any]) -> None:
    buffers = dict(model.named_buffers())
    for leaf in ("running_mean", "running_var"):
        values = torch.cat([value for key, value in buffers.items() if key.endswith(leaf)])
        wanted = expected[f"{leaf}_after"]
        assert values.norm().item() == pytest.approx(wanted["l2"], rel=1e-6)
        assert values.sum().item() == pytest.approx(wanted["sum"], rel=1e-6, abs=1e-6 * wanted["l2"])
    counters = {key: int(value) for key, value in buffers.items() if key.endswith("num_batches_tracked")}
    assert {key: count for key, count in counters.items() if count != 1} == expected["num_batches_tracked_not_1"]
