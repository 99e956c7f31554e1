"""The statistics keep their promises on runs whose effects are known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from llmeff.compare.intervals import (
    best_of,
    holm,
    largest_of,
    many_to_one,
    mean_interval,
    paired,
    product,
    ratio_interval,
    resampled_ratio,
    same_settings,
)

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


def logs_of(spreads, seed=0, baseline=15, runs=5):
    """Logarithms of a baseline's runs and of arms', with these standard deviations exactly."""
    generator = np.random.default_rng(seed)
    found = []
    for place, spread in enumerate((0.01, *spreads)):
        own = generator.normal(size=baseline if place == 0 else runs)
        found.append(0.005 * place + spread * (own - own.mean()) / own.std(ddof=1))
    return found


@pytest.mark.parametrize(("baseline", "sizes"), [(15, (5, 5, 5, 5)), (6, (6, 3, 9)), (4, (4, 4))])
def test_arms_of_like_spread_are_judged_as_scipys_dunnett_judges_them(baseline, sizes):
    generator = np.random.default_rng(baseline)
    control = generator.normal(0, 0.01, baseline)
    arms = [generator.normal(0.006 * place, 0.01, size) for place, size in enumerate(sizes)]
    found = many_to_one(control, arms)
    expected = stats.dunnett(*arms, control=control, rng=0)
    interval = expected.confidence_interval(0.95)
    assert {own.method for own in found} == {"Dunnett"}
    assert [own.p_family for own in found] == pytest.approx(expected.pvalue, abs=2e-3)
    for bound, theirs in (("lower", interval.low), ("upper", interval.high)):
        assert [math.log(getattr(own.ratio, bound)) for own in found] == pytest.approx(theirs, abs=1e-4)
    assert [own.ratio.n for own in found] == list(sizes)


def test_the_largest_t_of_unequal_arms_is_distributed_as_scipy_says():
    shares = (0.25, 0.25, 0.4, 0.6)
    root = np.sqrt(shares)
    shape = np.outer(root, root) + np.diag(1 - np.array(shares))
    for freedom, value in ((4, 2.0), (12, 2.6), (66, 3.0)):
        bounds = np.full(len(shares), value)
        theirs = stats.multivariate_t(shape=shape, df=freedom, seed=0).cdf(bounds, lower_limit=-bounds)
        assert largest_of(value, shares, freedom) == pytest.approx(theirs, abs=5e-4)


def test_the_smallest_visible_difference_is_that_of_the_whole_family():
    control, *arms = logs_of([0.01] * 4)
    found = many_to_one(control, arms)[0]
    (asked,) = {round(math.log(own.ratio.upper / own.ratio.value) / math.sqrt(1e-4 * (1 / 5 + 1 / 15)), 6)
                for own in many_to_one(control, arms)}  # fmt: skip
    seen = asked + stats.t(14 + 16).ppf(0.8)
    assert math.log(found.smallest_visible) == pytest.approx(seen * 0.01 * math.sqrt(1 / 5 + 1 / 15), rel=1e-4)


def test_an_arm_whose_spread_stands_out_is_judged_by_its_own():
    control, *arms = logs_of([0.02, *[0.01] * 12])
    noisy, *others = many_to_one(control, arms)
    assert (noisy.method, {own.method for own in others}) == ("own spread", {"Dunnett"})
    pooled = (0.02**2 * 4 + 0.01**2 * (14 + 48)) / 66
    error = math.sqrt(0.02**2 / 5 + pooled / 15)
    alone = 2 * stats.t(4).sf(0.005 / error)
    assert noisy.p == pytest.approx(alone)
    assert noisy.p_family == pytest.approx(1 - (1 - alone) ** 13)
    half = stats.t(4).ppf(0.5 + 0.95 ** (1 / 13) / 2) * error
    assert math.log(noisy.ratio.upper) == pytest.approx(0.005 + half)
    assert others[0].p == pytest.approx(2 * stats.t(66).sf(0.010 / math.sqrt(pooled * (1 / 5 + 1 / 15))))


@pytest.mark.parametrize(
    ("spread", "method", "is_pooled"),
    [(0.018, "Dunnett", True), (0.0188, "own spread", True), (0.0215, "own spread", False)],
)
def test_a_spread_that_stands_out_over_all_arms_has_no_part_in_the_others(spread, method, is_pooled):
    """F is the square of the ratio of spreads, with 4 and 62 degrees of freedom."""
    control, *arms = logs_of([spread, *[0.01] * 12])
    noisy, *others = many_to_one(control, arms)
    p = stats.f(4, 62).sf((spread / 0.01) ** 2)
    assert (p < 0.012, 14 * p < 0.05, 14 * p < 0.01) == (method == "own spread", not is_pooled, False)
    assert (noisy.method, {own.method for own in others}) == (method, {"Dunnett"})
    freedom = 66 if is_pooled else 62
    pooled = (spread**2 * 4 * is_pooled + 0.01**2 * 62) / freedom
    assert others[0].p == pytest.approx(2 * stats.t(freedom).sf(0.010 / math.sqrt(pooled * (1 / 5 + 1 / 15))))


@pytest.mark.parametrize(("p", "method"), [(0.0125, "Dunnett"), (0.016, "Dunnett"), (0.0115, "own spread")])
def test_of_few_arms_one_that_is_judged_by_the_pooled_spread_has_a_part_in_it(p, method):
    """Of two arms and a baseline one stands out over all (3 p below 0.05) before it does alone."""
    spread = 0.01 * math.sqrt(stats.f(4, 18).isf(p))
    control, noisy, other = logs_of([spread, 0.01])
    found = many_to_one(control, [noisy, other])
    assert [own.method for own in found] == [method, "Dunnett"]
    is_pooled = method == "Dunnett"
    freedom = 18 + 4 * is_pooled
    error = math.sqrt((spread**2 * 4 * is_pooled + 0.01**2 * 18) / freedom * (1 / 5 + 1 / 15))
    assert found[1].p == pytest.approx(2 * stats.t(freedom).sf(0.010 / error))
    if is_pooled:
        assert found[0].p == pytest.approx(2 * stats.t(22).sf(0.005 / error))


@pytest.mark.parametrize("place", [0, 3, "baseline"])
def test_where_one_spread_is_far_from_the_others_nothing_is_pooled(place):
    control, *arms = logs_of([0.01] * 6)
    if place == "baseline":
        control = 5 * control
    else:
        arms[place] = 5 * arms[place]
    found = many_to_one(control, arms)
    assert {own.method for own in found} == {"own spread"}
    error = math.sqrt(arms[1].var(ddof=1) / 5 + control.var(ddof=1) / 15)
    assert found[1].p == pytest.approx(2 * stats.t(4).sf(abs(arms[1].mean() - control.mean()) / error))


def test_a_baseline_whose_spread_stands_out_is_judged_by_its_own():
    control, *arms = logs_of([0.01] * 13, baseline=15)
    found = many_to_one(1.9 * control, arms)
    assert {own.method for own in found} == {"own spread"}
    error = math.sqrt(0.01**2 / 5 + 0.019**2 / 15)
    assert found[0].p == pytest.approx(2 * stats.t(4).sf(0.005 / error))


def test_one_arm_alone_is_judged_by_welchs_t_as_scipy_has_it():
    control, arm = logs_of([0.03], baseline=9, runs=4)
    (found,) = many_to_one(control, [arm])
    expected = stats.ttest_ind(arm, control, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert (found.method, found.p, found.p_family) == (
        "Welch", pytest.approx(expected.pvalue), pytest.approx(expected.pvalue),
    )  # fmt: skip
    assert (found.ratio.lower, found.ratio.upper) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))


def test_the_same_settings_are_judged_by_students_t_as_scipy_has_it():
    control, again = logs_of([0.012], baseline=9, runs=4)
    found = same_settings(again, control)
    expected = stats.ttest_ind(again, control)
    interval = expected.confidence_interval(0.95)
    assert (found.method, found.p, found.p_family) == (
        "A/A", pytest.approx(expected.pvalue), pytest.approx(expected.pvalue),
    )  # fmt: skip
    assert (found.ratio.lower, found.ratio.upper) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert math.isnan(same_settings(control[:1], again[:1]).p)


def test_intervals_and_p_values_over_the_family_agree():
    generator, apart = np.random.default_rng(5), 0
    for _ in range(60):
        spreads = generator.choice([0.01, 0.01, 0.04], 4)
        control = generator.normal(0, 0.01, 6)
        arms = [generator.normal(generator.normal(0, 0.01), spread, 4) for spread in spreads]
        for own in many_to_one(control, arms):
            assert (own.p_family < 0.05) == (not own.ratio.lower <= 1 <= own.ratio.upper)
            assert own.p <= own.p_family <= 1
            apart += own.p_family < 0.05
    assert apart > 10


def test_arms_that_have_their_noise_in_common_tell_of_the_spread_as_one():
    control, one, other = logs_of([0.01, 0.014], baseline=4, runs=4)
    apart = many_to_one(control, [one, one + 0.001, one + 0.002, other])[0]
    found = many_to_one(control, [one, one + 0.001, one + 0.002, other], kin=["a", "a", "a", "b"])[0]
    pooled = (0.01**2 * 3 + 0.01**2 * 3 + 0.014**2 * 3) / 9
    assert found.p == pytest.approx(2 * stats.t(9).sf(0.005 / math.sqrt(pooled / 2)))
    assert found.ratio.upper / found.ratio.lower > apart.ratio.upper / apart.ratio.lower


def test_more_comparisons_in_the_family_ask_more():
    control, *arms = logs_of([0.01] * 2)
    widths = [
        own.ratio.upper / own.ratio.lower for family in (2, 5, 20) for own in many_to_one(control, arms, family=family)
    ]
    assert widths[0] < widths[2] < widths[4]


def test_comparisons_that_others_judge_count_as_those_of_the_smallest_arm_which_asks_most():
    generator = np.random.default_rng(11)
    control, *arms = (generator.normal(0, 0.01, size) for size in (6, 3, 12))
    found = many_to_one(control, arms, family=4)[1]
    freedom = 5 + 2 + 11
    pooled = sum(own.var(ddof=1) * (len(own) - 1) for own in (control, *arms)) / freedom
    t = abs(arms[1].mean() - control.mean()) / math.sqrt(pooled * (1 / 12 + 1 / 6))
    root = np.sqrt([3 / 9, 12 / 18, 3 / 9, 3 / 9])
    shape = np.outer(root, root) + np.diag(1 - root**2)
    theirs = stats.multivariate_t(shape=shape, df=freedom, seed=0).cdf(np.full(4, t), lower_limit=np.full(4, -t))
    assert found.p_family == pytest.approx(1 - theirs, abs=1e-3)


def test_a_single_run_has_a_ratio_and_no_interval_among_others_that_have():
    control, *arms = logs_of([0.01] * 3)
    found = many_to_one(control, [arms[0], arms[1][:1], arms[2]])
    assert [math.isnan(own.p_family) for own in found] == [False, True, False]
    assert found[1].ratio.value == pytest.approx(math.exp(arms[1][0] - control.mean()))
    assert all(math.isnan(own.p) for own in many_to_one(control[:1], arms))


def test_arms_without_any_spread_are_as_they_are():
    control = np.log([2.0, 2.0, 2.0])
    same, twice = many_to_one(control, [control, control + math.log(2)])
    assert (same.ratio.value, same.ratio.lower, same.ratio.upper, same.p_family) == (1, 1, 1, 1)
    assert (twice.ratio.lower, twice.ratio.upper, twice.p_family) == (pytest.approx(2), pytest.approx(2), 0)
    (alone,) = many_to_one(control, [control + math.log(2)])
    assert (alone.ratio.lower, alone.ratio.upper) == (pytest.approx(2), pytest.approx(2))
    assert (alone.method, alone.p, alone.p_family, alone.smallest_visible) == ("Welch", 0, 0, 1)


def test_a_product_of_means_has_the_errors_of_all_of_them():
    parts = [np.array([0.1, 0.2, 0.15]), np.array([-0.3, -0.1]), np.array([0.0, 0.02, 0.05, 0.01])]
    found = product(parts)
    squares = [part.var(ddof=1) / len(part) for part in parts]
    error = math.sqrt(sum(squares))
    freedom = sum(squares) ** 2 / sum(own**2 / (len(part) - 1) for own, part in zip(squares, parts, strict=True))
    mean = sum(part.mean() for part in parts)
    assert (found.ratio.value, found.method) == (pytest.approx(math.exp(mean)), "Welch")
    assert found.p == pytest.approx(2 * stats.t(freedom).sf(abs(mean) / error))
    assert math.log(found.ratio.upper) == pytest.approx(mean + stats.t(freedom).ppf(0.975) * error)


def test_holm_is_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([0.01, 0.02], family=4) == pytest.approx([0.04, 0.06])  # beside two others that are not rejected
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
