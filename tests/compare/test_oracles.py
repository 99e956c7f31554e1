"""What it takes to reach a target, on curves that a person can read off."""

import pytest

from llmeff.compare.verdict import judge

CURVES = {"base": (4.0, 3.0, 2.0, 1.0), "quick": (4.0, 2.0, 1.0, 0.5)}
"""Losses after 10, 20, 30 and 40 steps."""
STEPS_TO = {"base": 25.0, "quick": 17.5}
"""To a loss of 2.5: halfway from 3 at 20 to 2 at 30; three quarters of the way from 4 at 10 to 2 at 20."""


@pytest.fixture
def runs(entry):
    """A step of `quick` takes half as many FLOPs again; each is run on two ranks, on 64 items a step."""

    def make(arm, seed, flops):
        return entry(
            arm, seed, steps=40, items=40 * 64, curve_steps=(10, 20, 30, 40), curve_losses=CURVES[arm],
            loss=CURVES[arm][-1], metrics={"loss": CURVES[arm][-1]}, train_loss=0.8,
            measured={"executed_flops": flops}, energy_j=80.0,
            config={"name": arm, "seed": seed, "train": {"steps": 40}, "parallel": {"ranks": 2}},
        )  # fmt: skip

    return [make(arm, seed, flops) for seed in range(3) for arm, flops in (("base", 2e6), ("quick", 3e6))]


@pytest.fixture
def table(runs):
    (group,) = judge(runs, target=2.5, step_times={"base": [0.5, 0.7], "quick": [0.8, 0.8]}).groups
    return {key: {arm: set(cell.values.values()) for arm, cell in row.items()} for key, row in group.table.items()}


@pytest.mark.parametrize(
    ("quantity", "base", "quick"),
    [
        ("steps_to_target", 1, 1),
        ("items_to_target", 64, 64),
        ("flops_to_target", 2 * 2e6, 2 * 3e6),
        ("seconds_to_target", 0.6, 0.8),
        ("joules_to_target", 2, 2),
    ],
)
def test_what_a_target_takes_is_its_steps_times_what_each_takes(table, quantity, base, quick):
    (found,), (other,) = table[quantity]["base"], table[quantity]["quick"]
    assert found == pytest.approx(25.0 * base)
    assert other == pytest.approx(17.5 * quick)


def test_losses_at_equal_flops_are_those_after_as_many_steps_as_fit(table):
    """All of `base` comes to 40 x 4e6, which is 26 2/3 steps of `quick`: two thirds of the way from 2 to 1."""
    assert table["loss_at_flops"]["base"] == {1.0}
    (found,) = table["loss_at_flops"]["quick"]
    assert found == pytest.approx(2.0 - 2 / 3)


def test_losses_at_equal_time_are_those_after_as_many_steps_as_fit(table):
    """All of `base` takes 24 s, which is 30 steps of `quick`."""
    assert table["loss_at_seconds"] == {"base": {1.0}, "quick": {1.0}}


def test_what_else_is_read_off_a_run(table):
    assert table["step_s"] == {"base": {0.6}, "quick": {0.8}}
    assert table["gap"] == {"base": {1.0 / 0.8}, "quick": {0.5 / 0.8}}
    assert table["loss"] == {"base": {1.0}, "quick": {0.5}}
