"""Mutated files, one at a time, given to the commands that read them."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from . import children, mutations
from .children import Ended, Limits, Place
from .originals import CACHED, CIFAR_NAME, DISTILL, SHORT, Originals

Rehash = Callable[[Path], None]
_STOPPED = ("train", "--model", "res8", *SHORT, "--out", "stopped", "--checkpoint-every", "1", "--resume")
_REGISTERED = "registry/digits100/small/v1"


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and the commands that read them."""

    file: str
    """The file, in the project of the originals."""
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...]
    """What else of the originals the commands need."""
    structure: str = ""
    """One of `mutations.STRUCTURES`; empty where only bytes are changed."""
    rehash: Rehash | None = None
    """Makes the hashes of a project right after a change, so that the change is not refused for its hash alone."""
    mapped: bool = False
    """It is mapped into memory: a process that reads it can't survive that it is cut short meanwhile."""
    weight: int = 4
    """How often it is drawn, compared with other kinds; 1 where its commands take long."""


def _rehash_export(project: Path) -> None:
    manifest = project / "exported" / "manifest.json"
    stated = json.loads(manifest.read_text(encoding="utf-8"))
    for name, row in stated["files"].items():
        path = project / "exported" / name
        if path.is_file():
            content = path.read_bytes()
            row.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    stated.pop("sha256", None)
    manifest.write_text(json.dumps(stated), encoding="utf-8")


def _without_hashes(*names: str) -> Rehash:
    """Take the hashes out of JSON files: a missing hash is not checked."""

    def take_out(project: Path) -> None:
        for name in names:
            try:
                stated = json.loads((project / name).read_bytes())
                kept = {key: value for key, value in stated.items() if not key.endswith("sha256")}
                (project / name).write_bytes(json.dumps(kept).encode("utf-8", "surrogatepass"))
            except (OSError, ValueError, RecursionError, AttributeError):
                continue  # it is damaged so that it holds no hash

    return take_out


def kinds(originals: Originals) -> dict[str, Kind]:
    """Name -> kind, for all files that icdctl reads."""
    image = "photos/val/cat/0.png"
    run = ("student", "teacher")
    student_readers = (("validate", "student"), ("registry", "add", "student", "--name", "new"))
    export_readers = (("verify", "exported"), ("validate", "exported"), ("predict", "exported", image))
    registry_readers = (
        ("registry", "list"),
        ("registry", "show", "digits100/small"),
        ("registry", "verify"),
        ("list", "teachers"),
        (
            "distill",
            "--method",
            "kd",
            "--teacher",
            "registry:digits100/small",
            "--student",
            "res8",
            *SHORT,
            "--dry-run",
        ),
    )
    repeat = ("distill", "--config", "student/config.json", "--out", "again", "--dry-run")
    graph_readers = (("verify", "exported/model.onnx"), ("predict", "exported/model.onnx", image))
    registered = "registry/digits100/small"
    state = originals.state_of("stopped")
    cached = _first(originals.project, ".icdctl/cache/answers/[!.]*")
    answer_readers: tuple[tuple[str, ...], ...] = (
        (*DISTILL, "--method", "kd", *SHORT, *CACHED, "--out", "new", "--max-steps", "1"),
        ("clean", "--list"),
    )
    cifar: tuple[tuple[str, ...], ...] = (
        ("train", "--model", "res8", "--data-dir", "data", "--max-steps", "1", "--device", "cpu", "--out", "new"),
    )
    birds = (
        ("train", "--model", "res8", "--dataset", "cub200", "--data-dir", "data", "--max-steps", "1", "--out", "new"),
    )
    photos: tuple[tuple[str, ...], ...] = (
        ("validate", "imagefolder:photos"),
        ("train", "--model", "res8", "--dataset", "imagefolder:photos", "--max-steps", "1", "--out", "new"),
    )
    foreign = (
        ("validate", "foreign.pth", "--dataset", "cifar100"),
        ("distill", "--method", "kd", "--teacher", "foreign.pth", "--student", "res8", *SHORT, "--dry-run"),
        ("train", "--model", "res8", "--init-weights", "foreign.pth", *SHORT, "--max-steps", "1", "--out", "new"),
    )
    decoded = _first(originals.project, ".icdctl/cache/images/imagefolder-train-*.npy").removesuffix(".npy")
    digits = _first(originals.project, ".icdctl/cache/digits100-v1-60-*.safetensors")
    numbers = _first(originals.project, ".icdctl/cache/evaluated/[!.]*.json")
    report = (("report", "student", "--no-latency", "--out", "new"),)
    grid_readers = (
        ("grid", "status"),
        ("grid", "plan"),
        ("grid", "expand", "--check"),
        ("train", "--model", "res8", "--dry-run"),
    )
    run_hashes = _without_hashes("student/metrics.json")
    artifact_hashes = _without_hashes(f"{_REGISTERED}/manifest.json")
    found = {
        "run config": Kind(
            "student/config.json",
            (*student_readers, repeat, ("recipes", "import", "student/config.json"), ("eval", "student")),
            (*run, "params.yaml"),
            "json",
            run_hashes,
        ),
        "run metrics": Kind("student/metrics.json", student_readers, run, "json", run_hashes),
        "run history": Kind("student/history.csv", student_readers, run, "csv", run_hashes),
        "run metrics in a report": Kind("student/metrics.json", report, (*run, numbers), "json", run_hashes, weight=1),
        "run history in a report": Kind("student/history.csv", report, (*run, numbers), "csv", run_hashes, weight=1),
        "numbers of a report": Kind(
            numbers, (*report, ("clean", "--list")), run, "json", _without_hashes(numbers), weight=1
        ),
        "run environment": Kind("student/environment.json", student_readers, run, "json", run_hashes),
        "environment of a stopped run": Kind("stopped/environment.json", (_STOPPED,), ("stopped", state), "json"),
        "weights": Kind(
            "student/student.safetensors",
            (
                *student_readers,
                ("eval", "student"),
                ("validate", "student/student.safetensors"),
                ("predict", "student", image),
                ("distill", "--method", "kd", "--teacher", "student", "--student", "res8", *SHORT, "--dry-run"),
            ),
            (*run, "photos"),
            "safetensors",
        ),
        "checkpoint": Kind(
            f"{state}/state.safetensors",
            (_STOPPED, ("clean", "--list")),
            ("stopped", state),
            "safetensors",
        ),
        "foreign checkpoint": Kind("foreign.pth", foreign, (), "zip", weight=8),
        "graph": Kind("exported/model.onnx", graph_readers, ("exported", "photos"), "onnx", weight=8),
        "graph with its export": Kind(
            "exported/model.onnx", export_readers, ("exported", "photos"), "onnx", _rehash_export
        ),
        "description of an export": Kind(
            "exported/model.json", export_readers, ("exported", "photos"), "json", _rehash_export
        ),
        "manifest of an export": Kind("exported/manifest.json", export_readers, ("exported", "photos"), "json"),
        "verification of an export": Kind(
            "exported/verify.json", export_readers, ("exported", "photos"), "json", _rehash_export
        ),
        "params.yaml": Kind("params.yaml", grid_readers, ("cells.yaml", "teacher"), "yaml", weight=8),
        "cells.yaml": Kind("cells.yaml", grid_readers, ("params.yaml", "teacher"), "yaml"),
        "recipe of another project": Kind(
            "foreign.yaml", (("recipes", "import", "foreign.yaml"),), ("params.yaml", "cells.yaml"), "yaml", weight=8
        ),
        "data.dvc": Kind(
            "data.dvc",
            (("fetch-data", "cifar100", "--data-dir", "data", "--offline"),),
            (".dvc", "data/cifar-100-python"),
            "yaml",
        ),
        "manifest of an artifact": Kind(
            f"{_REGISTERED}/manifest.json", registry_readers, (registered,), "json", artifact_hashes
        ),
        "card of an artifact": Kind(
            f"{_REGISTERED}/card.md", registry_readers[:3], (registered,), rehash=artifact_hashes
        ),
        "teachers.lock": Kind(
            "registry/teachers.lock", (("fetch-teachers", "--list"), ("list", "teachers")), (), "json"
        ),
        "archive": Kind(
            CIFAR_NAME, (("fetch-data", "cifar100", "--from", CIFAR_NAME, "--data-dir", "new"),), (), weight=1
        ),
        "CIFAR-100": Kind("data/cifar-100-python/train", cifar, ("data/cifar-100-python",), weight=8),
        "lists of CUB-200-2011": Kind("data/CUB_200_2011/images.txt", birds, ("data/CUB_200_2011",), weight=1),
        "labels of CUB-200-2011": Kind(
            "data/CUB_200_2011/image_class_labels.txt", birds, ("data/CUB_200_2011",), weight=1
        ),
        "decoded images": Kind(f"{decoded}.npy", photos[1:], ("photos", f"{decoded}.json"), mapped=True),
        "facts of decoded images": Kind(
            f"{decoded}.json", (*photos[1:], ("clean", "--list")), ("photos", f"{decoded}.npy"), "json"
        ),
        "generated digits": Kind(digits, (_STOPPED,), ("stopped", state), "safetensors"),
        "PNG": Kind(image, (*photos, ("predict", "exported", image)), ("photos", "exported")),
        "JPEG": Kind("photos/train/cat/2.jpg", photos, ("photos",)),
        "teacher cache": Kind(f"{cached}/logits.npy", answer_readers, ("teacher", cached), mapped=True, weight=2),
        "facts of a teacher cache": Kind(f"{cached}/facts.json", answer_readers, ("teacher", cached), "json", weight=2),
    }
    for name, kind in found.items():
        assert (originals.project / kind.file).is_file(), f"{name}: no `{kind.file}`"
    return found


def _first(project: Path, pattern: str) -> str:
    """The first file or folder of a pattern."""
    return str(min(project.glob(pattern)).relative_to(project))


@dataclass(frozen=True)
class Case:
    """One mutation and one command."""

    seed: int
    kind: str
    way: str
    """What is done to the file: "bytes", "structure", "changed while it is read", or one of `mutations.THINGS`."""
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.kind}, {self.way}: icdctl {' '.join(self.command)}"


@dataclass(frozen=True)
class Result:
    """What a case showed."""

    case: Case
    faults: list[str]
    ended: Ended


class Fuzzer:
    """Draws cases and runs them; the same seed gives the same case."""

    def __init__(self, originals: Originals, folder: Path) -> None:
        """Use `folder` for the cases."""
        self._originals, self._folder = originals, folder
        self._kinds = kinds(originals)
        self._honest: dict[tuple[str, ...], int] = {}
        self._names = [name for name, kind in self._kinds.items() for _ in range(kind.weight)]

    def draw(self, seed: int) -> Case:
        """The case of a seed."""
        rng = random.Random(f"case {seed}")
        kind = rng.choice(self._names)
        ways = ["bytes"] * 10 + ["changed while it is read", rng.choice(list(mutations.THINGS))]
        if self._kinds[kind].structure:
            ways += ["structure"] * 12
        return Case(seed, kind, rng.choice(ways), rng.choice(self._kinds[kind].commands))

    def run(self, case: Case) -> Result:
        """Run one case in a folder of its own."""
        kind = self._kinds[case.kind]
        honest = self._honest_bytes(kind, case.command)
        place = self._place(kind, f"case-{case.seed}")
        rng = random.Random(f"mutation {case.seed}")
        path = place.project / kind.file
        content = path.read_bytes()
        during: AbstractContextManager[None] = nullcontext()
        if case.way in mutations.THINGS:
            mutations.put_in_place(path, case.way)
        else:
            way = mutations.STRUCTURES[kind.structure] if case.way == "structure" else mutations.mutate_bytes
            mutated = way(content, rng)
            if case.way == "changed while it is read":
                during = mutations.changing(path, (content, mutated), cut=not kind.mapped)
            else:
                path.write_bytes(mutated)
            if kind.rehash is not None and rng.random() < 0.7:
                kind.rehash(place.project)
        with during:
            ended = children.run(case.command, place, limits=Limits())
        faults = [*ended.faults(honest_bytes=honest), *(f"left `{name}`" for name in place.strays())]
        if (place.project / "ran").exists():
            faults.append("code of the file ran")
        if not faults:
            shutil.rmtree(place.root)
        return Result(case, faults, ended)

    def _place(self, kind: Kind, name: str) -> Place:
        place = Place(self._folder / name)
        return place.make(self._originals.sources([*kind.needs, kind.file]))

    def _honest_bytes(self, kind: Kind, command: tuple[str, ...]) -> int:
        """Peak memory of a command on sound files, which it must accept."""
        if command not in self._honest:
            place = self._place(kind, "honest")
            ended = children.run(command, place, limits=Limits())
            faults = [*ended.faults(), *place.strays()]
            assert (ended.code, faults) == (0, []), (command, ended)
            shutil.rmtree(place.root)
            self._honest[command] = ended.peak_bytes
        return self._honest[command]
