"""`icdctl distill`: the main job."""

from __future__ import annotations

from typing import Annotated

import typer

from icdctl.commands import options
from icdctl.commands.training import run_training


def distill(
    method: Annotated[
        str | None,
        typer.Option(help="Loss to train with, or several: `kd,dkd`; `icdctl list methods`.", rich_help_panel="What"),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Frozen model to learn from: a name (its registered teacher), `registry:NAME`, a run folder or a "
            "weights file.",
            rich_help_panel="What",
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(help="Model to train, or several: `mv2,shuv1`; `icdctl list models`.", rich_help_panel="What"),
    ] = None,
    dataset: options.Dataset = None,
    scales: options.Scales = None,
    recipe: options.Recipe = None,
    settings: options.Settings = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    seed: options.Seed = None,
    seeds: options.Seeds = None,
    init_weights: options.InitWeights = None,
    optimizer: options.Optimizer = None,
    train_images: options.TrainImages = None,
    test_images: options.TestImages = None,
    image_size: options.ImageSize = None,
    val_split: options.ValSplit = None,
    test_split: options.TestSplit = None,
    split_seed: options.SplitSeed = None,
    skip_broken: options.SkipBroken = False,
    data_dir: options.DataDir = None,
    device: options.Device = None,
    precision: options.Precision = None,
    teacher_mode: options.TeacherMode = None,
    teacher_precision: options.TeacherPrecision = None,
    deterministic: options.Deterministic = False,
    compile_: options.Compile = None,
    max_steps: options.MaxSteps = None,
    time_limit: options.TimeLimit = None,
    out: options.Out = None,
    resume: options.Resume = False,
    config: options.ConfigFile = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Train a student to imitate a teacher; leave weights, metrics and configuration in a run folder.

    Example: icdctl distill --method cd_sdd_dkd --teacher res32x4 --student mv2 --scales 1,2,4
    """
    given = options.given_options(
        method=method,
        teacher=teacher,
        student=student,
        dataset=dataset,
        scales=scales,
        recipe=recipe,
        **options.parse_settings(settings),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        init_weights=init_weights,
        optimizer=optimizer,
        train_images=train_images,
        test_images=test_images,
        image_size=image_size,
        val_split=val_split,
        test_split=test_split,
        split_seed=split_seed,
        skip_broken=skip_broken,
        data_dir=data_dir,
        device=device,
        precision=precision,
        teacher_mode=teacher_mode,
        teacher_precision=teacher_precision,
        deterministic=deterministic,
        compile=compile_,
        max_steps=max_steps,
        time_limit=time_limit,
        out=out,
    )
    run_training("distill", given, config_file=config, resume=resume, dry_run=dry_run, as_json=as_json, seeds=seeds)
