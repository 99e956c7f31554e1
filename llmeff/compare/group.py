"""All arms of one cell of a study: their quantities side by side, tuning, effects of factors, and noise."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmeff.compare.arms import Arms
from llmeff.compare.effects import Effects, effects, is_factorial
from llmeff.compare.intervals import Estimate
from llmeff.compare.ledger import Entry, Metric
from llmeff.compare.quantities import Quantity, budgets_of, by_seed, quantities_of, target_of
from llmeff.compare.row import Cell, row
from llmeff.compare.tuning import Tuning, tuning_of


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What seeds alone do to a quantity of the baseline."""

    sd: float
    """The standard deviation of the log ratio of two runs that differ by their seed only."""
    num_runs: int
    """Runs that it was estimated from: the baseline's, and those of an A/A arm."""
    ratio: Estimate | None
    """The A/A arm's ratio to the baseline, whose interval has 1 in it in 95 of 100 studies; None if there is no such arm."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """All arms under the same values of the axes."""

    cell: dict[str, Any]
    """The values."""
    arms: dict[str, list[Entry]]
    """The final runs of each arm, by seed."""
    baseline: str
    """The arm that the others are compared with."""
    kin: Mapping[str, Hashable]
    """The key of each arm's kin (`kin_of`)."""
    quantities: list[Quantity]
    """The quantities that some run has."""
    table: dict[str, dict[str, Cell]]
    """By quantity, then by arm."""
    tuning: dict[str, Tuning]
    """By arm; arms without trials are absent."""
    effects: dict[str, Effects]
    """By quantity; empty unless the arms are combinations of factors of two levels."""
    noise: dict[str, Noise]
    """By quantity that depends on the seed."""
    metric: Metric
    """The metric that decides."""
    target: float | None
    """The value of the metric that `..._to_target` count to."""
    budgets: dict[str, float]
    """The budgets that the metric is read at, for `..._at_flops` and `..._at_seconds`."""


def group_of(arms: Arms, trials: Sequence[Entry], metrics: Sequence[Metric], target: float | None) -> Group:
    """Judges the arms of one cell.

    Args:
        arms: the arms.
        trials: the tuning trials of the cell.
        metrics: what runs are judged by; the first one decides.
        target: a value of the first; None: the best that every run of the baseline reaches.
    """
    metric = metrics[0]
    if target is None:
        target = target_of(arms.runs[arms.baseline], metric)
    budgets = budgets_of(arms.runs, arms.times)
    quantities, table = [], {}
    for quantity in quantities_of(metrics, target, budgets, arms.times):
        values = {name: by_seed(quantity, runs) for name, runs in arms.runs.items()}
        if any(values.values()):
            quantities.append(quantity)
            table[quantity.key] = row(quantity, values, arms)
    return Group(
        cell=arms.cell,
        arms=arms.runs,
        baseline=arms.baseline,
        kin=arms.kin,
        quantities=quantities,
        table=table,
        tuning=_tunings(arms, trials, metric),
        effects=_effects(arms, quantities),
        noise=_noises(arms, quantities, table),
        metric=metric,
        target=target,
        budgets=budgets,
    )


def _tunings(arms: Arms, trials: Sequence[Entry], metric: Metric) -> dict[str, Tuning]:
    found = {name: tuning_of([entry for entry in trials if entry.arm == name], metric) for name in arms.runs}
    return {name: tuning for name, tuning in found.items() if tuning is not None}


def _effects(arms: Arms, quantities: Sequence[Quantity]) -> dict[str, Effects]:
    """The effects of factors, by quantity. There are none on a quantity that only one level of some factor has."""
    runs = [run for runs in arms.runs.values() for run in runs if run.repeats is None]
    if not is_factorial(runs):
        return {}
    found = {
        quantity.key: effects(runs, quantity.value, quantity.predicted, depends_on_seed=quantity.depends_on_seed)
        for quantity in quantities
        if quantity.has_effects and is_factorial(_with_positive(quantity, runs))
    }
    if arms.are_all_timed:
        found["step_s"] = _effects_on_step_time(arms)
    return found


def _with_positive(quantity: Quantity, runs: Sequence[Entry]) -> list[Entry]:
    return [run for run in runs if (quantity.value(run) or 0) > 0]


def _effects_on_step_time(arms: Arms) -> Effects:
    """Takes each generation of the timing run as a run, with its number in place of the seed."""
    laps = [
        replace(runs[0], seed=generation)
        for name, runs in arms.runs.items()
        if runs and runs[0].repeats is None
        for generation in range(len(arms.times[name]))
    ]
    return effects(laps, lambda lap: arms.times[lap.arm][lap.seed], depends_on_seed=False)


def _noises(arms: Arms, quantities: Sequence[Quantity], table: Mapping[str, Mapping[str, Cell]]) -> dict[str, Noise]:
    found = {quantity.key: _noise(arms, table[quantity.key]) for quantity in quantities if quantity.depends_on_seed}
    return {key: noise for key, noise in found.items() if noise is not None}


def _noise(arms: Arms, cells: Mapping[str, Cell]) -> Noise | None:
    """From the baseline and its A/A arm, if all their runs have the quantity; None if the runs are too few."""
    repeat = None if arms.aa_arm is None else cells[arms.aa_arm]
    complete = [cell for cell in (cells[arms.baseline], repeat) if cell is not None and cell.mean is not None]
    values = [[*cell.values.values()] for cell in complete]
    logs = [np.log(of_arm) for of_arm in values if len(of_arm) > 1 and min(of_arm) > 0]
    freedom = sum(len(of_arm) - 1 for of_arm in logs)
    if not freedom or cells[arms.baseline].mean is None:
        return None
    return Noise(
        sd=math.sqrt(2 * sum(float(of_arm.var()) * len(of_arm) for of_arm in logs) / freedom),
        num_runs=sum(map(len, logs)),
        ratio=None if repeat is None or repeat.difference is None else repeat.difference.ratio,
    )
