"""Runs that have not started: their options with every name resolved, and their configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from icdctl import data, files, methods, models, run_files, teachers
from icdctl.config import resolving, sources
from icdctl.config.dataset_request import dataset_request
from icdctl.config.declare import Command
from icdctl.config.lookup import OPTIONS
from icdctl.config.run_config import RunConfig
from icdctl.config.sources import Options
from icdctl.data import Dataset, DatasetInfo, Request
from icdctl.errors import ArtifactError, IcdctlError, UsageError
from icdctl.models import Classifier
from icdctl.models.external import CUSTOM_MODEL, adapt, check_module, check_patches
from icdctl.registry.trained import TrainedModel, split_in, weights_file

FindTeacher = Callable[[str, DatasetInfo], TrainedModel]


@dataclass(frozen=True)
class StandIn:
    """What is assumed about files that a configuration names and that are not on this machine."""

    teacher: tuple[str, str, str]
    """Model, weights file and its sha256."""
    init_sha256: str | None
    """sha256 of the first weights."""


class Planner:
    """Resolves the configurations of many runs; looks at each teacher once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, DatasetInfo], TrainedModel | IcdctlError] = {}

    def plan(self, command: Command, options: Mapping[str, object], *, stand_in: StandIn | None = None) -> RunConfig:
        """Resolve the configuration of one run, as the function `plan` does.

        Args:
            command: the command of the run.
            options: the options of the run.
            stand_in: what is assumed where the teacher or the first weights are missing; None to fail without them.

        Raises:
            IcdctlError: with a message and a hint.
        """
        return Job(command, options, find=self.find_teacher, stand_in=stand_in).config

    def find_teacher(self, teacher: str, dataset: DatasetInfo) -> TrainedModel:
        """Find a teacher as `icdctl.teachers.find` does; the second time it comes from memory."""
        key = (teacher, dataset)
        if key not in self._found:
            try:
                found = teachers.find(teacher, dataset=dataset)
                # Only its hash is needed here; its tensors are read again when it is loaded.
                self._found[key] = replace(found, weights=replace(found.weights, tensors={}))
            except IcdctlError as error:
                self._found[key] = error
        known = self._found[key]
        if isinstance(known, IcdctlError):
            raise known
        return known


def plan(command: Command, options: Mapping[str, object], config_file: Path | None = None) -> RunConfig:
    """The resolved configuration of a run that has not started; the teacher must be there, the data need not.

    Raises:
        IcdctlError: with a message and a hint.
    """
    return Job(command, options, config_file).config


def plan_many(
    command: Command,
    several: Sequence[Mapping[str, object]],
    config_file: Path | None = None,
    *,
    in_folder: bool = False,
) -> list[RunConfig]:
    """The resolved configurations of runs that have not started; arguments as for `make_jobs`.

    Raises:
        IcdctlError: with a message and a hint.
    """
    return [job.config for job in make_jobs(command, several, config_file, in_folder=in_folder)]


def make_jobs(
    command: Command, several: Sequence[Mapping[str, object]], config_file: Path | None, *, in_folder: bool
) -> list[Job]:
    """Runs that share what they find.

    Args:
        command: the command of all runs.
        several: one mapping of options for each run.
        config_file: a run's config.json, which the options override.
        in_folder: `out` is the folder of the run folders, not the run folder.

    Raises:
        IcdctlError: with a message and a hint.
    """
    find = Planner().find_teacher
    jobs = [Job(command, options, config_file, find=find) for options in several]
    if in_folder:
        for job, options in zip(jobs, several, strict=True):
            if options.get("out") is not None:
                out = files.user_path(str(options["out"])) / resolving.default_run_name(job.config)
                job.config = job.config.model_copy(update={"out": str(out)})
    return jobs


class Job:
    """Options with every name resolved."""

    def __init__(
        self,
        command: Command,
        options: Mapping[str, object],
        config_file: Path | None = None,
        *,
        find: FindTeacher | None = None,
        stand_in: StandIn | None = None,
    ) -> None:
        given = dict(options)
        self.student_module = _take_module(given, "student")
        self.teacher_module = _take_module(given, "teacher")
        collected = sources.collect(given, config_file=config_file, command=command)
        _check_needed(command, collected)
        self._stand_in: StandIn | None = None
        problems: list[IcdctlError] = []
        self.teacher_target: TrainedModel | None = None
        self.scales_are_given = collected.get("scales") is not None
        needs_teacher = command == "distill" and _needs_teacher(collected)
        self.teacher_is_ignored = command == "distill" and not needs_teacher and collected.get("teacher") is not None
        if needs_teacher and self.teacher_module is None:
            try:
                teachers.model_of(str(collected.get("teacher")))  # reported even where the data set is wrong too
                find = find or Planner().find_teacher
                self.teacher_target = find(str(collected.get("teacher")), _described(collected))
                _check_same_teacher(self.teacher_target, collected.text("teacher_sha256"))
            except IcdctlError as error:
                self._stand_in = stand_in
                if stand_in is None:
                    problems.append(error)
        if problems and not any(isinstance(problem, UsageError) for problem in problems):
            problems += _missing_data(collected)
        build = partial(resolving.make_config, command, teacher=self._teacher_identity(), problems=problems)
        collected = _with_file_of_first_weights(collected, problems)
        first_weights = collected.text("init_weights")
        if stand_in is not None and first_weights is not None and not _is_file(first_weights):
            config = build(collected.without("init_weights"))
            self.config = config.model_copy(update={"init_sha256": stand_in.init_sha256})
        else:
            self.config = build(collected)

    def _teacher_identity(self) -> tuple[str, str, str] | None:
        if self._stand_in is not None:
            return self._stand_in.teacher
        if self.teacher_target is not None:
            target = self.teacher_target
            return target.model, str(target.path.resolve()), target.sha256
        if self.teacher_module is None or self.teacher_is_ignored:
            return None
        return CUSTOM_MODEL, "", models.hash_weights(self.teacher_module)

    def warnings(self) -> list[str]:
        """Warnings about options that have no effect."""
        config = self.config
        needs_patches = methods.get(config.method).needs_patches
        found = []
        if needs_patches and config.scales == (1,):
            found.append("warning: with scale 1 alone there are no patches: SDD and the cluster term add nothing")
        if self.scales_are_given and not needs_patches:
            found.append(f"warning: method `{config.method}` reads no patches, `--scales` is ignored")
        if self.teacher_is_ignored:
            found.append(f"warning: method `{config.method}` reads no teacher, `--teacher` is ignored")
        return found

    def test_images_seen(self, dataset: Dataset) -> list[str]:
        """What is known of test images that the teacher, or the model with the first weights, was trained on.

        Raises:
            ArtifactError: the first weights can't be read, or their metadata are malformed.
        """
        found: list[str | None] = []
        if self.teacher_target is not None:
            target = self.teacher_target
            found.append(dataset.seen_by(f"teacher `{target.origin}`", target.dataset, target.split))
        if self.config.init_weights is not None and dataset.parts:
            path = Path(self.config.init_weights)
            said = models.read_weights(path).metadata
            if "dataset" in said:  # weights of other programs are mostly of other images
                split = split_in(said, path=path)
                found.append(dataset.seen_by(f"the model with the first weights `{path}`", str(said["dataset"]), split))
        return [text for text in found if text is not None]

    def teacher(self, dataset: Dataset, needs_patches: bool) -> Classifier | None:
        """The teacher's weights, or a custom module; None where the method reads none."""
        if self.teacher_target is not None:
            model = self.teacher_target.load()
            if needs_patches:
                check_patches(model)
            return model
        return self._adapted(self.teacher_module, dataset, needs_patches)

    def own_student(self, dataset: Dataset) -> Classifier | None:
        """A custom module in place of a named student."""
        needs_patches = methods.get(self.config.method).needs_patches
        return self._adapted(self.student_module, dataset, needs_patches, is_trained=True)

    def _adapted(
        self, module: nn.Module | None, dataset: Dataset, needs_patches: bool, *, is_trained: bool = False
    ) -> Classifier | None:
        if module is None:
            return None
        return adapt(
            module,
            image_size=dataset.preprocessing.size,
            num_classes=dataset.num_classes,
            needs_patches=needs_patches,
            is_trained=is_trained,
        )


def _check_same_teacher(target: TrainedModel, sha256: str | None) -> None:
    """Refuse a teacher that has changed since the configuration that names it."""
    if sha256 is not None and target.sha256 != sha256:
        raise ArtifactError(
            f"teacher `{target.path}` has sha256 {target.sha256[:12]}..., the configuration states {sha256[:12]}...",
            hint="name the teacher with `--teacher` to use it as it is now",
        )


def _take_module(given: dict[str, object], key: str) -> nn.Module | None:
    """An nn.Module among the options, replaced by a name there."""
    value = given.get(key)
    if isinstance(value, nn.Module):
        check_module(value)
        given[key] = CUSTOM_MODEL
        return value
    if isinstance(value, Path):
        given[key] = str(value)
    return None


def _with_file_of_first_weights(options: Options, problems: list[IcdctlError]) -> Options:
    """The options with a weights file in place of the run folder or artifact that `init_weights` names."""
    named = options.text("init_weights")
    if not named or _is_file(named):
        return options
    try:
        path = weights_file(named)
        if files.user_path(named).is_dir():
            hint = f"restore it, or name `{path}` itself to use it as it is now"
            run_files.check_as_written(path.parent, files.sha256_file(path), hint=hint)
    except IcdctlError as error:
        problems.append(error)
        return options.without("init_weights")
    return replace(options, given={**options.given, "init_weights": str(path)})


def _is_file(path: str) -> bool:
    """Whether a path is a file, or `FILE:KEY` of one."""
    return models.split_part(files.user_path(path))[0].is_file()


def _check_needed(command: Command, options: Options) -> None:
    """Check that a student is named, and a method and a teacher for `distill`."""
    needed = ["student"] if command == "train" else ["method", "student"]
    if command == "distill" and _needs_teacher(options):
        needed.append("teacher")
    missing = [name for name in needed if options.get(name) is None]
    if missing:
        flags = ", ".join(OPTIONS[name].shown(command) for name in missing)
        example = (
            "icdctl train --model res20 --dataset digits100"
            if command == "train"
            else "icdctl distill --method cd_sdd_dkd --teacher res32x4 --student mv2 --scales 1,2,4"
        )
        raise UsageError(f"{flags} {'is' if len(missing) == 1 else 'are'} missing", hint=f"e.g. `{example}`")


def _described(options: Options) -> DatasetInfo:
    """What is known of the data set of a run, before its configuration is complete."""
    return data.describe(_requested(options))


def _requested(options: Options) -> Request:
    dataset, data_dir = options.text("dataset"), options.text("data_dir")
    name = data.resolve(resolving.DEFAULT_DATASET if dataset is None else dataset)
    folder = None if data_dir is None else files.user_path(data_dir)
    return dataset_request(
        name, folder=folder, **dict(resolving.dataset_settings(name, options.text("student"), options))
    )


def _needs_teacher(options: Options) -> bool:
    try:
        return methods.get(options.text("method") or "").needs_teacher
    except UsageError:
        return True  # the name is reported later, together with what else is wrong


def _missing_data(options: Options) -> list[IcdctlError]:
    """Problems of the data, to be reported together with a missing teacher.

    A folder of images is not decoded for that: it was looked at before the teacher was.
    """
    try:
        wanted = _requested(options)
        if not data.is_there(wanted.name, wanted.folder):  # to decode images that are there would take minutes
            data.load(wanted)
    except IcdctlError as error:
        return [error]
    return []
