"""The golden numbers: what the reference computes, on weights and inputs made from a formula.

The folder may be another one of the same format (`ICDCTL_GOLDEN`), so seeds, shapes and class counts come from its
files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import golden_support as golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from step_support import READS, make_step
from torch import Tensor

from icdctl import models
from icdctl.engine.teacher import InlineTeacher
from icdctl.methods import distillation_terms, patch_logits
from icdctl.methods.logit import dkd_loss, kd_loss, nkd_loss
from icdctl.methods.patch import cluster_loss, scale_decoupled_loss

CPU = torch.device("cpu")
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


# Losses: the functions, and the sums of terms that the reference's trainer backpropagates.

LOSS_FILE = golden.read("losses.json")
LOSS_ARRAYS = golden.read_arrays("losses.npz") if LOSS_FILE else {}
CASES: dict[str, dict[str, Any]] = {
    case["id"]: case for case in LOSS_FILE.get("cases", []) if case["section"] in ("loss", "forward_train")
}
NONFINITE_RULE = (
    "inputs that are not finite: the reference may zero the loss, icdctl lets it through (checked: not finite)"
)
GUARDED_RULE = "the reference zeroes the loss of finite inputs, even in float64: icdctl has its value (checked: finite)"
OVERFLOW_RULE = "the reference is not finite even in float64: icdctl has the loss's value (checked: finite)"
LOWERED_RULE = (
    "target more than 850 T above the other classes: the reference lowers it by 1000, which no longer drops it; "
    "icdctl drops it (checked: finite)"
)
REFUSED_RULE = "scale sets that the reference refuses: icdctl has a value, and the reference has none to compare with"
SCALES_OF_PATCHES = {1: (1,), 4: (2,), 5: (1, 2), 16: (4,), 17: (1, 4), 20: (2, 4), 21: (1, 2, 4)}
GRADIENT_FLOOR = 1e-6
"""Gradients below this norm are compared as if they had it: where student and teacher agree they are rounding."""


def loss_inputs(case: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    inputs = {}
    for name, key in case["inputs"].items():
        value = torch.from_numpy(np.array(LOSS_ARRAYS[key])).to(device)
        inputs[name] = value.to(dtype) if value.is_floating_point() else value
    for name in case.get("grad_wrt", []):
        inputs[name].requires_grad_()
    return inputs


def losses_of(case: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The case's loss by icdctl, as the reference's function reduces it."""
    numbers, method = case["hparams"], case["method"]
    student, teacher, labels = inputs["student"], inputs["teacher"], inputs.get("target", torch.empty(0))
    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    if "temp" in numbers:
        rows = partial(nkd_loss, gamma=numbers["gamma"], temperature=numbers["temp"], drop_target=False)
    elif "alpha" in numbers:
        rows = partial(dkd_loss, **numbers)
    else:

        def rows(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            return kd_loss(student, teacher, temperature=numbers["temperature"])

    if method == "cluster_loss":
        scales = SCALES_OF_PATCHES[student.shape[2]]
        value = cluster_loss(student, teacher, scales=scales, corrected=False).mean()
        return {"loss": numbers["gamma"] * numbers["temperature"] ** 2 * value}
    if student.dim() == 3:
        return {"loss": scale_decoupled_loss(rows, student, teacher, labels, teacher[:, :, 0].argmax(dim=1)).mean()}
    if method.endswith("(per row)"):
        value = rows(student, teacher, labels)
        return {"loss": value / len(value) if method.startswith("dkd") else value}
    return {"loss": rows(student, teacher, labels).mean()}


def terms_of(case: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The case's terms by icdctl, under the reference's names."""
    if case["method"] == "NONE":
        ce = distillation_terms("ce", student_logits=inputs["student_logits"], labels=inputs["target"])["ce"]
        return {"ce": ce}
    patches = inputs["student_patch"].shape[2]
    method, settings = reference_settings(case["method"], case["hparams"])
    terms = distillation_terms(
        method,
        student_logits=inputs["student_logits"],
        student_patches=inputs["student_patch"],
        teacher_logits=inputs["teacher_logits"],
        teacher_patches=inputs["teacher_patch"],
        labels=inputs["target"],
        scales=SCALES_OF_PATCHES[patches],
        epoch=case["hparams"]["epoch"],
        settings=settings,
    )
    named = {f"loss_{name}": term for name, term in terms.items()}
    return {**named, "__total__": torch.stack(list(terms.values())).sum()}


def reference_settings(reference_method: str, numbers: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Our method and settings for a reference class and its configuration."""
    method = reference_method.lower()
    if method.endswith("nkd"):
        settings = {"ce_weight": numbers["DKD.CE_WEIGHT"], "warmup_epochs": numbers["DKD.WARMUP"]}
        if method != "nkd":
            settings |= {"beta": numbers["DKD.BETA"], "temperature": numbers["DKD.T"]}
    elif method.endswith("dkd"):
        settings = {
            "alpha": numbers["DKD.ALPHA"],
            "beta": numbers["DKD.BETA"],
            "temperature": numbers["DKD.T"],
            "ce_weight": numbers["DKD.CE_WEIGHT"],
            "warmup_epochs": numbers["DKD.WARMUP" if method == "dkd" else "warmup"],
        }
    else:
        settings = {
            "temperature": numbers["KD.TEMPERATURE"],
            "ce_weight": numbers["KD.LOSS.CE_WEIGHT"],
            "kd_weight": numbers["KD.LOSS.KD_WEIGHT"],
        }
    return method, settings | ({"gamma": numbers["CD.GAMMA"]} if method.startswith("cd_") else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case_id", CASES)
def test_loss_reaches_the_float64_value_of_the_reference(case_id: str, dtype: torch.dtype) -> None:
    check_loss(case_id, dtype, CPU)


def check_loss(case_id: str, dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[case_id]
    section = f"{case['section']} {str(dtype).removeprefix('torch.')}"
    inputs = loss_inputs(case, dtype, device)
    actual = losses_of(case, inputs) if case["section"] == "loss" else terms_of(case, inputs)
    is_finite = all(torch.isfinite(value).all() for value in actual.values())
    if not is_finite and not all(torch.isfinite(value).all() for value in inputs.values()):
        golden.record(section, skipped_rule=NONFINITE_RULE)
        return
    rule = rule_to_skip(case, inputs)
    if rule is not None:
        assert is_finite
        golden.record(section, skipped_rule=rule)
        return

    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (1e-9, 1e-12)
    assert set(actual) == set(case["expected"]["float64"])
    for name, expected in case["expected"]["float64"].items():
        wanted = LOSS_ARRAYS[expected["npz"]] if isinstance(expected, dict) else np.float64(expected)
        np.testing.assert_allclose(
            actual[name].detach().double().cpu().numpy(), wanted, rtol=rtol, atol=atol, err_msg=name
        )
    check_gradients(case, inputs, actual)
    golden.record(section, checked=1)


def rule_to_skip(case: dict[str, Any], inputs: dict[str, Tensor]) -> str | None:
    """Why the reference's number is not the loss's value, if it is not."""
    if "expected_error" in case:
        return REFUSED_RULE
    if case["guard_hit"]["float64"]:
        return GUARDED_RULE
    expected = [
        LOSS_ARRAYS[value["npz"]] if isinstance(value, dict) else np.float64(value)
        for value in case["expected"]["float64"].values()
    ]
    if not all(np.isfinite(value).all() for value in expected):
        return OVERFLOW_RULE
    temperature = case["hparams"].get("temperature", case["hparams"].get("DKD.T"))
    if "dkd" in case["method"].lower() and any(
        gap_above_others(value, inputs["target"]) > 850 * temperature
        for name, value in inputs.items()
        if name != "target"
    ):
        return LOWERED_RULE
    return None


def gap_above_others(logits: Tensor, labels: Tensor) -> float:
    """How far the target's logit lies above the next one at most, over images and patches: [B, K(, P)], [B]."""
    index = labels.reshape(-1, 1, *[1] * (logits.dim() - 2)).expand(-1, 1, *logits.shape[2:])
    others = logits.detach().double().scatter(1, index, -torch.inf).amax(dim=1)
    return (logits.detach().double().gather(1, index).squeeze(1) - others).amax().item()


def check_gradients(case: dict[str, Any], inputs: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    total = next(actual[name] for name in ("__total__", "loss", "ce") if name in actual)
    if total.requires_grad:
        torch.autograd.backward(total.sum())
    for name, expected in (case.get("grad") or {}).items():
        if expected is not None and not expected["finite"]:
            continue  # the reference's own gradient is no number, though its value is one
        gradient = inputs[name].grad
        found = (torch.zeros_like(inputs[name]) if gradient is None else gradient).cpu()
        wanted = (
            torch.zeros_like(found) if expected is None else torch.from_numpy(np.array(LOSS_ARRAYS[expected["npz"]]))
        )
        error = (found.double() - wanted.double()).norm() / max(wanted.double().norm().item(), GRADIENT_FLOOR)
        assert error <= gradient_tolerance(expected, found.dtype), f"{name}: {error:.1e}"


def gradient_tolerance(expected: dict[str, Any] | None, dtype: torch.dtype) -> float:
    """1e-5, or 4 times what the reference's own float32 run loses where a gradient is ill-conditioned."""
    own = float((expected or {}).get("float32_rel_err") or 0.0)
    return max(1e-5, 4 * own) if dtype == torch.float32 and np.isfinite(own) else 1e-5


# Trajectories: steps of training, by the very step that the engine runs.

TRAJECTORIES: dict[str, dict[str, Any]] = {
    trajectory["spec"]["id"]: trajectory for trajectory in golden.read("trajectory.json").get("trajectories", [])
}


def trajectory_model(name: str, spec: dict[str, Any], role: str) -> models.Classifier:
    model = models.create(name, spec["num_classes"])
    golden.fill(model, fill_seed=spec[f"{role}_fill_seed"], gain=spec[f"{role}_gain"])
    return model.double()


@pytest.mark.parametrize("trajectory_id", TRAJECTORIES)
def test_training_follows_the_trajectory_of_the_reference(trajectory_id: str) -> None:
    check_trajectory(trajectory_id, CPU)


def check_trajectory(trajectory_id: str, device: torch.device) -> None:
    trajectory = TRAJECTORIES[trajectory_id]
    spec = trajectory["spec"]
    method, settings = reference_settings(
        spec["distiller"],
        {
            "DKD.ALPHA": spec["alpha"],
            "DKD.BETA": spec["beta"],
            "DKD.T": spec["T"],
            "DKD.CE_WEIGHT": spec["ce_weight"],
            "warmup": spec["warmup"],
            "CD.GAMMA": spec["gamma"],
        },
    )
    scales = golden.scales_of(spec["M"])
    student = trajectory_model(spec["student"], spec, "student").to(device)
    teacher = InlineTeacher(trajectory_model(spec["teacher"], spec, "teacher"), reads=READS, device=device)
    step = make_step(
        method,
        student,
        None,
        lambda parameters: torch.optim.SGD(
            parameters, spec["lr"], momentum=spec["momentum"], weight_decay=spec["weight_decay"], fused=True
        ),
        steps_per_epoch=spec["steps"],
        device=device,
        scales=scales,
        settings=settings,
        clip_norm=spec["clip"],
    )
    step.start_epoch(spec["epoch"])
    comparable = min(trajectory.get("comparable_steps_float64", spec["steps"]) - 2, spec["steps"])
    student.train()
    for index in range(spec["steps"]):
        images, labels = (tensor.to(device) for tensor in trajectory_batch(spec, index))
        step(index, images, labels, teacher(images))
    for index in range(comparable):
        wanted = trajectory["steps_float64"][index]
        expected = [wanted[f"loss_{name}"] for name in step.objective.term_names] + [wanted["grad_norm_before_clip"]]
        np.testing.assert_allclose(step.log[index].cpu().numpy(), expected, rtol=1e-6, err_msg=f"step {index}")
    golden.record("trajectory steps", checked=comparable)
    late = spec["steps"] - comparable
    golden.record("trajectory steps", skipped_rule="chaotic: past the file's comparable steps less two", skipped=late)


def trajectory_batch(spec: dict[str, Any], index: int) -> tuple[Tensor, Tensor]:
    random = np.random.RandomState(spec["data_seed"] + index)
    images = random.standard_normal((spec["batch"], 3, 32, 32)).astype(np.float32)
    labels = random.randint(0, spec["num_classes"], size=spec["batch"])
    return torch.from_numpy(images).double(), torch.from_numpy(labels)
