"""Accuracy of predictions: compares each predicted quantity with its measured value, over all runs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from llmeff.compare.ledger import Entry


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Accuracy of the predictions of one quantity."""

    n: int
    """Number of runs with both a predicted and a measured value."""
    median: float
    """Median over runs of |predicted / measured - 1|."""
    worst: float
    """The value of predicted / measured - 1 with the largest absolute value, signed."""
    worst_run: str
    """Name of the run with the worst prediction."""


def calibrate(entries: Sequence[Entry]) -> dict[str, Calibration]:
    """Returns the calibration of each quantity that at least one run both predicted and measured."""
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
