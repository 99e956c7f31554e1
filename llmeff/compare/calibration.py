"""How good predictions were: each predicted quantity against what was measured, over all runs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from llmeff.compare.ledger import Entry


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How good the predictions of one quantity were."""

    n: int
    """Runs for which it was predicted and measured."""
    median: float
    """The median of |predicted / measured - 1|."""
    worst: float
    """The largest of predicted / measured - 1 by size, with its sign."""
    worst_run: str
    """The run that had it."""


def calibrate(entries: Sequence[Entry]) -> dict[str, Calibration]:
    """The calibration of every quantity that was both predicted and measured."""
    errors: dict[str, list[tuple[float, str]]] = {}
    for entry in entries:
        for quantity, predicted in entry.predicted.items():
            measured = entry.measured.get(quantity)
            if measured is not None:
                error = predicted / measured - 1 if measured else math.inf if predicted else 0.0
                errors.setdefault(quantity, []).append((error, entry.name))
    return {quantity: _calibration(named_errors) for quantity, named_errors in errors.items()}


def _calibration(named_errors: Sequence[tuple[float, str]]) -> Calibration:
    worst, name = max(named_errors, key=lambda pair: abs(pair[0]))
    median = statistics.median(abs(error) for error, _ in named_errors)
    return Calibration(n=len(named_errors), median=median, worst=worst, worst_run=name)
