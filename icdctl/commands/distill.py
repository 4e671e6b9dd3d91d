"""`icdctl distill`: the main job."""

from __future__ import annotations

import typer

from icdctl.commands import options
from icdctl.commands.setting_flags import given_settings
from icdctl.commands.train_and_show import run_training


def distill(
    context: typer.Context,
    seeds: options.Seeds = None,
    resume: options.Resume = False,
    config: options.ConfigFile = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Train a student to imitate a teacher; write weights, metrics and configuration to a run folder.

    Example: icdctl distill --method cd_sdd_dkd --teacher res32x4 --student mv2 --scales 1,2,4
    """
    run_training(
        "distill",
        given_settings(context),
        config_file=config,
        resume=resume,
        dry_run=dry_run,
        as_json=as_json,
        seeds=seeds,
    )
