"""Lists the jobs of a sweep: tuning trials, and final runs with the settings of the best trials."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llmeff.compare.ledger import RUNS, find_metric, known_metrics
from llmeff.config.run import RunConfig
from llmeff.config.sweep import Job, SweepConfig, arm_path
from llmeff.core.config import read, validate
from llmeff.record import schema
from llmeff.record.reader import read_run

CHOSEN = "chosen.json"
"""The file with the settings of an arm's final runs. It is in the folder that contains the arm's runs."""

Settings = dict[str, Any]
"""Values by the dotted path of a config field."""


def tuning_jobs(sweep: SweepConfig) -> list[Job]:
    """Returns all tuning trials, in order."""
    trials = (
        (arm, cell, number, trial)
        for cell in sweep.cells()
        for arm in sweep.arms
        for number, trial in enumerate(sweep.trials(arm))
    )
    return [
        Job(arm=arm, cell=cell, phase="tuning", number=number, trial=trial, order=order)
        for order, (arm, cell, number, trial) in enumerate(trials)
    ]


def final_jobs(sweep: SweepConfig, folder: Path) -> list[Job]:
    """Returns the final runs, with the settings of the best trials in the folder.

    An arm has no final runs if none of its trials finished. Settings that were written for an arm are kept, even if a
    failed trial is tried again and turns out better, because all seeds of an arm must have the same settings.
    """
    trials = tuning_jobs(sweep)

    def chosen(arm: str, cell: Settings) -> Settings | None:
        tuner = sweep.tuned_by(arm)
        tuned_trials = [job for job in trials if job.arm == tuner and job.cell == cell]
        if not tuned_trials:
            return {}
        path = choice_path(sweep, folder, arm, cell)
        return read(path) if path.is_file() else best_trial(tuned_trials, folder, sweep.metric)

    return _finals(sweep, len(trials), chosen)


def planned_finals(sweep: SweepConfig) -> list[Job]:
    """Returns all final runs, with settings as if the first trial of every arm were its best trial."""
    return _finals(sweep, len(tuning_jobs(sweep)), lambda arm, cell: sweep.first_trial(arm))


def _finals(sweep: SweepConfig, first: int, chosen: Callable[[str, Settings], Settings | None]) -> list[Job]:
    """Returns a final run for each seed of every arm in every cell.

    Args:
        sweep: the sweep.
        first: value of `Job.order` for the first final run.
        chosen: function that returns the settings of an arm in a cell, or None if the arm gets no final runs there.
    """
    jobs: list[Job] = []
    for cell, arm in itertools.product(sweep.cells(), sweep.every_arm):
        trial = chosen(arm, cell)
        if trial is None:
            continue
        for seed in sweep.seeds_of(arm):
            order = first + len(jobs)
            jobs.append(Job(arm=arm, cell=cell, phase="final", number=seed, trial=trial, order=order))
    return jobs


def choice_path(sweep: SweepConfig, folder: Path, arm: str, cell: Settings) -> Path:
    """Returns the path of the file with the settings chosen for an arm in a cell."""
    return folder / RUNS / arm_path(sweep.tuned_by(arm), cell) / CHOSEN


def best_trial(trials: Sequence[Job], folder: Path, metric: str) -> Settings | None:
    """Returns the settings of the trial with the best value of a metric.

    If several trials tie, returns the settings of the first. Returns None if no trial finished.

    Raises:
        ConfigError: the task of a trial does not have the metric.
    """
    costs = [_cost(folder / RUNS / job.path, metric) for job in trials]
    best = min(range(len(costs)), key=costs.__getitem__)
    return trials[best].trial if math.isfinite(costs[best]) else None


def _cost(folder: Path, metric: str) -> float:
    """Returns a run's value of a metric, negated if higher is better. Infinite if the run did not finish."""
    if not (folder / schema.RESULT).is_file():
        return math.inf
    run = read_run(folder)
    if run.result is None or run.result.status != "finished":
        return math.inf
    judged = find_metric(metric, known_metrics([run.result.metric_directions]))
    return judged.cost(run.result.metrics[run.config["evaluation"]["split"]].get(metric))


def as_begun(sweep: SweepConfig, folder: Path, config: RunConfig) -> RunConfig:
    """Returns a run's config. `auto` settings of the optimizer get the values that an earlier run used for them.

    So all runs of a sweep have the same settings, even if the sweep continues on another machine. The settings stay
    `auto` if no run with the same optimizer and the same `auto` settings has begun.
    """
    left_open = {name for name, value in config.optim.model_dump().items() if value == "auto"}
    if not left_open:
        return config
    for arm, cell in itertools.product(sweep.every_arm, sweep.cells()):
        begun_paths = sorted((folder / RUNS / arm_path(arm, cell)).glob(f"*/{schema.CONFIG}"))
        if begun_paths and _leaves_open(sweep, arm, cell, config.optim.name, left_open):
            begun = validate(RunConfig, read(begun_paths[0])).optimizer_as_begun()
            resolved = {name: getattr(begun, name) for name in left_open}
            return config.model_copy(update={"optim": config.optim.model_copy(update=resolved)})
    return config


def _leaves_open(sweep: SweepConfig, arm: str, cell: Settings, optimizer: str, names: Iterable[str]) -> bool:
    """Returns whether the runs of an arm in a cell use `optimizer` and leave all settings in `names` at `auto`."""
    asked = sweep.run_config(arm, cell, sweep.first_trial(arm), seed=0).optim
    tried = sweep.every_arm[sweep.tuned_by(arm)].search.keys() | cell.keys()
    if asked.name != optimizer or any(f"optim.{name}" in tried for name in names):
        return False
    settings = asked.model_dump()
    return all(settings[name] == "auto" for name in names)
