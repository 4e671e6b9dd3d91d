"""The environment of a run: versions, device, commit, command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from icdctl import files, versions
from icdctl.errors import arguments_without_secrets

PACKAGES = ("icdctl", "torch", "torchvision", "numpy", "onnx", "onnxruntime", "safetensors", "scikit-learn", "dvc")
"""Packages whose versions matter to a run."""
_CPU_INFO = Path("/proc/cpuinfo")
_NO_PROGRAMS = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
_NO_FETCHING = {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
_FILTERS = r"^filter\..*\.(clean|smudge|process|required)$"


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside a repository, before a first commit or without git."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *_NO_PROGRAMS]
    try:
        environment = _without_programs(command)
        commit = _output([*command, "rev-parse", "--verify", "HEAD^{commit}"], environment, check=True)
        changed = [*command, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty"]
        return {"commit": commit, "dirty": bool(_output(changed, environment, check=True))}
    except (OSError, ValueError, subprocess.SubprocessError):
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
        "command_line": [files.utf8_name(word) for word in arguments_without_secrets(sys.argv)],
    }


def differing_environment(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of an environment may change digits, where it differs: `torch 2.13.0 (now 2.15.0)`."""
    pairs: dict[str, tuple[object, object]] = {
        key: (earlier.get(key), now.get(key)) for key in ("platform", "precision")
    }
    for key in ("versions", "device"):
        old, new = earlier.get(key) or {}, now.get(key) or {}
        pairs |= {name: (old.get(name), new.get(name)) for name in {**old, **new}}
    return [f"{name} {old} (now {new})" for name, (old, new) in pairs.items() if old != new]


def _without_programs(command: list[str]) -> dict[str, str]:
    """Variables with which git runs no program that the repository names.

    A repository's own configuration may name a monitor of files, hooks, filters for the content of files, and programs
    that fetch missing objects; git would run them to find its status.

    Args:
        command: git for that repository.
    """
    environment = {**os.environ, **_NO_FETCHING}
    listed = _output([*command, "config", "--show-scope", "-z", "--name-only", "--get-regexp", _FILTERS], environment)
    words = listed.split("\0")
    own = [name for scope, name in zip(words[::2], words[1::2], strict=False) if scope in ("local", "worktree")]
    first = int(environment.get("GIT_CONFIG_COUNT") or 0)
    # By variables, because the name of a filter may hold `=`, which separates name and value after `-c`.
    environment["GIT_CONFIG_COUNT"] = str(first + len(own))
    for number, name in enumerate(own, start=first):
        environment |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": ""}
    return environment


def _output(command: list[str], environment: dict[str, str], *, check: bool = False) -> str:
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=check,
        timeout=20,
    )
    return done.stdout.strip()
