"""Statistics over a few seeds: summaries, equivalence with a published number, paired differences.

These are pure functions of numbers. They assume, as is usual, that the results of seeds are independent and normally
distributed. Values may have any unit (points of top-1 nearly everywhere); differences and margins have the same unit.

There are three verdicts. Each of the first two is wrong with probability `alpha` at most:

- *reproduced*: the mean of the method lies within the margin of the published number. Two one-sided t tests
  (D. J. Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987): both `mean <= number - margin` and `mean >= number + margin`
  are rejected at `alpha`, which is the same as the 1 - 2 alpha interval of the difference lying inside the margin. If
  the true mean is outside, this verdict is given with probability `alpha` at most. The published number is taken as
  exact: the verdict is about that number, not about what its authors would find on average.
- *not reproduced*: the authors' mean and ours are further apart than the margin. The published number is itself a
  random draw. With one seed's spread of 0.25 points, a perfect copy of the method has a mean that is 0.5 points from a
  single published run once in 22 times, and more seeds of our own do not change that. So this verdict needs an interval
  that includes the spread of the published number and lies wholly beyond the margin. It is the two-sided 1 - alpha
  interval, because the error may be on either side: if the true means are within the margin, this verdict is given with
  probability `alpha` at most, whatever the spread, and with about half of that if the spread is small compared with the
  margin.
- *underpowered*: neither. These seeds do not decide the question; it does not mean that the two half agree.

The second interval contains the first, so no data gives both verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from icdctl.errors import UsageError

Verdict = Literal["reproduced", "not reproduced", "underpowered"]

CONFIDENCE = 0.95
"""Confidence level of the intervals that `summarise` and `paired_difference` give."""

_NO_SPREAD = 1e-9
"""A standard deviation below this share of the values is a rounding error."""


@dataclass(frozen=True)
class Summary:
    """Number, mean, standard deviation and interval of values over seeds."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation of one seed, with n - 1; None for n = 1."""
    low: float | None
    """Lower end of the 95 % t interval of the mean; None for n = 1."""
    high: float | None
    """Upper end of the same interval; None for n = 1."""


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a measured mean with a published number. Differences are measured minus published."""

    verdict: Verdict
    reason: str
    """One sentence with the numbers that decided."""
    basis: str
    """What is assumed about the published number: how many runs it stands for, and their spread."""
    n: int
    difference: float
    margin: float
    alpha: float
    p_lower: float | None = None
    """p of the one-sided test against `mean <= published - margin`. This and all values below are None if no spread
    can be estimated."""
    p_upper: float | None = None
    """p of the one-sided test against `mean >= published + margin`."""
    p_equivalence: float | None = None
    """The larger of the two: the smallest alpha that gives `reproduced`."""
    interval: tuple[float, float] | None = None
    """1 - 2 alpha interval of the difference, with the published number taken as exact; decides `reproduced`."""
    p_outside: float | None = None
    """The smallest alpha that gives `not reproduced`."""
    outer_interval: tuple[float, float] | None = None
    """1 - alpha interval of the difference, including the spread of the published number; decides `not reproduced`."""


@dataclass(frozen=True)
class PairedDifference:
    """The first method minus the second, seed by seed."""

    n: int
    seeds: tuple[int, ...]
    """The seeds that both methods have, ascending."""
    left_out: tuple[int, ...]
    """The seeds that only one method has."""
    mean: float
    sd: float | None
    """Standard deviation of the differences, with n - 1; None for n = 1."""
    low: float | None
    """Lower end of the 95 % t interval of the mean difference; None for n = 1."""
    high: float | None
    """Upper end of the same interval; None for n = 1."""
    p: float | None
    """Two-sided p of the t test against a mean difference of 0. None for n = 1, and if all differences are equal and
    not 0, because the test is then undefined."""
    effect_size: float | None
    """Cohen's d_z: mean divided by sd of the differences; None if there is no sd or it is 0."""


def summarise(values: Sequence[float]) -> Summary:
    """Number n, mean m, standard deviation s with n - 1, and the interval m -+ t(0.975, n - 1) s / sqrt(n).

    Raises:
        UsageError: there are no values, or one is not finite.
    """
    array = _checked(values)
    n, mean = len(array), float(array.mean())
    if n == 1:
        return Summary(1, mean, None, None, None)
    sd = float(array.std(ddof=1))
    half = t_quantile(n - 1, (1 + CONFIDENCE) / 2) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def reproduces(
    measured: Sequence[float],
    published: float,
    *,
    margin: float,
    alpha: float = 0.05,
    published_runs: int | None = 1,
    published_sd: float | None = None,
) -> Reproduction:
    """Decide whether measured values reproduce a published number within a margin; the module explains the verdicts.

    With mean m and sd s of n values, the published number p from k runs, d = m - p and t quantiles:

    - `interval` is d -+ t(1 - alpha, n - 1) s / sqrt(n);
    - `outer_interval` is d -+ t(1 - alpha / 2, f) e, where e = s sqrt(1 / n + 1 / k) and f = n - 1 if the sd of the
      published runs is unknown and taken to be ours, e = sqrt(s^2 / n + q^2 / k) and Welch's f if it is q, and
      e = s / sqrt(n) and f = n - 1 if p is exact.

    Args:
        measured: one value per seed.
        published: the number to compare with, of the same kind (final epoch with final epoch, best with best).
        margin: the largest difference that counts as equal; above 0.
        alpha: the largest probability of each wrong verdict; below 0.5.
        published_runs: how many runs the number is the mean of; 1 if its source does not say. None takes the number as
            exact, which only a goal that was never measured is.
        published_sd: standard deviation of a single one of these runs, if the source states it.

    Raises:
        UsageError: a value is not finite or out of range, or an sd is given for fewer than two runs.
    """
    array = _checked(measured)
    _check_test(published, margin, alpha, published_runs, published_sd)
    summary = summarise(measured)
    difference = summary.mean - published
    basis = _basis(published_runs, published_sd)
    if summary.sd is None:
        reason = "one seed has no spread to judge a difference by"
        return Reproduction("underpowered", reason, basis, 1, difference, margin, alpha)
    if _is_constant(array, summary.sd):
        reason = f"all {summary.n} values are the same, so their spread can't be estimated"
        return Reproduction("underpowered", reason, basis, summary.n, difference, margin, alpha)

    freedom, error = float(summary.n - 1), summary.sd / math.sqrt(summary.n)
    p_lower = _upper_tail(freedom, (difference + margin) / error)
    p_upper = _upper_tail(freedom, (margin - difference) / error)
    p_equivalence = max(p_lower, p_upper)
    half = t_quantile(freedom, 1 - alpha) * error
    interval = (difference - half, difference + half)

    outer_freedom, outer_error = _with_published(summary.n, summary.sd, published_runs, published_sd)
    p_outside = min(1.0, 2 * _upper_tail(outer_freedom, (abs(difference) - margin) / outer_error))
    half = t_quantile(outer_freedom, 1 - alpha / 2) * outer_error
    outer_interval = (difference - half, difference + half)

    if p_equivalence <= alpha:
        verdict: Verdict = "reproduced"
        reason = f"{_between(interval, 1 - 2 * alpha)} is inside -+{margin:g}"
    elif p_outside <= alpha:
        verdict = "not reproduced"
        reason = f"{_between(outer_interval, 1 - alpha)} is wholly beyond -+{margin:g}"
    else:
        verdict = "underpowered"
        reason = (
            f"{_between(interval, 1 - 2 * alpha)} reaches beyond -+{margin:g}, and "
            f"{_between(outer_interval, 1 - alpha)} is not wholly beyond it"
        )
    return Reproduction(
        verdict,
        reason,
        basis,
        summary.n,
        difference,
        margin,
        alpha,
        p_lower,
        p_upper,
        p_equivalence,
        interval,
        p_outside,
        outer_interval,
    )


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> PairedDifference:
    """The paired t test over the seeds that both methods have: t = mean / (sd / sqrt(n)), n - 1 degrees of freedom.

    Runs with the same seed share the order of images, crops and flips, so the spread that these cause cancels in the
    differences. The statement therefore holds for the difference, not for each method alone.

    Args:
        first: seed -> value.
        second: seed -> value.

    Raises:
        UsageError: the methods have no seed in common, or a value is not finite.
    """
    seeds = tuple(sorted(first.keys() & second.keys()))
    left_out = tuple(sorted(first.keys() ^ second.keys()))
    if not seeds:
        raise UsageError(
            f"no seed in common: {_listed(first)} and {_listed(second)}", hint="run both with the same `--seeds`"
        )
    differences = _checked([first[seed] - second[seed] for seed in seeds])
    summary = summarise(differences.tolist())
    p: float | None = None
    effect_size: float | None = None
    if summary.sd is not None:
        scale = max(abs(first[seed]) + abs(second[seed]) for seed in seeds)
        if summary.sd <= _NO_SPREAD * max(1.0, scale):
            p = 1.0 if abs(summary.mean) <= _NO_SPREAD * max(1.0, scale) else None
        else:
            effect_size = summary.mean / summary.sd
            p = min(1.0, 2 * _upper_tail(summary.n - 1, abs(effect_size) * math.sqrt(summary.n)))
    return PairedDifference(
        summary.n, seeds, left_out, summary.mean, summary.sd, summary.low, summary.high, p, effect_size
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of a family of m tests, adjusted by Holm's method and in the order given.

    In ascending order, the j-th of m becomes the largest of (m - i + 1) p_i over i <= j, at most 1. Rejecting every
    test with an adjusted p of at most alpha keeps the probability of even one false rejection at alpha, however the
    tests depend on each other.

    Raises:
        UsageError: a value is not between 0 and 1.

    Source: S. Holm, Scand. J. Statist. 6, 1979
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise UsageError("a p value is not between 0 and 1", hint="pass the p values of the tests, unadjusted")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _checked(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise UsageError(
            "values over seeds are missing or not finite", hint="pass at least one finite number, one for each seed"
        )
    return array


def _check_test(published: float, margin: float, alpha: float, runs: int | None, sd: float | None) -> None:
    if not (math.isfinite(published) and math.isfinite(margin) and margin > 0 and 0 < alpha < 0.5):
        raise UsageError(
            f"no test for published = {published:g}, margin = {margin:g}, alpha = {alpha:g}",
            hint="the margin is above 0, alpha between 0 and 0.5",
        )
    if (runs is not None and runs < 1) or (sd is not None and (runs is None or runs < 2 or not sd >= 0)):
        raise UsageError(
            f"a published sd of {sd} does not go with {runs} runs", hint="an sd needs two runs or more; leave it out"
        )


def _with_published(n: int, sd: float, runs: int | None, published_sd: float | None) -> tuple[float, float]:
    """Degrees of freedom and standard error of the difference, including the spread of the published number."""
    ours = sd**2 / n
    if runs is None:
        return n - 1, math.sqrt(ours)
    if published_sd is None:
        return n - 1, sd * math.sqrt(1 / n + 1 / runs)
    theirs = published_sd**2 / runs
    freedom = (ours + theirs) ** 2 / (ours**2 / (n - 1) + theirs**2 / (runs - 1))
    return freedom, math.sqrt(ours + theirs)


def _basis(runs: int | None, sd: float | None) -> str:
    if runs is None:
        return "an exact number"
    if sd is not None:
        return f"mean of {runs} runs, sd {sd:g}"
    if runs > 1:
        return f"mean of {runs} runs without a spread; the spread of our seeds is used for it"
    return "a single value without a spread; the spread of our seeds is used for it"


def _is_constant(values: np.ndarray[tuple[int], np.dtype[np.float64]], sd: float) -> bool:
    return sd <= _NO_SPREAD * max(1.0, float(np.abs(values).max()))


def t_quantile(freedom: float, probability: float) -> float:
    """Quantile of Student's t."""
    return float(special.stdtrit(freedom, probability))


def _upper_tail(freedom: float, value: float) -> float:
    """P(T > value) of Student's t."""
    return float(special.stdtr(freedom, -value))


def _between(interval: tuple[float, float], confidence: float) -> str:
    return f"the {100 * confidence:.4g} % interval {interval[0]:+.2f} to {interval[1]:+.2f}"


def _listed(seeds: Mapping[int, float]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "none"
