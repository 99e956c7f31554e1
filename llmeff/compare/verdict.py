"""The verdict on a study: arms against a baseline, cell by cell, with what a reader must know."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmeff.compare.alike import by_cell, differences, in_cell
from llmeff.compare.arms import Arms
from llmeff.compare.calibration import Calibration, calibrate
from llmeff.compare.group import Group, group_of
from llmeff.compare.ledger import LOSS, Entry, Metric, find_metric, known_metrics
from llmeff.compare.notes import notes_on
from llmeff.compare.timing import StepTimes
from llmeff.core.config import ConfigError
from llmeff.core.registry import nearest


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A study, judged."""

    groups: list[Group]
    """One for each cell, that is for each combination of values of the axes."""
    calibration: dict[str, Calibration]
    """By quantity: predictions against measurements, over all runs."""
    notes: list[str]
    """What a reader must know."""
    metrics: list[Metric]
    """What runs are judged by; the first one decides."""
    command: str | None = None
    """The command that reproduces it."""


def judge(
    entries: Sequence[Entry],
    *,
    baseline: str | None = None,
    target: float | None = None,
    metric: str = LOSS.name,
    step_times: StepTimes | None = None,
    notes: Sequence[str] = (),
    mixed: bool = False,
    command: str | None = None,
) -> Comparison:
    """Compares arms, cell by cell.

    Args:
        entries: the runs of a study.
        baseline: the arm that others are compared with; None: the first.
        target: a value of the metric; None: in each cell the best that every run of the baseline reaches.
        metric: the metric that decides: targets, budgets and tuning go by it. All statistics are of ratios, which need positive
            values: if some value is not positive, nothing is compared.
        step_times: of the timing run, by `timing_name`; without it no times are compared.
        notes: what else a reader must know.
        mixed: compare runs that read other data or had another budget all the same.
        command: the command that reproduces the study.

    Raises:
        ConfigError: there is nothing to compare, no such baseline or metric, or the runs are not of one kind.
    """
    first = _first_arm(entries, baseline)
    metrics = _metrics(entries, metric)
    if target is not None and not 0 < target < math.inf:
        raise ConfigError(f"the target {metrics[0].label} is {target}: it must be a positive number")
    trials = by_cell(entry for entry in entries if entry.phase == "tuning")
    groups, all_notes = [], list(notes)
    for key, finals in by_cell(entry for entry in entries if entry.phase == "final").items():
        all_notes += _mixed_notes(finals, mixed=mixed)
        arms = Arms.of(finals, trials.get(key, []), baseline=baseline or first, step_times=step_times)
        groups.append(group_of(arms, trials.get(key, []), metrics, target))
    all_notes += notes_on(groups, metrics, step_times)
    return Comparison(groups=groups, calibration=calibrate(entries), notes=all_notes, metrics=metrics, command=command)


def _first_arm(entries: Sequence[Entry], baseline: str | None) -> str:
    """The first arm with a final run, once there are arms to compare, the baseline among them."""
    if not any(entry.phase == "final" for entry in entries):
        raise ConfigError("no final run was begun yet: nothing to compare")
    arms = list(dict.fromkeys(entry.arm for entry in sorted(entries, key=lambda entry: entry.phase != "final")))
    if len(arms) < 2:
        raise ConfigError(f"there is one arm ({', '.join(arms) or 'none'}): nothing to compare it with")
    if baseline is not None and baseline not in arms:
        raise ConfigError(f"--baseline {baseline!r}: there is no such arm.{nearest(baseline, arms)}")
    return arms[0]


def _metrics(entries: Sequence[Entry], deciding: str) -> list[Metric]:
    """All metrics of these runs, the one that decides first."""
    known = known_metrics(entry.metric_directions for entry in entries)
    first = find_metric(deciding, known)
    return [first, *(other for other in known.values() if other != first)]


def _mixed_notes(finals: Sequence[Entry], *, mixed: bool) -> list[str]:
    """What the runs of a cell differ in that they should have in common; an error unless that is asked for."""
    where, unlike = in_cell(finals[0].cell), differences(finals)
    if unlike and not mixed:
        raise ConfigError([
            f"these runs are not of one kind{where}:", *unlike, "--mixed compares them all the same, and says so",
        ])  # fmt: skip
    return [f"compared although{where} {text}" for text in unlike]
