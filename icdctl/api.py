"""The library: what the commands call, and what `import icdctl` offers.

Each function takes keywords named like the flags, resolves every name, and hands a frozen configuration to the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from icdctl import config as configuration
from icdctl import data, evaluation, files, methods, sources, targets, teachers
from icdctl.config import CUSTOM_MODEL, RunConfig
from icdctl.data import Dataset, Description, OnImages, Preprocessing, Request
from icdctl.engine import run as engine
from icdctl.engine.device import resolve_device
from icdctl.engine.member import RunResult
from icdctl.engine.observer import Observer, SilentObserver
from icdctl.engine.run import Failure
from icdctl.errors import ArtifactError, IcdctlError, UsageError
from icdctl.exporting import Export, OnnxClassifier, export_onnx
from icdctl.lists import expand
from icdctl.models import Classifier
from icdctl.models.external import adapt
from icdctl.sources import Options
from icdctl.targets import Target

Model = str | Path | nn.Module
Config = Mapping[str, Any] | RunConfig
Command = Literal["train", "distill"]
FindTeacher = Callable[[str, Description], Target]


def train(
    config: Config | None = None,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    **options: Any,
) -> RunResult:
    """Train a model on labels alone.

    Args:
        config: options as a mapping, or a resolved configuration; keywords override it.
        resume: start, go on, or finish at once, whatever the state of the run folder is.
        observer: told of the progress.
        **options: `student` (a model's name or an nn.Module; `model` means the same), `dataset`, `out`, `epochs`, `lr`,
            `seed`, ...: the fields of `icdctl.sources.Options`.

    Raises:
        IcdctlError: with a message and a hint.
    """
    given = {**_stated(config), **options}
    if "model" in given:
        given["student"] = given.pop("model")
    return _one(_run([_Job("train", given)], resume=resume, observer=observer))


def distill(
    config: Config | None = None,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    **options: Any,
) -> RunResult:
    """Train a student to imitate a teacher.

    Args:
        config: options as a mapping, or a resolved configuration; keywords override it.
        resume: start, go on, or finish at once, whatever the state of the run folder is.
        observer: told of the progress.
        **options: `method`, `teacher` (a name, `registry:NAME`, a run folder, a weights file or an nn.Module),
            `student` (a name or an nn.Module), `scales`, `settings`, ...: the fields of `icdctl.sources.Options`.

    Raises:
        IcdctlError: with a message and a hint.
    """
    return _one(_run([_Job("distill", {**_stated(config), **options})], resume=resume, observer=observer))


def distill_many(
    config: Config | None = None,
    *,
    seeds: str | Sequence[int] | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    **options: Any,
) -> list[RunResult | Failure]:
    """Train many students of one teacher at once, each as if it were alone, each with a run folder of its own.

    Args:
        config: options as a mapping, or a resolved configuration; keywords override it.
        seeds: `0-4`, or a sequence.
        resume: for each of them, as for `distill`.
        observer: told of the progress.
        **options: as for `distill`; `method`, `student` and the values of `settings` may be lists, and every
            combination is trained. `out` is the folder of the run folders.

    Returns:
        A result for each combination, or a `Failure` for one that did not get through.

    Raises:
        IcdctlError: with a message and a hint.
    """
    given = {**_stated(config), **options}
    text = seeds if seeds is None or isinstance(seeds, str) else ",".join(map(str, seeds))
    several = expand(given, seeds=text)
    return start("distill", several, in_folder=len(several) > 1, resume=resume, observer=observer)


def _stated(config: Config | None) -> dict[str, Any]:
    """The options that a configuration states."""
    if isinstance(config, RunConfig):
        return sources.options_of(config.model_dump())
    return dict(config or {})


def plan(command: Command, options: Mapping[str, Any], config_file: Path | None = None) -> RunConfig:
    """The resolved configuration of a run that is not started; the teacher must be there, the data need not.

    Raises:
        IcdctlError: with a message and a hint.
    """
    return _Job(command, options, config_file).config


@dataclass(frozen=True)
class StandIn:
    """What is taken to be known of files that a configuration names and that are not here."""

    teacher: tuple[str, str, str]
    """Model, file, sha256 of its weights."""
    init_sha256: str | None
    """Of the first weights."""


class Planner:
    """Resolves the configurations of many runs that are not started; looks at each teacher once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, Description], Target | IcdctlError] = {}

    def plan(self, command: Command, options: Mapping[str, Any], *, stand_in: StandIn | None = None) -> RunConfig:
        """As the function `plan`.

        Args:
            command: of the run.
            options: of the run.
            stand_in: in place of a teacher and of first weights that are not here; None to fail without them.

        Raises:
            IcdctlError: with a message and a hint.
        """
        return _Job(command, options, find=self.find_teacher, stand_in=stand_in).config

    def find_teacher(self, teacher: str, dataset: Description) -> Target:
        """As `icdctl.teachers.find`, the second time from memory."""
        key = (teacher, dataset)
        if key not in self._found:
            try:
                found = teachers.find(teacher, dataset=dataset)
                # Its hash is what is wanted, its tensors are read again when it is loaded.
                self._found[key] = replace(found, weights=replace(found.weights, tensors={}))
            except IcdctlError as error:
                self._found[key] = error
        known = self._found[key]
        if isinstance(known, IcdctlError):
            raise known
        return known


def plan_many(
    command: Command,
    several: Sequence[Mapping[str, Any]],
    config_file: Path | None = None,
    *,
    in_folder: bool = False,
) -> list[RunConfig]:
    """The resolved configurations of runs that are not started; arguments as for `start`.

    Raises:
        IcdctlError: with a message and a hint.
    """
    return [job.config for job in _jobs(command, several, config_file, in_folder=in_folder)]


def start(
    command: Command,
    several: Sequence[Mapping[str, Any]],
    *,
    config_file: Path | None = None,
    in_folder: bool = False,
    resume: bool = False,
    wait: bool = False,
    observer: Observer | None = None,
) -> list[RunResult | Failure]:
    """`train` or `distill` by name, from options and a config.json; several runs share data and teacher.

    Args:
        command: of all of them.
        several: options, a mapping a run.
        config_file: a run's config.json, which the options override.
        in_folder: `out` is the folder of the run folders, not the run folder.
        resume: for each of them, as for `distill`.
        wait: for other processes that are at work in the run folders, rather than fail.
        observer: told of the progress.

    Raises:
        IcdctlError: with a message and a hint.
    """
    jobs = _jobs(command, several, config_file, in_folder=in_folder)
    return _run(jobs, resume=resume, wait=wait, observer=observer)


def _jobs(
    command: Command, several: Sequence[Mapping[str, Any]], config_file: Path | None, *, in_folder: bool
) -> list[_Job]:
    find = Planner().find_teacher
    jobs = [_Job(command, options, config_file, find=find) for options in several]
    if in_folder:
        for job, options in zip(jobs, several, strict=True):
            if options.get("out") is not None:
                out = files.user_path(str(options["out"])) / configuration.default_run_name(job.config)
                job.config = job.config.model_copy(update={"out": str(out)})
    return jobs


def _one(results: list[RunResult | Failure]) -> RunResult:
    (result,) = results
    if isinstance(result, Failure):
        raise result.error
    return result


def _run(
    jobs: Sequence[_Job], *, resume: bool, observer: Observer | None, wait: bool = False
) -> list[RunResult | Failure]:
    """Load what is needed, once, then train."""
    observer = observer or SilentObserver()
    engine.check_together([job.config for job in jobs])
    dataset = data.load(jobs[0].config.images, on_images=_decoding(observer))
    caveat = [f"warning: {dataset.caveat}"] if dataset.caveat else []
    warnings = [warning for job in jobs for warning in job.warnings()]
    for text in dict.fromkeys([*dataset.notes, *caveat, *warnings]):
        observer.message(text)
    needs_patches = any(methods.METHODS[job.config.method].needs_patches for job in jobs)
    asking = next((job for job in jobs if job.config.teacher is not None), jobs[0])
    return engine.run_together(
        [job.config for job in jobs],
        dataset,
        teacher=asking.teacher(dataset, needs_patches),
        teacher_origin=_origin_of(asking.teacher_target),
        students=[job.own_student(dataset) for job in jobs],
        resume=resume,
        wait=wait,
        observer=observer,
    )


class _Job:
    """Options with every name resolved."""

    def __init__(
        self,
        command: Command,
        options: Mapping[str, Any],
        config_file: Path | None = None,
        *,
        find: FindTeacher | None = None,
        stand_in: StandIn | None = None,
    ) -> None:
        given = dict(options)
        self.student_module = _take_module(given, "student")
        self.teacher_module = _take_module(given, "teacher")
        gathered = sources.gather(given, config_file=config_file, command=command)
        _check_needed(command, gathered)
        self._stand_in: StandIn | None = None
        problems: list[IcdctlError] = []
        self.teacher_target: Target | None = None
        self.scales_are_given = bool(gathered.scales)
        needs_teacher = command == "distill" and _needs_teacher(gathered)
        self.teacher_is_ignored = command == "distill" and not needs_teacher and gathered.teacher is not None
        if needs_teacher and self.teacher_module is None:
            try:
                teachers.model_of(str(gathered.teacher))  # told even where the data set is wrong too
                find = find or Planner().find_teacher
                self.teacher_target = find(str(gathered.teacher), _described(gathered))
                _check_same_teacher(self.teacher_target, gathered.teacher_sha256)
            except IcdctlError as error:
                self._stand_in = stand_in
                if stand_in is None:
                    problems.append(error)
        if problems and not any(isinstance(problem, UsageError) for problem in problems):
            problems += _missing_data(gathered)
        build = partial(configuration.build, command, teacher=self._teacher_identity(), problems=problems)
        if stand_in is not None and gathered.init_weights is not None and not _is_file(gathered.init_weights):
            without = gathered.model_copy(update={"init_weights": None})
            self.config = build(without).model_copy(update={"init_sha256": stand_in.init_sha256})
        else:
            self.config = build(gathered)

    def _teacher_identity(self) -> tuple[str, str, str] | None:
        if self._stand_in is not None:
            return self._stand_in.teacher
        if self.teacher_target is not None:
            target = self.teacher_target
            return target.model, str(target.path.resolve()), target.sha256
        has_module = self.teacher_module is not None and not self.teacher_is_ignored
        return (CUSTOM_MODEL, "", "") if has_module else None

    def warnings(self) -> list[str]:
        """What was given and does nothing."""
        config = self.config
        needs_patches = methods.METHODS[config.method].needs_patches
        found = []
        if needs_patches and config.scales == (1,):
            found.append("warning: with scale 1 alone there are no patches: SDD and the cluster term add nothing")
        if self.scales_are_given and not needs_patches:
            found.append(f"warning: method `{config.method}` reads no patches, `--scales` is ignored")
        if self.teacher_is_ignored:
            found.append(f"warning: method `{config.method}` reads no teacher, `--teacher` is ignored")
        return found

    def teacher(self, dataset: Dataset, needs_patches: bool) -> Classifier | None:
        """The teacher's weights, or a module of one's own; None where the method reads none."""
        if self.teacher_target is not None:
            return self.teacher_target.load()
        return self._adapted(self.teacher_module, dataset, needs_patches)

    def own_student(self, dataset: Dataset) -> Classifier | None:
        """A module of one's own in place of a named student."""
        return self._adapted(self.student_module, dataset, methods.METHODS[self.config.method].needs_patches)

    def _adapted(self, module: nn.Module | None, dataset: Dataset, needs_patches: bool) -> Classifier | None:
        if module is None:
            return None
        size = dataset.preprocessing.size
        return adapt(module, image_size=size, num_classes=dataset.num_classes, needs_patches=needs_patches)


def _is_file(name: str) -> bool:
    return files.user_path(name).is_file()


def _check_same_teacher(target: Target, sha256: str | None) -> None:
    """Refuse a teacher that has changed since the configuration that names it."""
    if sha256 is not None and target.sha256 != sha256:
        raise ArtifactError(
            f"teacher `{target.path}` has sha256 {target.sha256[:12]}..., the configuration states {sha256[:12]}...",
            hint="name the teacher with `--teacher` to use it as it is now",
        )


def _take_module(given: dict[str, Any], key: str) -> nn.Module | None:
    """An nn.Module among the options, replaced by a name there."""
    value = given.get(key)
    if isinstance(value, nn.Module):
        given[key] = CUSTOM_MODEL
        return value
    if isinstance(value, Path):
        given[key] = str(value)
    return None


def _check_needed(command: str, options: Options) -> None:
    """A student always; a method and a teacher for `distill`."""
    needed = ["student"] if command == "train" else ["method", "student"]
    if command == "distill" and _needs_teacher(options):
        needed.append("teacher")
    missing = [name for name in needed if getattr(options, name) is None]
    if missing:
        flags = ", ".join(f"`--{'model' if command == 'train' else name}`" for name in missing)
        example = (
            "icdctl train --model res20 --dataset digits100"
            if command == "train"
            else "icdctl distill --method cd_sdd_dkd --teacher res32x4 --student mv2 --scales 1,2,4"
        )
        raise UsageError(f"{flags} {'is' if len(missing) == 1 else 'are'} missing", hint=f"e.g. `{example}`")


def _described(options: Options) -> Description:
    """What is known of the data set that a run is to be on, before its configuration is complete."""
    return data.describe(_requested(options))


def _requested(options: Options) -> Request:
    name = data.resolve(configuration.DEFAULT_DATASET if options.dataset is None else options.dataset)
    folder = None if options.data_dir is None else files.user_path(options.data_dir)
    return data.request(name, folder=folder, **configuration.dataset_settings(name, options.student, options))


def _origin_of(teacher: Target | None) -> dict[str, str | None]:
    """Whose weights a student learns from, for its metrics."""
    return {} if teacher is None else {"teacher_source": teacher.source, "teacher_licence": teacher.licence}


def _decoding(observer: Observer) -> OnImages:
    """Progress of decoding, as the observer hears it: (images here, in all) as steps."""
    here = 0

    def advance(done: int, total: int | None) -> None:
        nonlocal here
        if done < here or here == 0:
            here = 0
            observer.begin("decoding images", total or 0)
        observer.advance(done - here)
        here = done

    return advance


def _needs_teacher(options: Options) -> bool:
    try:
        return methods.METHODS[methods.resolve(options.method or "")].needs_teacher
    except UsageError:
        return True  # the name is reported later, together with what else is wrong


def _missing_data(options: Options) -> list[IcdctlError]:
    """What is wrong with the data, to be reported together with a missing teacher.

    A folder of images is not decoded for that: it was looked at before the teacher was.
    """
    try:
        wanted = _requested(options)
        if not data.is_there(wanted.name, wanted.folder):  # to decode images that are there would take minutes
            data.load(wanted)
    except IcdctlError as error:
        return [error]
    return []


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers of a classifier on a data set's test images."""

    target: str
    dataset: str
    num_images: int
    class_names: tuple[str, ...]
    numbers: evaluation.Evaluation
    agreement: float | None
    """With the teacher, in percent."""
    fidelity: float | None
    """Mean KL(teacher || this), in nats."""

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        found = {"target": self.target, "dataset": self.dataset, "num_images": self.num_images}
        compared = {} if self.agreement is None else {"agreement": self.agreement, "fidelity": self.fidelity}
        return {**found, **self.numbers.as_json(), **compared}


def evaluate(
    target: Model,
    *,
    dataset: str | None = None,
    teacher: Model | None = None,
    data_dir: str | None = None,
    test_images: int | None = None,
    image_size: int | None = None,
    device: str = "auto",
    observer: Observer | None = None,
) -> EvaluationResult:
    """Top-1, top-5, loss, calibration and top-1 per class on the test images; with a teacher, how alike the two are.

    Args:
        target: a run folder, a weights file, `registry:NAME`, an .onnx file or an nn.Module.
        dataset: what to test on; by default what the target was trained on.
        teacher: another such thing to compare with.
        data_dir: what holds the data sets.
        test_images: how many test images digits100 makes.
        image_size: what an nn.Module reads, in pixels, where `dataset` is an `imagefolder`; all else says it itself.
        device: for torch models; ONNX files run on the CPU.
        observer: told of the progress.

    Raises:
        IcdctlError: with a message and a hint.
    """
    place = resolve_device(device)
    seen = observer or SilentObserver()
    named = None if dataset is None else data.describe(data.request(dataset, image_size=image_size))
    is_folder = named is not None and named.name.startswith("imagefolder:")
    if is_folder and image_size is None and isinstance(target, nn.Module):
        raise UsageError("nothing says what size of images the module reads", hint="pass `image_size`, e.g. 224")
    known, predict = _ready(target, named, place)
    wanted = _own_images(known, dataset, data_dir=data_dir, test_images=test_images)
    other = None if teacher is None else _ready(_of_model(teacher, wanted), data.describe(wanted), place)
    if other is not None and dataset is None and other[0].dataset not in (None, known.dataset):
        raise UsageError(
            f"`{other[0].label}` was trained on `{other[0].dataset}`, `{known.label}` on `{known.dataset}`",
            hint="compare models of one data set, or name the one to test on with `--dataset`",
        )
    for classifier in (known,) if other is None else (known, other[0]):
        _check_size(classifier, data.describe(wanted))
    held = data.load(wanted, on_images=_decoding(seen))
    others = None
    if other is not None:
        seen.begin("teacher", held.test_images.shape[0])
        others = evaluation.predict_all(other[1], held.test_images, on_batch=seen.advance)
        _check_classes(other[0], others, held)
    seen.begin("evaluating", held.test_images.shape[0])
    logits = evaluation.predict_all(predict, held.test_images, on_batch=seen.advance)
    _check_classes(known, logits, held)
    return EvaluationResult(
        target=known.label,
        dataset=held.name,
        num_images=logits.shape[0],
        class_names=held.class_names,
        numbers=evaluation.evaluate_logits(logits, held.test_labels),
        agreement=None if others is None else evaluation.agreement(logits, others),
        fidelity=None if others is None else evaluation.fidelity(logits, others),
    )


@dataclass(frozen=True)
class _Known:
    """What is known of a classifier to be measured."""

    label: str
    """What to call it."""
    dataset: str | None
    """What it was trained on, as it says itself; None where it does not."""
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    run: RunConfig | None
    """The run that it comes from, where its configuration lies beside it."""


def _known_of(target: Target) -> _Known:
    """Of weights on disk."""
    run = _run_beside(target.path.parent)
    return _Known(target.origin, target.dataset, target.preprocessing, target.class_names, run)


def _ready(target: Model, dataset: Description | None, device: torch.device) -> tuple[_Known, evaluation.Predict]:
    """What a person points at, ready to classify; `dataset` is for what does not say what it was trained on."""
    if isinstance(target, nn.Module):
        if dataset is None:
            raise UsageError("the data set is not named", hint="pass `dataset`, e.g. `dataset='cifar100'`")
        predict = evaluation.module_predictor(target.eval().to(device), dataset.preprocessing, device)
        return _Known(type(target).__name__, None, dataset.preprocessing, None, None), predict
    label = str(target)
    if (files.user_path(label) / "model.onnx").is_file():  # an export folder
        label = str(files.user_path(label) / "model.onnx")
    if label.endswith(".onnx"):
        path = files.user_path(label)
        session = OnnxClassifier(path)
        said = session.description
        run = _run_beside(path.parent) or _run_beside(path.parent.parent)
        return _Known(label, said.dataset, said.preprocessing, said.class_names, run), session.logits
    found = targets.resolve(label, dataset=dataset)
    model = found.load().to(device).to(memory_format=torch.channels_last)
    return _known_of(found), evaluation.module_predictor(model, found.preprocessing, device)


def _of_model(teacher: Model, wanted: Request) -> Model:
    """The weights that a model's name stands for, as for `distill`; anything else as it is."""
    if isinstance(teacher, nn.Module) or teachers.model_of(str(teacher)) is None:
        return teacher
    return str(teachers.find(str(teacher), dataset=data.describe(wanted)).path)


def _run_beside(folder: Path) -> RunConfig | None:
    """The configuration in a run folder or a registered artifact, if there is one that can be read."""
    try:
        return RunConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _own_images(known: _Known, dataset: str | None, *, data_dir: str | None, test_images: int | None) -> Request:
    """The test images of what a classifier was trained on, divided as in its run; or those of another data set.

    Raises:
        UsageError: it was trained on a folder of images, and nothing says which.
    """
    if dataset is None and known.dataset is None:
        raise UsageError("the data set is not named", hint="pass it with `--dataset`")
    run, name = known.run, str(dataset or known.dataset)
    if dataset is None and name.startswith("imagefolder:"):
        if run is None or not run.dataset.startswith("imagefolder:"):
            raise UsageError(
                f"`{known.label}` was trained on the image folder `{name.partition(':')[2]}`, and nothing says where "
                "it is",
                hint="name it with `--dataset imagefolder:DIR`",
            )
        name = run.dataset
    name = data.resolve(name)
    kind = name.partition(":")[0]
    settings: dict[str, Any] = {}
    if run is not None and run.dataset.partition(":")[0] == kind:
        settings = {key: getattr(run, key) for key in (*configuration.DATASET_SETTINGS, "split_seed")}
        if kind == "imagefolder" and run.dataset == name:  # what the run decoded is then found again
            held = run.images
            settings |= {key: getattr(held, key) for key in ("val_split", "room_to_crop", "unlabeled")}
    if test_images is not None:
        settings["test_images"] = test_images
    if kind == "imagefolder":
        settings["image_size"] = known.preprocessing.size[0]
    folder = None if data_dir is None else files.user_path(data_dir)
    return data.request(name, folder=folder, **settings)


def _check_size(known: _Known, dataset: Description) -> None:
    """Refuse images of a size that the classifier was not trained on."""
    height, width = known.preprocessing.size
    if (height, width) != dataset.preprocessing.size:
        our_height, our_width = dataset.preprocessing.size
        raise ArtifactError(
            f"`{known.label}` reads images of {height} x {width}, those of `{dataset.name}` are "
            f"{our_height} x {our_width}",
            hint="name the data set that it was trained on with `--dataset`, and compare models for images of one size",
        )


def _check_classes(known: _Known, logits: torch.Tensor, dataset: Dataset) -> None:
    """Refuse numbers that compare one class with another."""
    if logits.shape[1] != dataset.num_classes:
        raise ArtifactError(
            f"`{known.label}` tells {logits.shape[1]} classes apart, `{dataset.name}` has {dataset.num_classes}",
            hint="name the data set that it was trained on with `--dataset`",
        )
    pairs = zip(known.class_names or dataset.class_names, dataset.class_names, strict=True)
    other = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if other is not None:
        raise ArtifactError(
            f"`{known.label}` has the class `{other[0]}` where `{dataset.name}` has `{other[1]}`",
            hint="name the data set that it was trained on with `--dataset`",
        )


def export(
    target: str | Path,
    out: str | Path | None = None,
    *,
    input_kind: Literal["uint8", "float"] = "uint8",
    opset: int = 18,
    dataset: str | None = None,
    data_dir: str | None = None,
    replace: bool = False,
) -> Export:
    """An ONNX file that agrees with PyTorch, verified, in a folder with its card, hashes and report.

    Args:
        target: a run folder, a weights file or `registry:NAME`.
        out: the folder to make; by default `onnx` in the run folder, or beside the weights file.
        input_kind: `uint8` pixels [batch, H, W, 3], or normalised `float` images [batch, 3, H, W].
        opset: 18 to 23.
        dataset: for weights that do not say what they were trained on.
        data_dir: what holds the data sets; where the data are there, the test images join the verification.
        replace: an existing folder.

    Raises:
        IcdctlError: with a message and a hint; a file that fails verification is not kept.
    """
    found = targets.resolve(str(target), dataset=None if dataset is None else data.describe(data.request(dataset)))
    if out is None:
        beside = found.path.parent if not str(target).startswith("registry:") else Path.cwd()
        out = beside / "onnx"
    images, labels = None, None
    try:
        held = data.load(_own_images(_known_of(found), dataset, data_dir=data_dir, test_images=None))
        images, labels = held.test_images, held.test_labels
    except (ArtifactError, UsageError):
        pass  # verification then uses its own probe images, and the card states no accuracy
    facts = _facts(found)
    return export_onnx(
        found,
        Path(out),
        input_kind=input_kind,
        opset=opset,
        images=images,
        labels=labels,
        facts=facts,
        replace=replace,
    )


def _facts(target: Target) -> dict[str, Any]:
    """What the run folder of a weights file says of how it came about, for the model card."""
    row = data.row_of(target.dataset)
    facts: dict[str, Any] = {} if row is None else {"data_source": row.source, "data_licence": row.licence}
    if target.licence is not None:
        facts |= {"weights_source": target.source, "weights_licence": target.licence}
    folder = target.path.parent
    hint = "point at the weights file itself"
    if (folder / "config.json").is_file() and (folder / "metrics.json").is_file():
        config = files.read_json(folder / "config.json", what="config", hint=hint)
        metrics = files.read_json(folder / "metrics.json", what="metrics", hint=hint)
        for name, value in (("config.json", config), ("metrics.json", metrics)):
            if not isinstance(value, dict):
                raise ArtifactError(f"`{folder / name}` holds no JSON object", hint=hint)
        facts |= {key: config.get(key) for key in ("method", "teacher", "teacher_sha256", "scales", "settings", "seed")}
        told = ("final_top1", "best_top1", "best_epoch", "variant", "teacher_source", "teacher_licence")
        facts |= {key: metrics[key] for key in told if metrics.get(key) is not None}
    return facts


__all__ = [
    "EvaluationResult",
    "Failure",
    "Planner",
    "RunResult",
    "StandIn",
    "distill",
    "distill_many",
    "evaluate",
    "export",
    "plan",
    "plan_many",
    "start",
    "train",
]
