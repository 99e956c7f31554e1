"""Comparison of all arms of one cell of a study: quantities by arm, tuning, effects of factors, and noise."""

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
    """Variation of a quantity of the baseline between seeds."""

    sd: float
    """Standard deviation of the log ratio of two runs that differ only in their seed."""
    num_runs: int
    """Number of runs for this estimate: those of the baseline and of the A/A arm."""
    ratio: Estimate | None
    """Ratio of the A/A arm to the baseline. Its interval contains 1 in 95 of 100 studies. None if the ratio cannot be
    computed, for example because the study has no A/A arm."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The comparison of all arms of one cell."""

    cell: dict[str, Any]
    """The value of each axis."""
    arms: dict[str, list[Entry]]
    """The final runs of each arm, sorted by seed."""
    baseline: str
    """The arm that the other arms are compared with."""
    kin: Mapping[str, Hashable]
    """A key for each arm, equal for arms that are kin (see `kin_of`)."""
    quantities: list[Quantity]
    """The quantities for which at least one run has a value."""
    table: dict[str, dict[str, Cell]]
    """The cells of the table, by key of the quantity, then by arm."""
    tuning: dict[str, Tuning]
    """Tuning results by arm. Arms without trials are absent."""
    effects: dict[str, Effects]
    """Effects of the factors, by key of the quantity. Empty unless the arms are combinations of factors with two levels
    each."""
    noise: dict[str, Noise]
    """Noise by key of the quantity, for quantities that depend on the seed. A quantity is absent if too few runs have
    it."""
    metric: Metric
    """The main metric."""
    target: float | None
    """The value of the main metric at which the `..._to_target` quantities stop counting. None if there is no
    target."""
    budgets: dict[str, float]
    """The budgets at which `..._at_flops` and `..._at_seconds` read the main metric (see `budgets_of`)."""


def group_of(arms: Arms, trials: Sequence[Entry], metrics: Sequence[Metric], target: float | None) -> Group:
    """Compares the arms of one cell with the baseline.

    Args:
        arms: the arms.
        trials: the tuning trials of the cell.
        metrics: the metrics that runs are judged by. The first is the main metric.
        target: a value of the main metric. Some quantities are the cost of a run until it reaches this value. None for
            the best value that every finished run of the baseline reaches.
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
    """Returns the effects of the factors by quantity.

    Leaves out a quantity if it has values at only one level of some factor. Empty if the runs form no factorial study.
    """
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
    """Returns the effects on the step time.

    Each generation of the timing run counts as a run, with its number as the seed.
    """
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
    """Estimates the noise of a quantity from the baseline and its A/A arm.

    Ignores the A/A arm if some of its runs have no value. Returns None if the baseline is incomplete or there are too
    few runs.
    """
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
