"""Notes on a study: sentences that warn of limits of the comparison, such as failed runs or unequal tuning."""

import itertools
import re
from collections.abc import Iterator, Sequence

from llmeff.compare.alike import hold_the_same_runs, in_cell
from llmeff.compare.group import Group
from llmeff.compare.ledger import Entry, Metric, flat_config
from llmeff.compare.timing import StepTimes, timed_as, timing_name

FEW_RUNS = 5
"""With fewer runs per arm, the test of an arm's spread seldom detects a difference. If all arms have equal means but
one has three times the spread of the others, studies with three runs per arm call some arm different in 9 % of cases
instead of 5 % (`analysis/results/coverage.json`)."""


def notes_on(groups: Sequence[Group], metrics: Sequence[Metric], step_times: StepTimes | None) -> Iterator[str]:
    """Yields all notes on a study.

    Args:
        groups: the comparison of each cell.
        metrics: the metrics that runs are judged by.
        step_times: the step times of the timing run. None if there was no timing run.
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
        yield (
            "times are not compared, because there is no timing run (the runs themselves may have shared a "
            "machine, which slows them down)"
        )
        return
    names = {timing_name(timed_as(arm, runs), group.cell) for group in groups for arm, runs in group.arms.items()}
    missing = sorted(names - step_times.keys())
    if missing:
        yield f"the timing run does not include {', '.join(map(repr, missing))}: times of these arms are not compared"


def _on_runs(group: Group) -> Iterator[str]:
    for name, runs in group.arms.items():
        yield from _on_ends(group, name, runs)
        yield from _on_twins(group, name, runs)
        yield from _on_missing_seeds(group, name, runs)


def _on_ends(group: Group, name: str, runs: Sequence[Entry]) -> Iterator[str]:
    """Yields a note for each status other than `finished` that runs have, with their number and the first reason."""
    for status in ("diverged", "failed", "unfinished"):
        those = [run for run in runs if run.status == status]
        if those:
            why = next((f": {run.diagnosis.splitlines()[0]}" for run in those if run.diagnosis), "")
            yield f"{name}{in_cell(group.cell)}: {len(those)} of {len(runs)} runs {status}{why}"


def _on_twins(group: Group, name: str, runs: Sequence[Entry]) -> Iterator[str]:
    """Yields a note if an arm has the same runs as an earlier arm, unless the study declares kinship by `tuned_as`."""
    if any(run.tuned_as for run in runs):
        return
    before = itertools.takewhile(lambda other: other != name, group.arms)
    twin = next((other for other in before if hold_the_same_runs(group.arms[other], runs)), None)
    if twin is not None:
        yield (
            f"the runs of {name}{in_cell(group.cell)} equal those of {twin} up to rounding, "
            "so the two are not independent"
        )


def _on_missing_seeds(group: Group, name: str, runs: Sequence[Entry]) -> Iterator[str]:
    """Yields a note if an arm that is paired with the baseline by seed lacks some of the baseline's seeds."""
    missing = sorted({run.seed for run in group.arms[group.baseline]} - {run.seed for run in runs})
    is_paired = group.kin[name] == group.kin[group.baseline] and all(run.repeats is None for run in runs)
    if missing and runs and is_paired:
        yield (
            f"{name}{in_cell(group.cell)} was not run with the baseline's seeds {missing}: "
            "it is compared over the seeds that both have"
        )


def _on_spread(group: Group) -> Iterator[str]:
    """Yields a note if an arm has too few runs to test the assumption that all spreads are equal."""
    differences = [cell.difference for cell in group.table.get(group.metric.name, {}).values()]
    counts = [found.ratio.n for found in differences if found is not None and found.method == "Dunnett"]
    if counts and min(counts) < FEW_RUNS:
        yield (
            f"the spread of an arm with only {min(counts)} runs{in_cell(group.cell)} is uncertain: if it "
            "is much larger than the spread of the other arms, the arm may be called different although it is not"
        )


def _on_target(group: Group) -> Iterator[str]:
    """Yields a note on each arm in which some run did not reach the target."""
    for name, cell in group.table.get("steps_to_target", {}).items():
        if len(cell.values) < cell.num_seeds:
            yield (
                f"{name}{in_cell(group.cell)} reached the {group.metric.label} {group.target:.4f} in {len(cell.values)} of "
                f"{cell.num_seeds} runs, so the mean cost to reach it is not reported"
            )


def _on_tuning(group: Group) -> Iterator[str]:
    where = in_cell(group.cell)
    for name, tuning in group.tuning.items():
        if tuning.best is None:
            yield f"{name}{where}: none of {len(tuning.trials)} trials finished, so this arm has no final runs"
            continue
        for field in tuning.at_edge:
            yield (
                f"{name}{where}: the best {field} of {len(tuning.trials)} trials is at the edge of the searched range "
                f"({tuning.best[field]}): a wider search may find a better value"
            )
    yield from _on_formats(group)
    yield from _on_numbers_of_trials(group)


def _on_numbers_of_trials(group: Group) -> Iterator[str]:
    """Yields a note if the arms had unequal numbers of trials."""
    tuned_as = {name: next((run.tuned_as for run in runs if run.tuned_as), name) for name, runs in group.arms.items()}
    tunings = {name: group.tuning.get(tuned) for name, tuned in tuned_as.items()}
    counts = {name: 0 if tuning is None else len(tuning.trials) for name, tuning in tunings.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        yield f"the arms had different numbers of trials{in_cell(group.cell)}: {shown}"


def _on_formats(group: Group) -> Iterator[str]:
    """Yields a note on each pair of arms that differ only in precision or state format, but were tuned separately."""
    tuned = [(name, runs[0]) for name, runs in group.arms.items() if runs and _has_settings_of_its_own(runs[0])]
    for (name, one), (other, two) in itertools.combinations(tuned, 2):
        if one.trial != two.trial and _differ_in_format_alone(one, two):
            settings = [", ".join(f"{field} = {value}" for field, value in run.trial.items()) for run in (one, two)]
            yield (
                f"{name} and {other}{in_cell(group.cell)} differ only in precision or in the format of the "
                f"optimizer state, but were tuned separately, to different settings ({'; '.join(settings)}): "
                "the comparison mixes the effects of format and settings; use tuned_as to compare the format alone"
            )


def _has_settings_of_its_own(run: Entry) -> bool:
    return bool(run.trial) and run.tuned_as is None and run.repeats is None


_STATE_FORMAT = re.compile(r"[-_]?8bit$")
"""Suffix in the name of an optimizer that is the 8-bit variant of another optimizer."""


def _differ_in_format_alone(one: Entry, two: Entry) -> bool:
    """Whether two runs differ only in precision or in the optimizer's state format. Ignores their tuned settings."""
    first, second = flat_config(one), flat_config(two)
    optimizers = {_STATE_FORMAT.sub("", str(config.get("optim.name"))) for config in (first, second)}
    differing = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    differing -= {*one.trial, *two.trial}
    shared = first.keys() & second.keys()
    allowed = {"precision", "optim.name"} | {key for key in differing - shared if key.startswith("optim.")}
    return len(optimizers) == 1 and bool(differing & {"precision", "optim.name"}) and differing <= allowed
