"""What a reader must know of a study before believing its table, as sentences."""

import itertools
import re
from collections.abc import Iterator, Sequence

from llmeff.compare.alike import hold_the_same_runs, in_cell
from llmeff.compare.group import Group
from llmeff.compare.ledger import Entry, Metric, flat_config
from llmeff.compare.timing import StepTimes, timed_as, timing_name

FEW_RUNS = 5
"""An arm with fewer runs seldom shows that its spread differs from the others'. With three runs, an arm with three times the
spread makes 9 % of studies of equal arms call one different, not 5 % (`analysis/results/coverage.json`)."""


def notes_on(groups: Sequence[Group], metrics: Sequence[Metric], step_times: StepTimes | None) -> Iterator[str]:
    """All notes.

    Args:
        groups: the cells of the study.
        metrics: what runs are judged by.
        step_times: of the timing run; None if there was none.
    """
    higher = [metric.label for metric in metrics if metric.better == "higher"]
    if higher:
        yield f"higher is better for {', '.join(higher)}, lower for everything else"
    for group in groups:
        yield from _on_runs(group)
        yield from _on_spread(group)
        yield from _on_target(group)
        yield from _on_tuning(group)
    yield from _on_timing(groups, step_times)


def _on_timing(groups: Sequence[Group], step_times: StepTimes | None) -> Iterator[str]:
    if step_times is None:
        yield "no timing run was given: times are not compared (runs that share a machine slow each other down)"
        return
    names = {timing_name(timed_as(arm, runs), group.cell) for group in groups for arm, runs in group.arms.items()}
    missing = sorted(names - step_times.keys())
    if missing:
        yield f"the timing run has no {', '.join(map(repr, missing))}: their times are not compared"


def _on_runs(group: Group) -> Iterator[str]:
    for name, runs in group.arms.items():
        yield from _on_ends(group, name, runs)
        yield from _on_twins(group, name, runs)
        yield from _on_missing_seeds(group, name, runs)


def _on_ends(group: Group, name: str, runs: Sequence[Entry]) -> Iterator[str]:
    """Runs that did not finish, and why."""
    for status in ("diverged", "failed", "unfinished"):
        those = [run for run in runs if run.status == status]
        if those:
            why = next((f": {run.diagnosis.splitlines()[0]}" for run in those if run.diagnosis), "")
            yield f"{name}{in_cell(group.cell)}: {len(those)} of {len(runs)} runs {status}{why}"


def _on_twins(group: Group, name: str, runs: Sequence[Entry]) -> Iterator[str]:
    """An arm that holds the same runs as one before it, though the study does not say that they are kin."""
    if any(run.tuned_as for run in runs):
        return
    before = itertools.takewhile(lambda other: other != name, group.arms)
    twin = next((other for other in before if hold_the_same_runs(group.arms[other], runs)), None)
    if twin is not None:
        yield f"the runs of {name}{in_cell(group.cell)} are those of {twin}, but for rounding: of chance they tell as one"


def _on_missing_seeds(group: Group, name: str, runs: Sequence[Entry]) -> Iterator[str]:
    """Seeds of the baseline that an arm lacks, if the two are paired by seed."""
    missing = sorted({run.seed for run in group.arms[group.baseline]} - {run.seed for run in runs})
    is_paired = group.kin[name] == group.kin[group.baseline] and all(run.repeats is None for run in runs)
    if missing and runs and is_paired:
        yield (
            f"{name}{in_cell(group.cell)} was not run with the baseline's seeds {missing}: "
            "its pairs are of those that both have"
        )


def _on_spread(group: Group) -> Iterator[str]:
    """Arms with so few runs that spreads are taken to be equal without evidence."""
    differences = [cell.difference for cell in group.table.get(group.metric.name, {}).values()]
    counts = [found.ratio.n for found in differences if found is not None and found.method == "Dunnett"]
    if counts and min(counts) < FEW_RUNS:
        yield (
            f"arms of {min(counts)} runs{in_cell(group.cell)} tell little of their spread: if that of one is much larger than "
            "the others', it may be called different though it is not"
        )


def _on_target(group: Group) -> Iterator[str]:
    """Arms of which not every run reached the target."""
    for name, cell in group.table.get("steps_to_target", {}).items():
        if len(cell.values) < cell.num_seeds:
            yield (
                f"{name}{in_cell(group.cell)} reached the {group.metric.label} {group.target:.4f} in {len(cell.values)} of "
                f"{cell.num_seeds} runs: what it takes is not averaged over those that did"
            )


def _on_tuning(group: Group) -> Iterator[str]:
    where = in_cell(group.cell)
    for name, tuning in group.tuning.items():
        if tuning.best is None:
            yield f"{name}{where}: none of {len(tuning.trials)} trials finished, so nothing was chosen, and no final run made"
            continue
        for field in tuning.at_edge:
            yield (
                f"{name}{where}: the best {field} of {len(tuning.trials)} trials lies at the edge of its search "
                f"({tuning.best[field]}): a wider search may do better"
            )
    yield from _on_formats(group)
    yield from _on_numbers_of_trials(group)


def _on_numbers_of_trials(group: Group) -> Iterator[str]:
    """Arms that were tuned with unequal budgets."""
    tuned_as = {name: next((run.tuned_as for run in runs if run.tuned_as), name) for name, runs in group.arms.items()}
    tunings = {name: group.tuning.get(tuned) for name, tuned in tuned_as.items()}
    counts = {name: 0 if tuning is None else len(tuning.trials) for name, tuning in tunings.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        yield f"the arms had other numbers of trials{in_cell(group.cell)}: {shown}"


def _on_formats(group: Group) -> Iterator[str]:
    """Arms that differ only in precision or the format of an optimizer's state, and yet were tuned to other settings."""
    tuned = [(name, runs[0]) for name, runs in group.arms.items() if runs and _has_settings_of_its_own(runs[0])]
    for (name, one), (other, two) in itertools.combinations(tuned, 2):
        if one.trial != two.trial and _differ_in_format_alone(one, two):
            settings = [", ".join(f"{field} = {value}" for field, value in run.trial.items()) for run in (one, two)]
            yield (
                f"{name} and {other}{in_cell(group.cell)} differ in precision or the format of state alone, and were tuned "
                f"apart, to other settings ({'; '.join(settings)}): their difference is of both; with tuned_as it would be of "
                "the format"
            )


def _has_settings_of_its_own(run: Entry) -> bool:
    return bool(run.trial) and run.tuned_as is None and run.repeats is None


_STATE_FORMAT = re.compile(r"[-_]?8bit$")
"""The end of an optimizer's name if it is another optimizer with its state in 8 bits."""


def _differ_in_format_alone(one: Entry, two: Entry) -> bool:
    """Whether two runs are alike but for precision, the format of state, and what they were tuned to."""
    first, second = flat_config(one), flat_config(two)
    optimizers = {_STATE_FORMAT.sub("", str(config.get("optim.name"))) for config in (first, second)}
    differing = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    differing -= {*one.trial, *two.trial}
    shared = first.keys() & second.keys()
    allowed = {"precision", "optim.name"} | {key for key in differing - shared if key.startswith("optim.")}
    return len(optimizers) == 1 and bool(differing & {"precision", "optim.name"}) and differing <= allowed
