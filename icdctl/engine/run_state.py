"""Where the state of a run lies, and which run may take it up.

States lie in the state folder, one folder for each run folder, because pipelines delete the outputs of a stage before
they run it. The run folder names its state, so that both find each other after the run folder, the project or the state
folder was moved. Without `--resume` no state is taken up. With it, one is where the run is the same: settings, images,
teacher and, for a custom module, architecture and first weights.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from icdctl import files
from icdctl.config.lookup import SETTINGS
from icdctl.config.run_config import RunConfig
from icdctl.engine.checkpoint import Progress, read_state, read_student, state_files, update_hash
from icdctl.errors import ArtifactError, UsageError
from icdctl.models import Classifier
from icdctl.models.external import without_adapter
from icdctl.run_files import WEIGHTS_FILE, check_as_written, check_numbers

ENVIRONMENT_FILE = "environment.json"
_POINTER = "checkpoint"
"""Key in a run's environment.json for where its state is."""
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_LONGEST_RUN = 8
"""Characters of a run's name in the name of a folder."""


@dataclass(frozen=True)
class RunInputs:
    """What a run is made of beside its configuration."""

    dataset_sha256: str
    student: Classifier | None = None
    """A custom module, as it is before the run."""

    @cached_property
    def student_sha256(self) -> str:
        """Hash of the custom module: its architecture and weights; empty without one."""
        if self.student is None:
            return ""
        weights = {key: value.detach().cpu() for key, value in self.student.state_dict().items()}
        return _hash_of_module(self.student, weights)

    def student_differs(self, progress: Progress, folder: Path) -> bool:
        """Whether a custom module is neither as it was when a run began nor as the run's state has it."""
        if self.student is None or progress.student_sha256 in ("", self.student_sha256):
            return False
        return self.student_sha256 != _hash_of_module(self.student, read_student(folder))


@dataclass(frozen=True)
class RunState:
    """The state of a run that is about to be trained."""

    folder: Path
    """Where it lies, or will."""
    run: str
    """Name of the run."""
    student_sha256: str = ""
    """Hash of the custom module that the run began with."""
    decided: Mapping[str, str] = field(default_factory=dict)
    """What was decided when the run began, where that is known but no step is done."""
    metrics: dict[str, Any] | None = None
    """The result of a finished run whose state was deleted; there is nothing left to train."""

    @property
    def exists(self) -> bool:
        """Whether anything was saved."""
        return bool(state_files(self.folder))

    def pointer(self, out: Path) -> dict[str, Any]:
        """What the environment.json of a run folder says of its state, so that both find each other when moved."""
        folder = self.folder.resolve()
        where = {"run": self.run, "folder": os.path.relpath(folder, out.resolve()), "was_at": str(folder)}
        return {_POINTER: where}


def checkpoints_folder() -> Path:
    """Where states are kept, a folder for each run folder."""
    return files.state_folder() / "checkpoints"


def state_folder_of(out: Path) -> Path:
    """The folder for the state of a new run: the same after the whole project was moved."""
    whole, root = out.resolve(), files.state_folder().resolve().parent
    place = whole.relative_to(root) if whole.is_relative_to(root) else whole
    return checkpoints_folder() / files.sha256_bytes(os.fsencode(place))[:20]


def claim_state(
    config: RunConfig, inputs: RunInputs, *, resume: bool, message: Callable[[str], None] = lambda text: None
) -> RunState:
    """Find the state that a run takes up, or make room for a new one; the run folder is locked and fits the run.

    Args:
        config: the configuration of the run.
        inputs: what else it is made of.
        resume: whether an earlier state may be taken up.
        message: called with what is taken up or discarded.

    Raises:
        UsageError, ArtifactError: the run folder holds a run that is made of something else, or its state is lost.
    """
    out = Path(config.out)
    if (out / "config.json").is_file():
        return _of_run_folder(out, config, inputs)
    folder = state_folder_of(out)
    try:
        found = read_state(folder)
    except ArtifactError as error:
        message(f"the state of an earlier run in `{out}` is discarded: {error.message}")
        shutil.rmtree(folder, ignore_errors=True)
        found = None
    if found is not None:
        progress, earlier = found
        why = "`--resume` is not given" if not resume else _different(progress, earlier, config, inputs, folder)
        if not why:
            shown = "finished" if progress.done else progress.shown(config)
            message(f"`{out}` is gone, its state is not: it is taken up ({shown})")
            return RunState(folder, progress.run or _new_run(), progress.student_sha256)
        _discard(out, folder, progress, why, message)
    return RunState(folder, _new_run(), inputs.student_sha256)


def _of_run_folder(out: Path, config: RunConfig, inputs: RunInputs) -> RunState:
    """The state of the run that a folder holds."""
    found = _find_state(out, config)
    if found is not None:
        folder, progress = found
        if progress.dataset_sha256 != inputs.dataset_sha256:
            raise ArtifactError(
                f"the images of `{config.dataset}` have changed since this run began",
                hint=f"bring them back, or delete `{out}` and start again",
            )
        if inputs.student_differs(progress, folder):
            raise UsageError(
                f"run folder `{out}` holds a run of another module: its architecture or its first weights differ",
                hint="pass the module as it was when the run began, or choose another folder with `out`",
            )
        return RunState(folder, progress.run or _new_run(), progress.student_sha256)
    if (out / "metrics.json").is_file():
        return RunState(state_folder_of(out), _new_run(), metrics=_result_of(out, config, inputs))
    epochs = _epochs_in(out / "history.csv")
    if epochs:
        raise ArtifactError(
            f"the state of the run in `{out}` is lost: it stopped after epoch {epochs}, and `{checkpoints_folder()}` "
            "has nothing of it",
            hint=f"bring the state folder back (`ICDCTL_HOME` names it), or delete `{out}` and start again",
        )
    stated = files.read_json(out / "config.json", what="config", hint=f"delete `{out}` and start again")
    decided = {key: str(stated.get(key, "auto")) for key in ("teacher_mode", "teacher_precision")}
    return RunState(state_folder_of(out), _new_run(), inputs.student_sha256, decided)


def _result_of(out: Path, config: RunConfig, inputs: RunInputs) -> dict[str, Any]:
    """The metrics of a finished run whose state was deleted.

    Raises:
        ArtifactError: they are of other images, without weights, or not as the run wrote them.
    """
    hint = f"delete `{out}` and start again"
    metrics = files.read_json(out / "metrics.json", what="metrics", hint=hint)
    if not isinstance(metrics, dict) or not (out / WEIGHTS_FILE).is_file():
        raise ArtifactError(f"`{out}` holds no whole result", hint=hint)
    if metrics.get("dataset_sha256") != inputs.dataset_sha256:
        raise ArtifactError(f"the images of `{config.dataset}` have changed since the run in `{out}`", hint=hint)
    check_numbers(out, metrics, hint=hint)
    check_as_written(out, files.sha256_file(out / WEIGHTS_FILE), hint=hint)
    return metrics


def _find_state(out: Path, config: RunConfig) -> tuple[Path, Progress] | None:
    """The folder with the state of the run that a run folder holds; None where it is lost, or nothing was saved.

    Raises:
        ArtifactError: the state is where the run folder says, and broken.
    """
    try:
        stated = files.read_json(out / ENVIRONMENT_FILE, what="environment", hint="")[_POINTER]
        run = str(stated["run"])
        named = [(out / str(stated["folder"])).resolve(), Path(str(stated["was_at"]))]
    except (ArtifactError, KeyError, TypeError):
        # Run folders of earlier versions do not say where their state is.
        legacy = checkpoints_folder() / config.legacy_fingerprint
        found = read_state(legacy)
        return None if found is None else (legacy, found[0])
    for folder in (*named, state_folder_of(out)):
        found = read_state(folder)
        if found is not None and found[0].run in (run, ""):
            return folder, found[0]
    for folder in checkpoints_folder().iterdir() if checkpoints_folder().is_dir() else ():
        with suppress(ArtifactError):  # another run's, which is reported where that is continued
            found = read_state(folder)
            if found is not None and found[0].run == run:
                return folder, found[0]
    return None


def _different(
    progress: Progress, earlier: RunConfig | None, config: RunConfig, inputs: RunInputs, folder: Path
) -> str:
    """What makes a run another one than the run of a state; empty where it is the same."""
    if earlier is None:
        return "it is of an earlier version of icdctl"
    changed = differences(earlier, config)
    if progress.dataset_sha256 != inputs.dataset_sha256:
        changed.append("the images have changed")
    if inputs.student_differs(progress, folder) or bool(progress.student_sha256) != (inputs.student is not None):
        changed.append("the module is another one")
    return ", ".join(changed)


def differences(earlier: RunConfig, config: RunConfig) -> list[str]:
    """What makes two runs different, e.g. `gamma 4.0 -> 8.0`; empty where one may continue the other."""
    new, old = config.identity, earlier.identity
    if config.pretrained and config.pretrained_sha256 is None:  # planned: these weights were not loaded
        old.pop("pretrained_sha256", None)
    return [_change(key, old.get(key), new.get(key)) for key in SETTINGS if new.get(key) != old.get(key)]


def _change(key: str, old: Any, new: Any) -> str:
    """The change of one key: for settings, each that changed; for hashes, their first digits."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in inner)
    return f"{key} {str(old)[:12]} -> {str(new)[:12]}"


def _discard(out: Path, folder: Path, progress: Progress, why: str, message: Callable[[str], None]) -> None:
    """Make room for a new state. One that is not done is kept under another name: its run folder may have been moved.

    Raises:
        ArtifactError: it can't be moved.
    """
    if progress.done:
        shutil.rmtree(folder, ignore_errors=True)
        message(f"the state of an earlier, finished run in `{out}` is discarded: {why}")
        return
    aside = folder.with_name(f"{folder.name}-{(progress.run or _new_run())[:_LONGEST_RUN]}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    except OSError as error:
        raise files.not_writable(aside, error) from error
    message(f"the state of an earlier, unfinished run in `{out}` is not taken up: {why}; `icdctl clean` removes it")


def _new_run() -> str:
    return uuid.uuid4().hex


def _hash_of_module(module: Classifier, weights: Mapping[str, Tensor]) -> str:
    """Hash of an architecture, as the module prints it, and of weights."""
    digest = hashlib.sha256(_ADDRESS.sub("", repr(without_adapter(module))).encode())
    update_hash(digest, weights)
    return digest.hexdigest()


def _epochs_in(history: Path) -> int:
    """Number of epochs in a history.csv; 0 where there is none."""
    try:
        return len(files.read_table(history))
    except (OSError, ValueError):
        return 0
