"""The same training step by icdctl and by a checkout of the reference code, timed side by side on one machine.

The reference runs in a separate process (`reference.py`). Both sides have the same weights, images and constants. First
both take the same steps, and their losses and gradients must agree; only then are they timed. Blocks of steps
alternate, A B B A, while the other process waits on a pipe, so that a change of the machine's speed affects both.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from icdctl import files, methods, models
from icdctl.benchmark import clocks
from icdctl.benchmark.child import Ask, reference_process
from icdctl.benchmark.gate import largest_differences
from icdctl.benchmark.workload import (
    EPOCH,
    ModelPair,
    Plan,
    Session,
    Stepper,
    build_config,
    fresh_model,
    random_dataset,
)
from icdctl.config.run_config import RunConfig
from icdctl.data import Dataset
from icdctl.engine.device import backend_settings, resolve_device, resolve_precision
from icdctl.engine.environment import git_state
from icdctl.errors import ArtifactError, UsageError
from icdctl.files import JsonObject
from icdctl.models import Classifier

PREFERRED = ("cd_sdd_dkd", "sdd_dkd", "dkd")
"""Methods for the comparison where the user names none: the first one that the checkout has is used."""

VARIANTS = ("published", "workers", "autocast")
"""Ways to run the reference: with its own defaults, with more workers in its loader, and in half precision."""

_EPOCH_IMAGES, _FEW_BATCHES, _NUM_TEST = 50_000, 80, 64
_DKD_KEYS = {"temperature": "T", "alpha": "ALPHA", "beta": "BETA", "ce_weight": "CE_WEIGHT", "warmup_epochs": "WARMUP"}
_LONGEST_BLOCK_SECONDS = 12.0
_BUDGET_FOR_BLOCKS = 0.9
_WORKERS = {"cpu": (0, 2), "cuda": (2, 16)}
"""Workers of its loader, published and more; none on a CPU, so that all its work counts as its process's CPU time."""
_OURS, _WALL = "icdctl", "wall clock"
_SHORTEST_PATIENCE_SECONDS = 120.0

Tell = Callable[[str], None]
Block = dict[str, dict[str, float]]
"""The times of one round: side -> its clocks, in seconds per step."""


@dataclass(frozen=True)
class Pace:
    """How long to measure."""

    rounds: int
    """Blocks of each side, for each pair of models."""
    budget: float
    """Seconds for everything; where they run out, there are fewer rounds."""


@dataclass(frozen=True)
class Variant:
    """A way to run the reference without changing its code."""

    workers: int
    """Workers of its loader, set by its own option."""
    autocast: bool
    """Run its forward pass in bfloat16 where torch's autocast chooses it, and on CUDA matrix products in TF32."""


def parse_variants(text: str) -> tuple[str, ...]:
    """The names in a text like `workers,autocast`; `published` is always among them, and first.

    Raises:
        UsageError: a name is unknown.
    """
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"unknown reference variant `{name}`", hint=f"choose some of {', '.join(VARIANTS)}")
    return tuple(dict.fromkeys((VARIANTS[0], *names)))


def _variant(name: str, device: torch.device) -> Variant:
    few, many = _WORKERS[device.type]
    more = max(few, min(many, os.cpu_count() or 1))
    if name == "workers":
        return Variant(more, autocast=False)
    if name == "autocast":
        # On CUDA with the workers too, so that it does not wait for images; on a CPU without: its clock does not count
        # the CPU time of other processes.
        return Variant(few if device.type == "cpu" else more, autocast=True)
    return Variant(few, autocast=False)


def compare(
    plan: Plan,
    pairs: Sequence[ModelPair],
    checkout: Path,
    pace: Pace,
    *,
    variants: Sequence[str] = VARIANTS[:1],
    tell: Tell,
) -> JsonObject:
    """Time both sides on each pair of models.

    Args:
        plan: the options that all pairs share; without a method, the first of `PREFERRED` that the checkout has.
        pairs: teachers and students.
        checkout: the folder that holds `mdistiller`.
        pace: rounds and seconds.
        variants: ways to run the reference, from `parse_variants`.
        tell: called with a line of text about each step of the work.

    Returns:
        `device`, `versions`, `reference` and, under `pairs`, by label: `ratio` (reference time divided by icdctl time,
        the median over rounds), `ratio_min`, `ratio_max`, milliseconds per step and images per second of both sides,
        the gate's largest differences, and under `variants` the same numbers for each variant of the reference.

    Raises:
        UsageError: an option is wrong.
        ArtifactError: there is no such checkout, or it does not have the method or a model.
        IcdctlError: the two sides don't compute the same, so no speed is reported.
    """
    check_checkout(checkout)
    started = time.perf_counter()
    device = resolve_device(plan.device)
    precision = resolve_precision(build_config(_with_method(plan, PREFERRED[0]), pairs[0]).precision, device)
    found: JsonObject = {}
    with clocks.threads(plan.threads):
        described = {**clocks.describe(device, precision), "threads": plan.threads}
        if device.type == "cuda":
            described["clock"] = _WALL  # CUDA events can't be shared by two processes
        stand_ins: list[str] = []
        for done, pair in enumerate(pairs):
            share = (pace.budget - (time.perf_counter() - started)) / (len(pairs) - done)
            ways = {name: _variant(name, device) for name in variants}
            comparison = _Comparison(plan, pair, checkout, device, precision, ways, tell)
            found[pair.label], stand_ins = comparison.run(pace.rounds, share)
    described["load_after"] = clocks.load()
    state = git_state(checkout) if (checkout / ".git").exists() else None
    return {
        "device": described,
        "versions": clocks.package_versions(),
        "reference": {"git": state, "sha256": _sha256(checkout / "mdistiller"), "stand_ins": stand_ins},
        "pairs": found,
    }


def check_checkout(checkout: Path) -> None:
    """Check that the folder is a checkout of the reference.

    Raises:
        ArtifactError: the folder does not exist, or holds no `mdistiller`.
    """
    hint = "pass a checkout of iCD, SDD-CVPR2024 or mdistiller: the folder that holds `mdistiller`"
    if not checkout.is_dir():
        raise ArtifactError(f"`{checkout}` is not a folder", hint=hint)
    if not (checkout / "mdistiller" / "__init__.py").is_file():
        raise ArtifactError(f"`{checkout}` holds no package `mdistiller`", hint=hint)


def _sha256(package: Path) -> str:
    """The hash of the package's Python files, names and contents, in order."""
    paths = sorted(package.rglob("*.py"))
    lines = [f"{path.relative_to(package).as_posix()} {files.sha256_file(path)}\n" for path in paths]
    return files.sha256_bytes("".join(lines).encode())


def _with_method(plan: Plan, method: str) -> Plan:
    return replace(plan, method=plan.method or method)


class _Comparison:
    """The comparison of both sides for one pair of models."""

    def __init__(
        self,
        plan: Plan,
        pair: ModelPair,
        checkout: Path,
        device: torch.device,
        precision: str,
        variants: Mapping[str, Variant],
        tell: Tell,
    ) -> None:
        self.plan, self.pair, self.checkout, self.variants = plan, pair, checkout, variants
        self.device, self.precision = device, precision
        self._tell = tell

    def run(self, rounds: int, budget: float) -> tuple[JsonObject, list[str]]:
        """Pass the gate, then time blocks: the numbers, and the missing packages that were replaced by stand-ins."""
        started = time.perf_counter()
        patience = max(_SHORTEST_PATIENCE_SECONDS, budget)
        with (
            tempfile.TemporaryDirectory(prefix="icdctl-bench-") as folder,
            reference_process(
                Path(folder), self.checkout, self.device, num_threads=self.plan.threads, patience=patience
            ) as ask,
        ):
            self._say("making images and models")
            batch_size = build_config(_with_method(self.plan, PREFERRED[0]), self.pair).batch_size
            # Workers are started again in each epoch, so the reference's epoch has as many steps as a real one.
            has_workers = any(variant.workers for variant in self.variants.values())
            num_batches = max(1, _EPOCH_IMAGES // batch_size) if has_workers else _FEW_BATCHES
            dataset = random_dataset(num_batches * batch_size, _NUM_TEST, seed=self.plan.seed)
            keys = ("train_images", "train_labels", "test_images", "test_labels")
            save_file({key: getattr(dataset, key).contiguous() for key in keys}, Path(folder) / "images.safetensors")
            opened = ask(
                "open",
                checkout=str(self.checkout.resolve()),
                scratch=folder,
                device=self.device.type,
                threads=self.plan.threads,
                seed=self.plan.seed,
            )
            method = _choose_method(self.plan.method, opened["methods"], self.checkout)
            config = build_config(replace(self.plan, method=method), self.pair)
            teacher = fresh_model(self.pair.teacher, dataset, seed=self.plan.seed, is_teacher=True)
            student = fresh_model(self.pair.student, dataset, seed=self.plan.seed + 1, is_teacher=False)
            for name, model in (("teacher", teacher), ("student", student)):
                state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
                save_file(state, Path(folder) / f"{name}.safetensors")
            prepared = ask("prepare", **self._request(config))
            self._say("comparing losses and gradients")
            differences = largest_differences(
                self.pair.label,
                partial(self._exact_session, config, dataset, teacher, student),
                ask,
                Path(folder),
                device=self.device,
                say=self._say,
            )
            with backend_settings(self.device, self.precision, deterministic=False):
                session = self._session(config, dataset, teacher, student, self.precision)
                step = Stepper(session)
                blocks = self._blocks(ask, step, rounds, budget - (time.perf_counter() - started))
                step.check_finite()
        by_variant = {name: self._row(name, blocks, config.batch_size) for name in self.variants}
        numbers = {
            "method": method,
            "precision": self.precision,
            "teacher_precision": session.inline.precision,
            "batch_size": config.batch_size,
            "cuda_graph": step.captures,
            "compiled": session.run.is_compiled,
            "reference_workers": prepared["workers"][VARIANTS[0]],
            "gate_differences": differences,
            **by_variant[VARIANTS[0]],
            "variants": by_variant,
        }
        return numbers, opened["stand_ins"]

    def _row(self, name: str, blocks: Sequence[Block], batch_size: int) -> JsonObject:
        """The numbers of one variant and icdctl."""
        variant = self.variants[name]
        # Workers are separate processes, whose CPU time the clock of the training process does not count.
        on_cpu = self.device.type == "cpu" and not variant.workers
        summary = _summary([(block[name], block[_OURS]) for block in blocks], batch_size, on_cpu=on_cpu)
        clock = clocks.clock_name(self.device) if on_cpu else _WALL
        return {"workers": variant.workers, "autocast": variant.autocast, "clock": clock, **summary}

    def _say(self, what: str) -> None:
        self._tell(f"{self.pair.label}: {what}")

    def _session(
        self, config: RunConfig, dataset: Dataset, teacher: Classifier, student: Classifier, precision: str
    ) -> Session:
        return Session(config, dataset, teacher, student, device=self.device, precision=precision, message=self._say)

    def _exact_session(
        self, config: RunConfig, dataset: Dataset, teacher: Classifier, student: Classifier, dtype: torch.dtype
    ) -> Session:
        """A session for the gate, with copies of the given models; half precision is only timed, never compared."""
        exact = config.model_copy(update={"teacher_precision": "fp32", "compile": False})
        teacher, student = (copy.deepcopy(model).to(dtype) for model in (teacher, student))
        return self._session(exact, dataset, teacher, student, "fp32")

    def _request(self, config: RunConfig) -> JsonObject:
        """The constants and names of this configuration, under the reference's names."""
        settings = config.settings
        needs_patches = methods.get(config.method).needs_patches
        values: JsonObject = {
            "DATASET.TYPE": "cifar100",
            "DISTILLER.TYPE": config.method.upper(),
            "SOLVER.TYPE": "SGD",
            "SOLVER.BATCH_SIZE": config.batch_size,
            "SOLVER.LR": config.lr,
            "SOLVER.MOMENTUM": config.momentum,
            "SOLVER.WEIGHT_DECAY": config.weight_decay,
            "LOG.WANDB": False,
            "LOG.PREFIX": "output",
            "distributation": False,
            "M": f"[{','.join(map(str, config.scales or methods.SCALES))}]",
            "warmup": settings.get("warmup_epochs", 0.0),
        }
        values |= {f"DKD.{theirs}": settings[ours] for ours, theirs in _DKD_KEYS.items() if ours in settings}
        if "gamma" in settings:
            values["CD.GAMMA"] = settings["gamma"]
        if methods.get(config.method).family == "kd":
            values["KD.TEMPERATURE"] = settings["temperature"]
            values["KD.LOSS.CE_WEIGHT"], values["KD.LOSS.KD_WEIGHT"] = settings["ce_weight"], settings["kd_weight"]
        return {
            "method": config.method.upper(),
            "teacher": _their_names(self.pair.teacher, needs_patches),
            "student": _their_names(self.pair.student, needs_patches),
            "scales_text": values["M"],
            "config": values,
            "variants": {name: asdict(variant) for name, variant in self.variants.items()},
            "epoch": EPOCH,
        }

    def _blocks(self, ask: Ask, step: Stepper, rounds: int, budget: float) -> list[Block]:
        """Times of all sides, one block of each per round; every other round is in reverse order."""
        deadline = time.perf_counter() + budget

        def theirs(variant: str, count: int) -> dict[str, float]:
            spent = ask("steps", count=count, variant=variant)
            return {key: float(value) / count for key, value in spent.items()}

        def ours(count: int) -> dict[str, float]:
            wall, own = time.perf_counter(), time.process_time()
            for _ in range(count):
                step()
            clocks.synchronize(self.device)
            return {
                "cpu_seconds": (time.process_time() - own) / count,
                "wall_seconds": (time.perf_counter() - wall) / count,
            }

        sides: dict[str, Callable[[int], dict[str, float]]] = {name: partial(theirs, name) for name in self.variants}
        sides[_OURS] = ours
        self._say("warming up")
        for side in sides.values():
            side(1)  # the first calls choose algorithms and compile
        slower = max(side(2)["wall_seconds"] for side in sides.values())
        room = _BUDGET_FOR_BLOCKS * (deadline - time.perf_counter()) / (len(sides) * rounds)
        count = max(1, int(min(_LONGEST_BLOCK_SECONDS, room) / slower))
        found = []
        for number in range(rounds):
            self._say(f"round {number + 1} of {rounds}, {count} steps per block")
            names = list(sides) if number % 2 == 0 else list(reversed(sides))
            found.append({name: sides[name](count) for name in names})
            if time.perf_counter() + len(sides) * count * slower > deadline and number + 1 < rounds:
                self._say(f"the budget is spent after {number + 1} of {rounds} rounds")
                break
        return found


def _summary(
    blocks: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], batch_size: int, *, on_cpu: bool
) -> JsonObject:
    """Medians and ratios over the rounds; times in milliseconds, rates in images per second."""
    key = "cpu_seconds" if on_cpu else "wall_seconds"
    ratios = [theirs[key] / ours[key] for theirs, ours in blocks]
    wall_ratios = [theirs["wall_seconds"] / ours["wall_seconds"] for theirs, ours in blocks]
    theirs_ms = 1e3 * statistics.median(theirs[key] for theirs, _ in blocks)
    ours_ms = 1e3 * statistics.median(ours[key] for _, ours in blocks)
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "reference_ms": theirs_ms,
        "icdctl_ms": ours_ms,
        "reference_images_per_second": 1e3 * batch_size / theirs_ms,
        "icdctl_images_per_second": 1e3 * batch_size / ours_ms,
        "rounds": len(blocks),
        "wall_ratio": statistics.median(wall_ratios),
        "reference_wall_ms": 1e3 * statistics.median(theirs["wall_seconds"] for theirs, _ in blocks),
        "icdctl_wall_ms": 1e3 * statistics.median(ours["wall_seconds"] for _, ours in blocks),
    }


def _their_names(model: str, needs_patches: bool) -> list[str]:
    """The reference's possible names for a model, the preferred one first; models with `_sdd` give patch logits."""
    plain = list(models.MODELS[model].aliases)
    with_patches = [f"{name}_sdd" for name in plain]
    return [*with_patches, *plain] if needs_patches else [*plain, *with_patches]


def _choose_method(wanted: str | None, available: Sequence[str], checkout: Path) -> str:
    candidates = PREFERRED if wanted is None else (methods.resolve(wanted),)
    for method in candidates:
        if method in methods.LOGIT_METHODS and method.upper() in available:
            return method
    known = [name for name in methods.LOGIT_METHODS if name.upper() in available]
    raise ArtifactError(
        f"`{checkout}` has no method {' or '.join(f'`{name}`' for name in candidates)}",
        hint=f"choose `--method` from what it has: {', '.join(known) or 'none that icdctl knows'}",
    )
