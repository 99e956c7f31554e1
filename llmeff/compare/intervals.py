"""What a few runs, paired by their seeds, say of a difference, and how sure it is.

A run differs from its partner of the same seed by its method alone: data order and initialization are the same. So what
is judged is the mean of the logarithms of paired ratios, by Student's t; several methods against one baseline are judged
together, by Holm's procedure. Units of one run (documents, images) are resampled only where there are many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""Of every interval."""
POWER = 0.8
"""With which the smallest visible difference would have been found."""
FEW_UNITS = 100
"""Below so many units nothing is resampled: the interval would be too narrow."""

Floats = npt.NDArray[np.float64]


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
    """A method against a baseline, over the seeds that both have."""

    ratio: Estimate
    """The method's quantity over the baseline's."""
    p: float
    """Of Student's t, two-sided, of no difference; NaN of a single pair."""
    smallest_visible: float
    """A true ratio of so much, or its inverse, would have been found in 80 of 100 such comparisons, by the first of Holm's
    steps, which asks most; NaN of a single pair."""


def mean_interval(values: Sequence[float] | Floats) -> Estimate:
    """The mean of independent values, with Student's interval (Student 1908).

    Raises:
        ValueError: there is no value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers):
        raise ValueError("a mean of no values")
    mean, n = float(numbers.mean()), len(numbers)
    if n == 1:
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


def _t(quantile: float, degrees: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, quantile))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values of a family, so that one below 0.05 is a false finding of the family in at most 5 % (Holm 1979).

    A NaN, which tested nothing, stays one and does not count.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
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


def product(logs: Sequence[float] | Floats, others: Sequence[float] | Floats, family: int = 1) -> Difference:
    """The product of two independent mean ratios, as of steps and of the time of a step (Welch 1947).

    Args:
        logs: logarithms of the first ratio's values; `n` of what is returned is their number.
        others: of the second's.
        family: how many such comparisons are judged together.
    """
    means, squares, degrees = [], [], []
    for values in (logs, others):
        numbers = np.asarray(values, dtype=np.float64)
        means.append(float(numbers.mean()))
        squares.append(float(numbers.var(ddof=1)) / len(numbers) if len(numbers) > 1 else math.nan)
        degrees.append(len(numbers) - 1)
    total = sum(squares)
    freedom = total**2 / sum(square**2 / own for square, own in zip(squares, degrees, strict=True)) if total > 0 else 1
    return judged(sum(means), math.sqrt(total), freedom, len(logs), family)
