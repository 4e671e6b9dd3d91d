"""The environment of a run: versions, device, commit, command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from icdctl import files, versions

PACKAGES = ("icdctl", "torch", "torchvision", "numpy", "onnx", "onnxruntime", "safetensors", "scikit-learn", "dvc")
"""Packages whose versions matter to a run."""
_CPU_INFO = Path("/proc/cpuinfo")


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside a repository, before a first commit or without git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and size of a device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"type": "cuda", "name": properties.name, "memory_bytes": properties.total_memory}
    return {"type": "cpu", "name": cpu_name(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def cpu_name() -> str:
    """The processor's name, if the system states it."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def describe_environment(device: torch.device, precision: str) -> dict[str, Any]:
    """The content of environment.json."""
    return {
        "versions": versions.versions(PACKAGES),
        "platform": platform.platform(),
        "device": describe_device(device),
        "precision": precision,
        "git": git_state(Path.cwd()),
        "command_line": [files.utf8_name(word) for word in sys.argv],
    }


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
