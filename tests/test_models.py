"""Every row of MODELS has every property; a new row is tested the day it is added."""

from __future__ import annotations

import copy
import math

import golden_support as golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icdctl import models
from icdctl.errors import UsageError

HE_FAMILIES = {"resnet", "resnetv2", "wrn", "vgg", "mobilenetv2"}
NORMAL_HEAD_FAMILIES = {"vgg", "mobilenetv2"}
ZERO_HEAD_BIAS_FAMILIES = {"wrn", "vgg", "mobilenetv2"}
DATASETS = [None, "cub200"]

every_model = pytest.mark.parametrize("name", models.MODELS)
every_variant = pytest.mark.parametrize("dataset", DATASETS, ids=["plain", "cub200"])


@pytest.fixture(autouse=True)
def a_seed() -> None:
    torch.manual_seed(0)


def trained(name: str, dataset: str | None = None, num_classes: int = 10) -> models.Classifier:
    """A model in eval mode whose batch norms are not the identity."""
    model = models.create(name, num_classes, dataset=dataset)
    golden.fill(model, fill_seed=3, gain=1.4)
    return model.eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


@every_variant
@every_model
def test_outputs_keep_the_contract(name: str, dataset: str | None) -> None:
    model = trained(name, dataset)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outputs = model.outputs(images)
        logits = model(images)

    assert torch.equal(logits, outputs.logits)
    assert outputs.logits.shape == (2, 10)
    assert model.head.out_features == 10
    assert torch.equal(model.head(outputs.pooled), outputs.logits)
    torch.testing.assert_close(outputs.feature_map.mean(dim=(2, 3)), outputs.pooled)
    assert len(outputs.stages) in (4, 5)
    assert all(stage.dim() == 4 and stage.shape[0] == 2 for stage in outputs.stages)
    sizes = [stage.shape[2] for stage in outputs.stages]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == outputs.feature_map.shape[2]
    assert [before.shape for before in outputs.preactivations] == [stage.shape for stage in outputs.stages]


@every_model
def test_a_row_counts_the_parameters(name: str) -> None:
    model = models.create(name, 100)
    assert model.name == name
    assert sum(parameter.numel() for parameter in model.parameters()) == models.MODELS[name].num_params


@every_model
def test_the_head_reads_the_whole_map_at_any_size(name: str) -> None:
    model = trained(name)
    for size in [(40, 40), (33, 47)]:
        with torch.no_grad():
            outputs = model.outputs(torch.randn(1, 3, *size))
        assert outputs.logits.shape == (1, 10)
        torch.testing.assert_close(outputs.pooled, F.adaptive_avg_pool2d(outputs.feature_map, 1).flatten(1))


@every_variant
@every_model
def test_an_image_below_the_total_stride_is_refused(name: str, dataset: str | None) -> None:
    model = trained(name, dataset)
    smallest = model.smallest_image
    with torch.no_grad():
        assert model.outputs(torch.randn(1, 3, smallest, smallest)).feature_map.shape[2:] == (1, 1)
    with pytest.raises(ValueError, match=f"too small for {name}: its strides need {smallest} x {smallest}"):
        model(torch.randn(1, 3, smallest, smallest - 1))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3)])
def test_what_is_no_batch_of_colour_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \["):
        models.create("res8", 10)(torch.zeros(shape))


def test_vgg_pools_a_fourth_time_at_64_pixels_only() -> None:
    model = trained("vgg8")
    with torch.no_grad():
        sizes = {size: model.outputs(torch.zeros(1, 3, size, size)).feature_map.shape[2] for size in (32, 56, 64, 72)}
    assert sizes == {32: 4, 56: 7, 64: 4, 72: 9}


@every_model
def test_the_reference_spellings_are_resolved(name: str) -> None:
    for alias in models.MODELS[name].aliases:
        assert models.resolve(alias) == name
        assert models.resolve(f"{alias}_sdd") == name
        assert models.resolve(alias.lower()) == name
    assert models.resolve(name) == name


def test_no_spelling_belongs_to_two_models() -> None:
    spellings = [alias.lower() for name, model in models.MODELS.items() for alias in {*model.aliases, name}]
    assert len(spellings) == len(set(spellings))


def test_a_mistyped_model_is_named_and_the_nearest_one_suggested() -> None:
    with pytest.raises(UsageError, match="unknown model `res32x5`") as caught:
        models.create("res32x5", 100)
    assert caught.value.hint == "did you mean `res32x4`? `icdctl list models` shows all of them"


@pytest.mark.parametrize("num_classes", [1, 0, -3])
def test_fewer_than_two_classes_are_refused(num_classes: int) -> None:
    with pytest.raises(UsageError, match=f"`mv2` can't classify into {num_classes} classes"):
        models.create("MobileNetV2", num_classes)


@every_model
def test_an_equal_seed_gives_equal_weights(name: str) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(models.create(name, 10).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def assert_uniform(weight: Tensor, fan_in: int) -> None:
    """torch's default: uniform within 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    assert weight.abs().max().item() <= bound
    if weight.numel() >= 400:
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def assert_normal(weight: Tensor, std: float) -> None:
    if weight.numel() >= 400:
        assert weight.std().item() == pytest.approx(std, rel=0.15)
        assert weight.abs().max().item() > 2 * std
        assert abs(weight.mean().item()) < 0.2 * std


@every_variant
@every_model
def test_fresh_weights_follow_the_rule_of_the_family(name: str, dataset: str | None) -> None:
    model = models.create(name, 100, dataset=dataset)
    family = models.MODELS[name].family
    replaced_stem = dataset == "cub200" and family != "vgg"
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for index, conv in enumerate(convolutions):
        height, width = conv.kernel_size
        if family not in HE_FAMILIES or (replaced_stem and index == 0):
            assert_uniform(conv.weight, conv.weight[0].numel())
        else:
            assert_normal(conv.weight, math.sqrt(2 / (height * width * conv.out_channels)))
        assert (conv.bias is not None) == (family == "vgg")
        if conv.bias is not None:
            assert not conv.bias.any()
    if replaced_stem:
        assert convolutions[0].kernel_size == (7, 7)
        assert convolutions[0].stride == (2, 2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()
            assert (module.eps, module.momentum) == (1e-5, 0.1)


@every_variant
@every_model
def test_a_fresh_head_follows_the_rule_of_the_family(name: str, dataset: str | None) -> None:
    head = models.create(name, 100, dataset=dataset).head
    family = models.MODELS[name].family
    replaced = dataset == "cub200" and family in ("vgg", "wrn")
    if family in NORMAL_HEAD_FAMILIES and not replaced:
        assert_normal(head.weight, 0.01)
    else:
        assert_uniform(head.weight, head.in_features)
    assert bool(head.bias.any()) == (replaced or family not in ZERO_HEAD_BIAS_FAMILIES)


@every_variant
@every_model
def test_folding_keeps_the_function(name: str, dataset: str | None) -> None:
    model = trained(name, dataset)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    folded = models.fold_batch_norms(model)
    with torch.no_grad():
        assert relative_error(folded(images), model(images)) < 2e-5
        exact = model.double()
        expected = exact.outputs(images.double())
        found = models.fold_batch_norms(exact).outputs(images.double())

    assert relative_error(found.logits, expected.logits) < 1e-9
    for stage, wanted in zip(found.stages, expected.stages, strict=True):
        assert relative_error(stage, wanted) < 1e-9
    assert relative_error(found.feature_map, expected.feature_map) < 1e-9
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key].to(value.dtype)) for key, value in before.items())


@every_model
def test_folding_leaves_no_norm_that_could_go(name: str) -> None:
    folded = models.fold_batch_norms(models.create(name, 10))
    norms = [key for key, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if models.MODELS[name].family == "wrn":
        assert all(key.endswith("bn1") for key in norms)
    else:
        assert norms == []
    assert not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_a_module_that_names_no_pairs_is_only_copied_and_frozen() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    folded = models.fold_batch_norms(module)
    assert isinstance(folded[1], nn.BatchNorm2d)
    assert not folded.training
    assert module.training
    assert module[0].weight.requires_grad
    assert not folded[0].weight.requires_grad


@every_variant
@every_model
def test_every_parameter_gets_a_gradient(name: str, dataset: str | None) -> None:
    model = models.create(name, 10, dataset=dataset)
    loss = F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 7]))
    torch.autograd.backward(loss)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), key


@every_model
def test_a_training_pass_updates_every_norm_once(name: str) -> None:
    model = models.create(name, 10)
    model(torch.randn(2, 3, 64, 64))
    counters = [int(value) for key, value in model.named_buffers() if key.endswith("num_batches_tracked")]
    assert set(counters) == {1}


@every_model
def test_channels_last_gives_the_same_answer(name: str) -> None:
    model = trained(name)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        found = model(images.contiguous(memory_format=torch.channels_last))
    assert relative_error(found, expected) < 1e-5
