"""Runs a checkout of iCD, SDD or mdistiller as it is, in a process of its own, and times its training step.

Started as a script by `icdctl.benchmark.against`, which talks to it by lines of JSON: requests on stdin, answers on the
stdout that it was started with. Nothing of icdctl is imported here, and nothing of the checkout is changed or copied:
it is imported from where it lies. What is put in place of the world around it:

- torchvision's CIFAR100 becomes images handed over by the parent, read through the checkout's own data set class,
  transforms and DataLoader;
- checkpoints become weights handed over by the parent;
- packages that are not installed and that a step does not need (yacs, wandb, tensorboardX) become stand-ins, named in
  the answer;
- on a CPU `.cuda()` returns what it is called on.

Its variants are its own option for the number of its loader's workers, and torch's autocast around its forward pass.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

_PACKAGE = "mdistiller"
_PARTS = ("", ".models", ".distillers", ".engine", ".engine.cfg", ".engine.utils", ".dataset")
_MOST_STAND_INS = 20


class ConfigNode(dict[str, Any]):
    """What mdistiller's configuration needs of a yacs node: keys as attributes."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value


class Inert:
    """Takes any call and any attribute, and does nothing."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **keywords: Any) -> Inert:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert()


class InertModule(types.ModuleType):
    """A module that has every public name."""

    __path__ = []  # noqa: RUF012 (a package, by Python's rules)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return ConfigNode if name == "CfgNode" else Inert


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages that are known to be missing, and what lies under them."""

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
    """What torchvision's CIFAR100 is to its subclasses: images, labels, a transform."""

    images: dict[bool, tuple[np.ndarray[Any, Any], list[int]]]
    """Training set or not -> pixels [N, 32, 32, 3] uint8, labels."""

    def __init__(
        self,
        root: object = None,
        train: bool = True,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        self.data, self.targets = self.images[train]
        self.transform, self.target_transform = transform, target_transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image: Any = Image.fromarray(self.data[index])
        target: Any = self.targets[index]
        image = image if self.transform is None else self.transform(image)
        return image, target if self.target_transform is None else self.target_transform(target)


class Reference:
    """The checkout at work."""

    def __init__(self) -> None:
        self._cuda = False
        self._variants: dict[str, Any] = {}
        self._batches: dict[str, Iterator[Any]] = {}
        self._meters: dict[str, Any] = {}

    def open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Import the checkout; say what it has."""
        torch.set_num_threads(request["threads"])
        torch.manual_seed(request["seed"])
        torch.backends.cudnn.benchmark = True  # as its own script sets it
        self._cuda = request["device"] == "cuda"
        if not self._cuda:
            stay: Any = lambda self, *arguments, **keywords: self  # noqa: E731 (a method for two classes)
            for kind in (Tensor, nn.Module):
                kind.cuda = stay  # type: ignore[method-assign]  # it moves nothing, on purpose
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

    def _table(self, name: str) -> Any:
        """One of mdistiller's tables, wherever it gives it."""
        for part in self._parts:
            if hasattr(part, name):
                return getattr(part, name)
        raise LookupError(f"`{_PACKAGE}` has no `{name}`")

    def prepare(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Build data, models, distiller and trainer as its own script does."""
        self._request = request
        for name, module in list(sys.modules.items()):  # so that nothing is made in the checkout
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

    def _configuration(self, values: Mapping[str, Any]) -> Any:
        config = self._table("CFG")
        for path, value in values.items():
            *groups, key = path.split(".")
            node = config
            for group in groups:
                node = getattr(node, group, None)
            if node is not None and (key in node or not groups):
                setattr(node, key, value)
        return config

    def _model(self, names: Sequence[str], scales_text: str) -> Any:
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
        """Weights as handed over, a new optimiser, a new order of images."""
        for model, name in ((self._teacher, "teacher"), (self._student, "student")):
            model.load_state_dict(load_file(self._scratch / f"{name}.safetensors"))
        trainer = self._table("trainer_dict")["base"]
        self._trainer = trainer("bench", self._distiller, *self._loaders, self._config)
        self._batches = {name: self._endless(loader) for name, loader in self._train_loaders.items()}
        meter = self._table("AverageMeter")
        self._meters = {key: meter() for key in ("training_time", "data_time", "losses", "top1", "top5")}
        self._distiller.train()

    @staticmethod
    def _endless(loader: Any) -> Iterator[Any]:
        while True:
            yield from loader

    def gate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One training step on each handed batch, every time from the handed weights, in float32 or float64."""
        double = request["double"]
        models = (self._student, self._teacher)
        terms: dict[str, float] = {}
        bounds: list[tuple[float, float]] = []

        def see_losses(module: nn.Module, inputs: Any, output: Any) -> None:
            terms.update({key.removeprefix("loss_"): float(value.detach().mean()) for key, value in output[1].items()})

        clip = nn.utils.clip_grad_norm_

        def see_bound(parameters: Any, max_norm: float, *arguments: Any, **keywords: Any) -> Tensor:
            norm = clip(parameters, max_norm, *arguments, **keywords)
            bounds.append((float(max_norm), float(norm)))
            return norm

        found = []
        handles: list[Any] = []
        nn.utils.clip_grad_norm_ = see_bound
        tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:
            handles = [self._distiller.module.register_forward_hook(see_losses)]
            if double:  # a trainer casts images to float32 itself
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

    def steps(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """So many training steps of a variant, timed as one."""
        epoch, count, variant = self._request["epoch"], request["count"], request["variant"]
        batches = self._batches[variant]
        with self._autocast() if self._variants[variant]["autocast"] else nullcontext():
            wall, own = time.perf_counter(), time.process_time()
            for _ in range(count):
                told = self._trainer.train_iter(next(batches), epoch, self._meters)
                if isinstance(told, tuple):  # its loop over an epoch then reads two of the losses
                    for key in ("loss_ce", "loss_kd"):
                        told[1][key].item()
            if self._cuda:
                torch.cuda.synchronize()
            return {"cpu_seconds": time.process_time() - own, "wall_seconds": time.perf_counter() - wall}

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """Its forward passes in bfloat16 where torch's autocast chooses it, and on CUDA matrix products in TF32."""
        module = self._distiller.module
        before = torch.get_float32_matmul_precision()
        if self._cuda:
            torch.set_float32_matmul_precision("high")
        # The forward pass alone, as torch's manual wants it.
        module.forward = torch.autocast("cuda" if self._cuda else "cpu", dtype=torch.bfloat16)(module.forward)
        try:
            yield
        finally:
            del module.forward
            torch.set_float32_matmul_precision(before)


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the checkout prints is no answer
    reference = Reference()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(reference, request["do"])(request)
        except Exception as error:  # the parent tells the person
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
