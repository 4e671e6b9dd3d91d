"""Runs an unchanged checkout of iCD, SDD or mdistiller in a separate process, and times its training step.

`icdctl.benchmark.against` starts this file as a script and sends it lines of JSON: requests on stdin, answers on the
stdout that it was started with. It imports nothing from icdctl. The checkout is imported from its own folder; nothing
in it is changed or copied. Only its surroundings are replaced:

- torchvision's CIFAR100 gives images from the parent process, through the checkout's own data set class, transforms and
  DataLoader;
- checkpoints are replaced by weights from the parent process;
- packages that are not installed and that a step does not need (yacs, wandb, tensorboardX) are replaced by stand-ins,
  which the answer names;
- on a CPU, `.cuda()` returns its object unchanged.

The variants are the checkout's own option for the number of its loader's workers, and torch's autocast around its
forward pass.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import math
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_PACKAGE = "mdistiller"
_PARTS = ("", ".models", ".distillers", ".engine", ".engine.cfg", ".engine.utils", ".dataset")
_MOST_STAND_INS = 20

Foreign: TypeAlias = Any
"""A value of the checkout's own types, which are known only when it is imported."""
Json: TypeAlias = dict[str, Any]
"""A request or an answer."""


class ConfigNode(dict[str, object]):
    """Stand-in for a yacs node, with what mdistiller's configuration uses: keys as attributes."""

    def __getattr__(self, key: str) -> object:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None

    def __setattr__(self, key: str, value: object) -> None:
        self[key] = value


class Inert:
    """Stand-in for any object: accepts every call and attribute, and does nothing."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        pass

    def __call__(self, *arguments: object, **keywords: object) -> Inert:
        return self

    def __getattr__(self, name: str) -> Inert:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert()


class InertModule(types.ModuleType):
    """Stand-in for a module: it has every public name."""

    __path__ = []  # noqa: RUF012 (Python looks for this list in a package)

    def __getattr__(self, name: str) -> type[ConfigNode] | type[Inert]:
        if name.startswith("__"):
            raise AttributeError(name)
        return ConfigNode if name == "CfgNode" else Inert


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that gives stand-ins for the packages in `names` and all modules below them."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class HandedOver:
    """Stand-in for torchvision's CIFAR100 as a base class: images and labels from the parent process, a transform."""

    images: dict[bool, tuple[npt.NDArray[np.uint8], list[int]]]
    """Whether it is the training set -> pixels [N, 32, 32, 3] uint8, labels."""

    def __init__(
        self,
        root: object = None,
        train: bool = True,
        transform: Callable[[Image.Image], object] | None = None,
        target_transform: Callable[[int], object] | None = None,
        download: bool = False,
    ) -> None:
        self.data, self.targets = self.images[train]
        self.transform, self.target_transform = transform, target_transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[object, object]:
        image, target = Image.fromarray(self.data[index]), self.targets[index]
        return (
            image if self.transform is None else self.transform(image),
            target if self.target_transform is None else self.target_transform(target),
        )


class ReferenceCheckout:
    """The imported checkout, and an answer to each kind of request."""

    def __init__(self) -> None:
        self._cuda = False
        self._variants: dict[str, Json] = {}
        self._batches: dict[str, Iterator[Foreign]] = {}
        self._meters: dict[str, Foreign] = {}

    def open(self, request: Json) -> Json:
        """Import the checkout; return its methods and the packages that were replaced by stand-ins."""
        torch.set_num_threads(request["threads"])
        torch.manual_seed(request["seed"])
        torch.backends.cudnn.benchmark = True  # as the checkout's own script does
        self._cuda = request["device"] == "cuda"
        if not self._cuda:
            for kind in (Tensor, nn.Module):
                kind.cuda = _unmoved  # type: ignore[assignment, method-assign]  # a CPU has nowhere to move it to
        self._scratch = Path(request["scratch"])
        handed = load_file(self._scratch / "images.safetensors")
        HandedOver.images = {
            train: (handed[f"{name}_images"].numpy(), handed[f"{name}_labels"].tolist())
            for train, name in ((True, "train"), (False, "test"))
        }
        torchvision.datasets.CIFAR100 = HandedOver
        sys.path.insert(0, request["checkout"])
        stand_ins = self._import()
        return {"methods": sorted(self._table("distiller_dict")), "stand_ins": stand_ins}

    def _import(self) -> list[str]:
        finder = StandIns()
        sys.meta_path.append(finder)
        while True:
            try:
                self._parts = [importlib.import_module(_PACKAGE + part) for part in _PARTS]
                return finder.names
            except ModuleNotFoundError as error:
                missing = (error.name or "").split(".")[0]
                if missing in ("", _PACKAGE, *finder.names) or len(finder.names) == _MOST_STAND_INS:
                    raise
                finder.names.append(missing)
                for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
                    del sys.modules[name]

    def _table(self, name: str) -> Foreign:
        """One of mdistiller's tables, from whichever module has it."""
        for part in self._parts:
            if hasattr(part, name):
                return getattr(part, name)
        raise LookupError(f"`{_PACKAGE}` has no `{name}`")

    def prepare(self, request: Json) -> Json:
        """Build data, models, distiller and trainer as the checkout's own script does."""
        self._request = request
        for name, module in list(sys.modules.items()):  # so that no folder is made in the checkout
            if name.startswith(f"{_PACKAGE}.") and hasattr(module, "get_data_folder"):
                setattr(module, "get_data_folder", lambda: str(self._scratch))  # noqa: B010 (no module declares it)
        loaders = {}
        for name, variant in request["variants"].items():
            config = self._configuration({**request["config"], "DATASET.NUM_WORKERS": variant["workers"]})
            loaders[name] = self._table("get_dataset")(config)[:2]
        self._variants = request["variants"]
        self._train_loaders = {name: train_loader for name, (train_loader, _) in loaders.items()}
        train_loader, test_loader = next(iter(loaders.values()))
        self._test_transform = test_loader.dataset.transform
        teacher = self._model(request["teacher"], request["scales_text"])
        student = self._model(request["student"], request["scales_text"])
        kind = self._table("distiller_dict")[request["method"]]
        distiller = nn.DataParallel(kind(student, teacher, config).cuda())
        self._config, self._loaders = config, (train_loader, test_loader)
        self._student, self._teacher, self._distiller = student, teacher, distiller
        self._restart()
        workers = {name: loader.num_workers for name, loader in self._train_loaders.items()}
        return {"workers": workers, "trainer": type(self._trainer).__name__}

    def _configuration(self, values: Json) -> Foreign:
        """The checkout's configuration with these values; keys that it does not have are skipped."""
        config = self._table("CFG")
        for path, value in values.items():
            *groups, key = path.split(".")
            node = config
            for group in groups:
                node = getattr(node, group, None)
            if node is not None and (key in node or not groups):
                setattr(node, key, value)
        return config

    def _model(self, names: Sequence[str], scales_text: str) -> Foreign:
        """The first of the named models that the checkout has."""
        table = self._table("cifar_model_dict")
        for name in names:
            if name not in table:
                continue
            build = table[name][0]
            try:
                return build(num_classes=100, M=scales_text)
            except TypeError:
                return build(num_classes=100)
        raise LookupError(f"it has no model {' or '.join(f'`{name}`' for name in names)}")

    def _restart(self) -> None:
        """Start again with the parent's weights, a new optimiser and a new order of images."""
        for model, name in ((self._teacher, "teacher"), (self._student, "student")):
            model.load_state_dict(load_file(self._scratch / f"{name}.safetensors"))
        trainer = self._table("trainer_dict")["base"]
        self._trainer = trainer("bench", self._distiller, *self._loaders, self._config)
        self._batches = {name: self._endless(loader) for name, loader in self._train_loaders.items()}
        meter = self._table("AverageMeter")
        self._meters = {key: meter() for key in ("training_time", "data_time", "losses", "top1", "top5")}
        self._distiller.train()

    @staticmethod
    def _endless(loader: Foreign) -> Iterator[Foreign]:
        while True:
            yield from loader

    def gate(self, request: Json) -> Json:
        """Take one training step on each of the parent's batches, always from its weights, in float32 or float64."""
        double = request["double"]
        models = (self._student, self._teacher)
        terms: dict[str, float] = {}
        bounds: list[tuple[float, float]] = []

        def see_losses(module: nn.Module, inputs: object, output: Foreign) -> None:
            terms.update({key.removeprefix("loss_"): float(value.detach().mean()) for key, value in output[1].items()})

        clip = nn.utils.clip_grad_norm_

        def see_bound(parameters: Foreign, max_norm: float, *arguments: Foreign, **keywords: Foreign) -> Tensor:
            norm = clip(parameters, max_norm, *arguments, **keywords)
            bounds.append((float(max_norm), float(norm)))
            return norm

        found = []
        handles: list[RemovableHandle] = []
        nn.utils.clip_grad_norm_ = see_bound
        tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:
            handles = [self._distiller.module.register_forward_hook(see_losses)]
            if double:  # needed because trainers cast images to float32
                self._distiller.double()
                handles += [
                    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(), *inputs[1:]))
                    for model in models
                ]
            stored = load_file(self._scratch / request["batches"])
            for number in range(len({key.partition(".")[0] for key in stored})):
                batch = {key: stored[f"{number}.{key}"] for key in ("pixels", "labels", "epoch")}
                self._restart()
                terms.clear()
                bounds.clear()
                pictures = [Image.fromarray(image.numpy()) for image in batch["pixels"]]
                images = torch.stack([self._test_transform(picture) for picture in pictures])
                data = (images, batch["labels"], torch.arange(len(images)))
                self._trainer.train_iter(data, int(batch["epoch"]), self._meters)
                gradients = [p.grad for p in self._student.parameters() if p.grad is not None]
                norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
                before = bounds[0][1] if bounds else norm
                inputs = float(images.double().abs().sum())
                found.append({"inputs": inputs, "terms": dict(terms), "gradient": norm, "before_clipping": before})
        finally:
            for handle in handles:
                handle.remove()
            self._distiller.float()
            nn.utils.clip_grad_norm_ = clip
            torch.backends.cudnn.allow_tf32 = tf32
        self._restart()
        return {"batches": found, "clip_norm": bounds[0][0] if bounds else None}

    def steps(self, request: Json) -> Json:
        """Take `count` training steps of a variant, and time them together, in seconds."""
        epoch, count, variant = self._request["epoch"], request["count"], request["variant"]
        batches = self._batches[variant]
        with self._autocast() if self._variants[variant]["autocast"] else nullcontext():
            wall, own = time.perf_counter(), time.process_time()
            for _ in range(count):
                returned = self._trainer.train_iter(next(batches), epoch, self._meters)
                if isinstance(returned, tuple):  # then the checkout's own epoch loop reads two of the losses
                    for key in ("loss_ce", "loss_kd"):
                        returned[1][key].item()
            if self._cuda:
                torch.cuda.synchronize()
            return {"cpu_seconds": time.process_time() - own, "wall_seconds": time.perf_counter() - wall}

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """Run forward passes in bfloat16 where torch's autocast chooses it, and on CUDA matrix products in TF32."""
        module = self._distiller.module
        before = torch.get_float32_matmul_precision()
        if self._cuda:
            torch.set_float32_matmul_precision("high")
        # Only the forward pass, as torch's documentation recommends.
        module.forward = torch.autocast("cuda" if self._cuda else "cpu", dtype=torch.bfloat16)(module.forward)
        try:
            yield
        finally:
            del module.forward
            torch.set_float32_matmul_precision(before)


def _unmoved(value: Foreign, *arguments: object, **keywords: object) -> Foreign:
    """Takes the place of `.cuda()`: returns its object unchanged."""
    return value


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the checkout prints goes to stderr, not among the answers
    checkout = ReferenceCheckout()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(checkout, request["do"])(request)
        except Exception as error:  # the parent process reports it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
