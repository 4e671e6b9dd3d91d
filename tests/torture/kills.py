"""Commands that are killed at random instants and repeated: in the end they leave what an uninterrupted one leaves."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import children
from .children import Ended, Place, Running
from .originals import CACHED, CIFAR_NAME, DIGITS, DISTILL, PHOTOS, SHORT, Originals

_STEPS = (*SHORT, "--checkpoint-every", "1")
_TIMES = {
    "seconds",
    "images_per_second",
    "students_at_once",
    "created",
    "registered",
    "added",
    "date",
    "environment",
    "first_use",
    "command_line",
    "checkpoint",
    "history_sha256",
    "metrics_sha256",
    "card_sha256",
}
"""Keys of JSON files that say when and how fast, or hash files that say so."""
_TIMED_FILES = {"history.csv", "metrics.json", "environment.json"}
"""Files that hold such keys: their hashes differ, too."""
_TEMPORARY = re.compile(r"\.(.+\.[a-z0-9_]{8}|.+\.part|trash-.+)")
"""Names of files that are not complete."""
_OLD_SECONDS = 3 * 24 * 3600
_MOST_ATTEMPTS = 8
_MOST_TOGETHER = 4
_SHARE_KILLED = 0.25
"""Share of the commands at once that are killed."""


@dataclass(frozen=True)
class Job:
    """A command to kill, and what it must leave."""

    command: tuple[str, ...]
    results: tuple[str, ...]
    """Patterns of the files that must have the same bytes, but for times."""
    needs: tuple[str, ...] = ()
    resume: bool = False
    """The repeated command has `--resume`."""
    weight: int = 4
    check: tuple[str, ...] = ()
    """A command that finds all in order in the end."""
    program: tuple[str, ...] = ()
    """Another program than icdctl, in a process that is not forked."""


_SOUND = ("validate", "run")
RUN = ("config.json", "metrics.json", "history.csv", "student.safetensors")


def _in(*folders: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for folder in folders for name in RUN)


def jobs(mirror: str) -> dict[str, Job]:
    """Name -> job; `mirror` serves the archive of CIFAR-100's stand-in."""
    kd, fitnet = (*DISTILL, "--method", "kd"), (*DISTILL, "--method", "fitnet")
    return {
        "train": Job(("train", "--model", "res8", *SHORT, "--out", "run"), _in("run"), resume=True, check=_SOUND),
        "train, a state a step": Job(
            ("train", "--model", "res8", *_STEPS, "--out", "run"), _in("run"), resume=True, check=_SOUND
        ),
        "distill": Job(
            (*DISTILL, "--method", "cd_sdd_dkd", *_STEPS, "--out", "run"),
            _in("run"),
            ("teacher",),
            resume=True,
            check=_SOUND,
        ),
        "distill, two seeds": Job(
            (*kd, *_STEPS, "--seeds", "0-1", "--out", "runs"), _in("runs/*"), ("teacher",), resume=True
        ),
        "distill, connectors": Job(
            (*fitnet, *_STEPS, "--out", "run"), _in("run"), ("teacher",), resume=True, check=_SOUND
        ),
        "distill, teacher cache": Job(
            (*kd, *SHORT, *CACHED, "--out", "run"),
            (*_in("run"), ".icdctl/cache/answers/*/logits.npy"),
            ("teacher",),
            resume=True,
            weight=2,
        ),
        "train, decoding": Job(
            ("train", "--model", "res8", *PHOTOS, "--out", "run"),
            (*_in("run"), ".icdctl/cache/images/*.npy"),
            ("photos",),
            resume=True,
            check=_SOUND,
        ),
        "export": Job(
            ("export", "student", "--out", "exported"),
            ("exported/*",),
            ("student", "teacher"),
            weight=2,
            check=("verify", "exported"),
        ),
        "registry add": Job(
            ("registry", "add", "student", "--name", "small"),
            ("registry/**/*",),
            ("student",),
            check=("registry", "verify"),
        ),
        "train --as-teacher": Job(
            ("train", "--model", "res8", *DIGITS, "--epochs", "1", "--out", "run", "--as-teacher"),
            (*_in("run"), "registry/**/*"),
            resume=True,
            check=("registry", "verify"),
        ),
        "grid run": Job(("grid", "run"), _in("runs/*/*"), ("params.yaml", "cells.yaml", "teacher"), weight=3),
        "fetch-data": Job(
            ("fetch-data", "cifar100", "--mirror", mirror, "--data-dir", "data"), ("data/cifar-100-python/*",)
        ),
        "fetch-data --from": Job(
            ("fetch-data", "cifar100", "--from", CIFAR_NAME, "--data-dir", "data"),
            ("data/cifar-100-python/*", CIFAR_NAME),
            (CIFAR_NAME,),
        ),
        "clean": Job(
            ("clean", "--kind", "images", "--kind", "answers", "--kind", "finished", "--kind", "remains"),
            (".icdctl/cache/**/*", ".icdctl/checkpoints/**/*", *_in("teacher", "student")),
            (".icdctl", "teacher", "student", "stopped"),
        ),
        "dvc repro": Job(
            ("repro",),
            (*_in("teacher", "run"), "dvc.lock"),
            ("dvc.yaml", ".dvc"),
            weight=1,
            program=(sys.executable, "-m", "dvc"),
        ),
    }


@dataclass(frozen=True)
class Result:
    """What one killed job showed."""

    job: str
    seed: int
    kills: int
    """How often it was killed before it had ended."""
    faults: list[str]
    last: Ended

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.job}, {self.kills} kills"


class Killer:
    """Runs jobs, kills them at instants that a seed decides, and compares."""

    def __init__(self, originals: Originals, folder: Path, mirror: str) -> None:
        """Use `folder` for the cases; `mirror` is the URL of a server as `jobs` has it."""
        self._originals, self._folder = originals, folder
        self._jobs = jobs(mirror)
        self._whole: dict[str, tuple[float, Mapping[str, str]]] = {}

    def names(self, *, quick: bool) -> list[str]:
        """The jobs, each as often as it is to be drawn; the quick ones alone where wanted."""
        return [name for name, job in self._jobs.items() for _ in range(job.weight) if not (quick and job.weight < 3)]

    def run(self, name: str, seed: int) -> Result:
        """Kill a job once or several times, repeat it until it ends, and compare what it leaves."""
        job = self._jobs[name]
        seconds, expected = self._uninterrupted(name)
        rng = random.Random(f"kill {seed}")
        place = self._place(job)
        kills, command, ended = 0, job.command, None
        for attempt in range(_MOST_ATTEMPTS):
            running = Running(command, place, program=job.program)
            # The first half of a short command is reading its options.
            instant = rng.uniform(seconds / 2 if rng.random() < 0.5 else 0, seconds)
            is_spared = attempt > 0 and (attempt > 3 or rng.random() < 0.6)
            ended = running.wait(None if is_spared else instant)
            if ended is None:
                kills += 1
                ended = running.kill()
                command = (*job.command, "--resume") if job.resume else job.command
            elif ended.code == 0 or attempt > 0:
                break
        assert ended is not None
        faults = [*_unexplained(ended), *_differences(expected, ended, digests(place.project, job))]
        faults += self._unsound(job, place)
        faults += self._remains(place)
        self._put_away(place, faults, f"kill-{seed}")
        return Result(name, seed, kills, faults, ended)

    def run_together(self, name: str, seed: int) -> Result:
        """Run a job several times at once, kill some of them, run it once more, and compare what that leaves."""
        job = self._jobs[name]
        seconds, expected = self._uninterrupted(name)
        rng = random.Random(f"together {seed}")
        place = self._place(job)
        again = (*job.command, "--resume") if job.resume else job.command
        running: list[Running] = []
        ended: list[Ended] = []
        count, kills = rng.randint(2, _MOST_TOGETHER), 0
        for number in range(count):
            started = Running(again if number else job.command, place, program=job.program, number=number)
            if rng.random() >= _SHARE_KILLED:
                running.append(started)
                time.sleep(rng.uniform(0, seconds / 4))
                continue
            over = started.wait(rng.uniform(0, seconds))
            if over is None:
                started.kill()
                kills += 1
            else:
                ended.append(over)
        ended += [started.finish() for started in running]
        # DVC exits with 255 where another one is at work.
        faults = [] if job.program else [f"one of {count}: {fault}" for each in ended for fault in _unexplained(each)]
        last = children.run(again, place, program=job.program)
        faults += [*_unexplained(last), *_differences(expected, last, digests(place.project, job))]
        faults += [*self._unsound(job, place), *self._remains(place)]
        self._put_away(place, faults, f"together-{seed}")
        return Result(f"{name}, {count} at once", seed, kills, faults, last)

    def _put_away(self, place: Place, faults: list[str], name: str) -> None:
        """Keep the folder of a case that shows faults, under this name."""
        if faults:
            place.root.rename(self._folder / name)
        else:
            shutil.rmtree(place.root)

    def _uninterrupted(self, name: str) -> tuple[float, Mapping[str, str]]:
        """Seconds that a job takes, and what it leaves."""
        if name not in self._whole:
            job = self._jobs[name]
            place = self._place(job)
            ended = children.run(job.command, place, program=job.program)
            assert ended.code == 0, (name, ended)
            self._whole[name] = ended.seconds, digests(place.project, job)
            assert self._whole[name][1] or name == "clean", f"{name}: leaves nothing"
            shutil.rmtree(place.root)
        return self._whole[name]

    def _place(self, job: Job) -> Place:
        """A new place, always under the same path: results hold paths."""
        return Place(self._folder / "killed").make(self._originals.sources(job.needs))

    def _unsound(self, job: Job, place: Place) -> list[str]:
        checked = children.run(job.check, place) if job.check else None
        return [f"`icdctl {' '.join(job.check)}`: {checked.err}"] if checked is not None and checked.code else []

    def _remains(self, place: Place) -> list[str]:
        """Files that are not complete and that `icdctl clean` does not delete, two days later."""
        before = time.time() - _OLD_SECONDS
        for path in place.project.rglob("*"):
            with suppress(OSError):
                os.utime(path, (before, before), follow_symlinks=False)
        ended = children.run(("clean", "--kind", "remains", "--kind", "downloads"), place)
        found = [] if ended.code == 0 else [f"`icdctl clean` fails: {ended.err}"]
        for path in place.project.rglob(".*"):
            if _TEMPORARY.fullmatch(path.name) and ".dvc" not in path.parts:
                found.append(f"`icdctl clean` leaves `{path.relative_to(place.project)}`")
        return found


def digests(project: Path, job: Job) -> dict[str, str]:
    """File -> hash of what it holds, but for times, of all files that are a job's result."""
    paths = {path for pattern in job.results for path in project.glob(pattern) if path.is_file()}
    whole = {str(path.relative_to(project)): path for path in paths if not path.name.endswith(".lock")}
    whole |= {"dvc.lock": project / "dvc.lock"} if "dvc.lock" in job.results else {}
    return {
        name: hashlib.sha256(_without_times(path)).hexdigest() for name, path in sorted(whole.items()) if path.exists()
    }


def _without_times(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name == "history.csv":
        rows = csv.DictReader(io.StringIO(content.decode("utf-8")))
        return repr([{key: row[key] for key in row if key != "seconds"} for row in rows]).encode()
    if path.suffix == ".json":
        value = _timeless(json.loads(content))
        value.pop("sha256", None)  # of the file itself, with the times in it
        return json.dumps(value, sort_keys=True).encode()
    if path.name in ("environment.json", "card.md", "README.md", "dvc.lock"):
        return b""  # it says when something was made, or holds hashes of files that do
    return content


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in _TIMES | _TIMED_FILES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _unexplained(ended: Ended) -> list[str]:
    """What is wrong with the way in which a command ended."""
    faults = ended.faults()
    if ended.code != 0 and not all(f"\n{word}: " in f"\n{ended.err}" for word in ("error", "hint")):
        faults.append(f"exit code {ended.code} without an explanation")
    return faults


def _differences(expected: Mapping[str, str], ended: Ended, found: Mapping[str, str]) -> list[str]:
    """What files show of a command that is not as after an uninterrupted one."""
    faults = []
    if ended.code == 0 and found != expected:
        differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        faults.append(f"differs from an uninterrupted one: {', '.join(differing)}")
    elif any(name in expected and found[name] != expected[name] for name in found):
        faults.append("it explains itself, but files under their final names are others than of an uninterrupted one")
    return faults
