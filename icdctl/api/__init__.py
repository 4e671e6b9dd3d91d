"""The library: what the commands call, and what `import icdctl` offers.

Each function takes keywords named like the flags, resolves every name, and hands a frozen configuration to the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from icdctl import data, methods
from icdctl.api.classifiers import Model, info_of, ready, weights_at
from icdctl.api.evaluating import EvaluationResult, evaluate
from icdctl.api.export_inputs import facts_of, test_images_of
from icdctl.api.known_errors import known_errors
from icdctl.api.planning import Job, make_jobs
from icdctl.api.predicting import PredictionResult, image_files, predict_files
from icdctl.config import sources
from icdctl.config.dataset_request import dataset_request
from icdctl.config.declare import Command
from icdctl.config.expand import expand
from icdctl.config.run_config import RunConfig
from icdctl.data.folder_scan import LeftOut
from icdctl.engine import run as engine
from icdctl.engine.building import with_pretrained_hashes
from icdctl.engine.device import resolve_device
from icdctl.engine.observer import Observer, SilentObserver, decoding
from icdctl.engine.run import Failure
from icdctl.engine.run_output import RunResult
from icdctl.errors import UsageError
from icdctl.exporting import Export, export_onnx
from icdctl.models.backbones import allow_typed
from icdctl.registry.trained import TrainedModel

Config = Mapping[str, Any] | RunConfig


@known_errors()
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
        resume: continue the run in the folder from its last checkpoint, or start it; a finished run returns at once.
        observer: receives the progress.
        **options: `student` (a model's name or an nn.Module; `model` means the same), `dataset`, `out`, `epochs`, `lr`,
            `seed`, ...: the names in docs/settings.md.

    Raises:
        IcdctlError: with a message and a hint.
    """
    given = {**_stated(config), **options}
    if "model" in given:
        given["student"] = given.pop("model")
    allow_typed(options.get("model", options.get("student")))
    return _one(_run([Job("train", given)], resume=resume, observer=observer))


@known_errors()
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
        resume: continue the run in the folder from its last checkpoint, or start it; a finished run returns at once.
        observer: receives the progress.
        **options: `method`, `teacher` (a name, `registry:NAME`, a run folder, a weights file or an nn.Module),
            `student` (a name or an nn.Module), `scales`, `settings`, ...: the names in docs/settings.md.

    Raises:
        IcdctlError: with a message and a hint.
    """
    allow_typed(options.get("student"))
    return _one(_run([Job("distill", {**_stated(config), **options})], resume=resume, observer=observer))


@known_errors()
def distill_many(
    config: Config | None = None,
    *,
    seeds: str | Sequence[int] | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    **options: Any,
) -> list[RunResult | Failure]:
    """Train many students of one teacher at once, each as if it were alone, each with its own run folder.

    Args:
        config: options as a mapping, or a resolved configuration; keywords override it.
        seeds: `0-4`, or a sequence.
        resume: as for `distill`, for each run.
        observer: receives the progress.
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
    for each in several if "student" in options else ():
        allow_typed(each.get("student"))
    return start("distill", several, in_folder=len(several) > 1, resume=resume, observer=observer)


def _stated(config: Config | None) -> dict[str, Any]:
    """The options that a configuration states."""
    if isinstance(config, RunConfig):
        return sources.options_of(config.model_dump())
    if config is not None and not isinstance(config, Mapping):
        raise UsageError(
            f"the configuration is a {type(config).__name__}, expected a mapping of options",
            hint="options go by keyword: `model=`, `student=`, `teacher=`, `dataset=`, ...",
        )
    return dict(config or {})


@known_errors()
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
    """Start `train` or `distill` by name, from options and a config.json; several runs share data and teacher.

    Args:
        command: the command of all runs.
        several: one mapping of options for each run.
        config_file: a run's config.json, which the options override.
        in_folder: `out` is the folder of the run folders, not the run folder.
        resume: as for `distill`, for each run.
        wait: wait for other processes that are at work in the run folders, rather than fail.
        observer: receives the progress.

    Raises:
        IcdctlError: with a message and a hint.
    """
    jobs = make_jobs(command, several, config_file, in_folder=in_folder)
    return _run(jobs, resume=resume, wait=wait, observer=observer)


def _one(results: list[RunResult | Failure]) -> RunResult:
    (result,) = results
    if isinstance(result, Failure):
        raise result.error
    return result


def _run(
    jobs: Sequence[Job], *, resume: bool, observer: Observer | None, wait: bool = False
) -> list[RunResult | Failure]:
    """Load what is needed, once, then train."""
    observer = observer or SilentObserver()
    engine.check_together([job.config for job in jobs])
    dataset = data.load(jobs[0].config.images, on_images=decoding(observer))
    doubts = [*([dataset.caveat] if dataset.caveat else []), *dataset.warnings]
    doubts += [doubt for job in jobs for doubt in job.test_images_seen(dataset)]
    warnings = [warning for job in jobs for warning in job.warnings()]
    teachers = [job.teacher_target for job in jobs if job.teacher_target is not None]
    read = [note for teacher in teachers for note in teacher.weights.notes]
    notes = [*dataset.notes, *_last_batch(jobs[0].config, len(dataset.train_labels))]
    for text in dict.fromkeys([*notes, *(f"warning: {doubt}" for doubt in doubts), *warnings, *read]):
        observer.message(text)
    needs_patches = any(methods.get(job.config.method).needs_patches for job in jobs)
    asking = next((job for job in jobs if job.config.teacher is not None), jobs[0])
    return engine.run_together(
        with_pretrained_hashes([job.config for job in jobs]),
        dataset,
        teacher=asking.teacher(dataset, needs_patches),
        teacher_origin=_origin_of(asking.teacher_target),
        students=[job.own_student(dataset) for job in jobs],
        resume=resume,
        wait=wait,
        observer=observer,
    )


def _last_batch(config: RunConfig, num_images: int) -> list[str]:
    """The line about an image that each epoch leaves out, because batch norm can't learn from a batch of one."""
    if config.drop_last or num_images == 1 or num_images % config.batch_size != 1:
        return []
    return [
        f"each epoch leaves out one of the {num_images:,} training images, a different one each time: it would be "
        f"alone in the last batch of {config.batch_size}"
    ]


def _origin_of(teacher: TrainedModel | None) -> dict[str, str | None]:
    """Source and licence of the weights that a student learns from, for its metrics."""
    return {} if teacher is None else {"teacher_source": teacher.source, "teacher_licence": teacher.licence}


@known_errors()
def predict(
    target: Model,
    images: str | Path | Sequence[str | Path],
    *,
    dataset: str | None = None,
    model: nn.Module | None = None,
    image_size: int | None = None,
    top: int = 1,
    skip_broken: bool = False,
    device: str = "auto",
    observer: Observer | None = None,
) -> PredictionResult:
    """Classify image files, which are decoded in the same way as training images.

    Args:
        target: a run folder, a weights file, `registry:NAME`, an .onnx file, an export folder or an nn.Module.
        images: a file, a folder, or several of them.
        dataset: the data set of a target that does not say what it was trained on.
        model: the nn.Module that the weights of `target` belong to, where that is a custom module.
        image_size: side of the images that an nn.Module reads, in pixels, where `dataset` is an `imagefolder`.
        top: number of classes to report for each image.
        skip_broken: leave out files that can't be decoded, rather than fail.
        device: the device for torch models; ONNX files run on the CPU.
        observer: receives the progress.

    Raises:
        IcdctlError: with a message and a hint.
    """
    if top < 1:
        raise UsageError(f"`top` is {top}, expected 1 or more", hint="e.g. `--top 5`")
    seen = observer or SilentObserver()
    named = None if dataset is None else data.describe(dataset_request(dataset, image_size=image_size))
    classifier, logits_of = ready(target, named, resolve_device(device), module=model, image_size=image_size)
    for note in classifier.notes:
        seen.message(note)
    class_names = classifier.class_names or (() if named is None else named.class_names)
    left_out = LeftOut()
    paths = image_files([images] if isinstance(images, str | Path) else images, left_out)
    if left_out.may_be_images:  # of a folder of photos, nobody expects a class for each text file
        seen.message(str(left_out.as_note()))
    seen.begin("classifying", len(paths))
    result = predict_files(
        logits_of,
        paths,
        target=classifier.label,
        preprocessing=classifier.preprocessing,
        class_names=class_names,
        top=top,
        skip_broken=skip_broken,
        on_images=seen.advance,
    )
    for image in result.skipped:
        seen.message(f"warning: left out: `{image.path}`: {image.reason}")
    return result


@known_errors()
def export(
    target: str | Path,
    out: str | Path | None = None,
    *,
    input_kind: Literal["uint8", "float"] = "uint8",
    opset: int = 18,
    dataset: str | None = None,
    model: nn.Module | None = None,
    image_size: int | None = None,
    data_dir: str | None = None,
    replace: bool = False,
) -> Export:
    """Export a trained model to an ONNX file, verify it, and write its card, hashes and report beside it.

    Args:
        target: a run folder, a weights file or `registry:NAME`.
        out: the folder to make; by default `onnx` in the run folder, or beside the weights file.
        input_kind: `uint8` pixels [batch, H, W, 3], or normalised `float` images [batch, 3, H, W].
        opset: the ONNX operator set, 18 to 23.
        dataset: the data set of weights that do not say what they were trained on.
        model: the nn.Module that the weights belong to, where that is a custom module; it is not changed.
        image_size: side of the images that such a module reads, in pixels, where `dataset` is an `imagefolder`.
        data_dir: the folder that holds the folders of the data sets; test images that are there join the verification.
        replace: whether an existing folder is replaced.

    Raises:
        IcdctlError: with a message and a hint; a file that fails verification is not kept.
    """
    if isinstance(target, nn.Module):
        raise UsageError(
            f"`{type(target).__name__}` is a module, expected what holds its weights",
            hint="name the run folder or the weights file, and pass the module as `model`",
        )
    named = None if dataset is None else data.describe(dataset_request(dataset, image_size=image_size))
    found = weights_at(str(target), named, module=model, image_size=image_size)
    if out is None:
        beside = found.path.parent if not str(target).startswith("registry:") else Path.cwd()
        out = beside / "onnx"
    images, labels, unmeasured = test_images_of(info_of(found), dataset, data_dir)
    made = export_onnx(
        found,
        Path(out),
        input_kind=input_kind,
        opset=opset,
        images=images,
        labels=labels,
        facts=facts_of(found),
        replace=replace,
    )
    return dataclasses.replace(made, unmeasured=unmeasured, notes=found.weights.notes)


__all__ = [
    "EvaluationResult",
    "Failure",
    "PredictionResult",
    "RunResult",
    "distill",
    "distill_many",
    "evaluate",
    "export",
    "predict",
    "start",
    "train",
]
