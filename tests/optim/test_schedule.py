"""Schedules: warm-up ends at the peak, the run at its last value, and nothing in between leaves the two."""

import math

import pytest

from llmeff.optim import WSD, Constant, Cosine, Linear, ScheduleConfig

every_schedule = pytest.mark.parametrize("name", ScheduleConfig.registry.names())
some_runs = pytest.mark.parametrize(("warmup_steps", "steps"), [(0, 1), (0, 7), (1, 2), (3, 10), (9, 10), (10, 10)])


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (Constant(warmup_steps=4), 6, [0.25, 0.5, 0.75, 1, 1, 1]),
        (Linear(warmup_steps=2, final=0.2), 6, [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        (
            Cosine(warmup_steps=1, final=0.5),
            5,
            [1, 0.75 + 0.125 * math.sqrt(2), 0.75, 0.75 - 0.125 * math.sqrt(2), 0.5],
        ),
        (WSD(warmup_steps=2, decay=0.5, final=0.1), 10, [0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1]),
        (WSD(decay=0.0, final=0.0), 4, [1, 1, 1, 1]),
        (WSD(decay=1.0), 4, [0.75, 0.5, 0.25, 0]),
    ],
)
def test_values_by_hand(schedule, steps, expected):
    assert [schedule.factor(step, steps) for step in range(steps)] == pytest.approx(expected, abs=1e-15)


@every_schedule
@some_runs
def test_warmup_rises_to_the_peak_which_its_last_step_has(name, warmup_steps, steps):
    schedule = ScheduleConfig.registry[name](warmup_steps=warmup_steps)
    factors = [schedule.factor(step, steps) for step in range(warmup_steps)]
    assert factors == [step / warmup_steps for step in range(1, warmup_steps + 1)]


@every_schedule
@some_runs
def test_the_rate_stays_between_0_and_the_peak_and_only_falls_after_warmup(name, warmup_steps, steps):
    schedule = ScheduleConfig.registry[name](warmup_steps=warmup_steps)
    factors = [schedule.factor(step, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)


@pytest.mark.parametrize("kind", [Cosine, Linear, WSD])
@pytest.mark.parametrize("final", [0.0, 0.01, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 10, 997])
def test_the_last_step_has_exactly_what_is_left(kind, final, steps):
    assert kind(final=final).factor(steps - 1, steps) == final


def test_the_plateau_is_the_peak_until_decay_begins():
    schedule = WSD(warmup_steps=10, decay=0.25)
    assert {schedule.factor(step, 50) for step in range(9, 40)} == {1.0}
    assert schedule.factor(40, 50) == pytest.approx(0.9)


def test_a_name_that_is_none_is_answered_with_the_nearest():
    known = "Known: constant, cosine, linear, wsd."
    assert ScheduleConfig.registry.unknown("cosin") == f"unknown schedule 'cosin'. Did you mean 'cosine'? {known}"
