"""The statistics: values worked by hand, values of printed tables, and error rates by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from icdctl.errors import UsageError
from icdctl.science import compare, power
from icdctl.science.compare import holm, paired_difference, reproduces, summarise
from icdctl.science.power import power_of, seeds_needed

SIMULATIONS = 10_000
ALPHA = 0.05
T_975_4, T_95_4 = 2.776445, 2.131847
"""Quantiles of Student's t with 4 degrees of freedom, from printed tables."""


def test_a_summary_is_what_a_hand_gets() -> None:
    summary = summarise([1, 2, 3, 4, 5])
    assert (summary.n, summary.mean) == (5, 3)
    assert summary.sd == pytest.approx(math.sqrt(2.5))
    half = T_975_4 * math.sqrt(2.5 / 5)
    assert summary.low == pytest.approx(3 - half, abs=1e-5)
    assert summary.high == pytest.approx(3 + half, abs=1e-5)


def test_one_value_has_no_spread() -> None:
    assert summarise([70.1]) == compare.Summary(1, 70.1, None, None, None)


def test_both_intervals_of_a_reproduction_are_what_a_hand_gets() -> None:
    outcome = reproduces([1, 2, 3, 4, 5], 2.5, margin=2.1)
    error = math.sqrt(2.5 / 5)
    assert outcome.difference == 0.5
    assert list(outcome.interval or ()) == pytest.approx([0.5 - T_95_4 * error, 0.5 + T_95_4 * error], abs=1e-5)
    outer = T_975_4 * math.sqrt(2.5 * (1 + 1 / 5))
    assert list(outcome.outer_interval or ()) == pytest.approx([0.5 - outer, 0.5 + outer], abs=1e-5)
    assert outcome.verdict == "reproduced"
    assert reproduces([1, 2, 3, 4, 5], 2.5, margin=2.0).verdict == "underpowered"


def test_p_values_of_four_degrees_of_freedom_have_a_closed_form() -> None:
    """P(T > t) = 1/2 - (3 + x) sqrt(x') / 4 for x' = t^2 / (4 + t^2), x = 2 - x', by integrating the density."""
    outcome = reproduces([1, 2, 3, 4, 5], 2.5, margin=2.1)
    t = (2.1 - 0.5) / math.sqrt(0.5)
    share = t**2 / (4 + t**2)
    assert outcome.p_equivalence == pytest.approx(0.5 - math.sqrt(share) * (3 - share) / 4, rel=1e-9)
    assert outcome.p_upper is not None
    assert outcome.p_upper == outcome.p_equivalence
    assert outcome.p_lower is not None
    assert outcome.p_lower < outcome.p_upper


def test_far_values_are_not_reproduced_and_the_reason_says_so() -> None:
    outcome = reproduces([69.0, 69.2, 69.1, 68.9, 69.3], 60.19, margin=0.5)
    assert outcome.verdict == "not reproduced"
    assert "wholly beyond -+0.5" in outcome.reason
    assert "single value without a spread" in outcome.basis
    assert outcome.p_outside is not None
    assert outcome.p_outside < 0.001


def test_a_single_published_run_weighs_less_than_an_exact_number() -> None:
    values = [70.9, 71.1, 71.0, 71.2, 70.8]
    assert reproduces(values, 70.1, margin=0.5).verdict == "underpowered"
    assert reproduces(values, 70.1, margin=0.5, published_runs=None).verdict == "not reproduced"
    assert reproduces(values, 70.1, margin=0.5, published_runs=5, published_sd=0.01).verdict == "not reproduced"


@pytest.mark.parametrize("values", [[70.1], [70.1, 70.1, 70.1]])
def test_no_spread_is_underpowered_whatever_the_difference(values: list[float]) -> None:
    for published in (70.1, 10.0):
        outcome = reproduces(values, published, margin=0.5)
        assert outcome.verdict == "underpowered"
        assert outcome.interval is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: summarise([]),
        lambda: summarise([1.0, float("nan")]),
        lambda: reproduces([1.0, 2.0], 1.0, margin=0),
        lambda: reproduces([1.0, 2.0], 1.0, margin=1, alpha=0.5),
        lambda: reproduces([1.0, 2.0], float("inf"), margin=1),
        lambda: reproduces([1.0, 2.0], 1.0, margin=1, published_runs=0),
        lambda: reproduces([1.0, 2.0], 1.0, margin=1, published_runs=1, published_sd=0.2),
        lambda: paired_difference({0: 1.0}, {1: 1.0}),
        lambda: holm([0.1, 1.2]),
        lambda: power_of(0, 1, 1),
        lambda: power_of(3, 1, 0),
        lambda: seeds_needed(0, 0.25),
        lambda: seeds_needed(1e-6, 1),
        lambda: power.equivalence_power(5, 0, 1),
    ],
)
def test_what_can_not_be_answered_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        call()


def test_a_paired_difference_is_what_a_hand_gets() -> None:
    """Differences 1, 2, 3: mean 2, sd 1, t = 2 sqrt(3); P(T > t) with 2 degrees is (1 - t / sqrt(2 + t^2)) / 2."""
    found = paired_difference({0: 1.0, 1: 2.0, 2: 4.0, 7: 9.0}, {0: 0.0, 1: 0.0, 2: 1.0, 8: 9.0})
    t = 2 * math.sqrt(3)
    assert (found.n, found.seeds, found.left_out) == (3, (0, 1, 2), (7, 8))
    assert (found.mean, found.sd, found.effect_size) == (2, 1, 2)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)


def test_equal_runs_differ_by_nothing_and_a_constant_difference_has_no_test() -> None:
    same = {0: 70.1, 1: 70.4}
    assert paired_difference(same, same).p == 1
    shifted = paired_difference({seed: value + 0.3 for seed, value in same.items()}, same)
    assert (shifted.p, shifted.effect_size) == (None, None)
    assert paired_difference({0: 1.0}, {0: 0.5}).p is None


def test_holm_is_what_a_hand_gets_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_eleven_per_arm_is_the_z_test_and_the_t_test_needs_twelve() -> None:
    assert seeds_needed(0.3, 0.25, known_sd=True) == 11
    assert seeds_needed(0.3, 0.25) == 12
    assert [seeds_needed(delta, 0.25, known_sd=True) for delta in (0.2, 0.5, 1.0)] == [25, 4, 1]
    assert seeds_needed(0.3, 0.25, paired=True) == 8
    assert power_of(11, 0.3, 0.25) < 0.8 <= power_of(12, 0.3, 0.25)


def test_power_is_that_of_printed_tables() -> None:
    """Cohen's tables: 17 per arm for d = 1, 26 for 0.8, 64 for 0.5, at power 0.8; 34 pairs for 0.5."""
    assert [seeds_needed(d, 1) for d in (1.0, 0.8, 0.5)] == [17, 26, 64]
    assert seeds_needed(0.5, 1, paired=True) == 34
    assert power_of(5, 0, 1) == pytest.approx(0.05)
    assert power_of(1, 1, 1) == 0
    assert power_of(5, -0.5, 1) == power_of(5, 0.5, 1)


@pytest.mark.parametrize("paired", [False, True])
def test_power_is_the_share_of_simulated_data_in_which_the_test_rejects(paired: bool) -> None:
    random = np.random.default_rng(7)
    first = random.normal(0.3, 0.25, (SIMULATIONS, 6))
    second = random.normal(0, 0.25, (SIMULATIONS, 6))
    if paired:
        statistic = first.mean(1) / (first.std(1, ddof=1) / math.sqrt(6))
        quantile = 2.570582
    else:
        error = np.sqrt((first.var(1, ddof=1) + second.var(1, ddof=1)) / 6)
        statistic, quantile = (first.mean(1) - second.mean(1)) / error, 2.228139
    found = float((np.abs(statistic) > quantile).mean())
    assert power_of(6, 0.3, 0.25, paired=paired) == pytest.approx(found, abs=0.015)


def rates(
    *,
    shift: float,
    n: int,
    sd: float,
    margin: float = 0.5,
    drawn: bool = False,
    runs: int | None = 1,
    known: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Shares of the verdicts where our mean is `shift` above the number, or above the mean that it is drawn around."""
    random = np.random.default_rng(seed)
    counts = {"reproduced": 0, "not reproduced": 0, "underpowered": 0}
    ours = random.normal(shift, sd, (SIMULATIONS, n))
    theirs = random.normal(0, sd, (SIMULATIONS, runs or 1))
    for values, drawn_runs in zip(ours.tolist(), theirs, strict=True):
        outcome = reproduces(
            values,
            float(drawn_runs.mean()) if drawn else 0.0,
            margin=margin,
            alpha=ALPHA,
            published_runs=runs,
            published_sd=float(drawn_runs.std(ddof=1)) if known else None,
        )
        counts[outcome.verdict] += 1
    return {verdict: count / SIMULATIONS for verdict, count in counts.items()}


TOLERANCE = 3 * math.sqrt(ALPHA * (1 - ALPHA) / SIMULATIONS)
"""Three standard errors of a simulated rate of 5 %: 0.0065."""


@pytest.mark.parametrize(("n", "sd"), [(3, 0.1), (5, 0.25), (12, 0.25)])
def test_a_mean_at_the_margin_is_called_reproduced_at_most_as_often_as_alpha(n: int, sd: float) -> None:
    found = rates(shift=0.5, n=n, sd=sd)["reproduced"]
    assert found <= ALPHA + TOLERANCE
    assert found >= ALPHA - 0.01, "with little spread the test uses up its alpha"


@pytest.mark.parametrize(("n", "sd"), [(2, 0.25), (5, 0.25), (12, 0.25), (5, 5.0), (3, 0.01)])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_mean_within_the_margin_is_called_not_reproduced_at_most_as_often_as_alpha(
    n: int, sd: float, drawn: bool
) -> None:
    assert rates(shift=0.5, n=n, sd=sd, drawn=drawn)["not reproduced"] <= ALPHA + TOLERANCE


def test_the_same_holds_against_the_mean_of_several_published_runs() -> None:
    assert rates(shift=0.5, n=5, sd=0.25, drawn=True, runs=3)["not reproduced"] <= ALPHA + TOLERANCE
    assert rates(shift=0.5, n=5, sd=0.25, drawn=True, runs=3, known=True)["not reproduced"] <= ALPHA + TOLERANCE
    assert rates(shift=0.5, n=5, sd=0.25, runs=None)["not reproduced"] <= ALPHA + TOLERANCE


def test_taking_a_single_run_as_exact_would_break_that_promise() -> None:
    """Why the outer interval has the published spread in it: here a perfect copy is often called not reproduced."""
    random = np.random.default_rng(3)
    numbers = random.normal(0, 0.5, 2000)
    wrong = [
        reproduces(random.normal(0, 0.5, 20).tolist(), float(number), margin=0.5, published_runs=None).verdict
        for number in numbers
    ]
    assert wrong.count("not reproduced") / len(wrong) > 2 * ALPHA


def test_enough_seeds_reproduce_what_is_the_same_and_refuse_what_is_not() -> None:
    needed = power.seeds_to_reproduce(0.5, 0.25)
    assert needed == 4
    assert rates(shift=0, n=needed, sd=0.25)["reproduced"] == pytest.approx(
        power.equivalence_power(needed, 0.5, 0.25), abs=0.015
    )
    assert rates(shift=2, n=5, sd=0.25, drawn=True)["not reproduced"] > 0.9


def test_holm_keeps_the_family_wise_error() -> None:
    """Nine true null hypotheses, five paired seeds each, all sharing the noise of the seed."""
    random = np.random.default_rng(11)
    shared = random.normal(0, 1, (SIMULATIONS, 5, 1))
    differences = shared + random.normal(0, 1, (SIMULATIONS, 5, 9))
    t = differences.mean(1) / (differences.std(1, ddof=1) / math.sqrt(5))
    share = t**2 / (4 + t**2)
    p = 1 - np.sqrt(share) * (3 - share) / 2  # two-sided, 4 degrees of freedom, as above
    family_wise = float(np.mean([min(holm(row.tolist())) <= ALPHA for row in p]))
    assert family_wise <= ALPHA + TOLERANCE
    assert float((p.min(1) <= ALPHA).mean()) > 0.15, "without the correction"


def test_holm_finds_no_less_than_bonferroni() -> None:
    random = np.random.default_rng(5)
    for row in random.uniform(0, 0.1, (200, 6)):
        adjusted = holm(row.tolist())
        assert all(h <= min(1, 6 * p) + 1e-12 for h, p in zip(adjusted, row, strict=True))
        assert sorted(range(6), key=lambda i: row[i]) == sorted(range(6), key=lambda i: (adjusted[i], row[i]))
