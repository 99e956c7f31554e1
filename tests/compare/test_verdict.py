import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from llmeff.compare.alike import differences
from llmeff.compare.ledger import label_arms, read_ledger, write_ledger
from llmeff.compare.plots import arm_curves
from llmeff.compare.timing import timing_name
from llmeff.compare.verdict import judge
from llmeff.compare.verdict_table import render_comparison
from llmeff.core.config import ConfigError


def test_an_arm_that_is_faster_and_one_that_is_the_same(study):
    (group,) = judge(study).groups
    steps = group.table["steps_to_target"]
    assert steps["fast"].call == "better"
    assert steps["fast"].difference.ratio.value == pytest.approx(0.5, abs=0.02)
    assert len(steps["base"].values) == 3  # the target is one that every run of the baseline reaches
    assert group.table["loss"]["same"].call == "no detectable difference"
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
    kin = [replace(entry, tuned_as="base") if entry.arm == "fast" else entry for entry in study]
    comparison = judge([entry for entry in kin if entry.name != "fast/seed-2"])
    assert any("fast was not run with the baseline's seeds [2]" in note for note in comparison.notes)
    found = comparison.groups[0].table["loss"]["fast"].difference
    assert (found.ratio.n, found.method) == (2, "paired t")
    apart = judge([entry for entry in study if entry.name != "fast/seed-2"])
    assert not any("seeds" in note for note in apart.notes)
    assert apart.groups[0].table["loss"]["fast"].difference.method != "paired t"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_sha256": "b" * 64}, "read different data"),
        ({"split": "test"}, "evaluated on different splits"),
        ({"item": "pixel"}, "count different items"),
        ({"config": {"train": {"steps": 50}}}, "have different budgets, in items"),
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


def test_the_order_of_axes_makes_no_other_cell(study):
    """A config may name them in any order."""
    first, second = {"train.batch": 8, "data.seed": 1}, {"data.seed": 1, "train.batch": 8}
    runs = [replace(entry, cell=second if entry.arm == "fast" else first) for entry in study]
    (group,) = judge(runs).groups
    assert set(group.arms) == {entry.arm for entry in study}


def test_times_are_compared_by_the_lane_alone(study):
    comparison = judge(study)
    assert "step_s" not in comparison.groups[0].table
    assert any("no timing run" in note for note in comparison.notes)
    lane = {"base": [1.0, 1.01, 0.99], "fast": [1.5, 1.52, 1.49], "same": [1.0, 1.0, 1.0]}
    (group,) = judge(study, step_times=lane).groups
    assert group.table["step_s"]["fast"].difference.ratio.value == pytest.approx(1.5, rel=0.01)
    steps, seconds = (group.table[key]["fast"].difference for key in ("steps_to_target", "seconds_to_target"))
    assert seconds.ratio.value == pytest.approx(steps.ratio.value * 1.5, rel=0.01)
    assert (group.table["step_s"]["fast"].difference.method, seconds.method) == ("paired t", "Welch")
    logs = [np.log([*group.table["steps_to_target"][arm].values.values()]) for arm in ("fast", "base")]
    logs.append(np.log(np.divide(lane["fast"], lane["base"])))
    squares = [own.var(ddof=1) / 3 for own in logs]
    error, freedom = math.sqrt(sum(squares)), 2 * sum(squares) ** 2 / sum(own**2 for own in squares)
    half = math.log(seconds.ratio.upper / seconds.ratio.value)
    assert half == pytest.approx(stats.t(freedom).ppf(0.975) * error)
    # half the steps at one and a half times the time each is three quarters: at equal time it is ahead
    assert group.table["loss_at_seconds"]["fast"].call == "better"


def test_one_seed_has_no_interval_and_says_so(study):
    (group,) = judge([entry for entry in study if entry.seed == 0]).groups
    cell = group.table["loss"]["fast"]
    assert cell.call == "one run"
    assert math.isnan(cell.difference.ratio.lower)


def test_two_seeds_are_shown_one_by_one_and_have_no_interval(entry):
    pair = settled(entry, "twin", [1.98, 2.12], tuned_as="base", peak_bytes=90)
    both = settled(entry, "base", [2.0, 2.1], peak_bytes=100) + pair
    comparison = judge(both, baseline="base")
    table = comparison.groups[0].table
    loss, memory = table["loss"]["twin"], table["peak_bytes"]["twin"]
    assert loss.call == "two seeds"
    assert loss.difference.ratio.value == pytest.approx(math.sqrt(1.98 * 2.12 / (2.0 * 2.1)))
    assert math.isnan(loss.difference.ratio.lower)
    assert math.isnan(loss.mean.lower)
    assert "1.9800, 2.1200 (by seed)" in render_comparison(comparison, "markdown")
    # memory does not depend on the seed: every run is a replicate
    assert (memory.call, memory.mean.lower) == ("better", 90)
    (same,) = judge(settled(entry, "base", [2.0, 2.1]) + settled(entry, "twin", [2.0, 2.1], tuned_as="base")).groups
    assert same.table["loss"]["twin"].call == "equal"


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
    assert any("same 0" in note and "different numbers of trials" in note for note in comparison.notes)


# -- by other metrics


def random_study(entry, seed, num_seeds):
    """Arms that are better, worse or hardly other than the first, evaluated so often that lines between are exact."""
    noise, found = np.random.default_rng(seed), []
    for number in range(num_seeds):
        shared = noise.normal(0, 0.02)
        for arm, effect in (("base", 0.0), ("good", -0.04), ("bad", 0.05), ("near", 0.002)):
            factor = float(np.exp(shared + effect + noise.normal(0, 0.005)))
            steps = range(1, 401)
            losses = tuple(factor * (1.5 + 3 * math.exp(-step / 100)) for step in steps)
            found.append(
                entry(arm, number, steps=400, loss=losses[-1], curve_steps=tuple(steps), curve_losses=losses,
                      metrics={"loss": losses[-1]})
            )  # fmt: skip
    return found


@pytest.mark.parametrize(("seed", "num_seeds"), [(0, 3), (1, 3), (2, 2), (3, 5), (4, 1), (5, 8)])
def test_by_the_inverse_of_the_loss_of_which_more_is_better_all_is_mirrored(entry, with_gain, seed, num_seeds):
    runs = [with_gain(run) for run in random_study(entry, seed, num_seeds)]
    lane = {"base": [1.0, 1.01, 0.99], "good": [1.1, 1.12, 1.09], "bad": [0.9, 0.91, 0.9], "near": [1.0, 1.0, 1.0]}
    by_loss, by_gain = (judge(runs, metric=name, step_times=lane).groups[0] for name in ("loss", "gain"))
    mirrored = {"loss": "gain", "loss_at_flops": "gain_at_flops", "loss_at_seconds": "gain_at_seconds"}
    for (one, other), arm in itertools.product(mirrored.items(), ("good", "bad", "near")):
        loss, gain = by_loss.table[one][arm], by_gain.table[other][arm]
        assert gain.call == loss.call, (one, arm)
        assert gain.p_adjusted == pytest.approx(loss.p_adjusted, rel=1e-3, nan_ok=True)
        ours, theirs = gain.difference.ratio, loss.difference.ratio
        inverse = (1 / theirs.value, 1 / theirs.upper, 1 / theirs.lower)
        assert (ours.value, ours.lower, ours.upper) == pytest.approx(inverse, rel=1e-4, nan_ok=True)
        assert gain.difference.smallest_visible == pytest.approx(
            loss.difference.smallest_visible, rel=1e-3, nan_ok=True
        )
    assert by_gain.target == pytest.approx(1 / by_loss.target, rel=2e-4)
    for key in ("steps_to_target", "items_to_target", "flops_to_target", "seconds_to_target"):
        for arm in by_loss.arms:
            loss, gain = by_loss.table[key][arm], by_gain.table[key][arm]
            assert (gain.values.keys(), gain.call) == (loss.values.keys(), loss.call), (key, arm)
            assert [*gain.values.values()] == pytest.approx([*loss.values.values()], rel=0.05)
    assert set(by_gain.table) == {mirrored.get(key, key) for key in by_loss.table} - {"gap"} | {"loss"}
    assert by_gain.table["peak_bytes"] == by_loss.table["peak_bytes"]
    assert by_gain.table["loss"] == by_loss.table["loss"]


def test_tuning_by_the_inverse_of_the_loss_chooses_the_same(study, entry, with_gain):
    rates = [1e-4, 1e-3, 3e-3, 1e-2]
    trials = tuning(entry, "base", rates, [None, 1.7, 1.5, 1.514]) + tuning(
        entry, "fast", rates, [1.9, 1.8, None, None]
    )
    trials += tuning(entry, "same", rates, [None] * 4)
    runs = [with_gain(run) for run in [*study, *trials]]
    by_loss, by_gain = (judge(runs, metric=name).groups[0].tuning for name in ("loss", "gain"))
    for arm, loss in by_loss.items():
        gain = by_gain[arm]
        assert (gain.best, gain.at_edge, gain.near_factor) == (loss.best, loss.at_edge, loss.near_factor)
        assert [value for _, value in gain.trials] == [
            -math.inf if math.isinf(value) else pytest.approx(1 / value) for _, value in loss.trials
        ]
        values = [value for _, value in gain.trials]
        for spent, expected in enumerate(gain.expected_best, start=1):
            assert expected == pytest.approx(np.mean([max(some) for some in itertools.combinations(values, spent)]))
    assert by_gain["base"].near_factor == {"optim.lr": pytest.approx(1e-2 / 3e-3)}


def scored(run, **finals):
    """The run, with metrics that rise in a straight line to these."""
    curves = {name: tuple(value * (n + 1) / len(run.curve_steps) for n in range(len(run.curve_steps)))
              for name, value in finals.items()}  # fmt: skip
    metric_directions = {"loss": "lower"} | dict.fromkeys(finals, "higher")
    return replace(run, metrics=run.metrics | finals, curves=curves, metric_directions=metric_directions)


IOU = {"base": 0.50, "fast": 0.55, "same": 0.50}


@pytest.fixture
def segmented(study):
    """The study, as if it were of images: `fast` is a tenth better by its mean IoU, and reaches any sooner."""
    return [scored(run, mean_iou=IOU[run.arm] * (1 + 0.001 * (3 * n % 7)), boundary_f1=0.3, class_accuracy=0.7)
            for n, run in enumerate(study)]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "better", "label", "call"),
    [
        ("loss", "lower", "loss", "better"),
        ("mean_iou", "higher", "mean IoU", "better"),
        ("boundary_f1", "higher", "boundary F1", "equal"),
        ("class_accuracy", "higher", "class accuracy", "equal"),
    ],
)
def test_every_goal_can_decide_and_all_are_shown(segmented, metric, better, label, call):
    comparison = judge(segmented, metric=metric)
    (group,) = comparison.groups
    assert (group.metric.name, group.metric.better) == (metric, better)
    assert comparison.metrics[0] == group.metric
    shown = {quantity.key: quantity.label for quantity in group.quantities}
    finals = {"loss": "final loss", "mean_iou": "final mean IoU", "boundary_f1": "final boundary F1",
              "class_accuracy": "final class accuracy"}  # fmt: skip
    assert list(shown)[:4] == [metric, *(name for name in finals if name != metric)]
    assert finals.items() <= shown.items()
    assert shown[f"{metric}_at_flops"] == f"{label} at equal FLOPs"
    assert shown["steps_to_target"] == f"steps to {label} {group.target:.4f}"
    assert group.table[metric]["fast"].call == call
    assert group.table["mean_iou"]["fast"].difference.ratio.value == pytest.approx(1.1, rel=0.01)
    (note,) = [note for note in comparison.notes if note.startswith("higher is better for ")]
    assert set(note.removeprefix("higher is better for ").removesuffix(", lower for everything else").split(", ")) == {
        "mean IoU",
        "boundary F1",
        "class accuracy",
    }


def test_the_target_of_a_metric_of_which_more_is_better_is_reached_by_every_run_of_the_baseline(segmented):
    (group,) = judge(segmented, metric="mean_iou").groups
    least = min(run.metrics["mean_iou"] for run in segmented if run.arm == "base")
    assert least * 0.9999 <= group.target <= least
    steps = group.table["steps_to_target"]
    assert [len(steps[arm].values) for arm in ("base", "fast", "same")] == [3, 3, 3]
    assert steps["fast"].call == "better"
    (group,) = judge(segmented, metric="mean_iou", target=0.53).groups
    assert [len(group.table["steps_to_target"][arm].values) for arm in ("base", "fast", "same")] == [0, 3, 0]


def test_a_metric_that_is_unknown_is_one_error_with_those_that_are_there(segmented):
    with pytest.raises(
        ConfigError, match=r"'mean_iuo'.*Did you mean 'mean_iou'\? Known: .*class_accuracy.*loss"
    ) as raised:
        judge(segmented, metric="mean_iuo")
    assert len(raised.value.problems) == 1
    with pytest.raises(ConfigError, match="the target mean IoU is 0"):
        judge(segmented, metric="mean_iou", target=0.0)


def test_a_metric_that_is_nothing_or_absent_has_no_ratio(segmented):
    runs = [scored(run, mean_iou=0.0) if run.arm == "fast" else run for run in segmented]
    runs = [replace(run, metrics={}) if run.name == "same/seed-1" else run for run in runs]
    (group,) = judge(runs, metric="mean_iou").groups
    assert group.table["mean_iou"]["fast"].mean.value == 0
    assert (group.table["mean_iou"]["fast"].difference, group.table["mean_iou"]["fast"].call) == (None, "")
    assert group.table["steps_to_target"]["fast"].values == {}
    assert (group.table["mean_iou"]["same"].mean, len(group.table["mean_iou"]["same"].values)) == (None, 2)


def test_a_metric_that_is_no_number_decides_nothing_and_breaks_nothing(segmented):
    nothing = tuple([math.nan] * len(segmented[0].curve_steps))
    runs = [replace(run, metrics=run.metrics | {"recall": math.nan}, curves={"recall": nothing},
                    metric_directions={"loss": "lower", "recall": "higher"}) for run in segmented]  # fmt: skip
    (group,) = judge(runs, metric="recall").groups
    assert (group.target, "recall" in group.table, group.table["loss"]["fast"].call) == (None, False, "better")
    assert arm_curves(group) is None


def test_a_metric_without_a_curve_is_compared_at_the_end_alone(segmented):
    (group,) = judge([replace(run, curves={}) for run in segmented], metric="mean_iou").groups
    assert group.target is None
    assert group.table["mean_iou"]["fast"].call == "better"
    assert not {"mean_iou_at_flops", "steps_to_target"} & set(group.table)


def test_every_goal_has_effects(entry):
    runs = []
    for (optimizer, more), (ranks, _) in itertools.product((("sgd", 1.0), ("adamw", 1.2)), (("1", 1), ("2", 2))):
        for seed in range(2):
            run = entry(f"{optimizer}, {ranks}", seed, factors={"optimizer": optimizer, "ranks": ranks})
            nothing = 0.0 if optimizer == "sgd" else 0.5  # of which there is no ratio
            runs.append(scored(run, mean_iou=0.4 * more * (1 + 0.01 * seed), boundary_f1=nothing))
    (group,) = judge(runs).groups
    assert {"loss", "mean_iou", "loss_at_flops"} <= set(group.effects)
    assert "boundary_f1" not in group.effects
    assert group.effects["mean_iou"].effects[0].ratio.value == pytest.approx(1.2)
    assert "mean_iou_at_flops" in judge(runs, metric="mean_iou").groups[0].effects


def test_bits_per_byte_have_effects_where_they_decide(entry):
    runs = [entry(f"{one}{other}", seed, factors={"one": one, "other": other}, metrics={"bits_per_byte": 1.5 + seed})
            for one in "ab" for other in "cd" for seed in range(2)]  # fmt: skip
    assert "bits_per_byte" not in judge(runs).groups[0].effects  # which would be those of the loss once more
    assert "bits_per_byte" in judge(runs, metric="bits_per_byte").groups[0].effects


def test_a_best_at_the_edge_is_said(study, entry):
    comparison = judge(study + tuning(entry, "base", [1e-3, 3e-3], [1.4, 1.5]))
    assert any("base: the best optim.lr of 2 trials is at the edge" in note for note in comparison.notes)


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
    with pytest.raises(ConfigError, match="fast has two runs with seed 1: fast/seed-1, fast/seed-1"):
        judge([*study, next(run for run in study if run.name == "fast/seed-1")])


def test_a_target_must_be_a_loss(study):
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="must be a positive number"):
            judge(study, target=target)


def test_arms_that_are_tuned_as_another_had_its_trials(study, entry):
    shared = [replace(run, tuned_as="base") if run.arm != "base" else run for run in study]
    comparison = judge([*tuning(entry, "base", [0.1, 0.2, 0.3], [2.0, 1.9, 2.1]), *shared])
    assert not any("different numbers of trials" in note for note in comparison.notes)


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


@pytest.mark.parametrize(
    ("item", "items", "is_one_budget"),
    [
        ("token", (6400, 6400), True),
        ("token", (6400, 6401), False),
        ("pixel", (122_128_702, 122_144_446), True),
        ("pixel", (122_128_702, 61_064_351), False),
    ],
)
def test_images_of_other_seeds_may_have_labels_for_other_numbers_of_pixels(entry, item, items, is_one_budget):
    runs = [entry(arm, seed, item=item, items=items[seed]) for arm in ("a", "b") for seed in (0, 1)]
    found = differences(runs)
    assert found == [] if is_one_budget else "have different budgets, in items" in found[0]


# -- which arms are pairs, which are independent, and which are the same


def settled(entry, arm, losses, *, first_seed=0, **changes):
    """Runs of an arm that ended at these losses, with flat curves."""
    return [
        entry(arm, first_seed + n, loss=loss, train_loss=loss, metrics={"loss": loss}, curve_losses=(2 * loss, loss),
              curve_steps=(0, 100), **changes)
        for n, loss in enumerate(losses)
    ]  # fmt: skip


BASE = [1.50, 1.53, 1.48, 1.51, 1.55, 1.47]
OTHER = [1.46, 1.50, 1.49, 1.45]


def test_an_arm_that_is_tuned_as_the_baseline_is_paired_and_others_are_independent(entry):
    kin = [loss * (1.001 + 1e-4 * n) for n, loss in enumerate(BASE[:4])]
    runs = [*settled(entry, "base", BASE), *settled(entry, "kin", kin, tuned_as="base"), *settled(entry, "other", OTHER),
            *settled(entry, "kin of other", [loss * 1.002 for loss in OTHER], tuned_as="other")]  # fmt: skip
    cells = judge(runs).groups[0].table["loss"]
    assert {name: cell.difference.method for name, cell in cells.items() if cell.difference} == {
        "kin": "paired t", "other": "Dunnett", "kin of other": "Dunnett",
    }  # fmt: skip
    paired = stats.ttest_1samp(np.log(np.divide(kin, BASE[:4])), 0.0)
    assert cells["kin"].difference.p == pytest.approx(paired.pvalue)
    assert cells["kin"].p_adjusted == pytest.approx(3 * paired.pvalue)  # one of three, whoever judges the others
    assert cells["kin"].call == "worse"
    logs = [np.log(own) for own in (BASE, OTHER)]
    pooled = stats.ttest_ind(logs[1], logs[0])  # the kin of `other` tell nothing more of the spread
    assert cells["other"].difference.p == pytest.approx(pooled.pvalue)
    assert cells["other"].difference.ratio.value == pytest.approx(stats.gmean(OTHER) / stats.gmean(BASE))
    (group,) = judge(runs, baseline="kin").groups
    assert group.table["loss"]["base"].difference.method == "paired t"
    (group,) = judge(runs, baseline="kin of other").groups
    assert [group.table["loss"][name].difference.method for name in ("other", "base", "kin")] == [
        "paired t", "Dunnett", "Dunnett",
    ]  # fmt: skip


def test_which_arms_are_akin_does_not_hang_on_their_order(entry):
    """`kin` is tuned as `twin`, which holds the baseline's runs: so it is paired with the baseline, wherever each stands."""
    arms = {
        "base": settled(entry, "base", BASE),
        "kin": settled(entry, "kin", [loss * (1.001 + 1e-4 * n) for n, loss in enumerate(BASE)], tuned_as="twin"),
        "twin": settled(entry, "twin", [loss * (1 + 1e-7) for loss in BASE]),
        "other": settled(entry, "other", OTHER),
        "kin of other": settled(entry, "kin of other", [loss * 1.002 for loss in OTHER], tuned_as="other"),
    }
    expected = {
        "base": None, "kin": "paired t", "twin": "paired t", "other": "Dunnett", "kin of other": "Dunnett",
    }  # fmt: skip
    pooled = stats.ttest_ind(np.log(OTHER), np.log(BASE))
    for order in itertools.permutations(set(arms) - {"base"}):  # which comes first in any case
        comparison = judge([run for name in ("base", *order) for run in arms[name]], baseline="base")
        cells = comparison.groups[0].table["loss"]
        assert {name: own.difference and own.difference.method for name, own in cells.items()} == expected
        assert cells["other"].difference.p == pytest.approx(pooled.pvalue)
        assert [note for note in comparison.notes if "are not independent" in note] == [
            "the runs of twin equal those of base up to rounding, so the two are not independent"
        ]


def test_the_same_runs_under_another_name_count_once(entry):
    again = [loss * (1 + 2e-7 * (-1) ** n) for n, loss in enumerate(OTHER)]
    once = [*settled(entry, "base", BASE), *settled(entry, "other", OTHER)]
    twice = [
        *once,
        *settled(entry, "ranks", again),
        *settled(entry, "base on ranks", [loss * (1 + 1e-7) for loss in BASE]),
    ]
    cells = judge(twice).groups[0].table["loss"]
    alone = judge(once).groups[0].table["loss"]["other"].difference
    pooled = stats.ttest_ind(np.log(OTHER), np.log(BASE))
    assert cells["other"].difference.p == pytest.approx(pooled.pvalue)
    assert cells["other"].difference.ratio.upper > alone.ratio.upper  # of three comparisons, not of one
    assert (cells["base on ranks"].call, cells["base on ranks"].difference.method) == ("equal", "paired t")
    assert [note for note in judge(twice).notes if "are not independent" in note] == [
        "the runs of ranks equal those of other up to rounding, so the two are not independent",
        "the runs of base on ranks equal those of base up to rounding, so the two are not independent",
    ]
    other_data = [replace(run, data_sha256="b" * 64) if run.arm == "base on ranks" else run for run in twice]
    found = judge(other_data, mixed=True).groups[0].table["loss"]["base on ranks"].difference
    assert found.method == "Dunnett"


def test_all_runs_of_a_baseline_with_more_seeds_are_used(entry):
    runs = [
        *settled(entry, "base", BASE),
        *settled(entry, "one", OTHER),
        *settled(entry, "two", OTHER[::-1], first_seed=50),
    ]
    comparison = judge(runs)
    cells = comparison.groups[0].table["loss"]
    assert cells["base"].mean.n == 6
    theirs = stats.dunnett(np.log(OTHER), np.log(OTHER[::-1]), control=np.log(BASE), rng=0)
    assert [cells[name].p_adjusted for name in ("one", "two")] == pytest.approx(theirs.pvalue, abs=2e-3)
    assert not any("seeds" in note for note in comparison.notes)


@pytest.mark.parametrize(("count", "is_said"), [(4, True), (6, False)])
def test_few_runs_are_said_to_tell_little_of_spreads(entry, count, is_said):
    runs = [
        *settled(entry, "base", BASE[:count]),
        *settled(entry, "one", BASE[1:count]),
        *settled(entry, "two", BASE[:count][::-1]),
    ]
    said = f"the spread of an arm with only {count - 1} runs is uncertain"
    assert any(note.startswith(said) for note in judge(runs).notes) == is_said
    kin = [replace(run, tuned_as="base") if run.arm != "base" else run for run in runs]
    assert not any("is uncertain" in note for note in judge(kin).notes)


def test_an_arm_that_repeats_the_baseline_is_judged_alone_and_shows_the_noise(entry, tmp_path):
    again = [1.49, 1.54, 1.50]
    alone = [*settled(entry, "base", BASE), *settled(entry, "one", OTHER), *settled(entry, "two", OTHER[::-1])]
    runs = [*alone, *settled(entry, "base (A/A)", again, first_seed=20_000, repeats="base", tuned_as="base")]
    lane = {name: [1.0, 1.1, 0.9] for name in ("base", "one", "two")}
    comparison = judge(runs, step_times=lane)
    group, without = comparison.groups[0], judge(alone, step_times=lane).groups[0]
    for key, row in without.table.items():
        assert {name: group.table[key][name] for name in row} == row, key
    cell = group.table["loss"]["base (A/A)"]
    expected = stats.ttest_ind(np.log(again), np.log(BASE))
    assert (cell.difference.method, cell.call) == ("A/A", "no detectable difference")
    assert cell.difference.p == cell.p_adjusted == pytest.approx(expected.pvalue)
    noise = group.noise["loss"]
    assert noise.ratio == cell.difference.ratio
    spread = math.sqrt((np.var(np.log(BASE)) * 6 + np.var(np.log(again)) * 3) / 7)
    assert (noise.sd, noise.num_runs) == (pytest.approx(math.sqrt(2) * spread), 9)
    assert (without.noise["loss"].ratio, without.noise["loss"].num_runs) == (None, 6)
    assert "peak_bytes" not in group.noise
    assert group.table["step_s"]["base (A/A)"].difference is None
    assert not any("timing run does not include" in note for note in comparison.notes)
    seconds = judge(runs, step_times=lane, baseline="one").groups[0].table["seconds_to_target"]
    assert len(seconds["base (A/A)"].values) > 0  # which takes as long a step as what it repeats
    different = settled(entry, "base (A/A)", [1.2, 1.21, 1.22], first_seed=20_000, repeats="base")
    assert judge([*alone, *different]).groups[0].table["loss"]["base (A/A)"].call == "better"
    write_ledger(tmp_path / "it.parquet", runs)
    assert judge(read_ledger(tmp_path / "it.parquet"), step_times=lane) == comparison


def test_an_arm_that_repeats_the_baseline_has_no_part_in_effects(entry):
    runs = []
    for seed, (one, other) in itertools.product(range(3), itertools.product("ab", "cd")):
        loss = 1.5 + 0.01 * seed + 0.1 * (one == "b") + 0.003 * seed * (other == "d")
        runs += settled(entry, one + other, [loss], first_seed=seed, factors={"one": one, "other": other})
    again = settled(entry, "ac (A/A)", [1.7, 1.8], first_seed=20_000, factors={"one": "a", "other": "c"}, repeats="ac")
    found, without = (judge(own, baseline="ac").groups[0].effects["loss"] for own in ([*runs, *again], runs))
    assert found == without
    assert (found.seeds, found.dropped_seeds) == ((0, 1, 2), ())


def test_effects_on_memory_are_over_runs_and_on_the_loss_over_seeds(entry):
    runs = []
    for seed, (one, other) in itertools.product(range(3), itertools.product("ab", "cd")):
        size = {"a": 100.0, "b": 200.0}[one] + 7 * (other == "d") * (one == "b")
        runs += settled(entry, one + other, [1.5 + 0.01 * seed], first_seed=seed, peak_bytes=size,
                        factors={"one": one, "other": other})  # fmt: skip
    found = judge(runs).groups[0].effects
    assert found["loss"].seeds == (0, 1, 2)
    assert all(effect.is_none for effect in found["loss"].effects)
    assert (found["peak_bytes"].seeds, found["peak_bytes"].effects[0].ratio.n) == ((), 12)


def formatted(entry, arm, rate, **config):
    return settled(entry, arm, BASE, trial={"optim.lr": rate}, config={"train": {"steps": 100}} | config)


@pytest.mark.parametrize(
    ("one", "two", "rates", "is_said"),
    [
        ({"optim": {"name": "adamw"}}, {"optim": {"name": "adamw8bit", "min_8bit_size": 4096}}, (1e-3, 2e-3), True),
        ({"precision": "fp32"}, {"precision": "bf16"}, (1e-3, 2e-3), True),
        ({"precision": "fp32"}, {"precision": "bf16"}, (1e-3, 1e-3), False),
        ({"optim": {"name": "adamw"}}, {"optim": {"name": "muon"}}, (1e-3, 2e-3), False),
        ({"optim": {"name": "adamw"}}, {"optim": {"name": "adamw"}}, (1e-3, 2e-3), False),
        ({"precision": "fp32", "width": 8}, {"precision": "bf16", "width": 16}, (1e-3, 2e-3), False),
    ],
)
def test_arms_that_differ_in_format_and_were_tuned_to_other_settings_are_said(entry, one, two, rates, is_said):
    runs = [*formatted(entry, "one", rates[0], **one), *formatted(entry, "two", rates[1], **two)]
    said = "one and two differ only in precision or in the format of the optimizer state, but were tuned separately"
    assert any(said in note for note in judge(runs).notes) == is_said
    shared = [replace(run, tuned_as="one") if run.arm == "two" else run for run in runs]
    assert not any("tuned separately" in note for note in judge(shared).notes)


# -- means, targets and what a lane has to do with them


LANE = {"base": [1.0, 1.2, 0.8], "fast": [1.5, 1.6, 1.4], "same": [1.0, 1.0, 1.0]}


def test_means_are_over_seeds_and_of_the_time_of_a_step_over_generations(study):
    (group,) = judge(study, step_times=LANE).groups
    for quantity in group.quantities:
        for name, cell in group.table[quantity.key].items():
            values = LANE[name] if quantity.key == "step_s" else [*cell.values.values()]
            if cell.mean is None:
                continue
            assert cell.mean.value == pytest.approx(np.mean(values)), (quantity.key, name)
            assert cell.mean.n == 3
            half = stats.t(2).ppf(0.975) * np.std(values, ddof=1) / math.sqrt(3)
            assert cell.mean.upper - cell.mean.lower == pytest.approx(2 * half, rel=1e-9, abs=1e-9)
    assert group.table["step_s"]["base"].values == dict.fromkeys(range(3), pytest.approx(1.0))


@pytest.mark.parametrize("num", range(1, 7))
def test_a_mean_has_an_interval_from_three_seeds_on(entry, num):
    runs = [*settled(entry, "base", BASE[:num]), *settled(entry, "other", BASE[:num][::-1], peak_bytes=90)]
    cells = judge(runs).groups[0].table["loss"]
    assert [cell.mean.value for cell in cells.values()] == pytest.approx([np.mean(BASE[:num])] * 2)
    assert [math.isnan(cell.mean.lower) for cell in cells.values()] == [num < 3] * 2


def test_what_is_shown_of_a_study_has_keys_labels_units_and_a_better_way(segmented):
    runs = [replace(run, energy_j=5.0, measured=run.measured | {"wire_bytes": 10.0}) for run in segmented]
    (group,) = judge(runs, target=2.0, step_times=LANE).groups
    seen = {own.key: (own.label, own.show, own.better, own.depends_on_seed) for own in group.quantities}
    assert seen == {
        "loss": ("final loss", "number", "lower", True),
        "mean_iou": ("final mean IoU", "number", "higher", True),
        "boundary_f1": ("final boundary F1", "number", "higher", True),
        "class_accuracy": ("final class accuracy", "number", "higher", True),
        "loss_at_flops": ("loss at equal FLOPs", "number", "lower", True),
        "loss_at_seconds": ("loss at equal time", "number", "lower", True),
        "steps_to_target": ("steps to loss 2.0000", "count", "lower", True),
        "items_to_target": ("items to loss 2.0000", "count", "lower", True),
        "flops_to_target": ("FLOPs to loss 2.0000", "count", "lower", True),
        "seconds_to_target": ("time to loss 2.0000", "duration", "lower", True),
        "joules_to_target": ("energy to loss 2.0000", "energy", "lower", True),
        "step_s": ("time of a step", "duration", "lower", False),
        "peak_bytes": ("peak memory", "memory", "lower", False),
        "optimizer_bytes": ("optimizer state", "memory", "lower", False),
        "wire_bytes": ("payload of a step's collectives", "memory", "lower", False),
        "gap": ("held-out / training loss", "number", "lower", True),
    }
    bits = [replace(run, metrics={"bits_per_byte": 1.5}, metric_directions={}) for run in segmented]
    labels = {own.key: own.label for own in judge(bits, metric="bits_per_byte").groups[0].quantities}
    assert labels["bits_per_byte"] == "bits per byte"
    assert {"gap", "loss"} <= labels.keys()
    assert "gap" not in judge(segmented, metric="mean_iou").groups[0].table


def test_effects_on_the_time_of_a_step_are_over_laps_however_many_seeds_there_are(entry):
    """Three laps of each arm are its replicates."""
    runs, lane = [], {}
    for one, other in itertools.product("ab", "cd"):
        lane[one + other] = [(2.0 if one == "b" else 1.0) * more for more in (1.0, 1.1, 1.0)]
        runs += settled(entry, one + other, BASE[:2], factors={"one": one, "other": other})
    again = settled(entry, "ac (A/A)", BASE[:2], first_seed=90, factors={"one": "a", "other": "c"}, repeats="ac")
    (group,) = judge([*runs, *again], step_times=lane).groups
    found = group.effects["step_s"]
    assert (found.seeds, found.num_runs) == ((), 12)
    first = found.effects[0]
    assert (first.factors, first.by_seed, first.ratio.n) == (("one",), {}, 12)
    assert first.ratio.value == first.ratio.lower == pytest.approx(2.0)
    assert [effect.is_none for effect in found.effects] == [False, True, True]
    assert "step_s" not in judge(runs, step_times={name: lane[name] for name in ("ac", "bc")}).groups[0].effects


def test_the_target_is_of_the_runs_of_the_baseline_that_ended_with_a_curve(study):
    expected = judge([run for run in study if run.name != "base/seed-2"]).groups[0].target
    early = {"status": "diverged", "loss": None, "curve_steps": (0, 10), "curve_losses": (4.5, 4.4)}
    none = {"curve_steps": (), "curve_losses": ()}
    for changes in (early, none):
        runs = [replace(run, **changes) if run.name == "base/seed-2" else run for run in study]
        assert judge(runs).groups[0].target == expected


@pytest.mark.parametrize(("status", "is_refused"), [("finished", True), ("diverged", True), ("failed", False)])
def test_a_run_of_other_data_is_refused_unless_it_failed(study, status, is_refused):
    changes = {"status": status, "data_sha256": "b" * 64} | ({} if status == "finished" else {"loss": None})
    runs = [replace(run, **changes) if run.name == "fast/seed-2" else run for run in study]
    assert bool(differences(runs)) == is_refused


def test_what_runs_differ_in_is_said_with_the_first_of_them(study):
    runs = [replace(run, data_sha256=None) if run.arm == "fast" else run for run in study]
    (said,) = differences(runs)
    assert said == (
        "they read different data (SHA-256 of the data and, for text, of the tokenizer): aaaaaaaaaaaa: base/seed-0, same/seed-0, "
        "base/seed-1, ...; unknown: fast/seed-0, fast/seed-1, fast/seed-2"
    )


def test_single_runs_that_were_tuned_apart_are_said_too(entry):
    runs = [run for run in formatted(entry, "one", 1e-3, precision="fp32") if run.seed == 0]
    runs += [run for run in formatted(entry, "two", 2e-3, precision="bf16") if run.seed == 0]
    (note,) = [note for note in judge(runs).notes if "tuned separately" in note]
    assert "(optim.lr = 0.001; optim.lr = 0.002)" in note


def test_a_cell_is_named_in_all_that_is_said_of_it(study, entry):
    cell = {"train.batch": 8, "model": "tiny"}
    late = [replace(run, curve_losses=tuple(loss + 1 for loss in run.curve_losses)) if run.name == "same/seed-1"
            else run for run in study]  # fmt: skip
    trials = [*tuning(entry, "base", [1e-3, 3e-3], [1.4, 1.5]), *tuning(entry, "lost", [1e-3], [None])]
    runs = [replace(run, cell=cell) for run in [*late, *trials]]
    runs = [replace(run, status="failed", loss=None) if run.name == "fast/seed-0" else run for run in runs]
    where = "(train.batch = 8, model = tiny)"
    notes = judge(runs).notes
    for said in (
        f"fast {where}: 1 of 3 runs failed",
        f"same {where} reached the loss",
        f"base {where}: the best optim.lr of 2 trials is at the edge of the searched range (0.001): a wider search may find a better value",
        f"lost {where}: none of 1 trials finished, so this arm has no final runs",
        f"the arms had different numbers of trials {where}: base 2, fast 0, same 0, lost 1",
    ):
        assert [note for note in notes if note.startswith(said)], said
    assert "are compared although" not in " ".join(notes)
    (group,) = judge(runs, step_times={timing_name(name, cell): own for name, own in LANE.items()}).groups
    assert timing_name("base", cell) == "base @ model = tiny, train.batch = 8"
    assert "step_s" in group.table


def test_a_baseline_without_runs_in_a_cell_is_refused(study):
    runs = [replace(run, cell={"a": number}) for number in (1, 2) for run in study]
    with pytest.raises(ConfigError, match=r"the baseline 'base' has no run \(a = 2\)"):
        judge([run for run in runs if run.cell["a"] == 1 or run.arm != "base"])


def test_only_numbers_that_were_searched_have_edges_and_one_alone_says_what_is_near(study, entry):
    def trial(number, loss, **settings):
        return entry("base", 1000, phase="tuning", trial=settings, name=f"trial-{number}", loss=loss)

    settings = [
        {"lr": 1e-3, "name": "a", "flag": True, "decay": 0.1}, {"lr": 1e-2, "name": "b", "flag": False, "decay": 0.1},
        {"lr": 1e-1, "name": "c", "flag": True, "decay": 0.1},
    ]  # fmt: skip
    trials = [
        trial(number, loss, **own) for number, (own, loss) in enumerate(zip(settings, (1.5, 1.6, 1.7), strict=True))
    ]
    tuning_of = judge([*study, *trials]).groups[0].tuning["base"]
    assert (tuning_of.best, tuning_of.at_edge, tuning_of.near_factor) == (settings[0], ["lr"], {})
    assert tuning_of.trials == list(zip(settings, (1.5, 1.6, 1.7), strict=True))
    alone = [trial(number, loss, lr=rate) for number, (rate, loss) in enumerate([(0.0, 1.501), (0.1, 1.5), (0.2, 1.9)])]
    found = judge([*study, *alone]).groups[0].tuning["base"]
    assert found.at_edge == []
    assert math.isnan(found.near_factor["lr"])  # nothing is a multiple of nothing


@pytest.mark.parametrize(
    ("errors", "median", "worst"),
    [((1.1, 0.8, 1.0), 0.1, -0.2), ((1.1, 1.3, 1.0), 0.1, 0.3), ((1.1,), 0.1, 0.1)],
)
def test_the_worst_prediction_has_its_sign(study, errors, median, worst):
    runs = [replace(run, predicted={}, measured={}) for run in study]
    for place, error in enumerate(errors):
        runs[place] = replace(runs[place], predicted={"x": 200 * error}, measured={"x": 200.0, "y": 1.0})
    found = judge(runs).calibration
    assert list(found) == ["x"]
    assert (found["x"].n, found["x"].median, found["x"].worst) == (
        len(errors), pytest.approx(median), pytest.approx(worst),
    )  # fmt: skip


def test_flops_and_time_that_all_have_are_those_of_the_least(study):
    runs = [
        replace(run, measured={"executed_flops": 2e6} if run.arm == "fast" else {"executed_flops": 3e6})
        for run in study
    ]
    (group,) = judge(runs, step_times=LANE).groups
    assert group.budgets == {"flops": 100 * 2e6, "seconds": pytest.approx(100 * 1.0)}
    (group,) = judge(runs, step_times={name: LANE[name] for name in ("base", "fast")}).groups
    assert group.budgets == {"flops": 100 * 2e6}
    runs = [replace(run, measured={}, predicted={}) for run in study]
    assert judge(runs).groups[0].budgets == {}
