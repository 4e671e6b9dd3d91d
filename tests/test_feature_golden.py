"""The feature methods by the reference's numbers: every case of section `feature`, or the reason why it is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import golden_support as golden
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from icdctl.errors import UsageError
from icdctl.methods import METHODS, Objective, Settings, Supervision, check_settings
from icdctl.methods.connectors import Boundaries
from icdctl.methods.contrastive import ContrastiveObjective
from icdctl.methods.feature_losses import flow_loss, negative_means
from icdctl.methods.feature_method import FeatureMethod, FeatureObjective, Pairs
from icdctl.methods.logit import dkd_loss
from icdctl.methods.patch import scale_decoupled_loss

LOSSES = golden.read("losses.json")
ARRAYS = golden.read_arrays("losses.npz") if LOSSES else {}
CASES: dict[str, dict[str, Any]] = {
    case["id"]: case for case in LOSSES.get("cases", []) if case["section"] == "feature" and case["method"] != "FITNET"
}
"""All but those of FitNets, which are in test_feature.py."""
OTHER_KDSVD_RULE = "RepDistiller's KDSVD decomposes channels, mdistiller's columns: icdctl has mdistiller's"
REFUSED_RULE = "the reference raises, icdctl has a value (checked: finite)"
ICKD_RULE = "ICKD is no method of RepDistiller or mdistiller, and none of icdctl"


class Inputs:
    """The tensors of a case, float64: pre-activations of the student and its pooled features with a gradient."""

    def __init__(self, case: dict[str, Any]) -> None:
        listed = LOSSES["input_sets"][case["input_set"]]["arrays"]
        held = {name: array(item["key"]) for name, item in listed.items()}
        count = sum(name.startswith("s_preact_") for name in held)
        self.leaves = {
            name: held[name].double().requires_grad_()
            for name in ("s_pooled", *(f"s_preact_{index}" for index in range(count)))
        }
        self.labels = held["target"]
        self.student = self._tensors([self.leaves[f"s_preact_{index}"] for index in range(count)])
        self.teacher = self._tensors([held[f"t_preact_{index}"].double() for index in range(count)])
        self.student |= {"pooled": self.leaves["s_pooled"], "logits": held["s_logits"].double()}
        self.teacher["pooled"] = held["t_pooled"].double()

    @staticmethod
    def _tensors(maps: Sequence[Tensor]) -> dict[str, Tensor]:
        tensors = {f"preactivations.{index}": tensor for index, tensor in enumerate(maps)}
        return tensors | {f"stages.{index}": tensor.relu() for index, tensor in enumerate(maps)}

    def names(self, patterns: Sequence[str]) -> list[str]:
        """As a model with these stages would expand them."""
        count = sum(name.startswith("stages.") for name in self.student)
        found = []
        for pattern in patterns:
            group, _, index = pattern.partition(".")
            wanted = range(1, count) if index == "*" else [int(index) % count] if index else []
            found += [f"{group}.{number}" for number in wanted] or [pattern]
        return found


class Probe:
    """In place of the teacher's `ModelProbe`: the case has batch norms, not a model."""

    label = "golden"

    def __init__(self, norms: list[nn.BatchNorm2d]) -> None:
        self._norms = norms

    def preactivation_norms(self) -> list[nn.BatchNorm2d]:
        return self._norms


def array(key: str) -> Tensor:
    return torch.from_numpy(np.array(ARRAYS[key]))


def parameters(case: dict[str, Any]) -> dict[str, Tensor]:
    return {name: array(item["npz"]) for name, item in case.get("params", {}).items()}


def norms_of(case: dict[str, Any]) -> list[nn.BatchNorm2d]:
    """The teacher's batch norms, where a case has some."""
    given = parameters(case)
    norms: list[nn.BatchNorm2d] = []
    while (weight := given.get(f"teacher_bn.{len(norms)}.weight")) is not None:
        norm = nn.BatchNorm2d(len(weight))
        norm.load_state_dict({"weight": weight, "bias": given[f"teacher_bn.{len(norms)}.bias"]}, strict=False)
        norms.append(norm)
    return norms


def built(method: str, case: dict[str, Any], inputs: Inputs, **given: object) -> FeatureObjective:
    """The objective of a case, float64, with its parameters."""
    row = METHODS[method]
    assert isinstance(row, FeatureMethod)
    numbers = case["hparams"]
    weights = {"ce_weight": numbers.get("ce_weight", 1.0), "feature_weight": numbers.get("feat_weight", 1.0)}
    settings: Settings = check_settings(method, {**weights, **given})
    names = [inputs.names(patterns) for patterns in row.compared(settings)]
    shapes = [
        [tuple(side[name].shape[1:]) for name in side_names]
        for side, side_names in zip((inputs.student, inputs.teacher), names, strict=True)
    ]
    probe: Any = Probe(norms_of(case))
    comparison = row.comparison(Pairs(shapes[0], shapes[1], probe, "golden"), settings)
    objective = FeatureObjective(names[0], names[1], comparison, settings, Supervision()).double().train()
    load(comparison, case)
    return objective


def load(module: nn.Module, case: dict[str, Any]) -> None:
    """Load the stored parameters by the reference's names, which begin as the reference's attribute is called."""
    prefixes = ("connectors.connectors.", "connector.connectors.")
    stored = {}
    for name, value in parameters(case).items():
        name = next((f"connectors.{name.removeprefix(each)}" for each in prefixes if name.startswith(each)), name)
        if not name.startswith(("teacher_bn.", "margin.")):
            stored[name] = value
    missing, unexpected = module.load_state_dict(stored, strict=False)
    assert not unexpected
    assert [name for name in missing if not name.startswith("margin")] == []


def settings_of(case: dict[str, Any]) -> dict[str, float]:
    """Our settings for the numbers of a case, except the two weights that all have."""
    names = {
        "p": "attention_power",
        "distance_weight": "distance_weight",
        "angle_weight": "angle_weight",
        "init_pred_var": "initial_variance",
        "kernel_size": "kernel_size",
        "feat_dim": "feat_dim",
        "margin": "margin",
        "p1": "factor_power",
        "p2": "distance_power",
        "k": "num_vectors" if case["method"] == "KDSVD" else "factor_ratio",
        "warmup_epochs": "warmup_epochs",
        "stu_preact": "student_preactivations",
        "reviewkd_weight": "feature_weight",
    }
    settings = {names[name]: float(value) for name, value in case["hparams"].items() if name in names}
    return settings | ({"warmup_epochs": 0} if case["method"].startswith("FT") else {})


def simple_terms(case: dict[str, Any], inputs: Inputs) -> tuple[dict[str, Tensor], Objective]:
    method = case["method"].partition(" (")[0].lower()
    objective = built(method, case, inputs, **settings_of(case))
    terms = objective(inputs.student, inputs.teacher, inputs.labels, case["hparams"].get("epoch", 1))
    names = {"ce": "loss_ce", "feature": "loss_kd", "paraphraser": "paraphraser_mse"}
    return {names[name]: term for name, term in terms.items()}, objective


def ab_terms(case: dict[str, Any], inputs: Inputs) -> tuple[dict[str, Tensor], Objective]:
    """Stage by stage; the sum that training minimises has their weights, checked here too."""
    objective = built("ab", case, inputs, **settings_of(case))
    comparison = objective.comparison
    assert isinstance(comparison, Boundaries)
    names = inputs.names(("preactivations.*",))
    sides = [[side[name] for name in names] for side in (inputs.student, inputs.teacher)]
    stages = comparison.losses(*sides)
    torch.testing.assert_close(sum(stages), comparison(*sides))
    return {f"stage_{number}": loss for number, loss in enumerate(stages, 1)}, objective


def fsp_terms(case: dict[str, Any], inputs: Inputs) -> tuple[dict[str, Tensor], Objective]:
    objective = built("fsp", case, inputs)
    maps = [
        [side[name] for name in inputs.names(("stages.0", "stages.*"))] for side in (inputs.student, inputs.teacher)
    ]
    pairs = {
        f"pair_{index}": flow_loss(*(side[index : index + 2] for side in maps)) for index in range(len(maps[0]) - 1)
    }
    terms = objective(inputs.student, inputs.teacher, inputs.labels, 1)
    torch.testing.assert_close(terms["feature"], sum(pairs.values()))
    return pairs, objective


def kdsvd_terms(case: dict[str, Any], inputs: Inputs) -> tuple[dict[str, Tensor], Objective]:
    """The value belongs to one of the signs that the reference's singular vectors may have."""
    terms, objective = simple_terms(case, inputs)
    found = terms["loss_kd"].item()
    listed = [float(each["loss_kd"]) for each in case.get("sign_variants", [])] or [
        case["expected"]["float64"]["loss_kd"]
    ]
    nearest = min(listed, key=lambda value: abs(value - found))
    assert found == pytest.approx(nearest, rel=1e-4)  # the reference computes in float32
    return {"loss_ce": terms["loss_ce"]}, objective


def crd_terms(case: dict[str, Any], inputs: Inputs) -> tuple[dict[str, Tensor], Objective]:
    """Two steps with the stored banks and candidates; the draw of negatives is ours, and not compared."""
    numbers, given = case["hparams"], parameters(case)
    settings = check_settings(
        "crd",
        {
            "ce_weight": numbers["ce_weight"],
            "feature_weight": numbers["feat_weight"],
            "feat_dim": numbers["FEAT.DIM"],
            "nce_k": numbers["NCE.K"],
            "nce_t": numbers["temperature"],
            "nce_m": numbers["momentum"],
        },
    )
    labels = torch.arange(numbers["n_data"]) % 2
    widths = (numbers["FEAT.STUDENT_DIM"], numbers["FEAT.TEACHER_DIM"])
    objective = ContrastiveObjective(*widths, settings, Supervision(train_labels=labels)).double()
    for model in ("embed_s", "embed_t"):
        for leaf in ("weight", "bias"):
            getattr(objective, model).linear.get_parameter(leaf).data.copy_(given[f"{model}.linear.{leaf}"])
    banks = objective.banks
    banks.memory_v1.copy_(given["memory_v1"])
    banks.memory_v2.copy_(given["memory_v2"])
    candidates = given["contrastive_index"]
    assert torch.equal(candidates[:, 0], given["index"])
    objective.negatives = Stored(candidates[:, 1:])  # type: ignore[assignment]  # in the place of the draw
    student = {**inputs.student, "image_numbers": given["index"]}

    first = objective(student, inputs.teacher, inputs.labels, 1)
    wanted = case["expected_state"]
    np.testing.assert_allclose(banks.log_normalizers.exp(), wanted["Z_v1_Z_v2_after_first_call"], rtol=1e-6)
    for name in ("memory_v1", "memory_v2"):
        np.testing.assert_allclose(banks.get_buffer(name), ARRAYS[wanted[f"{name}_after_first_call"]], rtol=1e-6)
    second = objective(student, inputs.teacher, inputs.labels, 1)
    found = {"loss_ce": first["ce"], "loss_kd": first["feature"], "loss_kd_second_call": second["feature"]}
    return found, objective


class Stored(nn.Module):
    """In place of `Negatives`."""

    def __init__(self, negatives: Tensor) -> None:
        super().__init__()
        self._negatives = negatives

    def forward(self, images: Tensor) -> Tensor:
        return self._negatives


def icd_review_terms(case: dict[str, Any], inputs: Inputs) -> tuple[dict[str, Tensor], Objective]:
    """iCD's ReviewKD is mdistiller's, and SDD's loss with DKD on patches: both of them are here, not their sum."""
    terms, objective = simple_terms(case, inputs)
    patches, numbers = case["inputs"], case["hparams"]["multi_dkd"]
    student, teacher, labels = (array(patches[name]) for name in ("student_patch", "teacher_patch", "target"))
    student, teacher = student.double(), teacher.double()

    def rows(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return dkd_loss(student, teacher, labels, **numbers)

    decoupled = scale_decoupled_loss(rows, student, teacher, labels, teacher[:, :, 0].argmax(dim=1)).mean()
    return {"loss_ce": terms["loss_ce"], "loss_kd": terms["loss_kd"] + decoupled}, objective


Terms = Callable[[dict[str, Any], Inputs], tuple[dict[str, Tensor], Objective]]
TERMS: dict[str, Terms] = {
    **dict.fromkeys(["AT", "NST", "SP", "CC", "PKT", "RKD", "VID", "OFD", "REVIEWKD"], simple_terms),
    "FT (factor transfer)": simple_terms,
    "AB": ab_terms,
    "FSP": fsp_terms,
    "KDSVD": kdsvd_terms,
    "CRD": crd_terms,
    "REVIEWKD (iCD flavour)": icd_review_terms,
}
LEFT_OUT = {"KDSVD (RepDistiller)": OTHER_KDSVD_RULE, "ICKD (ChSimLoss)": ICKD_RULE}
SECOND_CALL = "loss_kd_second_call"
"""Not part of the gradient that is stored."""


@pytest.mark.parametrize("case_id", CASES)
def test_a_feature_method_computes_what_the_reference_computes(case_id: str) -> None:
    case = CASES[case_id]
    if case["method"] in LEFT_OUT:
        golden.record("feature", skipped_rule=LEFT_OUT[case["method"]])
        return
    inputs = Inputs(case)
    if "expected_error" in case:
        try:
            terms, _ = TERMS[case["method"]](case, inputs)
        except UsageError:
            golden.record("feature", checked=1)
        else:
            assert all(torch.isfinite(term) for term in terms.values())
            golden.record("feature", skipped_rule=REFUSED_RULE)
        return
    terms, _ = TERMS[case["method"]](case, inputs)
    for name, wanted in case["expected"]["float64"].items():
        if name in terms:
            rtol = 1e-6 if case["method"] == "CRD" else 1e-9  # the reference keeps CRD's normalisers in float32
            np.testing.assert_allclose(terms[name].item(), wanted, rtol=rtol, atol=1e-12, err_msg=name)
    assert set(case["expected"]["float64"]) - set(terms) <= ({"loss_kd"} if case["method"] == "KDSVD" else set())
    check_gradients(case, inputs, [term for name, term in terms.items() if name not in ("loss_ce", SECOND_CALL)])
    golden.record("feature", checked=1)


def check_gradients(case: dict[str, Any], inputs: Inputs, terms: list[Tensor]) -> None:
    wanted = case.get("grad_checksum", {})
    if not wanted:
        return
    leaves = [inputs.leaves[name] for name in wanted]
    gradients = torch.autograd.grad(torch.stack(terms).sum(), leaves)
    for (name, checksum), gradient in zip(wanted.items(), gradients, strict=True):
        size = checksum["l2"]
        assert gradient.norm().item() == pytest.approx(size, rel=1e-6), name
        assert gradient.sum().item() == pytest.approx(checksum["sum"], rel=1e-6, abs=1e-6 * size), name
        first = gradient.flatten()[: len(checksum["first"])].tolist()
        assert first == pytest.approx(checksum["first"], rel=1e-6, abs=1e-7 * size), name


@pytest.mark.parametrize(
    "case_id", [name for name, case in CASES.items() if "teacher_bn.0.weight" in case.get("params", {})]
)
def test_margins_are_those_of_the_reference(case_id: str) -> None:
    given = parameters(CASES[case_id])
    for index, norm in enumerate(norms_of(CASES[case_id])):
        found = negative_means(norm.bias.detach(), norm.weight.detach().abs())
        np.testing.assert_allclose(found, given[f"margin.{index}"], rtol=1e-6)
