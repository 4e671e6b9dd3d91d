"""`icdctl bench --against`: the comparison with a stand-in of the reference code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from bench_support import TINY, small_sizes
from conftest import CommandLine
from torch import Tensor

from icdctl.benchmark import against, reference
from icdctl.errors import ArtifactError

__all__ = ["small_sizes"]


PACKAGE = {
    "__init__.py": "",
    "models/__init__.py": '''
from icdctl import methods, models


def narrow(num_classes, M):
    """A model that answers with logits and patch logits."""
    model = models.create("res8", num_classes)
    scales = methods.parse_scales(M)

    def forward(images):
        outputs = model.outputs(images)
        return outputs.logits, methods.patch_logits(outputs.feature_map, model.head, scales)

    model.forward = forward
    return model


cifar_model_dict = {"resnet8_sdd": (narrow, None)}
''',
    "distillers/__init__.py": """
import torch
from torch import nn
from icdctl import methods


class Patches(nn.Module):
    def __init__(self, student, teacher, config):
        super().__init__()
        self.student, self.teacher, self.config = student, teacher, config

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, image, target, epoch):
        logits, patches = self.student(image)
        with torch.no_grad():
            teacher_logits, teacher_patches = self.teacher(image)
        settings = {"temperature": self.config.DKD.T, "beta": self.config.DKD.BETA, "warmup_epochs": self.config.warmup}
        terms = methods.distillation_terms(
            "sdd_dkd", student_logits=logits, student_patches=patches, teacher_logits=teacher_logits,
            teacher_patches=teacher_patches, labels=target, scales=methods.parse_scales(self.config.M), epoch=epoch,
            settings=settings,
        )
        return logits, {"loss_ce": terms["ce"], "loss_kd": FACTOR * terms["kd"]}


distiller_dict = {"SDD_DKD": Patches}
""",
    "engine/__init__.py": """
from .cfg import CFG
from .trainer import Trainer
from .utils import AverageMeter

trainer_dict = {"base": Trainer}
""",
    "engine/cfg.py": """
from surely_missing.config import CfgNode

CFG = CfgNode()
CFG.DATASET, CFG.SOLVER, CFG.DKD, CFG.LOG = CfgNode(), CfgNode(), CfgNode(), CfgNode()
CFG.DATASET.NUM_WORKERS = 2
CFG.SOLVER.update(BATCH_SIZE=64, LR=0.05, MOMENTUM=0.0, WEIGHT_DECAY=0.0)
CFG.DKD.update(T=1.0, BETA=8.0)
CFG.LOG.PREFIX = "."
""",
    "engine/utils.py": """
class AverageMeter:
    def update(self, value, count=1):
        self.average = value
""",
    "engine/trainer.py": """
import os
import torch
from torch import nn


class Trainer:
    def __init__(self, name, distiller, train_loader, test_loader, config):
        os.makedirs(os.path.join(config.LOG.PREFIX, name), exist_ok=True)
        self.distiller = distiller
        solver = config.SOLVER
        self.optimizer = torch.optim.SGD(
            distiller.module.student.parameters(), lr=solver.LR, momentum=solver.MOMENTUM,
            weight_decay=solver.WEIGHT_DECAY,
        )

    def train_iter(self, data, epoch, meters):
        image, target, index = data
        self.optimizer.zero_grad()
        image, target = image.float().cuda(non_blocking=True), target.cuda(non_blocking=True)
        logits, terms = self.distiller(image=image, target=target, epoch=epoch)
        loss = sum(term.mean() for term in terms.values())
        loss.backward()
        nn.utils.clip_grad_norm_(self.distiller.parameters(), max_norm=40, norm_type=2)
        self.optimizer.step()
        meters["losses"].update(loss.item())
        return "a line of progress", terms
""",
    "dataset/__init__.py": """
import os
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def get_data_folder():
    folder = os.path.join(os.path.dirname(__file__), "..", "..", "data")
    os.makedirs(folder, exist_ok=True)
    return folder


class Numbered(datasets.CIFAR100):
    def __getitem__(self, index):
        return (*super().__getitem__(index), index)


def get_dataset(config):
    print("talk on stdout is no answer")
    normal = [transforms.ToTensor(), transforms.Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))]
    varied = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *normal])
    train = Numbered(get_data_folder(), train=True, transform=varied, download=True)
    test = datasets.CIFAR100(get_data_folder(), train=False, transform=transforms.Compose(normal), download=True)
    size, workers = config.SOLVER.BATCH_SIZE, config.DATASET.NUM_WORKERS
    return DataLoader(train, size, shuffle=True, num_workers=workers), DataLoader(test, size), len(train), 100
""",
}
"""A package with mdistiller's interface; its patches, losses and weights are ours."""


def write_checkout(folder: Path, *, kd_factor: float = 1.0) -> Path:
    for name, text in PACKAGE.items():
        path = folder / "mdistiller" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("FACTOR", str(kd_factor)))
    return folder


def test_a_comparison_gates_then_times_both(icdctl: CommandLine, tmp_path: Path) -> None:
    checkout = write_checkout(tmp_path / "checkout")
    given = ("--against", checkout, "--pairs", "resnet8:res8", "--rounds", "2", "--budget", "4", "--require", "1000")
    code, out, err = icdctl("bench", *given, *TINY, "--json")
    found = json.loads(out)
    assert code == 1
    assert "error: the lowest ratio is below 1000" in err
    assert found["error"]["code"] == 1
    assert found["reference"] == {"git": None, "stand_ins": ["surely_missing"]} | {
        "sha256": found["reference"]["sha256"]
    }
    row = found["pairs"]["resnet8:res8"]
    assert row["method"] == "sdd_dkd"  # the best that it has
    assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert row["icdctl_images_per_second"] == pytest.approx(8000 / row["icdctl_ms"])
    assert row["reference_workers"] == 0
    assert row["gate_differences"]["float64_loss"] < 1e-9
    assert 0 < row["gate_differences"]["float32_gradient"] < 1e-3
    left = sorted(path.name for path in checkout.rglob("*") if path.suffix != ".py" and path.is_file())
    assert (left, (checkout / "data").exists()) == ([], False)


def test_the_reference_is_timed_in_more_than_one_way(
    icdctl: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(against, "_EPOCH_IMAGES", 160)
    checkout = write_checkout(tmp_path / "checkout")
    pace = ("--rounds", "2", "--budget", "4", "--reference-variants", "autocast,workers")
    given = ("--against", checkout, "--pairs", "resnet8:res8", *pace)
    code, out, err = icdctl("bench", *given, *TINY, "--json", "--require", "1000")
    row = json.loads(out)["pairs"]["resnet8:res8"]
    found = row["variants"]
    assert list(found) == ["published", "autocast", "workers"]
    assert {name: (one["workers"], one["autocast"]) for name, one in found.items()} == {
        "published": (0, False),
        "autocast": (0, True),
        "workers": (min(2, os.cpu_count() or 1), False),
    }
    assert [one["clock"] for one in found.values()] == 2 * ["CPU seconds of the process"] + ["wall clock"]
    assert all(0 < one["ratio_min"] <= one["ratio"] <= one["ratio_max"] for one in found.values())
    assert row["reference_ms"] == found["published"]["reference_ms"]
    # The slowest gain counts, whichever the variant.
    assert code == 1
    assert "resnet8:res8 (published)" in err
    assert "resnet8:res8 (workers)" in err
    code, out, _ = icdctl("bench", *given, *TINY)
    assert code == 0
    assert "ratio, autocast" in out
    assert "workers: by the wall clock" in out


def test_autocast_is_around_the_forward_pass_alone() -> None:
    class Seen(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images @ images

    held = reference.ReferenceCheckout()
    module = Seen()
    held._distiller = torch.nn.DataParallel(module)
    images = torch.eye(2)
    with held._autocast():
        assert held._distiller(images).dtype == torch.bfloat16
        assert (images @ images).dtype == torch.float32
    assert held._distiller(images).dtype == torch.float32
    assert "forward" not in vars(module)


def test_a_checkout_that_computes_something_else_gets_no_speed(icdctl: CommandLine, tmp_path: Path) -> None:
    checkout = write_checkout(tmp_path, kd_factor=1.001)
    code, out, err = icdctl("bench", "--against", checkout, "--pairs", "res8:res8", *TINY)
    assert (code, out) == (1, "")
    assert "don't compute the same, so no speed is reported: `kd` in epoch 1, float32, is" in err


def test_a_checkout_that_fails_is_named(icdctl: CommandLine, tmp_path: Path) -> None:
    checkout = write_checkout(tmp_path)
    given = ("bench", "--against", checkout, *TINY, "--pairs")
    code, _, err = icdctl(*given, "res8:res14")
    assert (code, "it has no model `resnet14_sdd` or `resnet14`" in err) == (1, True)
    (checkout / "mdistiller" / "engine" / "trainer.py").write_text("raise SystemExit('no trainer today')\n")
    code, _, err = icdctl(*given, "res8:res8")
    assert (code, "ended: no trainer today" in err) == (1, True)


def test_a_wrong_method_for_a_checkout_says_what_it_has() -> None:
    assert against._choose_method(None, ["KD", "DKD"], Path("x")) == "dkd"
    assert against._choose_method("CD-SDD-DKD", ["CD_SDD_DKD"], Path("x")) == "cd_sdd_dkd"
    with pytest.raises(ArtifactError, match="has no method `sdd_kd`") as caught:
        against._choose_method("sdd_kd", ["KD", "DKD", "NOT_OURS"], Path("x"))
    assert caught.value.hint == "choose `--method` from what it has: kd, dkd"


def test_the_reference_sees_one_device_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from icdctl.benchmark.child import _visible_devices

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _visible_devices(torch.device("cpu")) == ""
    assert [_visible_devices(torch.device(name)) for name in ("cuda", "cuda:1")] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert _visible_devices(torch.device("cuda:1")) == "7"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"
