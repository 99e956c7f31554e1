import itertools
import math
from dataclasses import replace

import pytest

from llmeff.compare.ledger import label_arms
from llmeff.compare.verdict import judge
from llmeff.core.config import ConfigError


def test_an_arm_that_is_faster_and_one_that_is_the_same(study):
    (group,) = judge(study).groups
    steps = group.table["steps_to_target"]
    assert steps["fast"].call == "better"
    assert steps["fast"].difference.ratio.value == pytest.approx(0.5, abs=0.02)
    assert len(steps["base"].values) == 3  # the target is one that every run of the baseline reaches
    assert group.table["loss"]["same"].call == "not told apart"
    assert group.table["loss"]["base"].difference is None
    assert group.table["peak_bytes"]["same"].call == "equal"
    assert group.table["loss"]["same"].difference.smallest_visible > 1


def test_the_baseline_may_be_another(study):
    (group,) = judge(study, baseline="fast").groups
    assert next(iter(group.arms)) == "fast"
    assert group.table["steps_to_target"]["base"].values == {}  # it never reaches so low a loss
    assert group.table["loss"]["base"].call == "worse"
    with pytest.raises(ConfigError, match=r"--baseline 'fats'.*Did you mean 'fast'"):
        judge(study, baseline="fats")


def test_a_run_that_misses_the_target_is_not_dropped(study):
    late = [replace(entry, curve_losses=tuple(loss + 1 for loss in entry.curve_losses)) if entry.name == "same/seed-1"
            else entry for entry in study]  # fmt: skip
    comparison = judge(late)
    cell = comparison.groups[0].table["steps_to_target"]["same"]
    assert 1 not in cell.values
    assert (cell.num_seeds, cell.mean, cell.difference, cell.call) == (3, None, None, "")
    said = f"in {len(cell.values)} of 3 runs"
    assert any("same reached the loss" in note and said in note for note in comparison.notes)


def test_a_run_that_diverged_is_a_result(study):
    broken = [replace(entry, status="diverged", loss=None, diagnosis="step 7: loss nan\nmore") if entry.arm == "fast"
              and entry.seed == 2 else entry for entry in study]  # fmt: skip
    comparison = judge(broken)
    cell = comparison.groups[0].table["loss"]["fast"]
    assert (len(cell.values), cell.num_seeds, cell.mean) == (2, 3, None)
    assert "fast: 1 of 3 runs diverged: step 7: loss nan" in comparison.notes


def test_a_missing_seed_is_said_and_the_others_are_compared(study):
    comparison = judge([entry for entry in study if entry.name != "fast/seed-2"])
    assert any("fast was run with the seeds [0, 1]" in note for note in comparison.notes)
    assert comparison.groups[0].table["loss"]["fast"].difference.ratio.n == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_sha256": "b" * 64}, "read other data"),
        ({"split": "test"}, "evaluated on other splits"),
        ({"item": "pixel"}, "count other items"),
        ({"config": {"train": {"steps": 50}}}, "other numbers of items"),
    ],
)
def test_runs_of_another_kind_are_not_compared_silently(study, change, words):
    mixed = [replace(entry, **change) if entry.arm == "fast" else entry for entry in study]
    with pytest.raises(ConfigError, match=words):
        judge(mixed)
    assert any(words in note for note in judge(mixed, mixed=True).notes)


def test_arms_are_compared_within_a_cell(study):
    both = [replace(entry, cell={"train.batch": batch}) for batch in (8, 32) for entry in study]
    comparison = judge(both)
    assert [group.cell for group in comparison.groups] == [{"train.batch": 8}, {"train.batch": 32}]


def test_times_are_compared_by_the_lane_alone(study):
    comparison = judge(study)
    assert "step_s" not in comparison.groups[0].table
    assert any("no timing lane" in note for note in comparison.notes)
    lane = {"base": [1.0, 1.01, 0.99], "fast": [1.5, 1.52, 1.49], "same": [1.0, 1.0, 1.0]}
    (group,) = judge(study, step_times=lane).groups
    assert group.table["step_s"]["fast"].difference.ratio.value == pytest.approx(1.5, rel=0.01)
    steps, seconds = (group.table[key]["fast"].difference.ratio for key in ("steps_to_target", "seconds_to_target"))
    assert seconds.value == pytest.approx(steps.value * 1.5, rel=0.01)
    assert seconds.upper / seconds.lower > steps.upper / steps.lower
    # half the steps at one and a half times the time each is three quarters: at equal time it is ahead
    assert group.table["loss_at_seconds"]["fast"].call == "better"


def test_one_seed_has_no_interval_and_says_so(study):
    (group,) = judge([entry for entry in study if entry.seed == 0]).groups
    cell = group.table["loss"]["fast"]
    assert cell.call == "one pair"
    assert math.isnan(cell.difference.ratio.lower)


def tuning(entry, arm, rates, losses):
    return [
        entry(arm, 1000, phase="tuning", trial={"optim.lr": rate}, name=f"{arm}/trial-{n}", loss=loss,
              status="finished" if loss is not None else "diverged")
        for n, (rate, loss) in enumerate(zip(rates, losses, strict=True))
    ]  # fmt: skip


def test_tuning_says_what_was_chosen_and_how_sure_that_is(study, entry):
    rates = [1e-3, 3e-3, 1e-2]
    trials = tuning(entry, "base", rates, [1.7, 1.5, 1.51]) + tuning(entry, "fast", rates, [1.9, 1.8, None])
    comparison = judge(study + trials)
    tunings = comparison.groups[0].tuning
    assert tunings["base"].best == {"optim.lr": 3e-3}
    assert tunings["base"].at_edge == []
    assert tunings["base"].near_factor == {"optim.lr": pytest.approx(1e-2 / 3e-3)}
    assert tunings["base"].expected_best == pytest.approx([(1.7 + 1.5 + 1.51) / 3, (1.5 + 1.5 + 1.51) / 3, 1.5])
    assert tunings["fast"].expected_best[0] == math.inf
    assert any("same 0" in note and "other numbers of trials" in note for note in comparison.notes)


def test_a_best_at_the_edge_is_said(study, entry):
    comparison = judge(study + tuning(entry, "base", [1e-3, 3e-3], [1.4, 1.5]))
    assert any("base: the best optim.lr of 2 trials lies at the edge" in note for note in comparison.notes)


def test_predictions_are_set_beside_measurements_over_all_runs(study):
    study[4] = replace(study[4], predicted={"peak_bytes": 2.0**19})
    found = judge(study).calibration["peak_bytes"]
    assert (found.n, found.worst_run) == (9, study[4].name)
    assert found.median == pytest.approx(1 - 1 / 1.02)
    assert found.worst == pytest.approx(0.5 / 1.02 - 1)


def plain(entry, name, seed, optim, arm=None):
    config = {"name": name, "seed": seed, "optim": {"name": optim, "lr": 1e-3}, "train": {"steps": 100}}
    return entry(arm or name, seed, factors={}, config=config)


def test_plain_runs_are_of_one_arm_where_their_configs_differ_by_seed_alone(entry):
    runs = [plain(entry, f"mine-s{seed}" if optim == "adamw" else f"other-s{seed}", seed, optim)
            for optim in ("adamw", "muon") for seed in (0, 1)]  # fmt: skip
    assert [run.arm for run in label_arms(runs)] == ["mine", "mine", "other", "other"]


def test_plain_runs_of_one_name_are_told_apart_by_their_configs(entry):
    runs = [plain(entry, "run", seed, optim) for optim in ("adamw", "muon") for seed in (0, 1)]
    assert [run.arm for run in label_arms(runs)] == ["optim.name=adamw"] * 2 + ["optim.name=muon"] * 2


def test_one_arm_is_nothing_to_compare(study):
    with pytest.raises(ConfigError, match=r"one arm \(base\)"):
        judge([entry for entry in study if entry.arm == "base"])


def test_what_only_some_levels_have_has_no_effects_and_breaks_nothing(entry):
    runs = []
    for optimizer, ranks in itertools.product(("sgd", "adamw"), ("1 rank", "2 ranks")):
        for seed in range(2):
            sent = {"wire_bytes": 100.0} if ranks == "2 ranks" else {}
            factors = {"optimizer": optimizer, "ranks": ranks}
            runs.append(entry(f"{optimizer}, {ranks}", seed, factors=factors, measured=sent, factor=1 + 0.01 * seed))
    (group,) = judge(runs).groups
    assert "wire_bytes" in group.table
    assert "wire_bytes" not in group.effects
    assert [effect.factors for effect in group.effects["loss"].effects] == [
        ("optimizer",), ("ranks",), ("optimizer", "ranks"),
    ]  # fmt: skip


def test_an_arm_of_which_no_trial_finished_is_still_there(study, entry):
    lost = [entry(arm="lost", seed=1000, phase="tuning", trial={"optim.lr": rate}, status="diverged", loss=None)
            for rate in (0.1, 1.0)]  # fmt: skip
    comparison = judge([*lost, *study])
    assert list(comparison.groups[0].arms) == ["base", "fast", "same", "lost"]
    assert comparison.groups[0].table["loss"]["lost"].num_seeds == 0
    assert any(note.startswith("lost: none of 2 trials finished") for note in comparison.notes)
    (group,) = judge([*lost, *study], baseline="lost").groups
    assert all(cell.difference is None for cell in group.table["loss"].values())


def test_a_quantity_that_is_nothing_has_no_ratio(study):
    nothing = [replace(run, measured={"optimizer_bytes": 0 if run.arm == "fast" else 8}) for run in study]
    (group,) = judge(nothing).groups
    assert group.table["optimizer_bytes"]["fast"].difference is None
    assert group.table["optimizer_bytes"]["fast"].mean.value == 0
    assert group.table["optimizer_bytes"]["same"].call == "equal"


def test_a_run_that_diverged_at_once_is_of_the_same_kind(study):
    broken = [replace(run, status="diverged", loss=None, steps=0, items=0, curve_steps=(), curve_losses=())
              if run.name == "fast/seed-1" else run for run in study]  # fmt: skip
    assert judge(broken).groups[0].table["loss"]["fast"].num_seeds == 3


def test_a_seed_that_is_there_twice_is_refused(study):
    with pytest.raises(ConfigError, match="fast has the seed 1 twice: fast/seed-1, fast/seed-1"):
        judge([*study, next(run for run in study if run.name == "fast/seed-1")])


def test_a_target_must_be_a_loss(study):
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="must be a positive number"):
            judge(study, target=target)


def test_arms_that_are_tuned_as_another_had_its_trials(study, entry):
    shared = [replace(run, tuned_as="base") if run.arm != "base" else run for run in study]
    comparison = judge([*tuning(entry, "base", [0.1, 0.2, 0.3], [2.0, 1.9, 2.1]), *shared])
    assert not any("other numbers of trials" in note for note in comparison.notes)


def test_what_was_foreseen_of_nothing_is_infinitely_wrong(study):
    wrong = [replace(run, predicted={"wire_bytes": 3.0}, measured={"wire_bytes": 0.0}) for run in study]
    assert judge(wrong).calibration["wire_bytes"].worst == math.inf


def test_flops_are_those_of_all_ranks(study):
    shared = [
        replace(run, config=run.config | {"parallel": {"ranks": 2}}) if run.arm == "same" else run for run in study
    ]
    flops = judge(shared, target=2.5).groups[0].table["flops_to_target"]
    alone = judge(study, target=2.5).groups[0].table["flops_to_target"]
    assert flops["same"].mean.value == pytest.approx(2 * alone["same"].mean.value)
    assert flops["base"].mean.value == alone["base"].mean.value


def test_an_arm_that_differs_by_rounding_reaches_the_baselines_target(study):
    twins = [replace(run, arm="twin", curve_losses=tuple(loss * (1 + 1e-9) for loss in run.curve_losses))
             for run in study if run.arm == "base"]  # fmt: skip
    (group,) = judge([*study, *twins]).groups
    assert len(group.table["steps_to_target"]["twin"].values) == 3
    worst = max(min(run.curve_losses) for run in study if run.arm == "base")
    assert worst <= group.target <= worst * 1.0001
