"""What a few runs say of a difference, and how sure it is; all of it on logarithms, so that differences are ratios.

Runs of one seed that differ by something small (precision, the format of state) are alike: their paired ratios are judged
by Student's t, and several of them together by Holm's procedure. Methods that were tuned apart share a seed's data order and
little else: they are judged as independent, all against one baseline at once (`many_to_one`). Units of one run (documents,
images) are resampled only where there are many.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""Of every interval."""
POWER = 0.8
"""With which the smallest visible difference would have been found."""
FEW_UNITS = 100
"""Below so many units nothing is resampled: the interval would be too narrow."""

OWN_SPREAD = 0.012
"""Below this p (an F test of its variance against that of all others) an arm is judged by its own spread, not the pooled one."""
REFUTED = 0.01
"""Below this p over all arms (Bonferroni) spreads are so unlike that nothing is pooled."""

Floats = npt.NDArray[np.float64]

Method = Literal["paired t", "Dunnett", "own spread", "Welch", "A/A"]
"""How a difference is judged; see `paired` and `many_to_one`."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its interval."""

    value: float
    """The mean; of ratios, the geometric mean."""
    lower: float
    """95 % confidence; NaN of a single value."""
    upper: float
    """95 % confidence; NaN of a single value."""
    n: int
    """Independent values in it."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method against a baseline."""

    ratio: Estimate
    """The method's quantity over the baseline's. Its interval is of all comparisons of a family at once where those are
    judged so (`many_to_one`), and else of this one alone."""
    p: float
    """Of Student's t, two-sided, of no difference, alone; NaN where runs are too few."""
    smallest_visible: float
    """A true ratio of so much, or its inverse, would have been found in 80 of 100 such comparisons, with what the whole family
    asks (of Holm's steps the first, which asks most); NaN where runs are too few."""
    method: Method = "paired t"
    """How it was judged."""
    p_family: float = math.nan
    """Among all of a family that is judged at once; NaN of those that Holm's procedure is left to."""


def mean_interval(values: Sequence[float] | Floats, fewest: int = 2) -> Estimate:
    """The mean of independent values, with Student's interval (Student 1908).

    Args:
        values: at least one.
        fewest: of fewer values there is no interval.

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
    """The geometric mean of ratios, given as their logarithms."""
    found = mean_interval(logs)
    return Estimate(value=math.exp(found.value), lower=math.exp(found.lower), upper=math.exp(found.upper), n=found.n)


def paired(method: Sequence[float] | Floats, baseline: Sequence[float] | Floats, family: int = 1) -> Difference:
    """Compares values of the same seeds, in the same order.

    Args:
        method: positive values.
        baseline: as many.
        family: how many such comparisons are judged together.

    Raises:
        ValueError: their numbers differ, or a value is not positive.
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
    """What a mean logarithm says, by Student's t.

    Args:
        mean: of logarithms of ratios.
        error: its standard error; NaN where nothing is left to judge it by.
        freedom: degrees of freedom that the error is known with.
        n: values in it.
        family: how many are judged together.
    """
    from scipy.special import stdtr

    if math.isnan(error):
        ratio = Estimate(value=math.exp(mean), lower=math.nan, upper=math.nan, n=n)
        return Difference(ratio=ratio, p=math.nan, smallest_visible=math.nan)
    half = _t(0.5 + LEVEL / 2, freedom) * error
    ratio = Estimate(value=math.exp(mean), lower=math.exp(mean - half), upper=math.exp(mean + half), n=n)
    if error == 0:  # all pairs differ by the same: as sure as n values can be of something, or of nothing
        return Difference(ratio=ratio, p=1.0 if mean == 0 else 0.0, smallest_visible=1.0)
    p = float(2 * stdtr(freedom, -abs(mean) / error))
    asked = _t(1 - (1 - LEVEL) / 2 / max(1, family), freedom)
    return Difference(ratio=ratio, p=p, smallest_visible=math.exp((asked + _t(POWER, freedom)) * error))


def many_to_one(
    baseline: Floats, arms: Sequence[Floats], *, family: int | None = None, kin: Sequence[Hashable] | None = None
) -> list[Difference]:
    """Compares independent arms with one baseline, all at once: intervals and p values are simultaneous, and agree.

    Where spreads are alike all runs together tell how large the spread is (Dunnett 1955, for any numbers of runs). An arm
    whose variance stands out from that of all others (F test, p below `OWN_SPREAD`) is judged by its own beside the others', with
    the degrees of freedom of its own, which are safe (Mickey and Brown 1966), and Šidák's correction. Where one stands out by
    `REFUTED` over all arms, nothing is pooled, and all are judged so. A single arm is judged by Welch's t (1947).

    A rule that looks at spreads first has errors of its own, so both bounds were chosen by simulation: the pooled procedure alone
    calls an arm of three times the others' spread different far too often, and a bound that sees every such arm costs the power
    to see anything else. What came of it is in `analysis/results/coverage.json`. Six arms of 1.5 times the spread of six others
    are seldom seen to be so: then 7.6 % of families err.

    Args:
        baseline: (n,) logarithms of its runs' values.
        arms: of each other arm, (n_i,).
        family: how many comparisons are judged together, where there are more than these.
        kin: of each arm, a key; arms of one key have noise in common, and tell of the spread as one. None: all are apart.

    Returns:
        one for each arm; without an interval where the arm or the baseline has fewer than two runs.
    """
    count = max(family or len(arms), 1)
    able = [place for place, own in enumerate(arms) if len(own) > 1 and len(baseline) > 1]
    found = [judged(float(own.mean() - baseline.mean()), math.nan, 0, len(own)) for own in arms]
    found = [replace(own, method="Welch" if count == 1 else "Dunnett") for own in found]
    if not able:
        return found
    if count == 1:
        found[able[0]] = _apart(arms[able[0]], baseline, 1, None, "Welch")
        return found
    keys = [kin[place] if kin is not None else place for place in able]
    spreads = _Spreads.of(baseline, [arms[place] for place in able], keys)
    shares = tuple(len(arms[place]) / (len(arms[place]) + len(baseline)) for place in able)
    shares += (min(shares),) * (count - len(able))  # of those that others judge: less correlation asks more
    for place, key in zip(able, keys, strict=True):
        own = arms[place]
        if spreads.is_refuted or spreads.is_baseline_apart:
            found[place] = _apart(own, baseline, count, min(len(own), len(baseline)) - 1, "own spread")
        elif key in spreads.apart:
            found[place] = _apart(own, baseline, count, len(own) - 1, "own spread", spreads.variance)
        else:
            found[place] = _pooled(own, baseline, spreads.variance, spreads.freedom, shares)
    return found


def same_settings(again: Floats, baseline: Floats) -> Difference:
    """Compares two arms of the same settings (A/A), by Student's t with one variance, which they have: alone, in no family.

    Args:
        again: (n,) logarithms.
        baseline: (m,) logarithms.
    """
    freedom = len(again) + len(baseline) - 2
    mean = float(again.mean() - baseline.mean())
    if freedom < 1:
        return replace(judged(mean, math.nan, 0, len(again)), method="A/A")
    squares = sum(float(((own - own.mean()) ** 2).sum()) for own in (again, baseline))
    error = math.sqrt(squares / freedom * (1 / len(again) + 1 / len(baseline)))
    found = judged(mean, error, freedom, len(again))
    return replace(found, method="A/A", p_family=found.p)


@dataclass(frozen=True, kw_only=True)
class _Spreads:
    """What the runs of all arms tell of the variance of a logarithm."""

    variance: float
    """Over all arms but those that are judged by their own, and whose own stands out over the whole family too."""
    freedom: float
    """Of it."""
    apart: frozenset[Hashable]
    """Arms, by their keys, whose own variance stands out."""
    is_baseline_apart: bool
    """Whether the baseline's does."""
    is_refuted: bool
    """Whether spreads are so unlike that nothing should be pooled."""

    @classmethod
    def of(cls, baseline: Floats, arms: Sequence[Floats], keys: Sequence[Hashable]) -> "_Spreads":
        from scipy.special import fdtrc

        groups: dict[Hashable, list[Floats]] = {None: [baseline]}
        for key, own in zip(keys, arms, strict=True):
            groups.setdefault(("arm", key), []).append(own)
        variances = [float(np.mean([own.var(ddof=1) for own in those])) for those in groups.values()]
        freedoms = [float(np.mean([len(own) - 1 for own in those])) for those in groups.values()]
        squares = [variance * freedom for variance, freedom in zip(variances, freedoms, strict=True)]
        p_values = []
        for variance, freedom, square in zip(variances, freedoms, squares, strict=True):
            rest, left = sum(squares) - square, sum(freedoms) - freedom
            ratio = variance * left / rest if rest > _NOTHING * sum(squares) else math.inf if variance > 0 else 1.0
            p_values.append(float(fdtrc(freedom, left, ratio)) if math.isfinite(ratio) else 0.0)
        # what is judged by the pooled variance has a part in it, also where few arms make the bound over all the looser one
        kept = [place for place, p in enumerate(p_values) if p >= OWN_SPREAD or p * len(groups) >= 1 - LEVEL]
        freedom = sum(freedoms[place] for place in kept)
        names = [key[1] if isinstance(key, tuple) else None for key in groups]
        return cls(
            variance=sum(squares[place] for place in kept) / freedom,
            freedom=freedom,
            apart=frozenset(name for name, p in zip(names[1:], p_values[1:], strict=True) if p < OWN_SPREAD),
            is_baseline_apart=p_values[0] < OWN_SPREAD,
            is_refuted=min(p_values) * len(groups) < REFUTED,
        )


_NOTHING = 1e-12
"""A share of all squares that rounding makes of none."""


def _apart(
    own: Floats, baseline: Floats, count: int, safe: int | None, method: Method, theirs: float | None = None
) -> Difference:
    """Two arms by their own spreads, as one of so many comparisons (Šidák 1967); `theirs`: the baseline's variance, where known better."""
    variances = float(own.var(ddof=1)), float(baseline.var(ddof=1)) if theirs is None else theirs
    squares = [variance / len(each) for variance, each in zip(variances, (own, baseline), strict=True)]
    freedom = float(safe or 1)
    if safe is None and sum(squares) > 0:  # Satterthwaite 1946
        ways = (len(own) - 1, len(baseline) - 1)
        freedom = sum(squares) ** 2 / sum(square**2 / way for square, way in zip(squares, ways, strict=True))
    mean, error = float(own.mean() - baseline.mean()), math.sqrt(sum(squares))
    asked = _t(0.5 + LEVEL ** (1 / count) / 2, freedom)
    alone = judged(mean, error, freedom, len(own))
    p_family = -math.expm1(count * math.log1p(-alone.p)) if alone.p < 1 else 1.0
    return _at_once(alone, mean, error, freedom, asked, p_family, method)


def _pooled(own: Floats, baseline: Floats, variance: float, freedom: float, shares: tuple[float, ...]) -> Difference:
    mean, error = float(own.mean() - baseline.mean()), math.sqrt(variance * (1 / len(own) + 1 / len(baseline)))
    alone = judged(mean, error, freedom, len(own))
    p_family = alone.p if error == 0 else max(alone.p, 1 - largest_of(abs(mean) / error, shares, freedom))
    return _at_once(alone, mean, error, freedom, _asked(shares, freedom), p_family, "Dunnett")


def _at_once(
    alone: Difference, mean: float, error: float, freedom: float, asked: float, p_family: float, method: Method
) -> Difference:
    """A comparison with the interval, and the smallest difference, of all of its family."""
    low, high = (math.exp(mean + side * asked * error) for side in (-1, 1))
    return Difference(
        ratio=replace(alone.ratio, lower=low, upper=high),
        p=alone.p,
        smallest_visible=math.exp((asked + _t(POWER, freedom)) * error),
        method=method,
        p_family=p_family,
    )


@lru_cache
def largest_of(value: float, shares: tuple[float, ...], freedom: float) -> float:
    """The probability that no |t| of several comparisons with one baseline is above a value (Dunnett 1955).

    The t values of arms i and j, whose variance is one, correlate by sqrt(share_i share_j): given the baseline's mean and the
    variance they are independent, which leaves two integrals, by quadrature.

    Args:
        value: at least 0.
        shares: n_i / (n_i + n) of each arm with n_i runs, where the baseline has n.
        freedom: of the pooled variance.
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
    """Points and weights of a normal density, of which one half stands for both, and of -1 to 1; weights sum to 1."""
    points, weights = np.polynomial.hermite_e.hermegauss(48)
    levels, level_weights = np.polynomial.legendre.leggauss(64)
    half = points > 0
    return points[half], weights[half] / weights[half].sum(), levels, level_weights / 2


@lru_cache
def _asked(shares: tuple[float, ...], freedom: float) -> float:
    """The |t| that the largest of a family exceeds in 5 %."""
    from scipy.optimize import brentq

    high = _t(1 - (1 - LEVEL) / 4 / len(shares), freedom) + 1  # above Bonferroni's
    return float(brentq(lambda value: largest_of(value, shares, freedom) - LEVEL, 0.5, high, xtol=1e-6))


def _t(quantile: float, degrees: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, quantile))


def holm(p_values: Sequence[float], family: int = 0) -> list[float]:
    """Adjusts p values of a family, so that one below 0.05 is a false finding of the family in at most 5 % (Holm 1979).

    A NaN, which tested nothing, stays one and does not count.

    Args:
        p_values: to adjust.
        family: how many are judged together, where there are others beside these.
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

    It says how much the choice of units matters, and nothing of other seeds.

    Args:
        method: (units,) sums of losses, and (units,) counts.
        baseline: the same of the other run, of the same units in the same order.
        seed: of the resampling.
        resamples: how many.

    Raises:
        ValueError: there are fewer than 100 units, or not the same number.
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

    A trial that diverged counts as infinite, and so does an expectation that may meet none but such.
    """
    ordered = sorted(math.inf if math.isnan(loss) else loss for loss in losses)
    n = len(ordered)
    expected = []
    for spent in range(1, n + 1):
        # the lowest of `spent` is the one at `place` where all the others lie above it
        ways = [math.comb(n - place - 1, spent - 1) / math.comb(n, spent) for place in range(n)]
        expected.append(sum(way * loss for way, loss in zip(ways, ordered, strict=True) if way))
    return expected


def product(parts: Sequence[Sequence[float] | Floats], family: int = 1) -> Difference:
    """The product of independent mean ratios, as of steps and of the time of a step (Welch 1947).

    Args:
        parts: logarithms of the values of each; `n` of what is returned is the number of the first's.
        family: how many such comparisons are judged together.
    """
    means, squares, degrees = [], [], []
    for values in parts:
        numbers = np.asarray(values, dtype=np.float64)
        means.append(float(numbers.mean()))
        squares.append(float(numbers.var(ddof=1)) / len(numbers) if len(numbers) > 1 else math.nan)
        degrees.append(len(numbers) - 1)
    total = sum(squares)
    freedom = total**2 / sum(square**2 / own for square, own in zip(squares, degrees, strict=True)) if total > 0 else 1
    return replace(judged(sum(means), math.sqrt(total), freedom, len(parts[0]), family), method="Welch")
