"""Arms against a baseline: what each costs and reaches, with intervals, and what cannot be said."""

import itertools
import json
import math
import re
import statistics as plain
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llmeff.compare.alike import differences, hold_the_same_runs, in_cell, kin_of
from llmeff.compare.calibration import Calibration, calibrate
from llmeff.compare.effects import Effects, effects, is_factorial
from llmeff.compare.intervals import (
    ARITHMETIC,
    FEWEST_SEEDS,
    Difference,
    Estimate,
    holm,
    judged,
    many_to_one,
    mean_interval,
    paired,
    product,
    same_settings,
)
from llmeff.compare.ledger import LOSS, Entry, Metric, find_metric, flat_config, known_metrics, steps_to, value_at
from llmeff.compare.timing import StepTimes, timed_as, times_by_arm, timing_name
from llmeff.compare.tuning import Tuning, tuning_of
from llmeff.core.config import ConfigError
from llmeff.core.metric import Direction
from llmeff.core.registry import nearest

ALPHA = 0.05
"""Below which an adjusted p value is called a difference."""
FEW_RUNS = 5
"""Fewer of an arm seldom show that its spread is another than the others': with three, one of three times the spread makes
9 % of studies of equal arms call one different, and not 5 % (`analysis/results/coverage.json`)."""

Call = Literal["better", "worse", "not told apart", "equal", "one run", "two seeds", ""]

Value = Callable[[Entry], float | None]
"""Of a run; None where it has none."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Something that a run costs or reaches."""

    key: str
    """For machines."""
    label: str
    """For people."""
    show: str
    """How a value is shown: `number`, `count`, `memory`, `duration`, `energy`."""
    better: Direction = "lower"
    """Which way it is better."""
    depends_on_seed: bool = True
    """Whether chance comes into it by the seed, so that runs of one seed tell the same again and seeds are what counts; of
    time and memory, which do not depend on it, every run does."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One arm's quantity beside the baseline's."""

    values: dict[int, float]
    """By seed; a seed that did not come to it is absent."""
    num_seeds: int
    """Seeds that were run."""
    mean: Estimate | None
    """Over the seeds; None where one is absent, since the mean of those that came to it would flatter."""
    difference: Difference | None
    """To the baseline; None for the baseline, and where a seed is absent."""
    p_adjusted: float
    """Among all arms; of an A/A arm alone; NaN where there is none."""
    call: Call
    """What may be said."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What seeds alone do to a quantity of the baseline."""

    sd: float
    """Standard deviation of the logarithm of the ratio of two runs that differ by their seed."""
    num_runs: int
    """It was estimated from: the baseline's, and those of an A/A arm."""
    ratio: Estimate | None
    """Of the A/A arm to the baseline, which 95 of 100 such intervals have 1 in; None where there is no such arm."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """All arms under the same values of the axes."""

    cell: dict[str, Any]
    """The values."""
    arms: dict[str, list[Entry]]
    """The final runs of each, by seed."""
    baseline: str
    """What the others are set beside."""
    quantities: list[Quantity]
    """Those that some arm has."""
    table: dict[str, dict[str, Cell]]
    """By quantity, then arm."""
    tuning: dict[str, Tuning]
    """By arm."""
    effects: dict[str, Effects]
    """By quantity, where the arms are combinations of factors of two levels."""
    noise: dict[str, Noise]
    """By quantity that depends on the seed."""
    metric: Metric
    """What is judged by."""
    target: float | None
    """Its value that `..._to_target` are counted to."""
    budgets: dict[str, float]
    """What `loss_at_...`, or the metric's, are read at."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A study, judged."""

    groups: list[Group]
    """By the values of the axes."""
    calibration: dict[str, Calibration]
    """By quantity: predictions against measurements, over all runs."""
    notes: list[str]
    """What a reader must know."""
    metrics: list[Metric]
    """What runs are judged by; first the one that decides."""
    command: str | None = None
    """That makes it again."""


def judge(
    entries: Sequence[Entry],
    *,
    baseline: str | None = None,
    target: float | None = None,
    metric: str = LOSS.name,
    step_times: StepTimes | None = None,
    notes: Sequence[str] = (),
    mixed: bool = False,
    command: str | None = None,
) -> Comparison:
    """Compares arms, cell by cell.

    Args:
        entries: of a study.
        baseline: the arm that others are set beside; None: the first.
        target: a value of the metric; None: in each cell the best that every run of the baseline reaches.
        metric: what decides: targets, budgets and tuning go by it. Ratios, of which all statistics are made, are of positive
            values: where one is not, nothing is compared.
        step_times: of the timing run, by `timing_name`; without it no times are compared.
        notes: what else a reader must know.
        mixed: compare runs that read other data or had another budget all the same.
        command: that makes the study again.

    Raises:
        ConfigError: there is nothing to compare, no such baseline or metric, or the runs are not of one kind.
    """
    arms = list(dict.fromkeys(entry.arm for entry in sorted(entries, key=lambda entry: entry.phase != "final")))
    if not any(entry.phase == "final" for entry in entries):
        raise ConfigError("no final run was begun yet: nothing to compare")
    if len(arms) < 2:
        raise ConfigError(f"there is one arm ({', '.join(arms) or 'none'}): nothing to compare it with")
    if baseline is not None and baseline not in arms:
        raise ConfigError(f"--baseline {baseline!r}: there is no such arm.{nearest(baseline, arms)}")
    known = known_metrics(entry.metric_directions for entry in entries)
    decisive = find_metric(metric, known)
    metrics = [decisive, *(other for other in known.values() if other != decisive)]
    if target is not None and not 0 < target < math.inf:
        raise ConfigError(f"the target {decisive.label} is {target}: it must be a positive number")
    finals = [entry for entry in entries if entry.phase == "final"]
    cells = list(dict.fromkeys(_key(entry.cell) for entry in finals))
    groups, said = [], list(notes)
    for key in cells:
        own = [entry for entry in finals if _key(entry.cell) == key]
        unlike = differences(own)
        if unlike and not mixed:
            raise ConfigError([
                f"these runs are not of one kind{in_cell(own[0].cell)}:", *unlike,
                "--mixed compares them all the same, and says so",
            ])  # fmt: skip
        said += [f"compared although{in_cell(own[0].cell)} {text}" for text in unlike]
        trials = [entry for entry in entries if entry.phase == "tuning" and _key(entry.cell) == key]
        groups.append(_group(own, trials, baseline or arms[0], metrics, target, step_times))
    said += _notes(groups, metrics, step_times)
    return Comparison(groups=groups, calibration=calibrate(entries), notes=said, metrics=metrics, command=command)


def _key(cell: Mapping[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)


# -- quantities


def _group(
    entries: list[Entry],
    trials: list[Entry],
    baseline: str,
    metrics: Sequence[Metric],
    target: float | None,
    step_times: StepTimes | None,
) -> Group:
    metric = metrics[0]
    names = dict.fromkeys(entry.arm for entry in [*entries, *trials])
    arms: dict[str, list[Entry]] = {name: [] for name in sorted(names, key=lambda name: name != baseline)}
    if baseline not in arms:
        raise ConfigError(f"the baseline {baseline!r} has no run{in_cell(entries[0].cell)}")
    for entry in sorted(entries, key=lambda entry: entry.seed):
        if any(run.seed == entry.seed for run in arms[entry.arm]):
            twice = ", ".join(run.name for run in entries if (run.arm, run.seed) == (entry.arm, entry.seed))
            raise ConfigError(f"{entry.arm}{in_cell(entry.cell)} has the seed {entry.seed} twice: {twice}")
        arms[entry.arm].append(entry)
    if target is None:
        target = _reached_by_all(arms[baseline], metric)
    times = times_by_arm(step_times, arms, entries[0].cell)
    budgets, kin = _budgets(arms, times), kin_of(arms)
    table, quantities, of_quantity = {}, [], {}
    for quantity, of in _quantities(metrics, target, budgets, times):
        values = {name: _by_seed(runs, of) for name, runs in arms.items()}
        if not any(values.values()):
            continue
        quantities.append(quantity)
        of_quantity[quantity.key] = of
        table[quantity.key] = _row(quantity, arms, values, baseline, times, kin)
    tuned = {name: tuning_of([entry for entry in trials if entry.arm == name], metric) for name in arms}
    by_key = {quantity.key: quantity for quantity in quantities}
    return Group(
        cell=entries[0].cell,
        arms=arms,
        baseline=baseline,
        quantities=quantities,
        table=table,
        tuning={name: tuning for name, tuning in tuned.items() if tuning is not None},
        effects=_effects(arms, metric, quantities, of_quantity, times),
        noise={
            key: noise
            for key, row in table.items()
            if by_key[key].depends_on_seed and (noise := _noise(row, baseline, _repeating(arms, baseline))) is not None
        },
        metric=metric,
        target=target,
        budgets=budgets,
    )


def _repeating(arms: Mapping[str, Sequence[Entry]], baseline: str) -> str | None:
    """The A/A arm of the baseline."""
    return next((name for name, runs in arms.items() if any(run.repeats == baseline for run in runs)), None)


def _noise(row: Mapping[str, Cell], baseline: str, again: str | None) -> Noise | None:
    whole = [row[name] for name in (baseline, again) if name is not None and row[name].mean is not None]
    own = [[*cell.values.values()] for cell in whole]
    logs = [np.log(values) for values in own if len(values) > 1 and min(values) > 0]
    freedom = sum(len(each) - 1 for each in logs)
    if not freedom or row[baseline].mean is None:
        return None
    difference = None if again is None else row[again].difference
    return Noise(
        sd=math.sqrt(2 * sum(float(each.var()) * len(each) for each in logs) / freedom),
        num_runs=sum(map(len, logs)),
        ratio=None if difference is None else difference.ratio,
    )


_PREDICTED = ("peak_bytes", "wire_bytes", "optimizer_bytes")
"""Quantities that a run's price foresees."""


def _reached_by_all(runs: Sequence[Entry], metric: Metric) -> float | None:
    """The best value that every run reaches, to five digits: arms that differ by rounding alone reach it too."""
    curves = [run.curve(metric.name) for run in runs if run.is_done and run.curve(metric.name)]
    value = metric.sign * max((min(map(metric.cost, curve)) for curve in curves), default=math.inf)
    if not math.isfinite(value):
        return None
    digit = 10.0 ** (math.floor(math.log10(value)) - 4) if value > 0 else 1.0
    return (math.ceil if metric.better == "lower" else math.floor)(value / digit) * digit


_AS_OTHERS = ("bits_per_byte", "items_to_target")
"""Of runs of one budget, data and batch, their ratios are those of the loss and of the steps."""


def _effects(
    arms: Mapping[str, list[Entry]],
    metric: Metric,
    quantities: Sequence[Quantity],
    of_quantity: Mapping[str, Value],
    times: Mapping[str, Sequence[float]],
) -> dict[str, Effects]:
    """Of the quantities whose runs are combinations of factors: one that only some levels have has no effects."""
    runs = [run for own in arms.values() for run in own if run.repeats is None]
    if not is_factorial(runs):
        return {}
    found = {}
    for quantity in quantities:
        of, key = of_quantity[quantity.key], quantity.key
        is_apart = key not in _TIMED and (key not in _AS_OTHERS or key == metric.name)
        if not is_apart or not is_factorial([run for run in runs if (of(run) or 0) > 0]):
            continue
        infer_model = (lambda run, key=key: run.predicted.get(key)) if key in _PREDICTED else None
        found[key] = effects(runs, of, infer_model, depends_on_seed=quantity.depends_on_seed)
    if arms.keys() <= times.keys():
        laps = [
            (replace(own[0], seed=lap), seconds)
            for name, own in arms.items() if own and own[0].repeats is None for lap, seconds in enumerate(times[name])
        ]  # fmt: skip
        by_lap = {id(entry): seconds for entry, seconds in laps}
        found["step_s"] = effects([entry for entry, _ in laps], lambda entry: by_lap[id(entry)], depends_on_seed=False)
    return found


def _by_seed(runs: list[Entry], of: Value) -> dict[int, float]:
    found = ((run.seed, of(run)) for run in runs)
    return {seed: value for seed, value in found if value is not None and math.isfinite(value)}


def _budgets(arms: Mapping[str, list[Entry]], times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The most FLOPs, and seconds, that every arm has spent."""
    flops = [
        entry.step_flops * entry.steps for runs in arms.values() for entry in runs if entry.is_done and entry.step_flops
    ]
    budgets = {"flops": min(flops)} if flops else {}
    done = [run for runs in arms.values() for run in runs if run.is_done]
    if done and arms.keys() <= times.keys():
        budgets["seconds"] = min(plain.fmean(times[run.arm]) * run.steps for run in done)
    return budgets


_FINAL = {"bits_per_byte": "bits per byte"}
"""Labels of final values that are not `final` and the metric."""


def _final(metric: Metric) -> tuple[Quantity, Value]:
    label = _FINAL.get(metric.name, f"final {metric.label}")
    quantity = Quantity(key=metric.name, label=label, show="number", better=metric.better)
    return quantity, _done(lambda entry: entry.final(metric.name))


def _at_equal(metric: Metric, what: str, key: str) -> Quantity:
    label = f"{metric.label} at equal {what}"
    return Quantity(key=f"{metric.name}_at_{key}", label=label, show="number", better=metric.better)


def _done(value: Value) -> Value:
    return lambda entry: value(entry) if entry.is_done else None


def _gap(entry: Entry) -> float | None:
    # as a ratio, which is what is compared: how much more held-out text costs than what was trained on
    return None if entry.loss is None or not entry.train_loss else entry.loss / entry.train_loss


def _step_joules(entry: Entry) -> float | None:
    return None if entry.energy_j is None or not entry.steps else entry.energy_j / entry.steps


def _quantities(
    metrics: Sequence[Metric],
    target: float | None,
    budgets: Mapping[str, float],
    times: Mapping[str, Sequence[float]],
) -> list[tuple[Quantity, Value]]:
    metric = metrics[0]

    def reached(entry: Entry) -> float | None:
        return None if target is None else steps_to(entry, target, metric)

    def times_steps(of: Value) -> Value:
        def value(entry: Entry) -> float | None:
            steps, each = reached(entry), of(entry)
            return None if steps is None or each is None else steps * each

        return value

    def seconds(entry: Entry) -> float | None:
        return plain.fmean(times[entry.arm]) if entry.arm in times else None

    def at(budget: str, of: Value) -> Value:
        def value(entry: Entry) -> float | None:
            each = of(entry)
            return value_at(entry, budgets[budget] / each, metric) if budget in budgets and each else None

        return value

    to = "" if target is None else f" to {metric.label} {target:.4f}"
    return [
        *map(_final, metrics),
        (_at_equal(metric, "FLOPs", "flops"), at("flops", lambda e: e.step_flops)),
        (_at_equal(metric, "time", "seconds"), at("seconds", seconds)),
        (Quantity(key="steps_to_target", label=f"steps{to}", show="count"), reached),
        (Quantity(key="items_to_target", label=f"items{to}", show="count"), times_steps(lambda e: e.items_per_step)),
        (Quantity(key="flops_to_target", label=f"FLOPs{to}", show="count"), times_steps(lambda e: e.step_flops)),
        (Quantity(key="seconds_to_target", label=f"time{to}", show="duration"), times_steps(seconds)),
        (Quantity(key="joules_to_target", label=f"energy{to}", show="energy"), times_steps(_step_joules)),
        (Quantity(key="step_s", label="time of a step", show="duration", depends_on_seed=False), seconds),
        (Quantity(key="peak_bytes", label="peak memory", show="memory", depends_on_seed=False),
         _done(lambda entry: entry.peak_bytes)),
        (Quantity(key="optimizer_bytes", label="optimizer state", show="memory", depends_on_seed=False),
         _done(lambda entry: entry.measured.get("optimizer_bytes"))),
        (Quantity(key="wire_bytes", label="payload of a step's collectives", show="memory", depends_on_seed=False),
         _done(lambda entry: entry.measured.get("wire_bytes") or None)),
        # of a task that is judged by something else, training losses may be weighted
        *([(Quantity(key="gap", label="held-out / training loss", show="number"), _done(_gap))]
          if metric.name in ("loss", *_FINAL) else []),
    ]  # fmt: skip


_TIMED = {"step_s": False, "seconds_to_target": True}
"""What depends on the timing run, and whether on steps too."""


def _row(
    quantity: Quantity,
    arms: Mapping[str, list[Entry]],
    values: Mapping[str, dict[int, float]],
    baseline: str,
    times: Mapping[str, Sequence[float]],
    kin: Mapping[str, Hashable],
) -> dict[str, Cell]:
    again = _repeating(arms, baseline)
    # nothing has a ratio to nothing, and those runs alone that came to a value would flatter
    logs = {name: {seed: math.log(value) for seed, value in values[name].items()} for name in arms
            if arms[name] and len(values[name]) == len(arms[name]) and min(values[name].values()) > 0}  # fmt: skip
    able = [name for name in arms if {name, baseline} <= logs.keys() and name not in (baseline, again)]
    found: dict[str, Difference | None] = dict.fromkeys(arms)
    if quantity.key in _TIMED:
        found |= {
            name: _timed(
                quantity, logs[name], logs[baseline], times.get(name), times.get(baseline),
                are_kin=kin[name] == kin[baseline], family=len(able),
            )
            for name in able
        }  # fmt: skip
    else:
        apart = [name for name in able if quantity.depends_on_seed and kin[name] != kin[baseline]]
        found |= {
            name: _by_pairs(logs[name], logs[baseline], len(able), depends_on_seed=quantity.depends_on_seed)
            for name in able if name not in apart
        }  # fmt: skip
        floats = {name: np.array([*own.values()]) for name, own in logs.items()}
        if apart:
            at_once = many_to_one(
                floats[baseline],
                [floats[name] for name in apart],
                family=len(able),
                kin=[kin[name] for name in apart],
            )
            found |= dict(zip(apart, at_once, strict=True))
        if again is not None and {again, baseline} <= floats.keys() and quantity.depends_on_seed:
            found[again] = same_settings(floats[again], floats[baseline])
    adjusted = _adjusted(found, len(able))
    return {
        name: Cell(
            values=values[name],
            num_seeds=len(arms[name]),
            mean=_mean(quantity, values[name], arms[name], times.get(name)),
            difference=found[name],
            p_adjusted=adjusted[name],
            call=_call(found[name], adjusted[name], quantity),
        )
        for name in arms
    }


def _adjusted(found: Mapping[str, Difference | None], family: int) -> dict[str, float]:
    """P values over all arms: those judged at once have theirs, and the others go by Holm's procedure over the whole family."""
    alone = {name: own.p for name, own in found.items() if own is not None and math.isnan(own.p_family)}
    held = dict(zip(alone, holm([*alone.values()], family), strict=True))
    at_once = {name: own.p_family for name, own in found.items() if own is not None and name not in held}
    return dict.fromkeys(found, math.nan) | held | at_once


def _by_pairs(
    ours: Mapping[int, float], theirs: Mapping[int, float], family: int, *, depends_on_seed: bool
) -> Difference | None:
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    logs = [ours[seed] - theirs[seed] for seed in seeds]
    if depends_on_seed and len(seeds) < FEWEST_SEEDS and max(map(abs, logs)) > ARITHMETIC:
        return judged(plain.fmean(logs), math.nan, 0, len(seeds))
    values, others = (np.exp([own[seed] for seed in seeds]) for own in (ours, theirs))
    return paired(values, others, family)


def _mean(
    quantity: Quantity, values: Mapping[int, float], runs: Sequence[Entry], times: Sequence[float] | None
) -> Estimate | None:
    """Over seeds, without an interval of fewer than `FEWEST_SEEDS`; of a step's time over generations."""
    if not runs or len(values) < len(runs):
        return None
    known = [*values.values()] if times is None or quantity.key != "step_s" else times
    return mean_interval(known, FEWEST_SEEDS if quantity.depends_on_seed else 2)


def _timed(
    quantity: Quantity,
    own: Mapping[int, float],
    other: Mapping[int, float],
    ours: Sequence[float] | None,
    theirs: Sequence[float] | None,
    *,
    are_kin: bool,
    family: int,
) -> Difference | None:
    """By the timing run, whose generations are pairs: in each, arms take turns."""
    if ours is None or theirs is None:
        return None
    if not _TIMED[quantity.key]:
        return paired(ours, theirs, family)
    ratios = np.log(np.divide(ours, theirs))
    seeds = [seed for seed in own if seed in other]
    if are_kin and not seeds:
        return None
    each, pace = math.log(plain.fmean(ours)), math.log(plain.fmean(theirs))  # what is left are steps
    steps, others = [value - each for value in own.values()], [pace - value for value in other.values()]
    pairs = [own[seed] - each + pace - other[seed] for seed in seeds]
    return product([pairs, ratios] if are_kin else [steps, others, ratios], family)


def _call(difference: Difference | None, p: float, quantity: Quantity) -> Call:
    if difference is None:
        return ""
    ratio = difference.ratio
    least = ARITHMETIC if quantity.depends_on_seed else 0.0
    if all(abs(value - 1) <= least for value in (ratio.value, ratio.lower, ratio.upper)):
        return "equal"
    if math.isnan(p):
        return "one run" if ratio.n == 1 else "two seeds"
    if p >= ALPHA:
        return "not told apart"
    return "better" if (ratio.value < 1) == (quantity.better == "lower") else "worse"


# -- notes


def _notes(groups: list[Group], metrics: Sequence[Metric], step_times: StepTimes | None) -> list[str]:
    higher = [metric.label for metric in metrics if metric.better == "higher"]
    notes = [f"of {', '.join(higher)} more is better, of all else less"] if higher else []
    for group in groups:
        notes += [*_run_notes(group), *_spread_notes(group), *_target_notes(group), *_tuning_notes(group)]
    names = {timing_name(timed_as(name, runs), group.cell) for group in groups for name, runs in group.arms.items()}
    missing = sorted(names - step_times.keys()) if step_times is not None else []
    if missing:
        notes.append(f"the timing lane has no {', '.join(map(repr, missing))}: their times are not compared")
    if step_times is None:
        notes.append("no timing lane was given: times are not compared (runs side by side slow one another)")
    return notes


def _run_notes(group: Group) -> Iterator[str]:
    where, known = in_cell(group.cell), {run.seed for run in group.arms[group.baseline]}
    kin = kin_of(group.arms)
    for name, runs in group.arms.items():
        for status in ("diverged", "failed", "unfinished"):
            those = [run for run in runs if run.status == status]
            if those:
                why = next((f": {run.diagnosis.splitlines()[0]}" for run in those if run.diagnosis), "")
                yield f"{name}{where}: {len(those)} of {len(runs)} runs {status}{why}"
        before = list(group.arms)[: list(group.arms).index(name)]
        same = next((other for other in before if kin[other] == kin[name] and not any(run.tuned_as for run in runs)
                     and hold_the_same_runs(group.arms[other], runs)), None)  # fmt: skip
        if same is not None:
            yield f"the runs of {name}{where} are those of {same}, but for rounding: of chance they tell as one"
        missing = sorted(known - {run.seed for run in runs})
        if missing and runs and kin[name] == kin[group.baseline] and all(run.repeats is None for run in runs):
            yield f"{name}{where} was not run with the baseline's seeds {missing}: its pairs are of those that both have"


def _spread_notes(group: Group) -> Iterator[str]:
    """Arms with so few runs that spreads are taken to be alike without being seen to be."""
    cells = group.table.get(group.metric.name, {})
    few = [cell.difference.ratio.n for cell in cells.values()
           if cell.difference is not None and cell.difference.method == "Dunnett" and cell.difference.ratio.n < FEW_RUNS]  # fmt: skip
    if few:
        yield (
            f"arms of {min(few)} runs{in_cell(group.cell)} tell little of their spread: if that of one is much larger than the "
            "others', it may be called different though it is not"
        )


def _target_notes(group: Group) -> Iterator[str]:
    for name, cell in group.table.get("steps_to_target", {}).items():
        if len(cell.values) < cell.num_seeds:
            yield (
                f"{name}{in_cell(group.cell)} reached the {group.metric.label} {group.target:.4f} in {len(cell.values)} of "
                f"{cell.num_seeds} runs: what it takes is not averaged over those that did"
            )


def _tuning_notes(group: Group) -> Iterator[str]:
    where = in_cell(group.cell)
    for name, tuning in group.tuning.items():
        if tuning.best is None:
            yield f"{name}{where}: none of {len(tuning.trials)} trials finished, so nothing was chosen, and no final run made"
            continue
        for edge in tuning.at_edge:
            yield (
                f"{name}{where}: the best {edge} of {len(tuning.trials)} trials lies at the edge of its search "
                f"({tuning.best[edge]}): a wider search may do better"
            )
    tuned = {name: next((run.tuned_as for run in runs if run.tuned_as), name) for name, runs in group.arms.items()}
    yield from _rate_notes(group, where)
    counts = {name: len(group.tuning[own].trials) if own in group.tuning else 0 for name, own in tuned.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        yield f"the arms had other numbers of trials{where}: {shown}"


_STATE_FORMAT = re.compile(r"[-_]?8bit$")
"""Ends the names of optimizers that are another with its state in 8 bits."""


def _rate_notes(group: Group, where: str) -> Iterator[str]:
    """Arms that differ in precision or the format of an optimizer's state alone, and yet ended at other settings."""
    searched = {
        name: runs[0] for name, runs in group.arms.items()
        if runs and runs[0].trial and runs[0].tuned_as is None and runs[0].repeats is None
    }  # fmt: skip
    for (name, one), (other, two) in itertools.combinations(searched.items(), 2):
        if one.trial != two.trial and _differ_in_format_alone(one, two):
            shown = "; ".join(", ".join(f"{key} = {own}" for key, own in run.trial.items()) for run in (one, two))
            yield (
                f"{name} and {other}{where} differ in precision or the format of state alone, and were tuned apart, to other "
                f"settings ({shown}): their difference is of both; with tuned_as it would be of the format"
            )


def _differ_in_format_alone(one: Entry, two: Entry) -> bool:
    """Whether two runs are alike but for precision, the format of state, and what they were tuned to."""
    configs = [flat_config(run) for run in (one, two)]
    names = [_STATE_FORMAT.sub("", str(own.get("optim.name"))) for own in configs]
    apart = {key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)}
    apart -= {*one.trial, *two.trial}
    shared = configs[0].keys() & configs[1].keys()
    format_alone = {"precision", "optim.name"} | {key for key in apart - shared if key.startswith("optim.")}
    return names[0] == names[1] and bool(apart & {"precision", "optim.name"}) and apart <= format_alone
