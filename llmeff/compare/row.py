"""One row of the table: one quantity of every arm, judged against the baseline."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmeff.compare.arms import Arms
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
from llmeff.compare.quantities import Quantity

ALPHA = 0.05
"""An adjusted p value below this is called a difference."""

Call = Literal["better", "worse", "not told apart", "equal", "one run", "two seeds", ""]
"""The result for an arm against the baseline; `not told apart`: no detectable difference."""

_Logs = Mapping[str, Mapping[int, float]]
"""The logarithms of values, by arm and seed."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One arm's quantity beside the baseline's."""

    values: dict[int, float]
    """By seed. The seed of a run without a value is absent."""
    num_seeds: int
    """Seeds that were run."""
    mean: Estimate | None
    """The mean over seeds. None if a value is absent: the mean of the other runs would flatter."""
    difference: Difference | None
    """The difference to the baseline. None for the baseline itself, and if a value is absent."""
    p_adjusted: float
    """The p value among all arms; for an A/A arm its own; NaN if there is none."""
    call: Call
    """The result in words."""


def row(quantity: Quantity, values: Mapping[str, dict[int, float]], arms: Arms) -> dict[str, Cell]:
    """Judges one quantity of all arms.

    Args:
        quantity: what is compared.
        values: by arm and seed.
        arms: the arms.

    Returns:
        A cell for each arm.
    """
    logs = _logs(values, arms)
    rivals = [name for name in logs if arms.baseline in logs and name not in (arms.baseline, arms.aa_arm)]
    judge = _by_seeds if quantity.timed is None else _by_timing
    differences = judge(quantity, logs, rivals, arms)
    found = {name: difference for name, difference in differences.items() if difference is not None}
    adjusted = _adjusted(found, len(rivals))
    return {
        name: Cell(
            values=values[name],
            num_seeds=len(runs),
            mean=_mean(quantity, values[name], len(runs), arms.times.get(name)),
            difference=found.get(name),
            p_adjusted=adjusted.get(name, math.nan),
            call=_call(quantity, found.get(name), adjusted.get(name, math.nan)),
        )
        for name, runs in arms.runs.items()
    }


def _logs(values: Mapping[str, Mapping[int, float]], arms: Arms) -> _Logs:
    """Logarithms of the values of the arms that can be compared.

    A value of zero has no ratio. An arm of which some run has no value is left out: its other runs would flatter it.
    """
    return {
        name: {seed: math.log(value) for seed, value in values[name].items()}
        for name, runs in arms.runs.items()
        if runs and len(values[name]) == len(runs) and min(values[name].values()) > 0
    }


def _by_seeds(quantity: Quantity, logs: _Logs, rivals: Sequence[str], arms: Arms) -> dict[str, Difference | None]:
    """Judges kin of the baseline by pairs of one seed, all other arms at once as independent ones, and the A/A arm alone."""
    independent = [name for name in rivals if quantity.depends_on_seed and not arms.is_kin(name)]
    found = {
        name: _by_pairs(logs[name], logs[arms.baseline], len(rivals), depends_on_seed=quantity.depends_on_seed)
        for name in rivals
        if name not in independent
    }
    arrays = {name: np.array([*of_arm.values()]) for name, of_arm in logs.items()}
    if independent:
        at_once = many_to_one(
            arrays[arms.baseline],
            [arrays[name] for name in independent],
            family=len(rivals),
            kin=[arms.kin[name] for name in independent],
        )
        found |= dict(zip(independent, at_once, strict=True))
    aa_arm = arms.aa_arm
    if aa_arm is not None and {aa_arm, arms.baseline} <= logs.keys() and quantity.depends_on_seed:
        found[aa_arm] = same_settings(arrays[aa_arm], arrays[arms.baseline])
    return found


def _by_pairs(
    ours: Mapping[int, float], theirs: Mapping[int, float], family: int, *, depends_on_seed: bool
) -> Difference | None:
    """Judges two arms by the seeds that both have. Two seeds give a mean without an interval, unless the arms are equal."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    logs = [ours[seed] - theirs[seed] for seed in seeds]
    if depends_on_seed and len(seeds) < FEWEST_SEEDS and max(map(abs, logs)) > ARITHMETIC:
        return judged(statistics.fmean(logs), math.nan, 0, len(seeds))
    values, others = (np.exp([of_arm[seed] for seed in seeds]) for of_arm in (ours, theirs))
    return paired(values, others, family)


def _by_timing(quantity: Quantity, logs: _Logs, rivals: Sequence[str], arms: Arms) -> dict[str, Difference | None]:
    """Judges by the timing run. Its generations are pairs, since arms take turns in each."""
    if quantity.timed == "steps":
        return {name: _time_to_target(name, logs, len(rivals), arms) for name in rivals}
    return {name: paired(arms.times[name], arms.times[arms.baseline], len(rivals)) for name in rivals}


def _time_to_target(name: str, logs: _Logs, family: int, arms: Arms) -> Difference | None:
    """Judges an arm's time to the target, whose ratio is that of step times multiplied by that of numbers of steps."""
    ours, theirs = logs[name], logs[arms.baseline]
    our_times, their_times = arms.times[name], arms.times[arms.baseline]
    ratios = np.log(np.divide(our_times, their_times))
    our_step, their_step = math.log(statistics.fmean(our_times)), math.log(statistics.fmean(their_times))
    if not arms.is_kin(name):
        our_steps, their_steps = (
            [log - our_step for log in ours.values()],
            [their_step - log for log in theirs.values()],
        )
        return product([our_steps, their_steps, ratios], family)
    pairs = [ours[seed] - our_step + their_step - theirs[seed] for seed in ours if seed in theirs]
    return product([pairs, ratios], family) if pairs else None


def _adjusted(found: Mapping[str, Difference], family: int) -> dict[str, float]:
    """P values among all arms: those of arms that were judged at once as they are, the others by Holm's procedure."""
    alone = {name: difference.p for name, difference in found.items() if math.isnan(difference.p_family)}
    at_once = {name: difference.p_family for name, difference in found.items() if name not in alone}
    return dict(zip(alone, holm([*alone.values()], family), strict=True)) | at_once


def _mean(
    quantity: Quantity, values: Mapping[int, float], num_runs: int, times: Sequence[float] | None
) -> Estimate | None:
    """The mean over seeds, with an interval from `FEWEST_SEEDS` on; the mean step time over generations."""
    if not num_runs or len(values) < num_runs:
        return None
    known = [*values.values()] if times is None or quantity.timed != "step" else times
    return mean_interval(known, FEWEST_SEEDS if quantity.depends_on_seed else 2)


def _call(quantity: Quantity, difference: Difference | None, p: float) -> Call:
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
