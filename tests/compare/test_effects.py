import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from llmeff.compare.effects import effects
from llmeff.core.config import ConfigError

TRUE = {"a": 0.10, "b": -0.30, "c": 0.0}
TOGETHER = 0.05
"""By which each of a and b grows where the other is high."""


def loss(levels, noise):
    codes = {name: 1 if level == "high" else -1 for name, level in levels.items()}
    log = sum(TRUE[name] / 2 * code for name, code in codes.items()) + TOGETHER / 4 * codes["a"] * codes["b"]
    return math.exp(log + noise)


def runs(entry, generator, seeds=3, design=None, spread=0.01):
    found = []
    for seed in range(seeds):
        shared = generator.normal(0, 0.05)
        for levels in design or itertools.product(("low", "high"), repeat=3):
            factors = dict(zip(TRUE, levels, strict=True))
            found.append(
                entry("-".join(levels), seed, factors=factors, loss=loss(factors, shared + generator.normal(0, spread)))
            )
    return found


def by_name(found):
    return {" x ".join(effect.factors): effect for effect in found.effects}


def test_effects_are_found_and_their_intervals_cover_them(entry):
    generator, covered, trials = np.random.default_rng(0), dict.fromkeys([*TRUE, "a x b"], 0), 300
    for _ in range(trials):
        found = by_name(effects(runs(entry, generator), lambda run: run.loss))
        for name, true in [*TRUE.items(), ("a x b", TOGETHER)]:
            ratio = found[name].ratio
            covered[name] += ratio.lower <= math.exp(true) <= ratio.upper
    assert all(count / trials == pytest.approx(0.95, abs=0.038) for count in covered.values())


def test_what_is_large_is_called_and_what_is_nothing_is_not(entry):
    found = by_name(effects(runs(entry, np.random.default_rng(1)), lambda run: run.loss))
    assert found["b"].p_adjusted < 0.001
    assert found["c"].p_adjusted > 0.05
    assert found["a"].levels == "low -> high"
    assert list(found) == ["a", "b", "c", "a x b", "a x c", "b x c"]


def test_pairs_that_a_fraction_cannot_tell_apart_are_named(entry):
    half = [levels for levels in itertools.product(("low", "high"), repeat=3) if levels.count("high") % 2]
    found = effects(runs(entry, np.random.default_rng(2), design=half), lambda run: run.loss)
    assert found.aliased == ["a x b", "a x c", "b x c"]
    assert [effect.factors for effect in found.effects] == [("a",), ("b",), ("c",)]


def test_what_hangs_on_no_chance_is_exact_and_stands_beside_its_prediction(entry):
    study = runs(entry, np.random.default_rng(3))
    peak = {"low": 100.0, "high": 60.0}
    found = by_name(
        effects(
            study,
            lambda run: peak[run.factors["b"]],
            lambda run: 1.02 * peak[run.factors["b"]],
            depends_on_seed=False,
        )
    )
    assert (found["a"].is_none, found["b"].is_none, found["b"].by_seed) == (True, False, {})
    assert found["b"].ratio.value == found["b"].ratio.lower == found["b"].ratio.upper == pytest.approx(0.6)
    assert (found["b"].p_adjusted, found["a"].p_adjusted) == (0.0, 1.0)
    assert found["b"].predicted == pytest.approx(0.6)


def test_one_seed_of_a_full_fit_leaves_nothing_to_judge_by(entry):
    design = [levels for levels in itertools.product(("low", "high"), repeat=3) if levels.count("high") % 2]
    found = effects(runs(entry, np.random.default_rng(4), seeds=1, design=design), lambda run: run.loss)
    assert all(math.isnan(effect.p_adjusted) for effect in found.effects)


@pytest.mark.parametrize(
    ("factors", "words"),
    [({}, "not a factorial study"), ({"a": "only"}, "exactly two levels, unlike these factors: a")],
)
def test_runs_without_two_levels_are_refused(entry, factors, words):
    with pytest.raises(ConfigError, match=words):
        effects([entry("x", seed, factors=factors) for seed in range(2)], lambda run: run.loss)


HALF = [(a, b, "high" if (a == "high") == (b == "high") else "low") for a in ("low", "high") for b in ("low", "high")]
"""Half of all combinations of three factors, of which no main effect is mistaken for another."""


def hand_made(entry, ratios, noise=None, repeats=1):
    """Runs whose loss is, of each seed, this many times as much where `a` is high; all else does nothing."""
    found = []
    for seed, ratio in enumerate(ratios):
        for place, levels in enumerate(HALF * repeats):
            factors = dict(zip("abc", levels, strict=True))
            rounding = 1 + (0 if noise is None else noise[place % len(noise)])
            value = 2.0 * (ratio if levels[0] == "high" else 1.0) * rounding
            found.append(entry(f"{'-'.join(levels)}, {place // len(HALF)}", seed, factors=factors, loss=value))
    return found


def test_what_hangs_on_the_seed_is_judged_by_its_seeds_however_many_runs_they_have(entry):
    ratios = [0.918, 0.946, 0.931, 0.925]
    expected = stats.ttest_1samp(np.log(ratios), 0.0)
    interval = expected.confidence_interval(0.95)
    for repeats in (1, 4):
        found = effects(hand_made(entry, ratios, repeats=repeats), lambda run: run.loss)
        effect = by_name(found)["a"]
        assert (found.seeds, effect.ratio.n, found.num_runs) == ((0, 1, 2, 3), 4, 16 * repeats)
        assert effect.ratio.value == pytest.approx(stats.gmean(ratios))
        assert (effect.ratio.lower, effect.ratio.upper) == pytest.approx((np.exp(interval.low), np.exp(interval.high)))
        assert effect.p_adjusted == pytest.approx(expected.pvalue)  # of b and c nothing is to be tested
        assert list(effect.by_seed.values()) == pytest.approx(ratios)
        seen = (stats.t(3).ppf(1 - 0.025) + stats.t(3).ppf(0.8)) * np.log(ratios).std(ddof=1) / 2
        assert math.log(effect.smallest_visible) == pytest.approx(seen)


def test_an_effect_is_judged_by_its_own_variation_over_seeds_and_not_by_that_of_others(entry):
    generator, found = np.random.default_rng(8), []
    for seed in range(6):
        own = {"a": generator.normal(0.1, 0.05), "b": generator.normal(0.001, 1e-4)}
        for levels in HALF:
            log = sum(own[name] for name, level in zip("ab", levels[:2], strict=True) if level == "high")
            found.append(
                entry("-".join(levels), seed, factors=dict(zip("abc", levels, strict=True)), loss=math.exp(log))
            )
    by = by_name(effects(found, lambda run: run.loss))
    assert by["b"].ratio.lower > 1.0005
    assert by["a"].ratio.upper / by["a"].ratio.lower > 1.05
    # of c there is nothing to test: Holm's procedure and what it would have seen are of two
    assert by["c"].is_none
    own = np.log(list(by["b"].by_seed.values()))
    alone = stats.ttest_1samp(own, 0.0).pvalue
    assert min(by["a"].p_adjusted, by["b"].p_adjusted) == pytest.approx(
        2 * min(alone, stats.ttest_1samp(np.log(list(by["a"].by_seed.values())), 0.0).pvalue)
    )
    seen = (stats.t(5).ppf(1 - 0.025 / 2) + stats.t(5).ppf(0.8)) * own.std(ddof=1) / math.sqrt(6)
    assert math.log(by["b"].smallest_visible) == pytest.approx(seen)


@pytest.mark.parametrize("count", [1, 2])
def test_of_fewer_than_three_seeds_there_are_values_by_seed_and_no_interval(entry, count):
    effect = by_name(effects(hand_made(entry, [0.918, 0.946][:count]), lambda run: run.loss))["a"]
    assert list(effect.by_seed.values()) == pytest.approx([0.918, 0.946][:count])
    assert all(map(math.isnan, (effect.ratio.lower, effect.ratio.upper, effect.p_adjusted, effect.smallest_visible)))
    assert not effect.is_none


@pytest.mark.parametrize(("noise", "is_none"), [(2e-7, True), (1e-5, False)])
def test_an_effect_below_the_noise_of_arithmetic_is_none(entry, noise, is_none):
    runs_of = hand_made(entry, [0.9, 0.95, 0.92], noise=[0, noise, 0, noise])  # which b does
    effect = by_name(effects(runs_of, lambda run: run.loss))["b"]
    assert effect.is_none == is_none
    assert (effect.p_adjusted == 1.0) == is_none
    assert effect.ratio.value == pytest.approx(1 + noise, rel=1e-9)


def test_a_seed_that_lacks_a_combination_is_left_out_and_named(entry):
    ratios = [0.9, 0.5, 0.95, 0.92]
    found = effects(
        [run for run in hand_made(entry, ratios) if (run.seed, run.arm[:4]) != (1, "low-")], lambda run: run.loss
    )
    assert (found.seeds, found.dropped_seeds, found.dropped_combinations) == ((0, 2, 3), (1,), ())
    assert by_name(found)["a"].ratio.value == pytest.approx(stats.gmean([0.9, 0.95, 0.92]))


def test_a_combination_that_most_seeds_lack_is_left_out_and_named_and_seeds_are_kept(entry):
    study = [run for run in runs(entry, np.random.default_rng(10), seeds=6, spread=0.0)
             if run.arm != "high-low-high" or run.seed == 2]  # fmt: skip
    found = effects(study, lambda run: run.loss)
    assert (found.seeds, found.dropped_seeds, found.num_runs) == (tuple(range(6)), (), 42)
    assert found.dropped_combinations == ({"a": "high", "b": "low", "c": "high"},)
    assert found.aliased == []  # seven combinations tell six effects and a mean apart
    truth = {**TRUE, "a x b": TOGETHER, "a x c": 0.0, "b x c": 0.0}
    assert {name: math.log(own.ratio.value) for name, own in by_name(found).items()} == pytest.approx(truth, abs=1e-9)


def test_a_seed_and_a_combination_are_both_left_out_where_each_lacks_much(entry):
    study = [run for run in runs(entry, np.random.default_rng(11), seeds=6)
             if not (run.arm == "low-low-low" and run.seed < 4) and not (run.seed == 4 and run.factors["a"] == "high")]  # fmt: skip
    found = effects(study, lambda run: run.loss)
    assert (found.seeds, found.dropped_seeds, found.num_runs) == ((0, 1, 2, 3, 5), (4,), 35)
    assert found.dropped_combinations == (dict.fromkeys("abc", "low"),)


def test_of_two_ways_that_cost_as_many_runs_seeds_are_left_out_and_the_factor_stays(entry):
    study = [
        run for run in runs(entry, np.random.default_rng(12), seeds=6) if run.seed < 3 or run.factors["a"] == "low"
    ]
    found = effects(study, lambda run: run.loss)
    assert (found.seeds, found.dropped_seeds, found.dropped_combinations) == ((0, 1, 2), (3, 4, 5), ())


def test_where_no_seed_is_whole_what_all_have_is_judged_and_what_it_cannot_tell_is_named(entry):
    study = hand_made(entry, [0.9, 0.95])
    found = effects([run for run in study if run.arm != study[run.seed].arm], lambda run: run.loss)
    assert (found.seeds, found.dropped_seeds, found.num_runs) == ((0, 1), (), 4)
    assert [tuple(own.values()) for own in found.dropped_combinations] == HALF[:2]
    assert ([effect.factors for effect in found.effects], found.aliased[:2]) == ([("b",)], ["a", "c"])


def test_a_combination_is_the_same_in_whatever_order_a_run_names_its_factors(entry):
    study = runs(entry, np.random.default_rng(13))
    turned = [replace(run, factors=dict(reversed(run.factors.items()))) if run.seed == 1 else run for run in study]
    assert effects(turned, lambda run: run.loss) == effects(study, lambda run: run.loss)


def test_what_does_not_hang_on_the_seed_has_every_run_as_a_replicate(entry):
    """Two factors in three blocks, by hand: beside blocks, effects and their pair six degrees of freedom are left."""
    generator, study = np.random.default_rng(9), []
    for seed in range(3):
        for one, other in itertools.product(("low", "high"), repeat=2):
            log = 0.2 * (one == "high") + 0.1 * seed + generator.normal(0, 0.01)
            study.append(entry(f"{one}{other}", seed, factors={"a": one, "b": other}, loss=math.exp(log)))
    effect = by_name(effects(study, lambda run: run.loss, depends_on_seed=False))["a"]
    table = np.log([run.loss for run in study]).reshape(3, 2, 2)
    left = table - table.mean(axis=0) - table.mean(axis=(1, 2))[:, None, None] + table.mean()
    error = math.sqrt((left**2).sum() / 6 * (1 / 6 + 1 / 6))
    log = table[:, 1].mean() - table[:, 0].mean()
    half = stats.t(6).ppf(0.975) * error
    assert np.log([effect.ratio.value, effect.ratio.lower, effect.ratio.upper]) == pytest.approx(
        [log, log - half, log + half]
    )
