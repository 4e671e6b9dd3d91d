"""The sound files that the attack starts from: runs, an export, a registry, a grid, data sets, foreign weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fetch_support import (
    CUB_TEST,
    CUB_TRAIN,
    cifar_members,
    cub_archive,
    cub_members,
    cub_release_of,
    release_of,
    tar_of,
)
from PIL import Image

from icdctl import data, models
from icdctl.data import cub200
from icdctl.engine import teacher_cache

from . import children
from .children import Place

DIGITS = ("--dataset", "digits100", "--train-images", "60", "--test-images", "20", "--device", "cpu")
SHORT = (*DIGITS, "--batch-size", "20", "--epochs", "2")
PHOTOS = ("--dataset", "imagefolder:photos", "--device", "cpu", "--batch-size", "6", "--epochs", "1")
DISTILL = ("distill", "--teacher", "teacher", "--student", "res8")
GRID: dict[str, Any] = {
    "train": {
        "dataset": "digits100",
        "train_images": 60,
        "test_images": 20,
        "batch_size": 20,
        "epochs": 2,
        "device": "cpu",
    },
    "seeds": [0, 1],
    "teachers": {"digits100-res8": {"dataset": "digits100", "model": "res8", "source": "train"}},
    "cells": {
        "plain": {"student": "res8", "method": "ce"},
        "taught": {"teacher": "teacher", "student": "res8", "method": "kd", "settings": {"temperature": 2}},
    },
}
FOREIGN_RECIPE: dict[str, Any] = {
    "EXPERIMENT": {"NAME": "", "TAG": "dkd,res32x4,mv2", "PROJECT": "cifar100_baselines"},
    "DISTILLER": {"TYPE": "DKD", "TEACHER": "resnet32x4", "STUDENT": "MobileNetV2"},
    "SOLVER": {"BATCH_SIZE": 64, "EPOCHS": 240, "LR": 0.01, "LR_DECAY_STAGES": [150, 180, 210], "TRAINER": "base"},
    "DKD": {"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20},
}
PIPELINE = yaml.safe_dump(
    {
        "stages": {
            "teacher": {
                "cmd": f"icdctl train --model res8 {' '.join(SHORT)} --out teacher --resume",
                "outs": ["teacher"],
            },
            "student": {
                "cmd": f"icdctl {' '.join(DISTILL)} --method kd {' '.join(SHORT)} --out run --resume",
                "deps": ["teacher"],
                "outs": ["run"],
            },
        }
    }
)
"""A small dvc.yaml: a teacher, and a student of it."""
CIFAR = cifar_members(train=120, test=40)
CIFAR_ARCHIVE = tar_of(CIFAR)
CIFAR_NAME = "cifar-100-python.tar.gz"
_CUB = cub_members()
CACHED = ("--set", "crop_padding=1", "--teacher-mode", "cache", "--teacher-precision", "fp32")
"""Nine views of each image: a teacher cache that `stand_in` lets be kept."""
_LOCK = {
    "cifar100/res32x4": {
        "sha256": "0" * 64,
        "converted_sha256": "1" * 64,
        "url": "https://example.org/ckpt_epoch_240.pth",
        "first_use": "2026-01-01",
        "measured_top1": 79.42,
        "accuracy_accepted": False,
    }
}


def stand_in() -> None:
    """Put small generated archives in the place of CIFAR-100 and CUB-200-2011, and keep small teacher caches."""
    teacher_cache._CHECKED_VIEWS, teacher_cache._KEPT_FROM_VIEWS = 20, 400
    described = release_of(CIFAR, CIFAR_ARCHIVE)
    data.DATASETS["cifar100"] = dataclasses.replace(data.DATASETS["cifar100"], release=described)
    birds = cub_release_of(_CUB, cub_archive(_CUB))
    row = dataclasses.replace(data.DATASETS["cub200"], release=birds, train_images=CUB_TRAIN, test_images=CUB_TEST)
    data.DATASETS["cub200"] = row
    for name, value in (("RELEASE", birds), ("NUM_TRAIN", CUB_TRAIN), ("NUM_TEST", CUB_TEST)):
        setattr(cub200, name, value)


class Originals:
    """A project with sound files of every kind."""

    def __init__(self, folder: Path) -> None:
        """Make it in `folder`, by the commands themselves."""
        self.place = Place(folder).make({})
        self.project = self.place.project
        (self.project / "registry").mkdir()
        self._runs()
        self._foreign_files()
        self._data()
        self._cache()
        self._do("registry", "add", "student", "--name", "small")
        self._do("export", "student", "--out", "exported")
        self._do("train", "--model", "res8", *PHOTOS, "--out", "photographed")
        self._do("report", "student", "--no-latency", "--out", "report")
        (self.project / "params.yaml").write_text(yaml.safe_dump(GRID), encoding="utf-8")
        self._do("grid", "expand")

    def sources(self, names: Sequence[str]) -> Mapping[str, Path]:
        """Some of its files and folders, as `Place.make` takes them."""
        return {name: self.project / name for name in names}

    def state_of(self, run: str) -> str:
        """The place of a run's state in the project."""
        stated = json.loads((self.project / run / "environment.json").read_text(encoding="utf-8"))
        return os.path.relpath(self.project / run / stated["checkpoint"]["folder"], self.project)

    def _do(self, *arguments: str) -> None:
        ended = children.run(arguments, self.place)
        assert ended.code == 0, f"icdctl {' '.join(arguments)}: {ended.err}"

    def _runs(self) -> None:
        self._do("train", "--model", "res8", *SHORT, "--out", "teacher")
        self._do(*DISTILL, "--method", "kd", *SHORT, "--out", "student")
        self._do(
            "train", "--model", "res8", *SHORT, "--out", "stopped", "--checkpoint-every", "1", "--time-limit", "0.001s"
        )

        stated = json.loads((self.project / "stopped" / "environment.json").read_text(encoding="utf-8"))
        stated["checkpoint"]["was_at"] = "/nowhere"  # else a copy of the run would use the state of this one
        (self.project / "stopped" / "environment.json").write_text(json.dumps(stated, indent=2), encoding="utf-8")

    def _cache(self) -> None:
        """A run whose teacher cache is kept."""
        self._do(*DISTILL, "--method", "kd", *SHORT, *CACHED, "--out", "cached")

    def _foreign_files(self) -> None:
        torch.manual_seed(0)
        state = models.create("res8", 100).state_dict()
        torch.save({"epoch": 240, "model": state, "best_acc": torch.tensor(70.0)}, self.project / "foreign.pth")
        (self.project / CIFAR_NAME).write_bytes(CIFAR_ARCHIVE)
        (self.project / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
        (self.project / "foreign.yaml").write_text(yaml.safe_dump(FOREIGN_RECIPE), encoding="utf-8")
        pinned = {"path": f"data/raw/{CIFAR_NAME}", "md5": hashlib.md5(CIFAR_ARCHIVE).hexdigest(), "hash": "md5"}
        document = {"frozen": True, "outs": [{**pinned, "size": len(CIFAR_ARCHIVE)}]}
        (self.project / "data.dvc").write_text(yaml.safe_dump(document), encoding="utf-8")
        (self.project / ".dvc").mkdir()
        (self.project / ".dvc" / "config").write_text("[core]\n    no_scm = True\n", encoding="utf-8")
        (self.project / "registry" / "teachers.lock").write_text(json.dumps(_LOCK), encoding="utf-8")

    def _data(self) -> None:
        random = np.random.default_rng(0)
        for number in range(12):
            for split in ("train", "val"):
                kind, suffix = ("cat", "dog")[number % 2], ("png", "jpg")[number // 2 % 2]
                path = self.project / "photos" / split / kind / f"{number}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
        for name, content in {**CIFAR, **_CUB}.items():
            path = self.project / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
