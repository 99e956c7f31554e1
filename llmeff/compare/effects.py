"""Main effects and pairwise interactions of the factors of a factorial study (Box, Hunter and Hunter 2005)."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmeff.compare.intervals import ARITHMETIC, FEWEST_SEEDS, Difference, Estimate, Floats, holm, judged
from llmeff.compare.ledger import Entry
from llmeff.core.config import ConfigError

_ROUNDING = 1e-9
"""Bound for quantities that do not depend on the seed: with zero residual, an effect on the logarithm below this is no
effect."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The effect of one factor, or of the interaction of two, on a quantity, averaged over all other factors."""

    factors: tuple[str, ...]
    """One factor for a main effect, two factors for an interaction."""
    levels: str
    """The levels compared, such as `fp32 -> bf16`. For two factors, the levels of both, joined by ` x `."""
    ratio: Estimate
    """For a main effect: the quantity at the second level over the quantity at the first. For an interaction: the ratio
    of one factor at the second level of the other, over its ratio at the first level. The bounds are NaN if there are
    too few seeds or runs."""
    p_adjusted: float
    """The p value of the null hypothesis of no effect, adjusted by Holm's procedure over all effects on the quantity
    that are not `is_none`. 1 for those that are. NaN if there are too few seeds or runs to estimate an error."""
    smallest_visible: float
    """A true ratio of this size, or its inverse, would have been detected in 80 of 100 such studies under Holm's
    procedure. NaN if there are too few seeds or runs to estimate an error."""
    is_none: bool
    """Whether the effect is within the rounding error of the arithmetic. Such an effect counts as no effect."""
    by_seed: dict[int, float]
    """The ratio for each seed. Empty if the quantity does not depend on the seed."""
    predicted: float | None
    """The ratio according to the predictions of the prices. None if some run has no prediction."""


@dataclass(frozen=True, kw_only=True)
class Effects:
    """All effects on one quantity."""

    effects: list[Effect]
    """Main effects, then interactions, in the order of the factors."""
    aliased: list[str]
    """Effects that are left out because these runs cannot separate them from earlier effects."""
    num_runs: int
    """Number of runs in the fit."""
    seeds: tuple[int, ...]
    """The seeds in the fit. Every combination in the fit has a value for each of them. Empty if the quantity does not
    depend on the seed."""
    dropped_seeds: tuple[int, ...]
    """Seeds that are left out because some combination has no value for them, so the design would be unbalanced."""
    dropped_combinations: tuple[dict[str, str], ...]
    """Combinations, as the level of each factor, that are left out because some seeds have no value for them."""


def effects(
    entries: Sequence[Entry],
    value: Callable[[Entry], float | None],
    predicted: Callable[[Entry], float | None] | None = None,
    *,
    depends_on_seed: bool = True,
) -> Effects:
    """Fits the logarithm of a quantity to the levels of all factors and pairs of factors.

    If the quantity depends on the seed, runs with the same seed are not replicates: the effect of a factor varies from
    seed to seed, and this variation differs between factors. So each seed is fitted separately. Each effect then has
    one value per seed, and is judged by Student's t over these values. This corresponds to the seed-by-factor stratum
    of a split-plot design (Box, Hunter and Hunter 2005, chapter 9), one factor at a time. All seeds must have the same
    combinations of levels. If runs are missing, seeds and combinations are left out until this holds (`_unbalanced`).

    If the quantity does not depend on the seed, all runs are fitted together, with seeds as blocks. The residual is the
    error.

    Args:
        entries: final runs. Each of their `factors` has two levels.
        value: returns the quantity of a run. Runs for which it is None or not positive are left out.
        predicted: returns the predicted quantity of a run. None if the quantity is not predicted.
        depends_on_seed: see `Quantity`.

    Raises:
        ConfigError: there are no factors, the arms name different factors, or a factor does not have exactly two
            levels.
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
    """Returns the logarithm of `value(run)` for each run. `value` must not return None."""
    logs: Floats = np.log(np.array([value(run) for run in runs], dtype=np.float64))
    return logs


def is_factorial(entries: Sequence[Entry]) -> bool:
    """Whether the runs form a factorial study: all name the same two or more factors, each with exactly two levels."""
    levels = _found_levels(entries)
    is_whole = all(entry.factors.keys() == levels.keys() for entry in entries)
    return len(levels) > 1 and is_whole and all(len(names) == 2 for names in levels.values())


def _levels(entries: Sequence[Entry]) -> dict[str, list[str]]:
    levels = _found_levels(entries)
    wrong = [f"{factor} ({', '.join(names)})" for factor, names in levels.items() if len(names) != 2]
    if wrong:
        raise ConfigError(
            f"every factor of a factorial study needs exactly two levels, unlike these factors: {'; '.join(wrong)}"
        )
    if not levels or any(entry.factors.keys() != levels.keys() for entry in entries):
        raise ConfigError(
            "these runs are not a factorial study: all arms must set the same factors (`factors` in the arm's config)"
        )
    return levels


def _found_levels(entries: Sequence[Entry]) -> dict[str, list[str]]:
    levels: dict[str, list[str]] = {}
    for entry in entries:
        for name, level in entry.factors.items():
            if level not in levels.setdefault(name, []):
                levels[name].append(level)
    return levels


# -- balancing the design


@dataclass(frozen=True, kw_only=True)
class _Lacking:
    """Seeds and combinations that are left out because runs are missing."""

    seeds: list[int]
    combinations: list[tuple[str, ...]]

    def has(self, run: Entry, levels: Iterable[str]) -> bool:
        return run.seed in self.seeds or _combination(run, levels) in self.combinations


def _combination(run: Entry, levels: Iterable[str]) -> tuple[str, ...]:
    """Returns the run's level of each factor, in the order of `levels`, which names the study's factors."""
    return tuple(run.factors[name] for name in levels)


def _unbalanced(runs: Sequence[Entry], levels: dict[str, list[str]]) -> _Lacking:
    """Chooses the seeds and combinations to leave out, so that each remaining seed has all remaining combinations.

    Keeping as many runs as possible is a hard problem, so the choice is greedy. Each step drops the seed or combination
    with the largest fraction of missing runs. In a tie between a seed and a combination it drops the seed, because
    effects can be told apart only if enough combinations remain. In a tie between two seeds, or between two
    combinations, it drops the later of the two.
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
    """The runs. Each is a row of the matrix."""
    levels: dict[str, list[str]]
    """The two levels of each factor."""
    seeds: tuple[int, ...]
    """The seeds. Each has one of the first columns, which is 1 for runs with that seed and 0 for other runs."""
    terms: list[tuple[str, ...]]
    """The factors and pairs of factors. Each has one of the remaining columns, with values 1 and -1."""
    matrix: Floats
    """(runs, seeds + terms)."""
    aliased: list[str]
    """Terms that are left out because these runs cannot separate them from earlier terms."""

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
        """For each term, the number that its coefficient is multiplied by to give its effect.

        For a single factor this is 2, because its levels are coded as -1 and 1. For a pair of factors it is 4, because
        an interaction is the difference between two such effects.
        """
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
    """Returns the predicted ratio of each factor and pair of factors.

    All ratios are None unless every run has a positive prediction.
    """
    if predicted is None or not all(_is_positive(predicted(run)) for run in design.runs):
        return [None] * len(design.terms)
    coefficients = _fit(design, _logs(design.runs, predicted))[0][-len(design.terms) :]
    return [
        math.exp(scale * float(coefficient)) for scale, coefficient in zip(design.scales, coefficients, strict=True)
    ]


def _by_seed(design: _Design, logs: Floats) -> list[_Judged]:
    """Judges each effect by its values for the individual seeds."""
    codes = design.matrix[:, len(design.seeds) :]
    of_run = np.array([run.seed for run in design.runs])
    each = []
    for seed in design.seeds:
        rows = of_run == seed
        columns = np.column_stack([np.ones(rows.sum()), codes[rows]])
        each.append(np.linalg.lstsq(columns, logs[rows], rcond=None)[0][1:] * design.scales)
    of_term = np.array(each).T
    nones = [bool((abs(values) < ARITHMETIC).all()) for values in of_term]
    family, n = nones.count(False), len(design.seeds)  # Holm's procedure leaves out effects that are none
    found = []
    for values, is_none in zip(of_term, nones, strict=True):
        error = float(values.std(ddof=1)) / math.sqrt(n) if n >= FEWEST_SEEDS else math.nan
        difference = judged(float(values.mean()), error, n - 1, n, family)
        ratios = np.exp(values).tolist()
        found.append(_Judged(difference, is_none, dict(zip(design.seeds, ratios, strict=True))))
    return found


def _by_run(design: _Design, logs: Floats) -> list[_Judged]:
    """Judges each effect by the residual of one fit to all runs."""
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
    """Fits by least squares. Returns the coefficients, their standard errors, and the residual degrees of freedom."""
    matrix = design.matrix
    coefficients = np.asarray(np.linalg.lstsq(matrix, logs, rcond=None)[0], dtype=np.float64)
    freedom = len(logs) - matrix.shape[1]
    residual = logs - matrix @ coefficients
    scale = math.nan if freedom == 0 else float(residual @ residual) / freedom
    if scale < 1e-24:  # a residual this small is rounding of doubles: the quantity is deterministic
        scale = 0.0
    errors: Floats = np.sqrt(scale * np.diag(np.linalg.inv(matrix.T @ matrix)))
    return coefficients, errors, freedom
