"""Step times from a timing run, in which arms take turns: the file, the names in it, and which arm has which."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmeff.compare.alike import show_cell
from llmeff.compare.ledger import Entry
from llmeff.core.config import ConfigError

TIMING = "timing.json"
"""The name of the file of step times in a sweep's folder."""

StepTimes = Mapping[str, Sequence[float]]
"""Seconds per step, one value for each generation of processes. Values of one generation are paired over arms."""


def timing_name(arm: str, cell: Mapping[str, Any]) -> str:
    """The name of an arm in a timing run."""
    return f"{arm} @ {show_cell(dict(sorted(cell.items())))}" if cell else arm


def timed_as(arm: str, runs: Sequence[Entry]) -> str:
    """The arm whose step times an arm has. An A/A arm has those of the arm that it repeats, and is not timed twice."""
    return next((run.repeats for run in runs if run.repeats is not None), arm)


def times_by_arm(
    step_times: StepTimes | None, arms: Mapping[str, Sequence[Entry]], cell: Mapping[str, Any]
) -> dict[str, Sequence[float]]:
    """The step times of each arm of a cell. An arm that was not timed is absent.

    Args:
        step_times: by `timing_name`; None if there was no timing run.
        arms: the runs of each arm.
        cell: the values of the axes.
    """
    if step_times is None:
        return {}
    names = {arm: timing_name(timed_as(arm, runs), cell) for arm, runs in arms.items()}
    return {arm: step_times[name] for arm, name in names.items() if name in step_times}


def read_timing(path: Path) -> dict[str, Any]:
    """Reads what a timing run found: `step_s` by `timing_name`, a value for each generation of processes, and `note`, how.

    Raises:
        ConfigError: the file cannot be read, or holds no step times.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        races = found["races"]
        rounds, dropped = (sum(race[key] for race in races) for key in ("rounds", "noisy_rounds_dropped"))
        busy = sum(len(race["busy_generations"]) for race in races)
        note = f"the timing run had {rounds} rounds, of which {dropped} were dropped since others used the cores"
        note += f"; in {busy} generations all were noisy, and kept" if busy else ""
        return {"step_s": {name: list(map(float, values)) for name, values in found["step_s"].items()}, "note": note}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: is no file of step times, which `llmeff sweep --timing` writes") from None
