"""How many seeds an experiment needs: the power of the tests in `compare.py`.

As there, the results of seeds are assumed to be independent and normally distributed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import special

from icdctl.errors import UsageError
from icdctl.science.compare import t_quantile

MOST_SEEDS = 100_000
"""The largest answer that `seeds_needed` and `seeds_to_reproduce` search for."""


def power_of(
    n: int, delta: float, sd: float, *, alpha: float = 0.05, paired: bool = False, known_sd: bool = False
) -> float:
    """The probability that a two-sided test at `alpha` finds a true difference `delta`.

    The noncentral t distribution with noncentrality L = delta / (sd sqrt(2 / n)) and 2 n - 2 degrees of freedom for two
    arms, delta / (sd / sqrt(n)) and n - 1 for pairs (J. Cohen, Statistical Power Analysis, 1988, chapter 2). Both tails
    count, so it never falls below alpha.

    Args:
        n: seeds in each arm; with `paired`, the number of pairs. One seed has no power, except with `known_sd`.
        delta: true difference of the means.
        sd: standard deviation of one run in either arm; with `paired`, of the differences.
        alpha: significance level of the test.
        paired: pairs by seed, rather than two independent arms.
        known_sd: use the z test, as if sd were not estimated. It promises too much for few seeds; rules of thumb are
            based on it.

    Raises:
        UsageError: n is below 1, or sd or alpha is out of range.
    """
    if n < 1 or not (sd > 0 and math.isfinite(sd) and math.isfinite(delta)) or not 0 < alpha < 1:
        raise UsageError(
            f"the power of n = {n}, delta = {delta:g}, sd = {sd:g}, alpha = {alpha:g} is not defined",
            hint="n is 1 or above, sd above 0, alpha between 0 and 1",
        )
    noncentrality = abs(delta) / (sd * math.sqrt((1 if paired else 2) / n))
    if known_sd:
        quantile = float(special.ndtri(1 - alpha / 2))
        return float(special.ndtr(noncentrality - quantile) + special.ndtr(-noncentrality - quantile))
    freedom = (n - 1) * (1 if paired else 2)
    if freedom == 0:
        return 0.0
    quantile = t_quantile(freedom, 1 - alpha / 2)
    below = float(special.nctdtr(freedom, noncentrality, quantile))
    far_side = float(special.nctdtr(freedom, noncentrality, -quantile))
    return min(1.0, 1 - below + far_side)


def seeds_needed(
    delta: float,
    sd: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    paired: bool = False,
    known_sd: bool = False,
) -> int:
    """The smallest number of seeds (in each arm, or of pairs) that reaches this power; see `power_of`.

    At sd 0.25 and delta 0.3, the t test needs two arms of 12. The z test, which takes the spread as known, gives 11:
    that is the origin of "11 per arm", and the t test with 11 has a power of 0.76.

    Raises:
        UsageError: delta is 0, more than `MOST_SEEDS` would be needed, or a value is out of range as in `power_of`.
    """
    if delta == 0 or not 0 < power < 1:
        raise UsageError("no number of seeds finds a difference of 0", hint="state the difference that matters")
    return _least(lambda n: power_of(n, delta, sd, alpha=alpha, paired=paired, known_sd=known_sd) >= power)


def equivalence_power(n: int, margin: float, sd: float, *, difference: float = 0.0, alpha: float = 0.05) -> float:
    """The probability that n seeds are found equivalent to a number, given the distance of their true mean from it.

    P(|d| <= margin - t(1 - alpha, n - 1) s / sqrt(n)), with d normal around `difference` and s^2 (n - 1) / sd^2
    chi-squared, averaged over 2,000 quantiles of s; accurate to 0.001.

    Raises:
        UsageError: sd or margin is not above 0, or alpha is not between 0 and 0.5.
    """
    if not (sd > 0 and margin > 0 and 0 < alpha < 0.5):
        raise UsageError(
            f"the power of margin = {margin:g}, sd = {sd:g}, alpha = {alpha:g} is not defined",
            hint="margin and sd are above 0, alpha between 0 and 0.5",
        )
    if n < 2:
        return 0.0
    shares = (np.arange(2000) + 0.5) / 2000
    spread = sd * np.sqrt(special.chdtri(n - 1, shares) / (n - 1))
    room = margin - t_quantile(n - 1, 1 - alpha) * spread / math.sqrt(n)
    error = sd / math.sqrt(n)
    inside = special.ndtr((room - difference) / error) - special.ndtr((-room - difference) / error)
    return float(np.where(room > 0, inside, 0.0).mean())


def seeds_to_reproduce(margin: float, sd: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """The smallest number of seeds with this power to find a method `reproduced` if its mean is the published number.

    Raises:
        UsageError: more than `MOST_SEEDS` would be needed, or a value is out of range as in `equivalence_power`.
    """
    return _least(lambda n: equivalence_power(n, margin, sd, alpha=alpha) >= power)


def _least(is_enough: Callable[[int], bool]) -> int:
    """The smallest n that is enough, given that every larger n is enough, too."""
    high = 1
    while not is_enough(high):
        high *= 2
        if high > MOST_SEEDS:
            raise UsageError(
                f"more than {MOST_SEEDS:,} seeds would be needed", hint="ask for a larger difference or less power"
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
