"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from icdctl.config.run_config import RunConfig


def learning_rate(config: RunConfig, *, epoch: int, step: int, total_steps: int) -> float:
    """The learning rate of one step.

    `step`: the rate times `lr_decay_rate` for each of `lr_decay_epochs` that lies before this epoch, so that the first
    lower rate stands in the epoch after it, as in the reference. `cosine`: up linearly over the first
    `lr_warmup_share` of all steps, then down along half a cosine, to 0 just after the last.

    Args:
        config: the configuration of the run.
        epoch: counted from 1.
        step: number of the step in the whole run, from 0.
        total_steps: number of steps of the whole run.
    """
    if config.schedule == "step":
        return config.lr * config.lr_decay_rate ** sum(epoch > stage for stage in config.lr_decay_epochs)
    warmup_steps = int(config.lr_warmup_share * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
