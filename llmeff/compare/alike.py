"""Which runs belong together: runs of one cell, runs that may be compared, and arms whose runs of one seed are alike."""

import itertools
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llmeff.compare.intervals import ARITHMETIC
from llmeff.compare.ledger import Entry

LABELLED = 0.02
"""The share by which the labelled pixels of equally many images may differ."""


def show_cell(cell: Mapping[str, Any]) -> str:
    """The values of the axes for people: `train.batch = 16`."""
    return ", ".join(f"{name} = {value}" for name, value in cell.items())


def in_cell(cell: Mapping[str, Any]) -> str:
    """The cell in brackets, to follow a name; empty if the study has no axes."""
    return f" ({show_cell(cell)})" if cell else ""


def by_cell(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries by the key of their cell, in the order of their first entry. The order of the axes does not matter."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(json.dumps(entry.cell, sort_keys=True), []).append(entry)
    return found


# -- what keeps runs from being compared


def differences(entries: Sequence[Entry]) -> list[str]:
    """What keeps runs from being compared: other data, items, splits or budgets. Failed and unfinished runs do not count."""
    done = [entry for entry in entries if entry.status in ("finished", "diverged")]
    traits = {
        "read other data (SHA-256, of texts with their tokenizer)": _names_by(done, _data),
        "count other items": _names_by(done, lambda entry: entry.item),
        "are evaluated on other splits": _names_by(done, lambda entry: entry.split),
        "were to train on other numbers of items": _names_by_budget(done),
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
    """The names of runs by the number of items that they were to train on.

    The budget of a run that diverged before its first step is not known. If the items are labelled pixels, budgets that equally
    many images may have are one: another seed draws other images.
    """
    names = _names_by((entry for entry in entries if entry.steps), _budget)
    return _merged(names) if {entry.item for entry in entries} == {"pixel"} else names


def _budget(entry: Entry) -> int | None:
    """Items that the run was to train on, to the step."""
    planned: int | None = entry.config.get("train", {}).get("steps")
    if planned is None or entry.items_per_step is None:
        return entry.items
    return round(planned * entry.items_per_step)


def _merged(names_by_budget: Mapping[int, list[str]]) -> dict[int | None, list[str]]:
    """Budgets within `LABELLED` of the lowest of them as one."""
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


# -- arms whose runs of one seed are alike


def kin_of(arms: Mapping[str, Sequence[Entry]]) -> dict[str, Hashable]:
    """A key for each arm. Arms of one key are kin: their runs of one seed are alike, so that pairing them by seed helps.

    Two arms are kin if the study says so by `tuned_as`: they differ in something that leaves the best settings alone. They are
    also kin if they hold the same runs under two names. Correlations between runs are not used: with so few runs they are mostly
    chance.
    """
    pairs = [pair for pair in itertools.combinations(arms, 2) if hold_the_same_runs(arms[pair[0]], arms[pair[1]])]
    pairs += [(run.tuned_as, name) for name, runs in arms.items() for run in runs if run.tuned_as]
    keys: dict[str, Hashable] = {name: name for pair in [*pairs, *zip(arms, arms, strict=True)] for name in pair}
    for one, other in pairs:  # merges all that are kin to either, so that the order of arms does not matter
        old, new = keys[other], keys[one]
        keys = {name: new if key == old else key for name, key in keys.items()}
    return keys


def hold_the_same_runs(runs: Sequence[Entry], others: Sequence[Entry]) -> bool:
    """Whether two arms read the same data and have the same curve, up to rounding, for every seed that both have, at least one."""
    curves = {run.seed: run.curve_losses for run in others if run.is_done}
    pairs = [(run.curve_losses, curves[run.seed]) for run in runs if run.is_done and run.seed in curves]
    data = {run.data_sha256 for run in [*runs, *others]}
    return bool(pairs) and len(data) == 1 and all(_are_equal(*pair) for pair in pairs)


def _are_equal(curve: Sequence[float], other: Sequence[float]) -> bool:
    return len(curve) == len(other) > 0 and np.allclose(curve, other, rtol=ARITHMETIC, atol=0)
