"""What each factor of a factorial study contributes, alone and together with others (Box, Hunter and Hunter 2005)."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmeff.compare.intervals import ARITHMETIC, FEWEST_SEEDS, Difference, Estimate, Floats, holm, judged
from llmeff.compare.ledger import Entry
from llmeff.core.config import ConfigError

_ROUNDING = 1e-9
"""For a quantity without chance: an effect below this is none."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What going from one level to another does to a quantity, averaged over all other factors."""

    factors: tuple[str, ...]
    """One name: a main effect. Two: the factor by which the ratio of each grows if the other is at its second level."""
    levels: str
    """`fp32 -> bf16`; for two factors both, joined by `x`."""
    ratio: Estimate
    """The quantity at the second level over the first. The interval is NaN if there are too few seeds or runs."""
    p_adjusted: float
    """The p value of no effect, adjusted over all effects of the study that are not none (Holm); NaN if nothing is left to judge
    by."""
    smallest_visible: float
    """A true ratio of this size, or its inverse, would have been found in 80 of 100 such studies, among as many effects as Holm's
    procedure judges; NaN as above."""
    is_none: bool
    """Whether it is below the noise of arithmetic."""
    by_seed: dict[int, float]
    """The ratio for each seed; empty if the quantity does not depend on the seed."""
    predicted: float | None
    """The ratio by the prices' predictions; None if the quantity is not predicted."""


@dataclass(frozen=True, kw_only=True)
class Effects:
    """All effects on one quantity."""

    effects: list[Effect]
    """Main effects, then pairs, in the order of the factors."""
    aliased: list[str]
    """Effects that these runs cannot separate from earlier ones. They are left out."""
    num_runs: int
    """Runs that were used."""
    seeds: tuple[int, ...]
    """The seeds that were used. All combinations that are kept have the quantity for each of them. Empty if the quantity does not
    depend on the seed."""
    dropped_seeds: tuple[int, ...]
    """Seeds that are left out because some combination has no value, so that factors are not balanced."""
    dropped_combinations: tuple[dict[str, str], ...]
    """Combinations, as the level of each factor, that are left out because some seeds lack them and keeping them would cost more
    runs."""


def effects(
    entries: Sequence[Entry],
    value: Callable[[Entry], float | None],
    predicted: Callable[[Entry], float | None] | None = None,
    *,
    depends_on_seed: bool = True,
) -> Effects:
    """Fits the logarithm of a quantity by the levels of all factors and pairs of factors.

    If the quantity depends on the seed, runs of one seed are no replicates: the effect of a factor differs from seed to seed, and
    by how much differs from factor to factor. So each seed is fitted alone, and each effect is judged by Student's t over its own
    values by seed, with one degree of freedom fewer than seeds. This is the stratum of seed by factor in a split-plot design (Box,
    Hunter and Hunter 2005, chapter 9), for one factor at a time. It needs seeds with the same combinations: if some lack some,
    seeds and combinations are left out until none does (`_unbalanced`). If the quantity does not depend on the seed, all runs are
    fitted at once, with seeds as blocks, and the residual is the error.

    Args:
        entries: final runs, whose `factors` have two levels each.
        value: the quantity, positive; a run without it (None) is left out.
        predicted: the prediction of the same quantity.
        depends_on_seed: see `Quantity`.

    Raises:
        ConfigError: there are no factors, or one has more or fewer than two levels.
    """
    runs = [entry for entry in entries if _is_positive(value(entry))]
    levels = _levels(runs)
    lacking = _unbalanced(runs, levels) if depends_on_seed else _Lacking(seeds=[], combinations=[])
    design = _Design.of([run for run in runs if not lacking.has(run, levels)], levels)
    logs = _logs(design.runs, value)
    judged_terms = _by_seed(design, logs) if depends_on_seed else _by_run(design, logs)
    return Effects(
        effects=_described(design, judged_terms, predicted),
        aliased=design.aliased,
        num_runs=len(design.runs),
        seeds=design.seeds if depends_on_seed else (),
        dropped_seeds=tuple(sorted(lacking.seeds)),
        dropped_combinations=tuple(dict(zip(levels, names, strict=True)) for names in lacking.combinations),
    )


def _is_positive(number: float | None) -> bool:
    return number is not None and math.isfinite(number) and number > 0


def _logs(runs: Sequence[Entry], value: Callable[[Entry], float | None]) -> Floats:
    """The logarithms of a value that all runs have."""
    logs: Floats = np.log(np.array([value(run) for run in runs], dtype=np.float64))
    return logs


def is_factorial(entries: Sequence[Entry]) -> bool:
    """Whether these runs are combinations of at least two factors, with two levels each."""
    levels = _found_levels(entries)
    is_whole = all(entry.factors.keys() == levels.keys() for entry in entries)
    return len(levels) > 1 and is_whole and all(len(names) == 2 for names in levels.values())


def _levels(entries: Sequence[Entry]) -> dict[str, list[str]]:
    levels = _found_levels(entries)
    wrong = [f"{factor} ({', '.join(names)})" for factor, names in levels.items() if len(names) != 2]
    if wrong:
        raise ConfigError(f"a factor of a factorial study has two levels: {'; '.join(wrong)}")
    if not levels or any(entry.factors.keys() != levels.keys() for entry in entries):
        raise ConfigError("these runs are no factorial study: their arms name no factors, or not all the same")
    return levels


def _found_levels(entries: Sequence[Entry]) -> dict[str, list[str]]:
    levels: dict[str, list[str]] = {}
    for entry in entries:
        for name, level in entry.factors.items():
            if level not in levels.setdefault(name, []):
                levels[name].append(level)
    return levels


# -- balance


@dataclass(frozen=True, kw_only=True)
class _Lacking:
    """Seeds and combinations that are left out because runs are missing."""

    seeds: list[int]
    combinations: list[tuple[str, ...]]

    def has(self, run: Entry, levels: Iterable[str]) -> bool:
        return run.seed in self.seeds or _combination(run, levels) in self.combinations


def _combination(run: Entry, levels: Iterable[str]) -> tuple[str, ...]:
    """The run's levels in the order of the study's factors, whatever the order in the run."""
    return tuple(run.factors[name] for name in levels)


def _unbalanced(runs: Sequence[Entry], levels: dict[str, list[str]]) -> _Lacking:
    """What to leave out, so that each seed that is left has each combination that is left.

    The largest such set is hard to find, so a greedy rule approaches it. At each step it drops the seed or combination that lacks
    the largest share of its runs, and so has the fewest to lose. Between a seed and a combination that lack as much, the seed goes,
    since combinations separate the effects. Between two seeds or two combinations, the later one goes.
    """
    had = {(run.seed, _combination(run, levels)) for run in runs}
    seeds = sorted({run.seed for run in runs})
    combinations = [
        names for names in itertools.product(*levels.values()) if any((seed, names) in had for seed in seeds)
    ]
    dropped = _Lacking(seeds=[], combinations=[])
    while True:
        of_seed = [sum((seed, names) not in had for names in combinations) / len(combinations) for seed in seeds]
        of_combination = [sum((seed, names) not in had for seed in seeds) / len(seeds) for names in combinations]
        worst = max(*of_seed, *of_combination)
        if worst == 0:
            return dropped
        if worst in of_seed:
            dropped.seeds.append(seeds.pop(_last(of_seed, worst)))
        else:
            dropped.combinations.append(combinations.pop(_last(of_combination, worst)))


def _last(values: Sequence[float], value: float) -> int:
    return max(place for place, other in enumerate(values) if other == value)


# -- the fit


@dataclass(frozen=True, kw_only=True)
class _Design:
    """The design matrix of a factorial study."""

    runs: Sequence[Entry]
    """One for each row."""
    levels: dict[str, list[str]]
    """The two levels of each factor."""
    seeds: tuple[int, ...]
    """One for each of the first columns, which is 1 for runs of that seed."""
    terms: list[tuple[str, ...]]
    """One for each of the other columns, which is 1 or -1: a factor, or two."""
    matrix: Floats
    """(runs, seeds and terms)."""
    aliased: list[str]
    """Terms that are left out because these runs cannot separate them from earlier ones."""

    @classmethod
    def of(cls, runs: Sequence[Entry], levels: dict[str, list[str]]) -> "_Design":
        seeds = tuple(sorted({run.seed for run in runs}))
        codes = {
            factor: np.array([2.0 * names.index(run.factors[factor]) - 1 for run in runs])
            for factor, names in levels.items()
        }
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
        return cls(
            runs=runs, levels=levels, seeds=seeds, terms=terms, matrix=np.stack(columns, axis=1), aliased=aliased
        )

    @property
    def scales(self) -> list[int]:
        """The factor from each term's coefficient to its effect: from -1 to 1, and for a pair twice that."""
        return [2 ** len(term) for term in self.terms]


@dataclass(frozen=True)
class _Judged:
    difference: Difference
    is_none: bool
    by_seed: dict[int, float]


def _described(
    design: _Design, judged_terms: Sequence[_Judged], predicted: Callable[[Entry], float | None] | None
) -> list[Effect]:
    adjusted = holm([math.nan if found.is_none else found.difference.p for found in judged_terms])
    foreseen = _predicted_ratios(design, predicted)
    return [
        Effect(
            factors=term,
            levels=" x ".join(" -> ".join(design.levels[name]) for name in term),
            ratio=found.difference.ratio,
            p_adjusted=1.0 if found.is_none else p,
            smallest_visible=found.difference.smallest_visible,
            is_none=found.is_none,
            by_seed=found.by_seed,
            predicted=ratio,
        )
        for term, found, p, ratio in zip(design.terms, judged_terms, adjusted, foreseen, strict=True)
    ]


def _predicted_ratios(design: _Design, predicted: Callable[[Entry], float | None] | None) -> Sequence[float | None]:
    """The effects on the predictions; None unless every run has one."""
    if predicted is None or not all(_is_positive(predicted(run)) for run in design.runs):
        return [None] * len(design.terms)
    coefficients = _fit(design, _logs(design.runs, predicted))[0][-len(design.terms) :]
    return [
        math.exp(scale * float(coefficient)) for scale, coefficient in zip(design.scales, coefficients, strict=True)
    ]


def _by_seed(design: _Design, logs: Floats) -> list[_Judged]:
    """Judges each effect by its own values, one for each seed."""
    codes = design.matrix[:, len(design.seeds) :]
    of_run = np.array([run.seed for run in design.runs])
    each = []
    for seed in design.seeds:
        rows = of_run == seed
        columns = np.column_stack([np.ones(rows.sum()), codes[rows]])
        each.append(np.linalg.lstsq(columns, logs[rows], rcond=None)[0][1:] * design.scales)
    of_term = np.array(each).T
    nones = [bool((abs(values) < ARITHMETIC).all()) for values in of_term]
    family, n = nones.count(False), len(design.seeds)  # Holm's procedure does not test what is none
    found = []
    for values, is_none in zip(of_term, nones, strict=True):
        error = float(values.std(ddof=1)) / math.sqrt(n) if n >= FEWEST_SEEDS else math.nan
        difference = judged(float(values.mean()), error, n - 1, n, family)
        ratios = np.exp(values).tolist()
        found.append(_Judged(difference, is_none, dict(zip(design.seeds, ratios, strict=True))))
    return found


def _by_run(design: _Design, logs: Floats) -> list[_Judged]:
    """Judges each effect by the residual of all of them."""
    coefficients, errors, freedom = _fit(design, logs)
    first = len(design.seeds)
    found = []
    for coefficient, error_of_one, scale in zip(coefficients[first:], errors[first:], design.scales, strict=True):
        log, error = scale * float(coefficient), scale * float(error_of_one)
        if is_none := error == 0 and abs(log) < _ROUNDING:
            log = 0.0
        found.append(_Judged(judged(log, error, freedom, len(logs), len(design.terms)), is_none, {}))
    return found


def _fit(design: _Design, logs: Floats) -> tuple[Floats, Floats, int]:
    """Least squares: coefficients, their standard errors, and the degrees of freedom that are left."""
    matrix = design.matrix
    coefficients = np.asarray(np.linalg.lstsq(matrix, logs, rcond=None)[0], dtype=np.float64)
    freedom = len(logs) - matrix.shape[1]
    residual = logs - matrix @ coefficients
    scale = math.nan if freedom == 0 else float(residual @ residual) / freedom
    if scale < 1e-24:  # without chance, values agree up to the rounding of doubles
        scale = 0.0
    errors: Floats = np.sqrt(scale * np.diag(np.linalg.inv(matrix.T @ matrix)))
    return coefficients, errors, freedom
