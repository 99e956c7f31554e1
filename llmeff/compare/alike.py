"""Groups runs by cell, checks that they may be compared, and finds kin (arms that are alike for the same seed)."""

import itertools
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llmeff.compare.intervals import ARITHMETIC
from llmeff.compare.ledger import Entry

LABELLED = 0.02
"""Budgets in labelled pixels count as equal if they differ by at most this fraction. Runs on the same number of images
differ in their labelled pixels, because every seed draws other images."""


def show_cell(cell: Mapping[str, Any]) -> str:
    """Returns the values of the axes as text: `train.batch = 16`."""
    return ", ".join(f"{name} = {value}" for name, value in cell.items())


def in_cell(cell: Mapping[str, Any]) -> str:
    """Returns the values of the axes in parentheses, to be appended to a name. Empty if the study has no axes."""
    return f" ({show_cell(cell)})" if cell else ""


def by_cell(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Groups entries by cell, in the order in which the cells first appear.

    Ignores the order of the axes within a cell.

    Returns:
        The entries of each cell. The key is the cell as JSON with sorted keys.
    """
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(json.dumps(entry.cell, sort_keys=True), []).append(entry)
    return found


# -- differences that make runs incomparable


def differences(entries: Sequence[Entry]) -> list[str]:
    """Returns why runs cannot be compared, one sentence per reason: different data, items, splits or budgets.

    Empty if the runs can be compared. Ignores failed and unfinished runs.
    """
    done = [entry for entry in entries if entry.status in ("finished", "diverged")]
    traits = {
        "read different data (SHA-256 of the data and, for text, of the tokenizer)": _names_by(done, _data),
        "count different items": _names_by(done, lambda entry: entry.item),
        "are evaluated on different splits": _names_by(done, lambda entry: entry.split),
        "have different budgets, in items": _names_by_budget(done),
    }
    return [f"they {text}: {_listed(names)}" for text, names in traits.items() if len(names) > 1]


def _names_by(entries: Iterable[Entry], trait: Callable[[Entry], Any]) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for entry in entries:
        found.setdefault(trait(entry), []).append(entry.name)
    return found


def _data(entry: Entry) -> str:
    return (entry.data_sha256 or "unknown")[:12]


def _names_by_budget(entries: Sequence[Entry]) -> dict[int | None, list[str]]:
    """Groups the names of runs by budget: the number of items that a run was planned to train on.

    Leaves out runs without a completed step, because their budget is unknown. If the items are labelled pixels, budgets
    that differ by at most `LABELLED` count as equal.
    """
    names = _names_by((entry for entry in entries if entry.steps), _budget)
    return _merged(names) if {entry.item for entry in entries} == {"pixel"} else names


def _budget(entry: Entry) -> int | None:
    """Returns the items of all planned steps. If the plan is unknown, returns the items that the run trained on."""
    planned: int | None = entry.config.get("train", {}).get("steps")
    if planned is None or entry.items_per_step is None:
        return entry.items
    return round(planned * entry.items_per_step)


def _merged(names_by_budget: Mapping[int, list[str]]) -> dict[int | None, list[str]]:
    """Merges nearly equal budgets: those that exceed the lowest of their group by at most the fraction `LABELLED`."""
    found: dict[int | None, list[str]] = {}
    first = None
    for budget, names in sorted(names_by_budget.items()):
        if first is None or budget > first * (1 + LABELLED):
            first = budget
        found.setdefault(first, []).extend(names)
    return found


def _listed(names_by_value: Mapping[Any, list[str]]) -> str:
    return "; ".join(
        f"{value}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" for value, names in names_by_value.items()
    )


# -- kin: arms whose runs with the same seed are alike


def kin_of(arms: Mapping[str, Sequence[Entry]]) -> dict[str, Hashable]:
    """Returns a key for each arm.

    Arms with equal keys are kin: their runs with the same seed are alike, so pairing by seed helps.

    Two arms are kin if one takes its settings from the other (`tuned_as`). The study declares in this way that the arms
    differ in something that does not change the best settings. Two arms are also kin if they contain the same runs
    under two names. Kinship is transitive. It does not depend on measured correlations between runs, because those are
    mostly chance with so few runs.
    """
    pairs = [pair for pair in itertools.combinations(arms, 2) if hold_the_same_runs(arms[pair[0]], arms[pair[1]])]
    pairs += [(run.tuned_as, name) for name, runs in arms.items() for run in runs if run.tuned_as]
    keys: dict[str, Hashable] = {name: name for pair in [*pairs, *zip(arms, arms, strict=True)] for name in pair}
    for one, other in pairs:  # merges the two groups, so that the order of arms does not matter
        old, new = keys[other], keys[one]
        keys = {name: new if key == old else key for name, key in keys.items()}
    return keys


def hold_the_same_runs(runs: Sequence[Entry], others: Sequence[Entry]) -> bool:
    """Whether two arms read the same data and have equal loss curves, up to rounding, for all seeds that both finished.

    False if no seed is finished in both arms.
    """
    curves = {run.seed: run.curve_losses for run in others if run.is_done}
    pairs = [(run.curve_losses, curves[run.seed]) for run in runs if run.is_done and run.seed in curves]
    data = {run.data_sha256 for run in [*runs, *others]}
    return bool(pairs) and len(data) == 1 and all(_are_equal(*pair) for pair in pairs)


def _are_equal(curve: Sequence[float], other: Sequence[float]) -> bool:
    return len(curve) == len(other) > 0 and np.allclose(curve, other, rtol=ARITHMETIC, atol=0)
