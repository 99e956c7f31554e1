"""What a few runs say of a difference, and how certain it is; all of it on logarithms, so that differences are ratios.

Runs of one seed that differ by something small (precision, the format of state) are alike. Their paired ratios are judged by
Student's t, and several of them together by Holm's procedure. Methods that were tuned apart share the data order of a seed and
little else. They are judged as independent, all against one baseline at once (`many_to_one`). Units of one run (documents, images)
are resampled only if there are many.
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
"""The probability with which the smallest visible difference would have been found."""
FEW_UNITS = 100
"""With fewer units nothing is resampled: the interval would be too narrow."""
FEWEST_SEEDS = 3
"""With fewer seeds, what depends on the seed is shown by seed, without an interval: one from two seeds is mostly chance."""
ARITHMETIC = 1e-6
"""What is learned is equal if it differs by less than this for every seed: summation in another order does as much. With one
optimizer and seed, fp32 runs on other numbers of ranks, at other ZeRO stages, with and without recomputation end within 2e-7 of
one another (`analysis/results/contribution.parquet`)."""

OWN_SPREAD = 0.012
"""An arm is judged by its own spread, not the pooled one, if an F test of its variance against all others has a p below this."""
REFUTED = 0.01
"""Nothing is pooled if some spread has a p below this over all arms (Bonferroni)."""

Floats = npt.NDArray[np.float64]

Method = Literal["paired t", "Dunnett", "own spread", "Welch", "A/A"]
"""How a difference is judged; see `paired`, `many_to_one` and `same_settings`."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its interval."""

    value: float
    """The mean; for ratios, the geometric mean."""
    lower: float
    """The lower end of the 95 % interval; NaN for a single value."""
    upper: float
    """The upper end; NaN for a single value."""
    n: int
    """The number of independent values."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method against a baseline."""

    ratio: Estimate
    """The method's quantity over the baseline's. The interval is simultaneous over the family if that is judged at once
    (`many_to_one`); otherwise it is for this comparison alone."""
    p: float
    """The two-sided p value of no difference, by Student's t, for this comparison alone; NaN if there are too few runs."""
    smallest_visible: float
    """A true ratio of this size, or its inverse, would have been found in 80 of 100 such comparisons, by the bound that holds for
    the whole family (the first of Holm's steps, which is the strictest); NaN if there are too few runs."""
    method: Method = "paired t"
    """How it was judged."""
    p_family: float = math.nan
    """The p value over a family that is judged at once; NaN if Holm's procedure has to adjust it."""


def mean_interval(values: Sequence[float] | Floats, fewest: int = 2) -> Estimate:
    """The mean of independent values, with Student's interval (Student 1908).

    Args:
        values: at least one.
        fewest: with fewer values there is no interval.

    Raises:
        ValueError: there is no value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        raise ValueError("a mean of no values")
    mean, n = float(numbers.mean()), len(numbers)
    if n < fewest:
        return Estimate(value=mean, lower=math.nan, upper=math.nan, n=1)
    half = _t(0.5 + LEVEL / 2, n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n)
    return Estimate(value=mean, lower=mean - half, upper=mean + half, n=n)


def ratio_interval(logs: Sequence[float] | Floats) -> Estimate:
    """The geometric mean of ratios, which are given as logarithms."""
    found = mean_interval(logs)
    return Estimate(value=math.exp(found.value), lower=math.exp(found.lower), upper=math.exp(found.upper), n=found.n)


def paired(method: Sequence[float] | Floats, baseline: Sequence[float] | Floats, family: int = 1) -> Difference:
    """Compares values of the same seeds, in the same order.

    Args:
        method: positive values.
        baseline: as many.
        family: how many such comparisons are judged together.

    Raises:
        ValueError: the numbers of values differ, or a value is not positive.
    """
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (method, baseline))
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values are paired with {len(theirs)}")
    if not ((ours > 0).all() and (theirs > 0).all()):
        raise ValueError("ratios are of positive values")
    logs = np.log(ours / theirs)
    n = len(logs)
    error = float(logs.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return judged(float(logs.mean()), error, n - 1, n, family)


def judged(mean: float, error: float, freedom: float, n: int, family: int = 1) -> Difference:
    """Judges a mean logarithm by Student's t.

    Args:
        mean: the mean of logarithms of ratios.
        error: its standard error; NaN if nothing is left to estimate it from.
        freedom: degrees of freedom of the error.
        n: the number of values.
        family: how many comparisons are judged together.
    """
    from scipy.special import stdtr

    if math.isnan(error):
        ratio = Estimate(value=math.exp(mean), lower=math.nan, upper=math.nan, n=n)
        return Difference(ratio=ratio, p=math.nan, smallest_visible=math.nan)
    half = _t(0.5 + LEVEL / 2, freedom) * error
    ratio = Estimate(value=math.exp(mean), lower=math.exp(mean - half), upper=math.exp(mean + half), n=n)
    if error == 0:  # all pairs differ by the same amount: certain, of a difference or of none
        return Difference(ratio=ratio, p=1.0 if mean == 0 else 0.0, smallest_visible=1.0)
    p = float(2 * stdtr(freedom, -abs(mean) / error))
    bound = _t(1 - (1 - LEVEL) / 2 / max(1, family), freedom)
    return Difference(ratio=ratio, p=p, smallest_visible=math.exp((bound + _t(POWER, freedom)) * error))


def many_to_one(
    baseline: Floats, arms: Sequence[Floats], *, family: int | None = None, kin: Sequence[Hashable] | None = None
) -> list[Difference]:
    """Compares independent arms with one baseline, all at once: intervals and p values are simultaneous, and agree.

    If spreads are alike, all runs together estimate the spread (Dunnett 1955, for any numbers of runs). An arm whose variance
    stands out from that of all others (F test, p below `OWN_SPREAD`) is judged by its own variance beside that of the others, with
    its own degrees of freedom, which is conservative (Mickey and Brown 1966), and Šidák's correction. If one stands out by
    `REFUTED` over all arms, nothing is pooled, and all are judged in this way. A single arm is judged by Welch's t (1947).

    A rule that looks at spreads first has errors of its own, so both bounds were chosen by simulation. The pooled procedure alone
    calls an arm with three times the others' spread different far too often. A bound that detects every such arm costs the power
    to detect anything else. The results are in `analysis/results/coverage.json`. Six arms with 1.5 times the spread of six others
    are seldom detected: then 7.6 % of families err.

    Args:
        baseline: (n,) logarithms of the baseline's values.
        arms: (n_i,) logarithms for each other arm.
        family: how many comparisons are judged together, if there are more than these.
        kin: a key for each arm. Arms of one key have noise in common, and count as one in the estimate of the spread. None: no two
            arms are kin.

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
    """Compares arms of at least two runs each, as so many of a family, by the pooled spread or by their own."""
    spreads = _Spreads.of(baseline, arms, keys)
    shares = tuple(len(values) / (len(values) + len(baseline)) for values in arms)
    shares += (min(shares),) * (count - len(arms))  # for comparisons made elsewhere: less correlation is stricter
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
    """Compares two arms with the same settings (A/A) by Student's t with one variance, outside of any family.

    Args:
        again: (n,) logarithms.
        baseline: (m,) logarithms.
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
    """What the runs of all arms say of the variance of a logarithm."""

    variance: float
    """The pooled variance. An arm has no part in it if it is judged by its own and stands out over the whole family too."""
    freedom: float
    """Its degrees of freedom."""
    apart: frozenset[Hashable]
    """The keys of arms whose own variance stands out."""
    is_baseline_apart: bool
    """Whether the baseline's variance stands out."""
    is_refuted: bool
    """Whether spreads are so unlike that nothing should be pooled."""

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
        # what is judged by the pooled variance has a part in it, even if few arms make the bound over all arms the looser one
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
    """The p value of one group's variance against that of all others (F test, one-sided)."""
    from scipy.special import fdtrc

    rest, left = sum(squares) - squares[place], sum(freedoms) - freedoms[place]
    if rest > _NOTHING * sum(squares):
        return float(fdtrc(freedoms[place], left, variance * left / rest))
    return 0.0 if variance > 0 else float(fdtrc(freedoms[place], left, 1.0))


_NOTHING = 1e-12
"""Rounding leaves up to this share of all squares when the others have none."""


def _apart(
    arm: Floats, baseline: Floats, count: int, safe: int | None, method: Method, baseline_variance: float | None = None
) -> Difference:
    """Compares two arms by their own spreads, as one of so many comparisons (Šidák 1967).

    Args:
        arm: its logarithms.
        baseline: the baseline's.
        count: comparisons in the family.
        safe: degrees of freedom; None: Satterthwaite's.
        method: the name of this way of judging.
        baseline_variance: if a better estimate is known than the variance of the baseline's runs.
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
    """Compares two arms by the pooled variance, as one of the comparisons that `shares` describes (Dunnett 1955)."""
    mean, error = float(arm.mean() - baseline.mean()), math.sqrt(variance * (1 / len(arm) + 1 / len(baseline)))
    alone = judged(mean, error, freedom, len(arm))
    p_family = alone.p if error == 0 else max(alone.p, 1 - largest_of(abs(mean) / error, shares, freedom))
    return _at_once(alone, mean, error, freedom, _bound_of_largest(shares, freedom), p_family, "Dunnett")


def _at_once(
    alone: Difference, mean: float, error: float, freedom: float, bound: float, p_family: float, method: Method
) -> Difference:
    """A comparison with the interval and the smallest visible difference that hold for its whole family."""
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
    """The probability that no |t| of several comparisons with one baseline is above a value (Dunnett 1955).

    The t values of arms i and j, which have a variance in common, correlate by sqrt(share_i share_j). Given the baseline's mean and
    the variance they are independent. That leaves two integrals, which are done by quadrature.

    Args:
        value: at least 0.
        shares: n_i / (n_i + n) for each arm with n_i runs, if the baseline has n.
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
    """Points and weights for a normal density, of which one half stands for both, and for -1 to 1. Weights sum to 1."""
    points, weights = np.polynomial.hermite_e.hermegauss(48)
    levels, level_weights = np.polynomial.legendre.leggauss(64)
    half = points > 0
    return points[half], weights[half] / weights[half].sum(), levels, level_weights / 2


@lru_cache
def _bound_of_largest(shares: tuple[float, ...], freedom: float) -> float:
    """The |t| that the largest of a family exceeds in 5 % of cases if there is no difference."""
    from scipy.optimize import brentq

    high = _t(1 - (1 - LEVEL) / 4 / len(shares), freedom) + 1  # above Bonferroni's
    return float(brentq(lambda value: largest_of(value, shares, freedom) - LEVEL, 0.5, high, xtol=1e-6))


def _t(quantile: float, degrees: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, quantile))


def holm(p_values: Sequence[float], family: int = 0) -> list[float]:
    """Adjusts p values so that, in at most 5 % of families, one of a true null is below 0.05 (Holm 1979).

    A NaN tested nothing: it stays NaN and does not count.

    Args:
        p_values: to adjust.
        family: how many are judged together, if there are more than these.
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
    """The ratio of two runs' mean losses over the same units, with a percentile interval (Efron 1979).

    The interval says how much the choice of units matters. It says nothing of other seeds.

    Args:
        method: (units,) sums of losses, and (units,) counts.
        baseline: the same for the other run, of the same units in the same order.
        seed: the seed of the resampling.
        resamples: how many resamples are drawn.

    Raises:
        ValueError: there are fewer than 100 units, or the runs have different numbers of them.
    """
    tables = [np.stack([np.asarray(part, dtype=np.float64) for part in run]) for run in (method, baseline)]
    num_units = tables[0].shape[1]
    if tables[1].shape[1] != num_units:
        raise ValueError(f"{num_units} units are set beside {tables[1].shape[1]}")
    if num_units < FEW_UNITS:
        raise ValueError(f"{num_units} units are too few to be resampled: at least {FEW_UNITS}")
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(num_units, np.full(num_units, 1 / num_units), size=resamples)
    ours, theirs = ((table[0] @ weights.T) / (table[1] @ weights.T) for table in tables)
    lower, upper = np.quantile(ours / theirs, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)).tolist()
    value = float(np.divide(*tables[0].sum(1)) / np.divide(*tables[1].sum(1)))
    return Estimate(value=value, lower=lower, upper=upper, n=num_units)


def best_of(losses: Sequence[float]) -> list[float]:
    """The expected lowest loss after 1, 2, ... of these trials in random order (Dodge et al. 2019, without replacement).

    The loss of a trial that diverged is infinite. So is an expectation over choices that may hold no other trial.
    """
    ordered = sorted(math.inf if math.isnan(loss) else loss for loss in losses)
    n = len(ordered)
    expected = []
    for spent in range(1, n + 1):
        # the lowest of `spent` trials is the one at `place` if all the others lie above it
        ways = [math.comb(n - place - 1, spent - 1) / math.comb(n, spent) for place in range(n)]
        expected.append(sum(way * loss for way, loss in zip(ways, ordered, strict=True) if way))
    return expected


def product(parts: Sequence[Sequence[float] | Floats], family: int = 1) -> Difference:
    """The product of independent mean ratios, such as numbers of steps and step times (Welch 1947).

    Args:
        parts: the logarithms of the values of each. `n` of the result is the number of values of the first.
        family: how many such comparisons are judged together.
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
