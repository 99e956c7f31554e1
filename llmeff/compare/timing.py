"""Step times from a timing run: reads the file, and assigns the step times to arms by name."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmeff.compare.alike import show_cell
from llmeff.compare.ledger import Entry
from llmeff.core.config import ConfigError

TIMING = "timing.json"
"""The name of the file of step times, in a sweep's folder."""

StepTimes = Mapping[str, Sequence[float]]
"""Seconds per step by `timing_name`, one value per generation of processes. The values of one generation are paired
across arms, because the arms took turns in it."""


def timing_name(arm: str, cell: Mapping[str, Any]) -> str:
    """Returns the name of an arm of a cell in a timing run."""
    return f"{arm} @ {show_cell(dict(sorted(cell.items())))}" if cell else arm


def timed_as(arm: str, runs: Sequence[Entry]) -> str:
    """Returns the arm whose step times apply to an arm: the arm itself or, for an A/A arm, the arm that it repeats."""
    return next((run.repeats for run in runs if run.repeats is not None), arm)


def times_by_arm(
    step_times: StepTimes | None, arms: Mapping[str, Sequence[Entry]], cell: Mapping[str, Any]
) -> dict[str, Sequence[float]]:
    """Returns the step times of each arm of a cell. Arms that were not timed are absent.

    Args:
        step_times: the step times by `timing_name`. None if there was no timing run.
        arms: the runs of each arm.
        cell: the value of each axis.
    """
    if step_times is None:
        return {}
    names = {arm: timing_name(timed_as(arm, runs), cell) for arm, runs in arms.items()}
    return {arm: step_times[name] for arm, name in names.items() if name in step_times}


def read_timing(path: Path) -> dict[str, Any]:
    """Reads the result of a timing run.

    Returns:
        A dict with two keys. `step_s` is a `StepTimes`. `note` is a sentence on how many rounds were used.

    Raises:
        ConfigError: the file cannot be read, or is not a file of step times.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        races = found["races"]
        rounds, dropped = (sum(race[key] for race in races) for key in ("rounds", "noisy_rounds_dropped"))
        busy = sum(len(race["busy_generations"]) for race in races)
        note = (
            f"the timing run had {rounds} rounds, of which {dropped} were dropped because other processes used the CPU"
        )
        note += f"; {busy} generations had too few quiet rounds, so their noisy rounds were kept" if busy else ""
        return {"step_s": {name: list(map(float, values)) for name, values in found["step_s"].items()}, "note": note}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: is not a file of step times as `llmeff sweep --timing` writes it") from None
