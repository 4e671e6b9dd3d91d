"""Which values a search tries next: optuna's TPE sampler, which looks at the trials so far."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from icdctl.errors import UsageError
from icdctl.grid.search_space import Axis, Space, Trial, as_text, as_value

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution


def next_values(space: Space, trials: Sequence[Trial], number: int, *, seed: int) -> list[dict[str, str]]:
    """Values to try next, each set of them once: fewer than `number` where a small space has no others.

    Args:
        space: what is searched.
        trials: the trials so far; the same trials and seed give the same values.
        number: how many sets of values.
        seed: the seed of the sampler.

    Raises:
        UsageError: optuna is not installed.
    """
    study = _study(space, trials, seed)
    distributions = {key: _distribution(axis) for key, axis in space.items()}
    tried = [dict(trial.values) for trial in trials]
    found: list[dict[str, str]] = []
    for _ in range(4 * number):  # the sampler may repeat itself
        asked = study.ask(distributions)
        values = {key: as_text(asked.params[key], axis) for key, axis in space.items()}
        if values not in tried and values not in found:
            found.append(values)
        if len(found) == number:
            break
    return found


def _study(space: Space, trials: Sequence[Trial], seed: int) -> optuna.Study:
    """A study that has seen the trials so far."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UsageError("optuna is not installed", hint="`pip install 'icdctl[search]'`") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Trials that are proposed together are not over yet: the sampler treats them as bad, so that they differ.
        sampler = optuna.samplers.TPESampler(seed=seed + len(trials), constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {key: _distribution(axis) for key, axis in space.items()}
    states = optuna.trial.TrialState
    for trial in trials:
        made = optuna.trial.create_trial(
            params={key: as_value(trial.values[key], axis) for key, axis in space.items()},
            distributions=distributions,
            value=None if trial.val_top1 is None else trial.score,
            state=states.FAIL if trial.val_top1 is None else states.COMPLETE,
        )
        study.add_trial(made)
    return study


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(axis, tuple):
        return CategoricalDistribution(list(axis))
    if axis.is_whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.is_logarithmic)
    return FloatDistribution(axis.low, axis.high, log=axis.is_logarithmic)
