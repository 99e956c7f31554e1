"""One row of the comparison table: one quantity of all arms, each compared with the baseline."""

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
"""The significance level: an arm is called better or worse if its adjusted p value is below this."""

Call = Literal["better", "worse", "no detectable difference", "equal", "one run", "two seeds", ""]
"""The result of an arm against the baseline. `one run` and `two seeds` mean that there are too few runs to judge. Empty means no
comparison."""

_Logs = Mapping[str, Mapping[int, float]]
"""The logarithms of values, by arm and seed."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One quantity of one arm, compared with the baseline."""

    values: dict[int, float]
    """The value of each run, by seed. Runs without a value are absent."""
    num_seeds: int
    """The number of seeds that were run."""
    mean: Estimate | None
    """The mean over seeds. None if some run has no value: the mean of the other runs would make the arm look too
    good."""
    difference: Difference | None
    """The difference from the baseline. None for the baseline, and if the two cannot be compared because a value is
    missing or not positive."""
    p_adjusted: float
    """The p value adjusted for all arms. For an A/A arm, the unadjusted p value. NaN if there is no p value."""
    call: Call
    """The result in words."""


def row(quantity: Quantity, values: Mapping[str, dict[int, float]], arms: Arms) -> dict[str, Cell]:
    """Compares one quantity of all arms with the baseline.

    Args:
        quantity: the quantity.
        values: its values by arm and seed.
        arms: the arms.

    Returns:
        A table cell for each arm.
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
    """Returns the logarithms of the values of all arms that can be compared.

    Leaves out an arm if some value is not positive, because ratios need positive values. Also leaves out an arm if some
    run has no value, because the other runs would make the arm look too good.
    """
    return {
        name: {seed: math.log(value) for seed, value in values[name].items()}
        for name, runs in arms.runs.items()
        if runs and len(values[name]) == len(runs) and min(values[name].values()) > 0
    }


def _by_seeds(quantity: Quantity, logs: _Logs, rivals: Sequence[str], arms: Arms) -> dict[str, Difference | None]:
    """Compares arms with the baseline by their runs.

    An arm that takes its settings from the baseline (`tuned_as`) is paired with it by seed. If the quantity does not
    depend on the seed, all arms are paired by seed. The other arms are independent of the baseline and are compared with
    it as one family. The A/A arm is judged alone.

    Args:
        quantity: the quantity.
        logs: the logarithms of its values.
        rivals: the arms to compare with the baseline, without the A/A arm.
        arms: all arms of the cell.

    Returns:
        The difference of each arm from the baseline. None if an arm shares no seed with the baseline.
    """
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
    """Compares two arms over the seeds that both have.

    If the quantity depends on the seed and there are fewer than `FEWEST_SEEDS` seeds, the result has no interval,
    unless the arms are equal.

    Args:
        ours: the logarithms of the arm's values, by seed.
        theirs: the logarithms of the baseline's values, by seed.
        family: the number of comparisons that are judged together.
        depends_on_seed: see `Quantity`.

    Returns:
        The difference. None if the arms have no seed in common.
    """
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    logs = [ours[seed] - theirs[seed] for seed in seeds]
    if depends_on_seed and len(seeds) < FEWEST_SEEDS and max(map(abs, logs)) > ARITHMETIC:
        return judged(statistics.fmean(logs), math.nan, 0, len(seeds))
    values, others = (np.exp([of_arm[seed] for seed in seeds]) for of_arm in (ours, theirs))
    return paired(values, others, family)


def _by_timing(quantity: Quantity, logs: _Logs, rivals: Sequence[str], arms: Arms) -> dict[str, Difference | None]:
    """Compares arms with the baseline by the timing run.

    Step times are paired by generation, because the arms take turns within each generation. See `_by_seeds` for the
    arguments.
    """
    if quantity.timed == "steps":
        return {name: _time_to_target(name, logs, len(rivals), arms) for name in rivals}
    return {name: paired(arms.times[name], arms.times[arms.baseline], len(rivals)) for name in rivals}


def _time_to_target(name: str, logs: _Logs, family: int, arms: Arms) -> Difference | None:
    """Compares an arm's time to the target with the baseline's: the ratio of step counts times the ratio of step times.

    If the arm is kin to the baseline, their runs are paired by seed. Returns None if they then have no seed in common.
    """
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
    """Returns p values adjusted for all arms.

    The p values of arms that were judged at once are already adjusted. Holm's procedure adjusts all others.

    Args:
        found: the difference of each arm.
        family: the number of comparisons that are judged together.
    """
    alone = {name: difference.p for name, difference in found.items() if math.isnan(difference.p_family)}
    at_once = {name: difference.p_family for name, difference in found.items() if name not in alone}
    return dict(zip(alone, holm([*alone.values()], family), strict=True)) | at_once


def _mean(
    quantity: Quantity, values: Mapping[int, float], num_runs: int, times: Sequence[float] | None
) -> Estimate | None:
    """Returns the mean over seeds or, for the step time, over the generations of the timing run.

    Returns None if some run has no value. The mean of a quantity that depends on the seed has an interval only if there
    are at least `FEWEST_SEEDS` seeds.
    """
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
        return "no detectable difference"
    return "better" if (ratio.value < 1) == (quantity.better == "lower") else "worse"
