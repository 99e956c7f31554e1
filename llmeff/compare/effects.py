"""What each factor of a factorial study contributes, alone and together with others (Box, Hunter and Hunter 2005)."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmeff.compare.intervals import Difference, Estimate, Floats, holm, judged
from llmeff.compare.ledger import Entry
from llmeff.core.config import ConfigError

_ROUNDING = 1e-9
"""An effect on what does not depend on chance is none below it."""
ARITHMETIC = 1e-6
"""An effect on what is learned is none where it is below it with every seed: sums in another order do as much. Of one
optimizer and seed fp32 runs on other ranks, at other ZeRO stages, with and without recomputation end within 2e-7 of one
another (`analysis/results/contribution.parquet`)."""
FEWEST_SEEDS = 3
"""Below so many, what depends on the seed has its values by seed, and no interval: of two it is mostly chance."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What going from one level to another does to a quantity, in the mean over all other factors."""

    factors: tuple[str, ...]
    """One: a main effect. Two: by what the ratio of each grows where the other is at its second level."""
    levels: str
    """`fp32 -> bf16`; of two factors both, by `x`."""
    ratio: Estimate
    """The quantity's, of the second level over the first; its interval is NaN where seeds or runs are too few."""
    p_adjusted: float
    """Of no effect, among all effects of the study that are not none (Holm); NaN where nothing is left to judge by."""
    smallest_visible: float
    """A true ratio of so much, or its inverse, would have been found in 80 of 100 such studies, among as many effects as
    Holm's procedure judges; NaN as above."""
    is_none: bool
    """Whether it is below the noise of arithmetic."""
    by_seed: dict[int, float]
    """The ratio of each seed, where the quantity depends on it."""
    predicted: float | None
    """The ratio that the prices foresaw; None where the quantity is not predicted."""


@dataclass(frozen=True, kw_only=True)
class Effects:
    """All effects on one quantity."""

    effects: list[Effect]
    """Main effects, then pairs, in the factors' order."""
    aliased: list[str]
    """Effects that the runs cannot tell from those before; they are left out."""
    num_runs: int
    """With the quantity."""
    seeds: tuple[int, ...]
    """What was judged by: seeds of which all combinations that are kept have the quantity; none where it does not depend on the
    seed."""
    dropped_seeds: tuple[int, ...]
    """Seeds of which some combination has no value, so that factors are not balanced: they are left out."""
    dropped_combinations: tuple[dict[str, str], ...]
    """Combinations, as the level of each factor, that are left out because some seeds lack them: keeping them costs more runs."""


def effects(
    entries: Sequence[Entry],
    value: Callable[[Entry], float | None],
    predicted: Callable[[Entry], float | None] | None = None,
    *,
    depends_on_seed: bool = True,
) -> Effects:
    """Fits the logarithm of a quantity by the levels of all factors and pairs of them.

    Where the quantity depends on the seed, runs of one seed are no replicates: what a factor does differs from seed to seed, and
    by how much differs from factor to factor. So each seed is fitted alone, and each effect is judged by Student's t over
    its own values by seed, with one degree of freedom fewer than seeds: the stratum of seed by factor in a design of split
    plots (Box, Hunter and Hunter 2005, chapter 9), of this factor alone. Seeds must then have the same combinations: where some
    lack some, seeds and combinations are left out until they do (`_unbalanced`). Otherwise all runs are fitted at once, with
    seeds as blocks, and what is left over is the error.

    Args:
        entries: final runs, whose `factors` have two levels each.
        value: the quantity, positive; None where a run does not have it, which leaves the run out.
        predicted: the same as it was foreseen.
        depends_on_seed: see `Quantity`.

    Raises:
        ConfigError: there are no factors, or one has more or fewer than two levels.
    """
    known = [(entry, value(entry)) for entry in entries]
    used = [(entry, number) for entry, number in known if number is not None and math.isfinite(number) and number > 0]
    levels = _levels([entry for entry, _ in used])
    dropped, left_out = _unbalanced([entry for entry, _ in used], levels) if depends_on_seed else ([], [])
    used = [
        (entry, number) for entry, number in used
        if entry.seed not in dropped and _combination(entry, levels) not in left_out
    ]  # fmt: skip
    runs = [entry for entry, _ in used]
    design, terms, aliased = _design(runs, levels)
    logs = np.log(np.array([number for _, number in used], dtype=np.float64))
    foreseen: Floats | None = None
    if predicted is not None:
        guesses = [predicted(entry) for entry in runs]
        if all(guess is not None and guess > 0 for guess in guesses):
            foreseen = _fit(design, np.log(np.array(guesses, dtype=np.float64)))[0][-len(terms) :]
    scales = [2 ** len(term) for term in terms]  # from -1 to 1; of a pair, what differs between two such ways
    seeds = tuple(sorted({entry.seed for entry in runs}))
    if depends_on_seed:
        judged_terms = _by_seed(design[:, len(seeds) :], logs, runs, seeds, scales)
    else:
        judged_terms = _by_run(design, logs, scales)
    adjusted = holm([math.nan if own.is_none else own.difference.p for own in judged_terms])
    return Effects(
        effects=[
            Effect(
                factors=term,
                levels=" x ".join(" -> ".join(levels[name]) for name in term),
                ratio=own.difference.ratio,
                p_adjusted=1.0 if own.is_none else p,
                smallest_visible=own.difference.smallest_visible,
                is_none=own.is_none,
                by_seed=own.by_seed,
                predicted=None if foreseen is None else math.exp(scale * float(foreseen[place])),
            )
            for place, (term, scale, own, p) in enumerate(zip(terms, scales, judged_terms, adjusted, strict=True))
        ],
        aliased=aliased,
        num_runs=len(used),
        seeds=seeds if depends_on_seed else (),
        dropped_seeds=tuple(dropped),
        dropped_combinations=tuple(dict(zip(levels, own, strict=True)) for own in left_out),
    )


@dataclass(frozen=True)
class _Judged:
    difference: Difference
    is_none: bool
    by_seed: dict[int, float]


def _combination(run: Entry, levels: Iterable[str]) -> tuple[str, ...]:
    """The run's levels, in the order of the study's factors, whatever that of its own."""
    return tuple(run.factors[name] for name in levels)


def _unbalanced(runs: Sequence[Entry], levels: dict[str, list[str]]) -> tuple[list[int], list[tuple[str, ...]]]:
    """Seeds and combinations to leave out, so that each seed that is left has each combination that is left.

    The largest such set is hard to find, so a greedy rule goes towards it: out goes, one at a time, the seed or combination
    that lacks the largest share of what it should have, and so has the fewest runs to lose. Of equals a seed goes, since
    combinations are what tells effects apart; of equal seeds or combinations the last.
    """
    had = {(run.seed, _combination(run, levels)) for run in runs}
    seeds = sorted({run.seed for run in runs})
    combinations = [own for own in itertools.product(*levels.values()) if any((seed, own) in had for seed in seeds)]
    dropped: list[int] = []
    left_out: list[tuple[str, ...]] = []
    while True:
        of_seed = [sum((seed, own) not in had for own in combinations) / len(combinations) for seed in seeds]
        of_combination = [sum((seed, own) not in had for seed in seeds) / len(seeds) for own in combinations]
        worst = max(*of_seed, *of_combination)
        if worst == 0:
            return sorted(dropped), left_out
        if worst in of_seed:
            dropped.append(seeds.pop(_last(of_seed, worst)))
        else:
            left_out.append(combinations.pop(_last(of_combination, worst)))


def _last(values: Sequence[float], value: float) -> int:
    return max(place for place, own in enumerate(values) if own == value)


def _design(runs: Sequence[Entry], levels: dict[str, list[str]]) -> tuple[Floats, list[tuple[str, ...]], list[str]]:
    """A column for each seed, then one for each term that these runs tell from those before; the terms, and the others."""
    seeds = sorted({run.seed for run in runs})
    codes = {name: np.array([2.0 * own.index(run.factors[name]) - 1 for run in runs]) for name, own in levels.items()}
    columns: list[Floats] = [np.array([float(run.seed == seed) for run in runs]) for seed in seeds]
    terms: list[tuple[str, ...]] = []
    aliased: list[str] = []
    for term in [*((name,) for name in levels), *itertools.combinations(levels, 2)]:
        column = np.prod([codes[name] for name in term], axis=0)
        if np.linalg.matrix_rank(np.stack([*columns, column])) > len(columns):
            columns.append(column)
            terms.append(term)
        else:
            aliased.append(" x ".join(term))
    return np.stack(columns, axis=1), terms, aliased


def _by_seed(
    codes: Floats, logs: Floats, runs: Sequence[Entry], seeds: Sequence[int], scales: Sequence[int]
) -> list[_Judged]:
    """Each effect by its own values, one a seed."""
    of_run = np.array([run.seed for run in runs])
    each = []
    for seed in seeds:
        own = of_run == seed
        whole = np.column_stack([np.ones(own.sum()), codes[own]])
        each.append(np.linalg.lstsq(whole, logs[own], rcond=None)[0][1:] * scales)
    of_term = np.array(each).T
    nones = [bool((abs(values) < ARITHMETIC).all()) for values in of_term]
    family = nones.count(False)  # of Holm's procedure, which tests nothing of the others
    found = []
    for values, is_none in zip(of_term, nones, strict=True):
        error = float(values.std(ddof=1)) / math.sqrt(len(seeds)) if len(seeds) >= FEWEST_SEEDS else math.nan
        difference = judged(float(values.mean()), error, len(seeds) - 1, len(seeds), family)
        ratios = np.exp(values).tolist()
        found.append(_Judged(difference, is_none, dict(zip(seeds, ratios, strict=True))))
    return found


def _by_run(design: Floats, logs: Floats, scales: Sequence[int]) -> list[_Judged]:
    """Each effect by what all of them leave over."""
    coefficients, errors, freedom = _fit(design, logs)
    first = len(coefficients) - len(scales)
    found = []
    for coefficient, own_error, scale in zip(coefficients[first:], errors[first:], scales, strict=True):
        log, error = scale * float(coefficient), scale * float(own_error)
        if is_none := error == 0 and abs(log) < _ROUNDING:
            log = 0.0
        found.append(_Judged(judged(log, error, freedom, len(logs), len(scales)), is_none, {}))
    return found


def is_factorial(entries: Sequence[Entry]) -> bool:
    """Whether these runs are combinations of at least two factors, each with two levels among them."""
    levels = _found_levels(entries)
    is_whole = all(entry.factors.keys() == levels.keys() for entry in entries)
    return len(levels) > 1 and is_whole and all(len(own) == 2 for own in levels.values())


def _found_levels(entries: Sequence[Entry]) -> dict[str, list[str]]:
    levels: dict[str, list[str]] = {}
    for entry in entries:
        for name, level in entry.factors.items():
            if level not in levels.setdefault(name, []):
                levels[name].append(level)
    return levels


def _levels(entries: Sequence[Entry]) -> dict[str, list[str]]:
    levels = _found_levels(entries)
    wrong = [f"{name} ({', '.join(own)})" for name, own in levels.items() if len(own) != 2]
    if wrong:
        raise ConfigError(f"a factor of a factorial study has two levels: {'; '.join(wrong)}")
    if not levels or any(entry.factors.keys() != levels.keys() for entry in entries):
        raise ConfigError("these runs are no factorial study: their arms name no factors, or not all the same")
    return levels


def _fit(design: Floats, logs: Floats) -> tuple[Floats, Floats, int]:
    """Least squares: coefficients, their standard errors, and the degrees of freedom that are left."""
    coefficients = np.asarray(np.linalg.lstsq(design, logs, rcond=None)[0], dtype=np.float64)
    freedom = len(logs) - design.shape[1]
    residual = logs - design @ coefficients
    scale = math.nan if freedom == 0 else float(residual @ residual) / freedom
    if scale < 1e-24:  # what does not depend on chance is as exact as doubles are
        scale = 0.0
    errors: Floats = np.sqrt(scale * np.diag(np.linalg.inv(design.T @ design)))
    return coefficients, errors, freedom
