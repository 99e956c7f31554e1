"""The statistics keep their promises on studies whose truth is known, as `analysis/coverage.py` draws them."""

import json

import numpy as np
import pytest
from scipy import stats

from llmeff.compare.intervals import many_to_one
from tests.scripts import ROOT, load_script

ANALYSIS = ROOT / "analysis"
coverage = load_script("analysis/coverage.py")


def is_likely(share, count, rate):
    """Whether so many of a count may well be by a rate: of a thousand honest ones one is not."""
    return stats.binomtest(round(share * count), count, rate).pvalue > 1e-3


def test_intervals_of_effects_cover_the_truth_whether_factors_are_noisy_or_neutral():
    for name, share in coverage.effect_coverage(60, num_seeds=4).items():
        assert is_likely(share, 60 * (10 if name == "pairs" else 1), 0.95), (name, share)


@pytest.mark.parametrize("spreads", [[1] * 6, [3, *[1] * 5]])
def test_few_studies_of_equal_arms_call_any_different(spreads):
    wrong, pooled = coverage.family_error(120, spreads, 8, 16, seed=1)
    assert wrong <= stats.binom(120, 0.05).ppf(0.999) / 120
    assert (pooled > 0.9) == (spreads[0] == 1)


def test_an_arm_that_is_better_is_seen_and_the_baseline_itself_is_not():
    assert coverage.power(30, 13, 5, 15, coverage.BETTER, seed=2) == pytest.approx(0.8, abs=0.1)
    assert is_likely(coverage.aa_error(100, 2, 5, 10, seed=3), 100, 0.05)


def test_a_whole_comparison_calls_what_its_procedure_does():
    generator, called = np.random.default_rng(4), 0
    for _ in range(15):
        logs = coverage.drawn(generator, [1, 1, 3, 1], 5, 9, ratio=0.985)
        found = coverage.calls(coverage.study(logs))
        expected = [own.p_family < 0.05 for own in many_to_one(logs[0], logs[1:])]
        assert [found[f"arm {place}"] for place in range(4)] == expected
        called += sum(expected)
    assert 0 < called < 60


def promised(found):
    """What holds of what was measured."""
    for own in found["intervals of effects that hold the truth, 1000 factorials"].values():
        assert all(0.93 <= share <= 0.97 for share in own.values()), own
    for own in found["equal arms, 13 arms x 5, baseline 15"].values():
        assert own["family_error"] <= 0.055
    assert found["power, 13 arms x 5, baseline 15, 40000 studies"]["ratio 0.985"] >= 0.8
    assert all(0.03 <= share <= 0.07 for share in found["A/A called different, 4 arms x 8, baseline 16"].values())


def test_what_was_committed_holds_what_is_promised():
    promised(json.loads((ANALYSIS / "results" / "coverage.json").read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_what_was_committed_comes_out_again():
    found = coverage.measured()
    promised(found)
    committed = json.loads((ANALYSIS / "results" / "coverage.json").read_text(encoding="utf-8"))
    for what, those in found.items():
        for name, own in those.items():
            assert own == pytest.approx(committed[what][name], abs=2e-3)  # a call may turn by rounding
