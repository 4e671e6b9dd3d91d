"""The golden numbers of newer losses: what the official code of each method computes, and what its paper says.

The folder may be another one of the same format (`ICDCTL_GOLDEN`), so everything comes from its files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import golden_support as golden
import numpy as np
import pytest
import torch
from torch import Tensor

from icdctl.methods.batch import cat_loss, dist_losses, skd_direction_loss, skd_mask_shares
from icdctl.methods.logit import cross_entropy_loss, dkd_loss, kd_loss
from icdctl.methods.newer_logit import (
    abkd_loss,
    entropy_weights,
    gdkd_loss,
    ldrld_loss,
    normkd_loss,
    rld_loss,
    standardise,
    ttm_loss,
)
from icdctl.methods.patch import scale_decoupled_loss

FILE = golden.read("newer.json") if (golden.FOLDER / "newer.json").is_file() else {}
ARRAYS = golden.read_arrays("newer.npz") if FILE else {}
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in FILE.get("cases", [])}

NOT_HERE = {
    "mlkd": "two views with RandAugment: MLKD is not a method of icdctl",
    "mlkd_ls": "as mlkd",
    "mlkd_noaug": "as mlkd",
    "mlkd_cc": "as mlkd",
    "mlkd_bc": "as mlkd",
    "ea_mlkd": "as mlkd",
    "crld": "two views with RandAugment: CRLD is not a method of icdctl",
    "gdkd3": "an ablation of the repository: three groups instead of two",
    "abkd_dkd": "the alpha-beta divergence inside DKD is not offered; `abkd` and `abkd+ls` are",
    "abkd_ttm": "the alpha-beta divergence inside TTM is not offered; `abkd` and `abkd+ls` are",
    "normkd_dkd": "NormKD's temperatures inside DKD are not offered; `normkd` is",
    "wkd_flow": "Sinkhorn distances need a cost matrix of teacher features: WKD is not a method of icdctl",
    "wkd_logit": "as wkd_flow",
    "wkd_sep": "as wkd_flow",
    "dot": "an optimiser, checked in test_dot.py",
}
"""Reference function -> why icdctl has none to compare with it."""
ABLATION_RULE = "an ablation that icdctl does not offer (GDKD's other strategies and KLs, CAT's partial or binary maps)"
UNDEFINED_RULE = "the reference is nan in float64, or raises: icdctl has the loss's value (checked: finite)"
DIAGNOSTIC_RULE = "diagnostic outputs of the reference that enter no loss"

FLOAT32_ROUNDING = 1e-5
"""The norm of what rounding leaves of a gradient whose parts cancel; logits are up to 100, weights up to 72."""

Given = dict[str, Tensor]
Numbers = dict[str, Any]


def standardised(inputs: Given, is_standardised: bool, corrected: bool) -> tuple[Tensor, Tensor]:
    pair = inputs["student"], inputs["teacher"]
    if not is_standardised:
        return pair
    student, teacher = (standardise(logits, corrected=corrected) for logits in pair)
    return student, teacher


def lskd_kd(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    pair = standardised(inputs, numbers["logit_stand"], corrected)
    return {"loss": kd_loss(*pair, temperature=numbers["temperature"])}


def lskd_dkd(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    pair = standardised(inputs, numbers["logit_stand"], corrected)
    return {"loss": dkd_rows(*pair, inputs["target"], numbers)}


def dkd_rows(student: Tensor, teacher: Tensor, labels: Tensor, numbers: Numbers) -> Tensor:
    alpha, beta, temperature = (numbers[key] for key in ("alpha", "beta", "temperature"))
    return dkd_loss(student, teacher, labels, alpha=alpha, beta=beta, temperature=temperature)


def rld_rows(student: Tensor, teacher: Tensor, labels: Tensor, numbers: Numbers, **weights: float) -> Tensor:
    given = {"alpha": numbers["alpha"], "beta": numbers["beta"], **weights}
    temperatures = {
        "temperature": numbers["temperature"],
        "confidence_temperature": numbers["alpha_temperature"],
    }
    return rld_loss(student, teacher, labels, **given, **temperatures)


def rld(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    student, teacher = standardised(inputs, numbers["logit_stand"], corrected)
    parts: dict[str, dict[str, float]] = {
        "loss": {},
        "scd": {"alpha": 1.0, "beta": 0.0},
        "mcd": {"alpha": 0.0, "beta": 1.0},
    }
    return {name: rld_rows(student, teacher, inputs["target"], numbers, **weights) for name, weights in parts.items()}


def gdkd(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    weights = [numbers[key] for key in ("w0", "w1", "w2")]
    parts = {"loss": weights, "high_loss": [1, 0, 0], "low_top_loss": [0, 1, 0], "low_other_loss": [0, 0, 1]}
    return {
        name: gdkd_loss(
            inputs["student"],
            inputs["teacher"],
            num_top=numbers["k"],
            split_weight=split,
            top_weight=top,
            rest_weight=rest,
            temperature=numbers["temperature"],
        )
        for name, (split, top, rest) in parts.items()
    }


def ttm(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    return {"loss": ttm_loss(inputs["student"], inputs["teacher"], power=numbers["l"], weighted=False)}


def wttm(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    return {"loss": ttm_loss(inputs["student"], inputs["teacher"], power=numbers["l"], weighted=True)}


def abkl(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    exponents = {"alpha": numbers["ab_alpha"], "beta": numbers["ab_beta"]}
    pair = inputs["student"], inputs["teacher"]
    return {"loss": abkd_loss(*pair, **exponents, temperature=numbers["kd_T"], corrected=corrected)}


def abkd_ls(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    student, teacher = standardised(inputs, True, corrected)
    found = abkl({"student": student, "teacher": teacher}, numbers, corrected)
    return {"loss": found["loss"] * numbers["kd_T"] ** 2}


def weights_of(inputs: Given, numbers: Numbers, corrected: bool, *, added: float) -> Tensor:
    # Its corrected numbers keep what is added inside of the logarithm.
    largest = None if corrected else numbers["H_ub"]
    pair = inputs["student"], inputs["teacher"]
    return entropy_weights(*pair, temperature=numbers.get("t", 3.0), largest_entropy=largest, added=added)


def ea_weight(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    added = 1e-10 if numbers["variant"] == "add" else 0.0
    return {"w": weights_of(inputs, numbers, corrected, added=added)}


def ea_kd(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    rows = kd_loss(inputs["student"], inputs["teacher"], temperature=numbers["temperature"])
    return {"loss": rows * weights_of(inputs, numbers, corrected, added=1e-10) if numbers["EA"] else rows}


def ea_dkd(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    # Its corrected numbers keep the published standardisation: they differ in the weights alone.
    student, teacher = standardised(inputs, numbers["LS"], corrected=False)
    rows = dkd_rows(student, teacher, inputs["target"], numbers)
    seen = inputs if corrected else {"student": student, "teacher": teacher}
    return {"loss": rows * weights_of(seen, numbers, corrected, added=0.0) if numbers["EA"] else rows}


def ldrld_parts(inputs: Given, numbers: Numbers, corrected: bool, alpha: float, beta: float) -> Tensor:
    temperature = numbers["T"] if "T" in numbers else numbers["temperature"]
    pair = inputs["student"], inputs["teacher"]
    return ldrld_loss(*pair, num_top=numbers["k"], alpha=alpha, beta=beta, temperature=temperature, corrected=corrected)


def ldrld_terms(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    return {
        "ldrld": ldrld_parts(inputs, numbers, corrected, 1.0, 0.0),
        "rntk": ldrld_parts(inputs, numbers, corrected, 0.0, 1.0),
    }


def ldrld(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    ce = cross_entropy_loss(inputs["student"], inputs["target"])
    rows = ldrld_parts(inputs, numbers, corrected, numbers["alpha"], numbers["beta"])
    return {"loss": rows + numbers["ce_loss_weight"] * ce}


def normkd(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    return {"loss": normkd_loss(inputs["student"], inputs["teacher"], temperature=numbers["t_norm"])}


def dist(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    pair = inputs["student"], inputs["teacher"]
    inter, intra = dist_losses(*pair, temperature=numbers["tau"], corrected=corrected)
    return {"inter": inter, "intra": intra, "loss": numbers["beta"] * inter + numbers["gamma"] * intra}


def skd_dir(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    pair = inputs["student"], inputs["teacher"]
    return {"loss": skd_direction_loss(*pair, regularisation=numbers["tik_factor"], corrected=corrected)}


def skd(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    pair = inputs["student"], inputs["teacher"]
    of_rows, of_classes = (1.0, 1.0) if corrected else skd_mask_shares(inputs["teacher"])
    terms = {
        "loss_ce": numbers["ce"] * cross_entropy_loss(inputs["student"], inputs["target"]).mean(),
        "loss_kd": numbers["kd"] * of_rows * kd_loss(*pair, temperature=numbers["temp"]).mean(),
        "loss_bc": numbers["kd"]
        * of_classes
        * skd_direction_loss(*pair, regularisation=numbers["tik"], corrected=corrected),
    }
    return {**terms, "__total__": torch.stack(list(terms.values())).sum()}


def cat(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    maps = inputs["student_cam"], inputs["teacher_cam"]
    loss = cat_loss(*maps, resolution=numbers["CAM_RESOLUTION"], normalised=numbers["IF_NORMALIZE"])
    return {"loss": loss}


def cat_forward(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    ce = cross_entropy_loss(inputs["student_logits"], inputs["target"]).mean()
    terms = {
        "loss_CE": numbers["CE_WEIGHT"] * ce,
        "loss_CAT": numbers["CAT_loss_weight"] * cat(inputs, numbers, corrected)["loss"].mean(),
    }
    return {**terms, "__total__": terms["loss_CE"] + terms["loss_CAT"]}


def cat_head(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    maps = {
        f"{side}_cam": torch.einsum("bdhw,kd->bkhw", inputs[f"{side}_feat"], inputs[f"{side}_weight"])
        for side in ("student", "teacher")
    }
    return cat(maps, numbers, corrected)


def over_patches(
    inputs: Given, rows: Callable[[Tensor, Tensor, Tensor], Tensor], *, shared_weight: bool = False
) -> Tensor:
    teacher = inputs["teacher_patch"]
    return scale_decoupled_loss(
        rows,
        inputs["student_patch"],
        teacher,
        inputs["target"],
        teacher[:, :, 0].argmax(dim=1),
        shared_weight=shared_weight,
    )


def patch_rows(
    numbers: Numbers, corrected: bool, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def rows(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        pair = standardised({"student": student, "teacher": teacher}, numbers["logit_stand"], corrected)
        return loss(*pair, labels)

    return rows


def sdd_kd_ls(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    rows = patch_rows(
        numbers, corrected, lambda student, teacher, _: kd_loss(student, teacher, temperature=numbers["T"])
    )
    return {"loss": over_patches(inputs, rows)}


def sdd_dkd_ls(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    # Its corrected numbers keep the published standardisation: they differ in the patches' weights alone.
    rows = patch_rows(numbers, False, partial(dkd_rows, numbers=numbers))
    mean = over_patches(inputs, rows, shared_weight=not corrected).mean()
    if corrected:
        return {"loss": mean, "loss_mean": mean}
    labels, patches = inputs["target"], inputs["teacher_patch"].shape[2]
    student, teacher = (inputs[name].permute(2, 0, 1).flatten(0, 1) for name in ("student_patch", "teacher_patch"))
    each = rows(student, teacher, labels.repeat(patches))
    return {"loss": each * (mean / each.mean()).detach(), "loss_mean": mean}


def sdd_rld_ls(inputs: Given, numbers: Numbers, corrected: bool) -> Given:
    rows = patch_rows(numbers, corrected, partial(rld_rows, numbers=numbers))
    return {"loss": over_patches(inputs, rows)}


HERE: dict[str, Callable[[Given, Numbers, bool], Given]] = {
    function.__name__: function
    for function in (
        *(lskd_kd, lskd_dkd, rld, gdkd, ttm, wttm, abkl, abkd_ls, ea_weight, ea_kd, ea_dkd, ldrld_terms, ldrld, normkd),
        *(dist, skd_dir, skd, cat, cat_forward, cat_head, sdd_kd_ls, sdd_dkd_ls, sdd_rld_ls),
    )
}
DIAGNOSTICS = {"entropy_temp", "entropy_no_temp"}


def test_every_reference_function_is_compared_or_has_a_reason() -> None:
    assert {case["method"] for case in CASES.values()} <= HERE.keys() | NOT_HERE.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case_id", CASES)
def test_a_newer_loss_reaches_the_float64_value_of_the_reference(case_id: str, dtype: torch.dtype) -> None:
    case = CASES[case_id]
    section = f"newer {str(dtype).removeprefix('torch.')}"
    rule = rule_to_skip(case)
    if rule is not None:
        golden.record(section, skipped_rule=rule)
        return
    expected = {name: value for name, value in case["expected"].get("float64", {}).items() if name not in DIAGNOSTICS}
    if DIAGNOSTICS & case["expected"].get("float64", {}).keys():
        golden.record(section, skipped_rule=DIAGNOSTIC_RULE)
    compare(case, dtype, section, corrected=False, expected=expected)
    if "corrected" in case["expected"]:
        compare(case, dtype, f"{section} corrected", corrected=True, expected=case["expected"]["corrected"])


def rule_to_skip(case: dict[str, Any]) -> str | None:
    if case["method"] in NOT_HERE:
        return f"{case['method']}: {NOT_HERE[case['method']]}"
    numbers = case["hparams"]
    if numbers.get("strategy", "best") != "best" or numbers.get("kl_type", "forward") != "forward":
        return ABLATION_RULE
    if numbers.get("IF_BINARIZE") or numbers.get("IF_OnlyTransferPartialCAMs"):
        return ABLATION_RULE
    return None


def compare(
    case: dict[str, Any], dtype: torch.dtype, section: str, *, corrected: bool, expected: dict[str, Any]
) -> None:
    inputs = case_inputs(case, dtype)
    found = HERE[case["method"]](inputs, case["hparams"], corrected)
    values = {name: numbers_of(value) for name, value in expected.items()}
    if not values or not all(np.isfinite(value).all() for value in values.values()):
        assert all(torch.isfinite(value).all() for value in found.values())
        golden.record(section, skipped_rule=UNDEFINED_RULE)
        return
    rtol, atol = (2e-5, 3e-6) if dtype == torch.float32 else (1e-6, 1e-8)
    if dtype == torch.float32 and case["hparams"].get("tik_factor", 1.0) < 0.01:
        rtol = 5e-4  # the covariance, whose condition is up to 1e5, is inverted
    for name, wanted in values.items():
        value = found[name] if wanted.ndim else found[name].mean()
        np.testing.assert_allclose(value.detach().double().numpy(), wanted, rtol=rtol, atol=atol, err_msg=name)
    if not corrected:
        for name, rows in case["expected"].get("rows", {}).items():
            if name in found and found[name].dim() == 1:
                wanted = numbers_of(rows)
                np.testing.assert_allclose(found[name].detach().double().numpy(), wanted, rtol=5 * rtol, atol=atol)
    check_gradients(case, inputs, found, corrected=corrected, rtol=rtol)
    golden.record(section, checked=1)


def case_inputs(case: dict[str, Any], dtype: torch.dtype) -> Given:
    inputs = {}
    for name, key in case["inputs"].items():
        value = torch.from_numpy(np.array(ARRAYS[key]))
        inputs[name] = value.to(dtype) if value.is_floating_point() else value
    for name in case.get("grad_wrt", []):
        inputs[name].requires_grad_()
    return inputs


def numbers_of(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(ARRAYS[value["npz"]] if isinstance(value, dict) else float(value), dtype=np.float64)


def check_gradients(case: dict[str, Any], inputs: Given, found: Given, *, corrected: bool, rtol: float) -> None:
    expected = case.get("grad_corrected" if corrected else "grad") or {}
    names = case.get("grad_corrected_of" if corrected else "grad_of") or []
    if not expected:
        return
    total = torch.stack([found[name].mean() for name in names]).sum()
    if total.requires_grad:
        torch.autograd.backward(total)
    for name, entry in expected.items():
        if entry is None or not entry["finite"]:
            continue
        gradient = inputs[name].grad
        actual = torch.zeros_like(inputs[name]) if gradient is None else gradient
        wanted = torch.from_numpy(np.array(ARRAYS[entry["npz"]])).double()
        own = float(entry.get("float32_rel_err") or 0.0)
        error = (actual.double() - wanted).norm().item()
        if actual.dtype == torch.float64:
            room = rtol * max(wanted.norm().item(), 1e-5)
        else:  # of two standardised classes, and of models that agree, rounding is what is left
            room = max(1.5 * rtol, 4 * own if math.isfinite(own) else 0.0) * wanted.norm().item() + FLOAT32_ROUNDING
        assert error <= room, f"{name}: {error:.1e} is above {room:.1e}"
