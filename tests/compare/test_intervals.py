"""The statistics keep their promises on runs whose effects are known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from llmeff.compare.intervals import best_of, holm, mean_interval, paired, ratio_interval, resampled_ratio

TRIALS = 4000


def losses(generator, num_arms, n, effects):
    """(arms, trials, n) losses: a seed moves all arms alike, and each a little on its own."""
    shared = generator.normal(0, 0.02, (1, TRIALS, n))
    own = generator.normal(0, 0.005, (num_arms, TRIALS, n))
    return 1.7 * np.exp(shared + own + np.log(np.asarray(effects))[:, None, None])


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_cover_the_truth_as_often_as_they_say(n):
    baseline, method = losses(np.random.default_rng(n), 2, n, [1.0, 0.98])
    covered = 0
    for trial in range(TRIALS):
        ratio = paired(method[trial], baseline[trial]).ratio
        covered += ratio.lower <= 0.98 <= ratio.upper
    assert 0.93 <= covered / TRIALS <= 0.97


@pytest.mark.parametrize("n", [3, 5, 10])
def test_of_eight_equal_arms_one_is_called_different_in_at_most_one_family_of_twenty(n):
    """All families at once, by the same formula, since 4,000 would tell 4.8 % from 5 % only now and then."""
    found, num_families = 0, 0
    for seed in range(10):
        arms = losses(np.random.default_rng(100 * n + seed), 9, n, [1.0] * 9)
        logs = np.log(arms[1:] / arms[0])
        t_values = logs.mean(-1) / (logs.std(-1, ddof=1) / math.sqrt(n))
        p_values = 2 * stats.t(n - 1).sf(abs(t_values))
        found += (8 * p_values.min(0) < 0.05).sum()
        num_families += TRIALS
        for trial in range(20):
            own = [paired(arm[trial], arms[0, trial]).p for arm in arms[1:]]
            assert own == pytest.approx(p_values[:, trial])
            assert min(holm(own)) == pytest.approx(min(1.0, 8 * min(own)))
    assert found / num_families <= 0.05


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_smallest_visible_difference_is_seen_four_times_in_five(n):
    generator = np.random.default_rng(200 + n)
    spread = 0.005 * math.sqrt(2)
    # what a comparison would state if it knew the spread, which it can only estimate
    seen = 0
    t_of = stats.t(n - 1).ppf
    effect = math.exp((t_of(0.975) + t_of(0.8)) * spread / math.sqrt(n))
    baseline, method = losses(generator, 2, n, [1.0, effect])
    for trial in range(TRIALS):
        seen += paired(method[trial], baseline[trial]).p < 0.05
    assert seen / TRIALS == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("family", [1, 4, 15])
def test_the_smallest_visible_difference_is_that_of_holms_first_step(family):
    ours, theirs = [1.70, 1.69, 1.72, 1.71], [1.74, 1.70, 1.73, 1.75]
    found = paired(ours, theirs, family)
    error = np.log(np.divide(ours, theirs)).std(ddof=1) / 2
    t_of = stats.t(3).ppf
    assert math.log(found.smallest_visible) == pytest.approx((t_of(1 - 0.025 / family) + t_of(0.8)) * error)


def test_a_pair_is_judged_as_scipy_judges_it():
    ours, theirs = [1.70, 1.69, 1.72, 1.71], [1.74, 1.70, 1.73, 1.75]
    found = paired(ours, theirs)
    expected = stats.ttest_1samp(np.log(np.divide(ours, theirs)), 0.0)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.ratio.lower, found.ratio.upper) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert found.ratio.n == 4


def test_a_single_pair_has_a_ratio_and_no_interval():
    found = paired([1.7], [1.8])
    assert found.ratio.value == pytest.approx(1.7 / 1.8)
    assert all(math.isnan(value) for value in (found.ratio.lower, found.ratio.upper, found.p, found.smallest_visible))


def test_pairs_that_do_not_differ_are_not_called_different():
    assert paired([1.7, 1.8], [1.7, 1.8]).p == 1.0
    assert paired([2.0, 2.0], [1.0, 1.0]).p == 0.0


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 2.0]), ([0.0, 1.0], [1.0, 1.0]), ([1.0, math.nan], [1, 1])])
def test_what_cannot_be_paired_is_refused(ours, theirs):
    with pytest.raises(ValueError, match=r"paired|positive"):
        paired(ours, theirs)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_ratios_are_averaged_as_logarithms():
    assert ratio_interval([math.log(2), -math.log(2)]).value == pytest.approx(1.0)


def test_holm_is_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    with_nothing = holm([math.nan, 0.02])
    assert math.isnan(with_nothing[0])
    assert with_nothing[1] == pytest.approx(0.02)


def test_units_are_resampled_in_pairs():
    generator = np.random.default_rng(0)
    counts = generator.integers(50, 500, 300).astype(float)
    hardness = generator.lognormal(0.5, 0.4, 300)
    baseline = (hardness * counts, counts)
    method = (0.97 * hardness * generator.lognormal(0, 0.01, 300) * counts, counts)
    found = resampled_ratio(method, baseline)
    assert found.lower < 0.97 < found.upper
    assert found.upper - found.lower < 0.01  # documents differ by 40 %, pairs by one
    assert resampled_ratio(method, baseline) == found


def test_few_units_are_not_resampled():
    few = (np.ones(99), np.ones(99))
    with pytest.raises(ValueError, match="99 units are too few"):
        resampled_ratio(few, few)


def test_the_best_of_so_many_trials_is_the_mean_over_all_orders():
    trials = [2.0, 1.5, 1.9, 1.7]
    for spent, expected in enumerate(best_of(trials), start=1):
        ways = list(itertools.combinations(trials, spent))
        assert expected == pytest.approx(sum(map(min, ways)) / len(ways))
    assert best_of([2.0, math.nan])[0] == math.inf
    assert best_of([2.0, math.nan])[1] == 2.0
