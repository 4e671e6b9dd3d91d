"""Custom modules that can't be a student, a teacher or measured: the library says why with its own error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import icdctl as library
from icdctl.errors import IcdctlError, UsageError
from icdctl.models.external import Adapted, adapt, check_module
from icdctl.models.inspection import check_logits

SMALL: dict[str, Any] = {"dataset": "digits100", "train_images": 128, "test_images": 100, "epochs": 1, "device": "cpu"}
CLASSES = 100


def network(*more: nn.Module, head: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, head or nn.Linear(4, CLASSES), *more)


class Gives(nn.Module):
    """Makes something else of the logits of a network."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network, self.change = network(), change

    def forward(self, images: Tensor) -> Any:
        return self.change(self.network(images))


class ConvolutionalHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images).mean(dim=(2, 3))
        return logits


class InTraining(nn.Module):
    """Fails in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            raise KeyError("a mistake of the user's")
        logits: Tensor = self.network(images)
        return logits


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


UNSUITABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: network(head=nn.LazyLinear(CLASSES)), "`4.weight` of `Sequential` has no size yet"),
    "lazy convolution": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), *network()[1:]), "its layer is lazy"),
    "meta": (lambda: network().to("meta"), "on the device `meta`"),
    "fp16": (lambda: network().half(), "`0.weight` of `Sequential` is float16, expected float32"),
    "bf16": (lambda: network().bfloat16(), "is bfloat16, expected float32"),
    "fp64": (lambda: network().double(), "is float64, expected float32"),
    "mixed": (lambda: network(head=nn.Linear(4, CLASSES).half()), "`4.weight` of `Sequential` is float16"),
    "tuple": (lambda: Gives(lambda logits: (logits, logits)), "gives a tuple, expected a tensor of logits"),
    "dict": (lambda: Gives(lambda logits: {"logits": logits}), "gives a dict, expected a tensor of logits"),
    "nothing": (lambda: Gives(lambda logits: None), "gives a NoneType, expected"),
    "a map": (
        lambda: Gives(lambda logits: logits[:, :, None]),
        r"gives float32 \[2, 100, 1\], expected logits \[B, K\]",
    ),
    "classes": (lambda: Gives(lambda logits: logits.long()), "gives int64 "),
    "softmax": (lambda: network(nn.Softmax(1)), "gives probabilities, each row of which sums to 1"),
    "error": (lambda: Gives(lambda logits: 1 / 0), "division by zero"),
}
MEASURED = [name for name in UNSUITABLE if name != "a map"]


@pytest.mark.parametrize("name", UNSUITABLE)
def test_as_teacher_and_as_student(tmp_path: Path, name: str) -> None:
    build, message = UNSUITABLE[name]
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=message) as caught:
        library.distill(method="kd", teacher=build(), student="res8", **SMALL, out=str(out))
    assert caught.value.hint
    with pytest.raises(UsageError, match=message):
        library.train(model=build(), **SMALL, out=str(out))
    assert not out.exists()


@pytest.mark.parametrize("name", MEASURED)
def test_when_it_is_measured(tmp_path: Path, name: str) -> None:
    from PIL import Image

    build, message = UNSUITABLE[name]
    with pytest.raises(UsageError, match=message):
        library.evaluate(build(), dataset="digits100", test_images=10, device="cpu")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=message):
        library.predict(build(), tmp_path / "a.png", dataset="digits100", device="cpu")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (network().requires_grad_(False), "all of its parameters are frozen"),
        (Gives(Tensor.detach), "no gradient reaches its parameters"),
    ],
)
def test_a_student_of_which_nothing_can_be_trained(tmp_path: Path, module: nn.Module, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        library.train(model=module, **SMALL, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    adapt(module, image_size=(32, 32), num_classes=CLASSES, needs_patches=True)  # a teacher needs no gradient


def test_a_student_of_which_something_can_be_trained(tmp_path: Path) -> None:
    module = network()
    frozen = module[0].requires_grad_(False).state_dict()["weight"]
    before = frozen.clone()
    result = library.train(model=module, **SMALL, out=str(tmp_path / "run"))
    assert torch.equal(frozen, before)
    assert result.finished


def test_a_module_made_in_inference_mode_and_one_of_torchscript() -> None:
    with pytest.raises(UsageError, match="made in inference mode"):
        check_module(in_inference_mode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, on TorchScript
        traced: Any = torch.jit.trace(network(), torch.zeros(1, 3, 32, 32))  # type: ignore[no-untyped-call]  # untyped
    with pytest.raises(UsageError, match="TorchScript module"):
        check_module(traced)


def test_a_convolutional_head_is_named_with_what_is_needed() -> None:
    with pytest.raises(UsageError, match=r"no `nn\.Linear` of `ConvolutionalHead` gives its logits") as caught:
        Adapted(ConvolutionalHead(), image_size=(32, 32))
    assert "`sdd_` and `cd_` methods need a global average before it" in caught.value.hint


@pytest.mark.parametrize("after", [nn.Sigmoid(), nn.Tanh()])
def test_what_follows_the_head_would_be_missing_in_the_logits_of_regions(after: nn.Module) -> None:
    adapt(network(after), image_size=(32, 32), num_classes=CLASSES, needs_patches=False)
    with pytest.raises(UsageError, match="no logits of single regions") as caught:
        adapt(network(after), image_size=(32, 32), num_classes=CLASSES, needs_patches=True)
    assert "nothing after it" in caught.value.hint


def test_logits_that_look_a_little_like_probabilities_are_logits() -> None:
    uniform = torch.full((4, 10), 0.1)
    for logits in (uniform * 1.01, uniform - 0.2, -uniform, uniform.log(), torch.zeros(4, 10)):
        assert check_logits("it", logits) is logits
    with pytest.raises(UsageError, match="probabilities"):
        check_logits("it", uniform)
    with pytest.raises(UsageError, match="probabilities"):
        check_logits("it", torch.randn(8, 5).softmax(dim=1))


def test_a_mistake_in_the_users_code_keeps_its_cause(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='`InTraining` fails: KeyError: "a mistake of the user\'s"') as caught:
        library.train(model=InTraining(), **SMALL, out=str(tmp_path / "run"))
    assert isinstance(caught.value.__cause__, KeyError)
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_icdctls_is_not_taken_for_the_users(tmp_path: Path) -> None:
    class Observer:
        """No observer at all: using it is an AttributeError, not one of the module."""

    observer: Any = Observer()
    with pytest.raises(AttributeError):
        library.train(model=network(), **SMALL, out=str(tmp_path / "run"), observer=observer)


def test_a_module_without_memory_is_no_mistake_of_the_module(tmp_path: Path) -> None:
    def fail(logits: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(IcdctlError, match="ran out of memory"):
        library.train(model=Gives(fail), **SMALL, out=str(tmp_path / "run"))
