"""The verdict on a study: compares arms with a baseline in each cell, and collects notes for the reader."""

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
    """The result of comparing the arms of a study."""

    groups: list[Group]
    """The comparison of each cell, that is of each combination of values of the axes."""
    calibration: dict[str, Calibration]
    """The accuracy of the predictions over all runs, by quantity."""
    notes: list[str]
    """Notes on the limits of the comparison, as sentences."""
    metrics: list[Metric]
    """The metrics that runs are judged by. The first is the main metric."""
    command: str | None = None
    """The command that reproduces the comparison. None if unknown."""


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
    """Compares the arms of a study with the baseline, cell by cell.

    Args:
        entries: the runs of the study.
        baseline: the arm that the other arms are compared with. None for the first arm with a final run.
        target: a value of the metric. Arms are also compared by the steps, FLOPs and time that a run spends until it
            reaches this value. None for the best value that every finished run of the baseline reaches, in each cell.
        metric: the main metric. Targets, values at equal budgets, and tuning use it. All statistics are of ratios,
            which need positive values, so an arm with a value that is not positive is not compared.
        step_times: the step times of the timing run, by `timing_name`. If None, no times are compared.
        notes: further notes for the reader, to be put first.
        mixed: whether to compare the runs of a cell even if their data, items, splits or budgets differ. A note then
            says so.
        command: the command that reproduces the study.

    Raises:
        ConfigError: there is nothing to compare, the baseline or the metric is unknown, or the runs of a cell differ in
            their data, items, splits or budgets.
    """
    first = _first_arm(entries, baseline)
    metrics = _metrics(entries, metric)
    if target is not None and not 0 < target < math.inf:
        raise ConfigError(f"the target {metrics[0].label} is {target}, but it must be a positive number")
    trials = by_cell(entry for entry in entries if entry.phase == "tuning")
    groups, all_notes = [], list(notes)
    for key, finals in by_cell(entry for entry in entries if entry.phase == "final").items():
        all_notes += _mixed_notes(finals, mixed=mixed)
        arms = Arms.of(finals, trials.get(key, []), baseline=baseline or first, step_times=step_times)
        groups.append(group_of(arms, trials.get(key, []), metrics, target))
    all_notes += notes_on(groups, metrics, step_times)
    return Comparison(groups=groups, calibration=calibrate(entries), notes=all_notes, metrics=metrics, command=command)


def _first_arm(entries: Sequence[Entry], baseline: str | None) -> str:
    """Returns the first arm with a final run.

    Raises:
        ConfigError: there is no final run, there are fewer than two arms, or the baseline is unknown.
    """
    if not any(entry.phase == "final" for entry in entries):
        raise ConfigError("there is nothing to compare, because no final run has started yet")
    arms = list(dict.fromkeys(entry.arm for entry in sorted(entries, key=lambda entry: entry.phase != "final")))
    if len(arms) < 2:
        raise ConfigError(
            f"there is only one arm ({', '.join(arms) or 'none'}), so there is nothing to compare. Give at least two"
        )
    if baseline is not None and baseline not in arms:
        raise ConfigError(f"--baseline {baseline!r}: no arm has this name.{nearest(baseline, arms)}")
    return arms[0]


def _metrics(entries: Sequence[Entry], deciding: str) -> list[Metric]:
    """Returns all metrics of these runs, with the main metric first.

    Args:
        entries: the runs.
        deciding: the name of the main metric.

    Raises:
        ConfigError: the runs do not have the main metric.
    """
    known = known_metrics(entry.metric_directions for entry in entries)
    first = find_metric(deciding, known)
    return [first, *(other for other in known.values() if other != first)]


def _mixed_notes(finals: Sequence[Entry], *, mixed: bool) -> list[str]:
    """Returns notes on the data, items, splits or budgets in which the runs of a cell differ.

    Raises:
        ConfigError: the runs differ, and `mixed` is false.
    """
    where, unlike = in_cell(finals[0].cell), differences(finals)
    if unlike and not mixed:
        raise ConfigError([
            f"these runs are not comparable{where}:", *unlike, "use --mixed to compare them anyway, with a note",
        ])  # fmt: skip
    return [f"the runs{where} are compared although {text}" for text in unlike]
