"""What each factor of a factorial study contributes, alone and together with others (Box, Hunter and Hunter 2005)."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmeff.compare.intervals import Estimate, Floats, holm, judged
from llmeff.compare.ledger import Entry
from llmeff.core.config import ConfigError

_ROUNDING = 1e-9
"""An effect on what does not hang on chance is none below it."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What going from one level to another does to a quantity, in the mean over all other factors."""

    factors: tuple[str, ...]
    """One: a main effect. Two: by what the ratio of each grows where the other is at its second level."""
    levels: str
    """`fp32 -> bf16`; of two factors both, by `x`."""
    ratio: Estimate
    """The quantity's, of the second level over the first."""
    p_adjusted: float
    """Of no effect, among all effects of the study (Holm); NaN where nothing is left to judge by."""
    predicted: float | None
    """The ratio that the prices foresaw; None where the quantity is not predicted."""


@dataclass(frozen=True, kw_only=True)
class Effects:
    """All effects on one quantity."""

    effects: list[Effect]
    """Main effects, then pairs, in the factors' order."""
    aliased: list[str]
    """Pairs that the runs cannot tell from another effect; they are left out."""
    num_runs: int
    """With the quantity."""


def effects(
    entries: Sequence[Entry],
    value: Callable[[Entry], float | None],
    predicted: Callable[[Entry], float | None] | None = None,
) -> Effects:
    """Fits the logarithm of a quantity by the levels of all factors and pairs of them; seeds are blocks.

    Args:
        entries: final runs, whose `factors` have two levels each.
        value: the quantity, positive; None where a run does not have it, which leaves the run out.
        predicted: the same as it was foreseen.

    Raises:
        ConfigError: there are no factors, or one has more or fewer than two levels.
    """
    known = [(entry, value(entry)) for entry in entries]
    used = [(entry, number) for entry, number in known if number is not None and math.isfinite(number) and number > 0]
    levels = _levels([entry for entry, _ in used])
    names = list(levels)
    codes = {name: np.array([2.0 * levels[name].index(entry.factors[name]) - 1 for entry, _ in used]) for name in names}
    seeds = sorted({entry.seed for entry, _ in used})
    blocks = np.array([[float(entry.seed == seed) for seed in seeds] for entry, _ in used])
    columns, terms, aliased = [*blocks.T], [], []
    for term in [*((name,) for name in names), *itertools.combinations(names, 2)]:
        column = np.prod([codes[name] for name in term], axis=0)
        if np.linalg.matrix_rank(np.stack([*columns, column])) > len(columns):
            columns.append(column)
            terms.append(term)
        else:
            aliased.append(" x ".join(term))
    design = np.stack(columns, axis=1)
    coefficients, errors, freedom = _fit(design, np.log([number for _, number in used]))
    foreseen = None
    if predicted is not None:
        guesses = [predicted(entry) for entry, _ in used]
        if all(guess is not None and guess > 0 for guess in guesses):
            foreseen = _fit(design, np.log(np.array(guesses, dtype=np.float64)))[0]
    found = []
    for place, term in enumerate(terms, start=len(seeds)):
        scale = 2 ** len(term)  # from -1 to 1; of a pair, what differs between two such ways
        log, error = scale * float(coefficients[place]), scale * float(errors[place])
        if error == 0 and abs(log) < _ROUNDING:
            log = 0.0
        fitted = judged(log, error, freedom, len(used), len(terms))
        said = None if foreseen is None else math.exp(scale * float(foreseen[place]))
        found.append((term, fitted.ratio, fitted.p, said))
    adjusted = holm([p for _, _, p, _ in found])
    return Effects(
        effects=[
            Effect(
                factors=term,
                levels=" x ".join(" -> ".join(levels[name]) for name in term),
                ratio=ratio,
                p_adjusted=own,
                predicted=said,
            )
            for (term, ratio, _, said), own in zip(found, adjusted, strict=True)
        ],
        aliased=aliased,
        num_runs=len(used),
    )


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
    if scale < 1e-24:  # what does not hang on chance is as exact as doubles are
        scale = 0.0
    errors: Floats = np.sqrt(scale * np.diag(np.linalg.inv(design.T @ design)))
    return coefficients, errors, freedom
