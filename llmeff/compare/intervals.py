"""Differences between arms with few runs: estimates, confidence intervals and p values.

All statistics are computed on logarithms, so differences are ratios. Runs with the same seed that differ in something
small, such as precision or the format of the optimizer state, are alike. They are paired: Student's t judges their
ratios, and Holm's procedure adjusts several p values. Arms that were tuned separately have little in common,
even for the same seed. They count as independent, and all are compared with one baseline at once (`many_to_one`).
The units of a single run (documents or images) are resampled only if there are many.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""The confidence level of every interval."""
POWER = 0.8
"""The probability of detecting a true difference of the size `smallest_visible`."""
FEW_UNITS = 100
"""The fewest units that are resampled. With fewer units, the interval would be too narrow."""
FEWEST_SEEDS = 3
"""The fewest seeds for an interval of a quantity that depends on the seed. With fewer seeds, the values are shown by
seed, because an interval from two seeds is mostly chance."""
ARITHMETIC = 1e-6
"""Relative differences below this, for every seed, count as equal, because summation in another order causes as much.
fp32 runs with the same optimizer and seed end within 2e-7 of one another for all numbers of ranks and ZeRO stages, with
and without recomputation (`analysis/results/contribution.parquet`)."""

OWN_SPREAD = 0.012
"""Bound on the p value of an F test of an arm's variance against the variance of all other arms. An arm below this is
judged by its own spread instead of the pooled spread."""
REFUTED = 0.01
"""If the smallest p value of these F tests, multiplied by the number of arms (Bonferroni), is below this, nothing is
pooled."""

Floats = npt.NDArray[np.float64]

Method = Literal["paired t", "Dunnett", "own spread", "Welch", "A/A"]
"""The method that judges a difference; see `paired`, `many_to_one`, `same_settings` and `product`."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its confidence interval."""

    value: float
    """The mean. For ratios, the geometric mean."""
    lower: float
    """The lower bound of the 95 % interval. NaN if there are too few values."""
    upper: float
    """The upper bound of the 95 % interval. NaN if there are too few values."""
    n: int
    """The number of independent values."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between a method and a baseline."""

    ratio: Estimate
    """The method's quantity over the baseline's. The interval holds simultaneously for the family if the family was
    judged at once (`many_to_one`). Otherwise it holds for this comparison alone."""
    p: float
    """The two-sided p value of the null hypothesis of no difference, by Student's t, for this comparison alone. NaN if
    there are too few runs."""
    smallest_visible: float
    """A true ratio of this size, or its inverse, would have been detected in 80 of 100 such comparisons. The bound for
    detection is the one for the whole family; under Holm's procedure, that of its first and strictest step. NaN if
    there are too few runs."""
    method: Method = "paired t"
    """The method that judged this difference."""
    p_family: float = math.nan
    """The p value adjusted for the whole family, if the family was judged at once. NaN if Holm's procedure must still
    adjust `p`."""


def mean_interval(values: Sequence[float] | Floats, fewest: int = 2) -> Estimate:
    """Returns the mean of independent values, with the interval of Student's t (Student 1908).

    Args:
        values: at least one value.
        fewest: the smallest number of values that gives an interval. If there are fewer values, the bounds of the
            result are NaN, and its `n` is 1.

    Raises:
        ValueError: there is no value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        raise ValueError("there are no values to average")
    mean, n = float(numbers.mean()), len(numbers)
    if n < fewest:
        return Estimate(value=mean, lower=math.nan, upper=math.nan, n=1)
    half = _t(0.5 + LEVEL / 2, n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n)
    return Estimate(value=mean, lower=mean - half, upper=mean + half, n=n)


def ratio_interval(logs: Sequence[float] | Floats) -> Estimate:
    """Returns the geometric mean of ratios, with its interval.

    Args:
        logs: the logarithms of the ratios.
    """
    found = mean_interval(logs)
    return Estimate(value=math.exp(found.value), lower=math.exp(found.lower), upper=math.exp(found.upper), n=found.n)


def paired(method: Sequence[float] | Floats, baseline: Sequence[float] | Floats, family: int = 1) -> Difference:
    """Compares a method with the baseline by pairs of values, one pair for each seed.

    Args:
        method: the values of the method; all positive.
        baseline: the values of the baseline, with the same seeds in the same order; all positive.
        family: the number of comparisons that are judged together.

    Raises:
        ValueError: the numbers of values differ, or a value is not positive.
    """
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (method, baseline))
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)} values: give one of each per seed")
    if not ((ours > 0).all() and (theirs > 0).all()):
        raise ValueError("ratios need positive values")
    logs = np.log(ours / theirs)
    n = len(logs)
    error = float(logs.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return judged(float(logs.mean()), error, n - 1, n, family)


def judged(mean: float, error: float, freedom: float, n: int, family: int = 1) -> Difference:
    """Judges a mean logarithm of ratios by Student's t.

    Args:
        mean: the mean logarithm.
        error: the standard error of the mean. NaN if there are too few values to estimate it.
        freedom: the degrees of freedom of the error.
        n: the number of values.
        family: the number of comparisons that are judged together.
    """
    from scipy.special import stdtr

    if math.isnan(error):
        ratio = Estimate(value=math.exp(mean), lower=math.nan, upper=math.nan, n=n)
        return Difference(ratio=ratio, p=math.nan, smallest_visible=math.nan)
    half = _t(0.5 + LEVEL / 2, freedom) * error
    ratio = Estimate(value=math.exp(mean), lower=math.exp(mean - half), upper=math.exp(mean + half), n=n)
    if error == 0:  # all values are equal, so the difference, or its absence, is certain
        return Difference(ratio=ratio, p=1.0 if mean == 0 else 0.0, smallest_visible=1.0)
    p = float(2 * stdtr(freedom, -abs(mean) / error))
    bound = _t(1 - (1 - LEVEL) / 2 / max(1, family), freedom)
    return Difference(ratio=ratio, p=p, smallest_visible=math.exp((bound + _t(POWER, freedom)) * error))


def many_to_one(
    baseline: Floats, arms: Sequence[Floats], *, family: int | None = None, kin: Sequence[Hashable] | None = None
) -> list[Difference]:
    """Compares independent arms with one baseline, all at once.

    Intervals and p values are simultaneous and agree with each other.

    If the arms have similar spreads, all runs together estimate one pooled spread (Dunnett 1955, for any numbers of
    runs). If the variance of an arm is larger than that of all others (F test, p below `OWN_SPREAD`), the arm is judged
    by its own variance, and the baseline by the pooled variance of the rest. The degrees of freedom are then the arm's
    own, which is conservative (Mickey and Brown 1966), and Šidák's correction accounts for the family. If the variance
    of the baseline stands out, or if some variance stands out by the stricter `REFUTED`, nothing is pooled: every arm
    is judged by its own variance and the baseline's. If only one comparison is judged, Welch's t (1947) is used.

    The choice between these rules can itself be wrong, so the bounds `OWN_SPREAD` and `REFUTED` were chosen by
    simulation (`analysis/results/coverage.json`). If spreads were always pooled, an arm with three times the spread of
    the others would too often be called different. If the bounds detected every such arm, the tests would have little
    power. A remaining weakness: if six of twelve arms have 1.5 times the spread of the rest, this is seldom detected,
    and 7.6 % of families contain an error.

    Args:
        baseline: (n,) logarithms of the baseline's values.
        arms: for each arm, (n_i,) logarithms of its values.
        family: the number of comparisons that are judged together, if it exceeds the number of arms here.
        kin: a key for each arm. Arms with equal keys have noise in common, and count as one arm in the estimate of the
            spread. None if no two arms are kin.

    Returns:
        One difference for each arm. It has no interval if the arm or the baseline has fewer than two runs.
    """
    count = max(family or len(arms), 1)
    able = [place for place, values in enumerate(arms) if len(values) > 1 and len(baseline) > 1]
    found = [_without_interval(values, baseline, "Welch" if count == 1 else "Dunnett") for values in arms]
    if able and count == 1:
        found[able[0]] = _apart(arms[able[0]], baseline, 1, None, "Welch")
    elif able:
        keys = [place if kin is None else kin[place] for place in able]
        judged_at_once = _by_spreads(baseline, [arms[place] for place in able], keys, count)
        for place, difference in zip(able, judged_at_once, strict=True):
            found[place] = difference
    return found


def _without_interval(values: Floats, baseline: Floats, method: Method) -> Difference:
    return replace(judged(float(values.mean() - baseline.mean()), math.nan, 0, len(values)), method=method)


def _by_spreads(baseline: Floats, arms: Sequence[Floats], keys: Sequence[Hashable], count: int) -> list[Difference]:
    """Compares arms with the baseline, each by the pooled spread or by its own spread.

    Args:
        baseline: the logarithms of the baseline's values.
        arms: the logarithms of each arm's values, at least two per arm.
        keys: a key for each arm, equal for arms that are kin.
        count: the number of comparisons in the family.
    """
    spreads = _Spreads.of(baseline, arms, keys)
    shares = tuple(len(values) / (len(values) + len(baseline)) for values in arms)
    shares += (min(shares),) * (
        count - len(arms)
    )  # stands for comparisons made elsewhere: a lower correlation is stricter
    found = []
    for values, key in zip(arms, keys, strict=True):
        if spreads.is_refuted or spreads.is_baseline_apart:
            freedom = min(len(values), len(baseline)) - 1
            found.append(_apart(values, baseline, count, freedom, "own spread"))
        elif key in spreads.apart:
            found.append(_apart(values, baseline, count, len(values) - 1, "own spread", spreads.variance))
        else:
            found.append(_pooled(values, baseline, spreads.variance, spreads.freedom, shares))
    return found


def same_settings(again: Floats, baseline: Floats) -> Difference:
    """Compares the A/A arm with the baseline by Student's t with one common variance.

    The comparison belongs to no family.

    Args:
        again: (n,) logarithms of the values of the A/A arm.
        baseline: (m,) logarithms of the values of the baseline.
    """
    freedom = len(again) + len(baseline) - 2
    mean = float(again.mean() - baseline.mean())
    if freedom < 1:
        return replace(judged(mean, math.nan, 0, len(again)), method="A/A")
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in (again, baseline))
    error = math.sqrt(squares / freedom * (1 / len(again) + 1 / len(baseline)))
    found = judged(mean, error, freedom, len(again))
    return replace(found, method="A/A", p_family=found.p)


@dataclass(frozen=True, kw_only=True)
class _Spreads:
    """Variances of the logarithms of all arms, and the tests that decide whether they may be pooled."""

    variance: float
    """The pooled variance. It leaves out an arm whose variance stands out both by itself and after Bonferroni's
    correction."""
    freedom: float
    """The degrees of freedom of the pooled variance."""
    apart: frozenset[Hashable]
    """The keys of arms whose variance stands out, so that they are judged by their own variance."""
    is_baseline_apart: bool
    """Whether the variance of the baseline stands out."""
    is_refuted: bool
    """Whether the variances differ so much that nothing should be pooled."""

    @classmethod
    def of(cls, baseline: Floats, arms: Sequence[Floats], keys: Sequence[Hashable]) -> "_Spreads":
        kin: dict[Hashable, list[Floats]] = {}
        for key, values in zip(keys, arms, strict=True):
            kin.setdefault(key, []).append(values)
        groups = [[baseline], *kin.values()]
        freedoms = [float(np.mean([len(values) - 1 for values in group])) for group in groups]
        variances = [float(np.mean([values.var(ddof=1) for values in group])) for group in groups]
        squares = [variance * freedom for variance, freedom in zip(variances, freedoms, strict=True)]
        p_values = [_stands_out(place, squares, freedoms, variances[place]) for place in range(len(groups))]
        # An arm that is judged by the pooled variance always contributes to it, even if the second bound is the looser
        # one, as it is for few arms.
        kept = [place for place, p in enumerate(p_values) if p >= OWN_SPREAD or p * len(groups) >= 1 - LEVEL]
        freedom = sum(freedoms[place] for place in kept)
        return cls(
            variance=sum(squares[place] for place in kept) / freedom,
            freedom=freedom,
            apart=frozenset(key for key, p in zip(kin, p_values[1:], strict=True) if p < OWN_SPREAD),
            is_baseline_apart=p_values[0] < OWN_SPREAD,
            is_refuted=min(p_values) * len(groups) < REFUTED,
        )


def _stands_out(place: int, squares: Sequence[float], freedoms: Sequence[float], variance: float) -> float:
    """Returns the p value of a one-sided F test: the variance of one group against the variance of all other groups.

    Args:
        place: the index of the group.
        squares: the sum of squares of each group.
        freedoms: the degrees of freedom of each group.
        variance: the variance of the group.
    """
    from scipy.special import fdtrc

    rest, left = sum(squares) - squares[place], sum(freedoms) - freedoms[place]
    if rest > _NOTHING * sum(squares):
        return float(fdtrc(freedoms[place], left, variance * left / rest))
    return 0.0 if variance > 0 else float(fdtrc(freedoms[place], left, 1.0))


_NOTHING = 1e-12
"""A sum of squares below this fraction of the total is rounding error, and counts as zero."""


def _apart(
    arm: Floats, baseline: Floats, count: int, safe: int | None, method: Method, baseline_variance: float | None = None
) -> Difference:
    """Compares an arm with the baseline by their own variances, with Šidák's correction for the family (Šidák 1967).

    Args:
        arm: the logarithms of the arm's values.
        baseline: the logarithms of the baseline's values.
        count: the number of comparisons in the family.
        safe: the degrees of freedom. None for Satterthwaite's estimate.
        method: the method to record in the result.
        baseline_variance: the variance of the baseline. None for the sample variance of its runs.
    """
    theirs = float(baseline.var(ddof=1)) if baseline_variance is None else baseline_variance
    squares = [float(arm.var(ddof=1)) / len(arm), theirs / len(baseline)]
    freedom = float(safe or 1)
    if safe is None and sum(squares) > 0:  # Satterthwaite 1946
        degrees = (len(arm) - 1, len(baseline) - 1)
        freedom = sum(squares) ** 2 / sum(square**2 / degree for square, degree in zip(squares, degrees, strict=True))
    mean, error = float(arm.mean() - baseline.mean()), math.sqrt(sum(squares))
    bound = _t(0.5 + LEVEL ** (1 / count) / 2, freedom)
    alone = judged(mean, error, freedom, len(arm))
    p_family = -math.expm1(count * math.log1p(-alone.p)) if alone.p < 1 else 1.0
    return _at_once(alone, mean, error, freedom, bound, p_family, method)


def _pooled(arm: Floats, baseline: Floats, variance: float, freedom: float, shares: tuple[float, ...]) -> Difference:
    """Compares an arm with the baseline by the pooled variance, as part of a family (Dunnett 1955).

    Args:
        arm: the logarithms of the arm's values.
        baseline: the logarithms of the baseline's values.
        variance: the pooled variance.
        freedom: the degrees of freedom of the pooled variance.
        shares: see `largest_of`, for every comparison of the family.
    """
    mean, error = float(arm.mean() - baseline.mean()), math.sqrt(variance * (1 / len(arm) + 1 / len(baseline)))
    alone = judged(mean, error, freedom, len(arm))
    p_family = alone.p if error == 0 else max(alone.p, 1 - largest_of(abs(mean) / error, shares, freedom))
    return _at_once(alone, mean, error, freedom, _bound_of_largest(shares, freedom), p_family, "Dunnett")


def _at_once(
    alone: Difference, mean: float, error: float, freedom: float, bound: float, p_family: float, method: Method
) -> Difference:
    """Returns a comparison whose interval and smallest visible difference account for all comparisons of its family.

    Args:
        alone: the same comparison, judged without regard to the family.
        mean: the mean logarithm of the ratio.
        error: the standard error of the mean.
        freedom: the degrees of freedom of the error.
        bound: the critical |t| of the family.
        p_family: the p value adjusted for the family.
        method: the method to record in the result.
    """
    low, high = (math.exp(mean + side * bound * error) for side in (-1, 1))
    return Difference(
        ratio=replace(alone.ratio, lower=low, upper=high),
        p=alone.p,
        smallest_visible=math.exp((bound + _t(POWER, freedom)) * error),
        method=method,
        p_family=p_family,
    )


@lru_cache
def largest_of(value: float, shares: tuple[float, ...], freedom: float) -> float:
    """Returns the probability that no |t| of several comparisons with one baseline exceeds `value` (Dunnett 1955).

    The t values of arms i and j share one variance, and their correlation is sqrt(share_i share_j). Conditional
    on the baseline's mean and on the variance, they are independent. This leaves two integrals, which are computed by
    quadrature.

    Args:
        value: a bound on |t|, at least 0.
        shares: for each arm, n_i / (n_i + n), where n_i is the number of its runs and n the number of the baseline's.
        freedom: the degrees of freedom of the pooled variance.
    """
    from scipy.special import chdtri, ndtr

    points, weights, levels, level_weights = _nodes()
    scale = np.sqrt(chdtri(freedom, 0.5 - levels / 2) / freedom)
    bound = value * scale[:, None]
    product = np.ones((len(levels), len(points)))
    for share in set(shares):
        moved, rest = math.sqrt(share) * points, math.sqrt(1 - share)
        inside = ndtr((bound - moved) / rest) - ndtr((-bound - moved) / rest)
        product *= inside ** shares.count(share)
    return float(level_weights @ product @ weights)


@cache
def _nodes() -> tuple[Floats, Floats, Floats, Floats]:
    """Returns quadrature points and weights for the normal density, then for the interval -1 to 1.

    Only positive points are returned for the normal density, because the integrand is symmetric. The weights for the
    density and those for the interval each sum to 1.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(48)
    levels, level_weights = np.polynomial.legendre.leggauss(64)
    half = points > 0
    return points[half], weights[half] / weights[half].sum(), levels, level_weights / 2


@lru_cache
def _bound_of_largest(shares: tuple[float, ...], freedom: float) -> float:
    """Returns the critical |t| of a family: under the null hypothesis, its largest |t| exceeds it in 5 % of cases."""
    from scipy.optimize import brentq

    high = _t(1 - (1 - LEVEL) / 4 / len(shares), freedom) + 1  # exceeds Bonferroni's bound, so it brackets the root
    return float(brentq(lambda value: largest_of(value, shares, freedom) - LEVEL, 0.5, high, xtol=1e-6))


def _t(quantile: float, degrees: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, quantile))


def holm(p_values: Sequence[float], family: int = 0) -> list[float]:
    """Adjusts p values for multiple tests by Holm's procedure (Holm 1979).

    In at most 5 % of families, some true null hypothesis gets an adjusted p value below 0.05. NaN means that there was
    no test: it stays NaN and does not count in the family.

    Args:
        p_values: the p values to adjust.
        family: the number of tests that are judged together, if it exceeds the number of p values here.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = [math.nan] * len(p_values), 0.0
    count = max(family, len(order))
    for rank, (p, place) in enumerate(order):
        least = max(least, min(1.0, (count - rank) * p))
        adjusted[place] = least
    return adjusted


def resampled_ratio(
    method: tuple[Floats, Floats], baseline: tuple[Floats, Floats], *, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """Returns the ratio of two runs' mean losses over the same units, with a bootstrap interval (Efron 1979).

    The interval accounts for the choice of units. It does not account for the variation between seeds.

    Args:
        method: two arrays of shape (units,) for the run to compare: each unit's sum of losses, and its number of items.
        baseline: the same two arrays for the baseline run, with the same units in the same order.
        seed: the seed of the resampling.
        resamples: the number of resamples.

    Raises:
        ValueError: there are fewer than 100 units, or the numbers of units differ.
    """
    tables = [np.stack([np.asarray(part, dtype=np.float64) for part in run]) for run in (method, baseline)]
    num_units = tables[0].shape[1]
    if tables[1].shape[1] != num_units:
        raise ValueError(f"the runs have {num_units} and {tables[1].shape[1]} units: the numbers must be equal")
    if num_units < FEW_UNITS:
        raise ValueError(f"{num_units} units are too few to resample: at least {FEW_UNITS} are needed")
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(num_units, np.full(num_units, 1 / num_units), size=resamples)
    ours, theirs = ((table[0] @ weights.T) / (table[1] @ weights.T) for table in tables)
    lower, upper = np.quantile(ours / theirs, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)).tolist()
    value = float(np.divide(*tables[0].sum(1)) / np.divide(*tables[1].sum(1)))
    return Estimate(value=value, lower=lower, upper=upper, n=num_units)


def best_of(losses: Sequence[float]) -> list[float]:
    """Returns the expected lowest loss of 1, 2, ... trials, drawn at random without replacement.

    The estimator follows Dodge et al. 2019, but draws without replacement.

    Args:
        losses: the loss of each trial. NaN and infinity mark a trial that diverged. If at least k trials diverged, the
            expected lowest loss of k trials is infinite.
    """
    ordered = sorted(math.inf if math.isnan(loss) else loss for loss in losses)
    n = len(ordered)
    expected = []
    for spent in range(1, n + 1):
        # the trial at `place` is the lowest of `spent` trials if all other drawn trials come after it
        ways = [math.comb(n - place - 1, spent - 1) / math.comb(n, spent) for place in range(n)]
        expected.append(sum(way * loss for way, loss in zip(ways, ordered, strict=True) if way))
    return expected


def product(parts: Sequence[Sequence[float] | Floats], family: int = 1) -> Difference:
    """Judges a product of independent mean ratios, such as step counts times step times (Welch 1947).

    Args:
        parts: for each factor of the product, the logarithms of its values. The `n` of the result is the number of
            values of the first factor.
        family: the number of comparisons that are judged together.
    """
    means, squares, degrees = [], [], []
    for values in parts:
        numbers = np.asarray(values, dtype=np.float64)
        means.append(float(numbers.mean()))
        squares.append(float(numbers.var(ddof=1)) / len(numbers) if len(numbers) > 1 else math.nan)
        degrees.append(len(numbers) - 1)
    total = sum(squares)
    freedom = (
        total**2 / sum(square**2 / degree for square, degree in zip(squares, degrees, strict=True)) if total > 0 else 1
    )
    return replace(judged(sum(means), math.sqrt(total), freedom, len(parts[0]), family), method="Welch")
