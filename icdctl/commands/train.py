"""`icdctl train`: teachers and baselines."""

from __future__ import annotations

from typing import Annotated

import typer

from icdctl.commands import options
from icdctl.commands.setting_flags import given_settings
from icdctl.commands.train_and_show import run_training


def train(
    context: typer.Context,
    as_teacher: Annotated[
        bool,
        typer.Option(
            "--as-teacher",
            help="Register the trained model, so that `icdctl distill --teacher MODEL` finds it.",
            rich_help_panel="What",
        ),
    ] = False,
    seeds: options.Seeds = None,
    resume: options.Resume = False,
    config: options.ConfigFile = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Train a model on labels alone: your own teacher, or a baseline for a student.

    Example: icdctl train --model res20 --dataset digits100 --recipe digits100-teacher
    """
    run_training(
        "train",
        given_settings(context),
        config_file=config,
        resume=resume,
        dry_run=dry_run,
        as_json=as_json,
        seeds=seeds,
        as_teacher=as_teacher,
    )
