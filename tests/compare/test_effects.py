import itertools
import math

import numpy as np
import pytest

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
    found = by_name(effects(study, lambda run: peak[run.factors["b"]], lambda run: 1.02 * peak[run.factors["b"]]))
    assert found["b"].ratio.value == found["b"].ratio.lower == found["b"].ratio.upper == pytest.approx(0.6)
    assert (found["b"].p_adjusted, found["a"].p_adjusted) == (0.0, 1.0)
    assert found["b"].predicted == pytest.approx(0.6)


def test_one_seed_of_a_full_fit_leaves_nothing_to_judge_by(entry):
    design = [levels for levels in itertools.product(("low", "high"), repeat=3) if levels.count("high") % 2]
    found = effects(runs(entry, np.random.default_rng(4), seeds=1, design=design), lambda run: run.loss)
    assert all(math.isnan(effect.p_adjusted) for effect in found.effects)


@pytest.mark.parametrize(("factors", "words"), [({}, "no factorial study"), ({"a": "only"}, "two levels: a")])
def test_runs_without_two_levels_are_refused(entry, factors, words):
    with pytest.raises(ConfigError, match=words):
        effects([entry("x", seed, factors=factors) for seed in range(2)], lambda run: run.loss)
