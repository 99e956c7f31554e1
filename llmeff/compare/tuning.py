"""Evaluation of an arm's tuning trials: the best settings, and signs that the search range was too narrow."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmeff.compare.intervals import best_of
from llmeff.compare.ledger import Entry, Metric

NEAR = 1.01
"""A trial is near the best trial if its value is worse by at most this factor."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Results of an arm's tuning trials."""

    trials: list[tuple[dict[str, Any], float]]
    """For each trial, its settings and the value of the main metric. The value is infinitely bad if the trial did not
    finish."""
    best: dict[str, Any] | None
    """The settings of the best trial. None if no trial finished."""
    expected_best: list[float]
    """The expected best value after 1, 2, ... trials in random order."""
    at_edge: list[str]
    """Fields whose best value is the lowest or the highest value tried. A wider search may find a better value."""
    near_factor: dict[str, float]
    """If exactly one number was searched, by its field: the highest over the lowest value among the trials within 1 %
    of the best. Empty otherwise."""


def tuning_of(trials: Sequence[Entry], metric: Metric) -> Tuning | None:
    """Evaluates the trials of one arm. Returns None if there are no trials."""
    if not trials:
        return None
    settings = [entry.trial for entry in trials]
    costs = [metric.cost(entry.final(metric.name) if entry.is_done else None) for entry in trials]
    lowest = min(costs)
    best = settings[costs.index(lowest)] if math.isfinite(lowest) else None
    return Tuning(
        trials=[(tried, metric.sign * cost) for tried, cost in zip(settings, costs, strict=True)],
        best=best,
        expected_best=[metric.sign * cost for cost in best_of(costs)],
        at_edge=[] if best is None else _at_edge(best, _searched(settings)),
        near_factor={} if best is None else _near_factor(settings, costs, metric),
    )


def _searched(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns each field that is a number in all trials, with its distinct values in ascending order."""
    return {
        name: sorted({tried[name] for tried in settings})
        for name in settings[0]
        if all(_is_number(tried.get(name)) for tried in settings)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_edge(best: Mapping[str, Any], searched: Mapping[str, Sequence[float]]) -> list[str]:
    return [name for name, tried in searched.items() if len(tried) > 1 and best[name] in (tried[0], tried[-1])]


def _near_factor(settings: Sequence[Mapping[str, Any]], costs: Sequence[float], metric: Metric) -> dict[str, float]:
    """Returns the ratio of the highest to the lowest value of the searched field, among trials within 1 % of the best.

    The key is the field. Empty unless exactly one field was searched, and it is a number.
    """
    if len(settings[0]) != 1:
        return {}
    limit = NEAR**metric.sign * min(costs)
    found = {}
    for name in _searched(settings):
        near = [tried[name] for tried, cost in zip(settings, costs, strict=True) if cost <= limit]
        found[name] = max(near) / min(near) if min(near) > 0 else math.nan
    return found
