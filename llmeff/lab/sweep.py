"""Runs a sweep on this machine: tuning trials, then final runs with fresh seeds; it goes on where it stopped.

All that a sweep knows lies in its folder: `sweep.json`, and one run folder a run. A run that has ended is not run again,
one that was cut off is resumed, and one that failed is tried once more each time the sweep is started.
"""

import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmeff.compare.ledger import (
    JOB_FILE,
    LEDGER,
    LOSS,
    RUNS,
    SWEEP,
    find_metric,
    known_metrics,
    read_facts,
    read_ledger,
    read_sweep,
    write_ledger,
)
from llmeff.compare.study import TIMING, read_timing
from llmeff.compare.verdict import lane_name
from llmeff.config.run import RunConfig
from llmeff.config.sweep import Job, SweepConfig, arm_path, items_per_step, job_config
from llmeff.core import files, log
from llmeff.core.config import ConfigError, read, validate, with_new_names
from llmeff.core.dist import child_environment, usable_cores
from llmeff.core.units import show_count
from llmeff.record import schema
from llmeff.record.reader import read_run
from llmeff.record.writer import lock, wait_until_free
from llmeff.run.launch import SCRIPT, end_with_starter, going_on, slurm_job, terminable

_SEEDS = frozenset(("seeds", "baseline_seeds", "aa_seeds"))
"""Fields that a sweep may be given more of."""
_BEFORE = {"metric": LOSS.name, "baseline_seeds": [], "aa_seeds": []}
"""What sweeps were, when they did not say."""
CHOSEN = "chosen.json"
"""Beside an arm's runs: the settings that its final runs have."""
_WARMUP_STEPS = 6
"""Of a timing lane, at least: with them what the loop counts and meters is over."""
_POLL_S = 0.1
_GRACE_S = 20.0
"""How long interrupted runs may take to end."""


def open_sweep(sweep: SweepConfig, folder: Path) -> None:
    """Begins a sweep in a folder, or finds the same one there; one that had fewer seeds becomes this one.

    Raises:
        ConfigError: something else lies there; it names what differs.
    """
    path = folder / SWEEP
    mine = json.loads(sweep.model_dump_json())
    if path.is_file():
        files.refuse_links(folder)
        theirs = _BEFORE | with_new_names(read(path), SweepConfig.renamed)
        changed = sorted(key for key in theirs.keys() | mine.keys() if theirs.get(key) != mine.get(key))
        if not changed:
            return
        if not _SEEDS.issuperset(changed) or not sweep.has_all_runs_of(validate(SweepConfig, theirs)):
            raise ConfigError(
                f"{folder} holds another sweep: {', '.join(changed)} differ; give another --out, or the same sweep, "
                "to which seeds may be added"
            )
        with files.reported(folder):
            files.write_text(path, json.dumps(mine, indent=2) + "\n")
        return
    if folder.is_dir() and not all(own.name.startswith(files.PARTIAL) for own in folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty, and holds no sweep")
    with files.reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(mine, indent=2) + "\n")


def tuning_jobs(sweep: SweepConfig) -> list[Job]:
    """All trials, in order."""
    found: list[Job] = []
    for cell in sweep.cells():
        for arm in sweep.arms:
            for number, trial in enumerate(sweep.trials(arm)):
                found.append(
                    Job(arm=arm, cell=cell, phase="tuning", number=number, trial=trial, order=len(found))
                )  # fmt: skip
    return found


def as_begun(sweep: SweepConfig, folder: Path, config: RunConfig) -> RunConfig:
    """A run's config, its optimizer's `auto` settings decided as the sweep's first run that left them open had them decided.

    So all runs of a sweep are alike whatever machine goes on with it.
    """
    left_open = {name for name, value in config.optim.model_dump().items() if value == "auto"}
    if not left_open:
        return config
    for arm, cell in itertools.product(sweep.every_arm, sweep.cells()):
        begun_paths = sorted((folder / RUNS / arm_path(arm, cell)).glob(f"*/{schema.CONFIG}"))
        if not begun_paths:
            continue
        tried = sweep.every_arm[sweep.tuned_by(arm)].search.keys() | cell.keys()
        asked = sweep.run_config(arm, cell, sweep.first_trial(arm), seed=0).optim
        if asked.name != config.optim.name or any(f"optim.{name}" in tried for name in left_open):
            continue
        if any(asked.model_dump()[name] != "auto" for name in left_open):
            continue  # settings of its own
        begun = validate(RunConfig, read(begun_paths[0])).optimizer_as_begun()
        decided = {name: getattr(begun, name) for name in left_open}
        return config.model_copy(update={"optim": config.optim.model_copy(update=decided)})
    return config


def final_jobs(sweep: SweepConfig, folder: Path) -> list[Job]:
    """All final runs, by the best trials in the folder; none of an arm of which no trial finished.

    What was once chosen for an arm stays, whatever trials that had failed come to later: its seeds are runs of one arm.
    """
    trials = tuning_jobs(sweep)

    def chosen(arm: str, cell: dict[str, Any]) -> dict[str, Any] | None:
        tuner = sweep.tuned_by(arm)
        own = [job for job in trials if job.arm == tuner and job.cell == cell]
        if not own:
            return {}
        path = _choice(sweep, folder, arm, cell)
        return read(path) if path.is_file() else best_trial(own, folder, sweep.metric)

    return _finals(sweep, len(trials), chosen)


def _choice(sweep: SweepConfig, folder: Path, arm: str, cell: dict[str, Any]) -> Path:
    """Where it is written what was chosen for an arm."""
    return folder / RUNS / arm_path(sweep.tuned_by(arm), cell) / CHOSEN


def _finals(
    sweep: SweepConfig, first: int, chosen: Callable[[str, dict[str, Any]], dict[str, Any] | None]
) -> list[Job]:
    """A run for each seed of every arm and cell that settings are chosen for; their places count from `first`."""
    jobs: list[Job] = []
    for cell in sweep.cells():
        for arm in sweep.every_arm:
            trial = chosen(arm, cell)
            for seed in sweep.seeds_of(arm) if trial is not None else ():
                order = first + len(jobs)
                jobs.append(Job(arm=arm, cell=cell, phase="final", number=seed, trial=trial or {}, order=order))
    return jobs


def best_trial(trials: Sequence[Job], folder: Path, metric: str) -> dict[str, Any] | None:
    """The settings of the trial with the best value of a metric; of equals the first; None where none finished.

    Raises:
        ConfigError: a trial is not judged by the metric.
    """
    costs = [_cost(folder / RUNS / job.path, metric) for job in trials]
    best = min(range(len(costs)), key=costs.__getitem__)
    return trials[best].trial if math.isfinite(costs[best]) else None


def _cost(folder: Path, metric: str) -> float:
    """What a run reached of a metric, as a number of which less is better; infinite where it did not finish."""
    if not (folder / schema.RESULT).is_file():
        return math.inf
    run = read_run(folder)
    if run.result is None or run.result.status != "finished":
        return math.inf
    judged = find_metric(metric, known_metrics([run.result.metric_directions]))
    return judged.cost(run.result.metrics[run.config["evaluation"]["split"]].get(metric))


@dataclass
class _Running:
    job: Job
    process: "subprocess.Popen[bytes]"
    cores: int
    log: Path


class Sweep:
    """A sweep under way.

    Args:
        sweep: what it is.
        folder: where it is, or will be.
        cores: that it may use at a time.
        modules: imported by every run, for the components that they register.
        command: that makes the sweep, for its ledger.
        tell: is handed a line for each run that begins or ends.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        folder: Path,
        *,
        cores: int,
        modules: Sequence[str],
        command: str,
        tell: Callable[[str], None],
    ):
        self.sweep, self.folder, self._command = sweep, folder, command
        self._cores, self._modules, self._tell = cores, modules, tell
        self._running: list[_Running] = []

    def run(self) -> None:
        """All that is left, to the end.

        Raises:
            ConfigError: see `open_sweep`.
            KeyboardInterrupt: once no run is left running.
        """
        open_sweep(self.sweep, self.folder)
        taken = lock(self.folder)
        try:
            with terminable():
                self.run_jobs(tuning_jobs(self.sweep))
                finals = final_jobs(self.sweep, self.folder)
                self._order(finals)
                self.run_jobs(finals)
            self.write_ledger()
        finally:
            self._stop()
            os.close(taken)

    def run_one(self, phase: str, number: int) -> bool:
        """One run of a phase, by its place in it; other processes may run others of the same sweep meanwhile.

        Returns:
            whether it has ended, now or before; also where there is nothing to run, since an arm had no trial that
            finished.

        Raises:
            ConfigError: see `open_sweep`; or the phase has not so many runs.
            KeyboardInterrupt: once the run has stopped.
        """
        trials = tuning_jobs(self.sweep)
        every = trials if phase == "tuning" else _finals(self.sweep, len(trials), lambda arm, cell: {})
        if number >= len(every):
            raise ConfigError(f"--only {phase}:{number}: there are {len(every)} {phase} runs, counted from 0")
        open_sweep(self.sweep, self.folder)
        jobs = trials if phase == "tuning" else final_jobs(self.sweep, self.folder)
        if number >= len(jobs):
            log.logger.warning(
                "%s run %d: there is nothing to run, since some arms have no trial that finished", phase, number
            )
            return True
        try:
            with terminable():
                self.run_jobs([jobs[number]])
        finally:
            self._stop()
        return (self.folder / RUNS / jobs[number].path / schema.RESULT).is_file()

    def failure(self) -> str | None:
        """Why there is nothing to compare, once all has run: no run finished. None where one did."""
        entries = read_sweep(self.folder)
        if any(entry.status == "finished" for entry in entries):
            return None
        first = next((entry for entry in entries if entry.diagnosis), entries[0])
        counts = Counter(entry.status for entry in entries)
        told = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
        return f"{self.folder}: no run of the sweep finished ({told}); {first.name}: {first.diagnosis or first.status}"

    def write_ledger(self) -> None:
        """Every run that was begun, in one file, with the step times where they were raced."""
        facts = {"sweep": json.loads(self.sweep.model_dump_json()), "command": self._command}
        timing = self.folder / TIMING
        times = {"timing": read_timing(timing)} if timing.is_file() else {}
        write_ledger(self.folder / LEDGER, read_sweep(self.folder), facts | times)

    def run_jobs(self, jobs: Sequence[Job]) -> None:
        """Some runs, as many at a time as there are cores."""
        left = [job for job in jobs if not (self.folder / RUNS / job.path / schema.RESULT).is_file()]
        if len(left) < len(jobs):
            self._tell(f"{len(jobs) - len(left)} of {len(jobs)} {jobs[0].phase} runs have ended before")
        waiting = [(job, as_begun(self.sweep, self.folder, job_config(self.sweep, job))) for job in left]
        while waiting or self._running:
            for each in list(waiting):  # a run of fewer cores goes before one that must wait for more
                if self._fits(cores := cores_of(each[1])):
                    waiting.remove(each)
                    self._start(*each, cores)
            time.sleep(_POLL_S)
            for ended in [own for own in self._running if own.process.poll() is not None]:
                self._running.remove(ended)
                self._end(ended)

    def _fits(self, cores: int) -> bool:
        used = sum(own.cores for own in self._running)
        return not self._running or used + cores <= self._cores

    def _start(self, job: Job, config: RunConfig, cores: int) -> None:
        own = self.folder / RUNS / job.path
        files.refuse_links(self.folder)
        wait_until_free(own, _GRACE_S)
        is_begun = (own / schema.CONFIG).is_file()
        asked = own.parent / f"{own.name}.json"
        with files.reported(own):
            own.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(asked, config.model_dump_json(indent=2) + "\n")
        if job.phase == "final" and job.trial:
            choice = _choice(self.sweep, self.folder, job.arm, job.cell)
            if not choice.is_file():
                choice.parent.mkdir(parents=True, exist_ok=True)
                files.write_text(choice, json.dumps(job.trial) + "\n")
        self._write_job(job, None)
        output = own.parent / f"{own.name}.log"
        given = [going_on(own)] if is_begun else [f"--config={asked}"]
        line = [
            sys.executable, str(SCRIPT), *given, f"--out={own}", "--quiet",
            *(f"--import={module}" for module in self._modules),
        ]  # fmt: skip
        self._tell(f"{'going on with' if is_begun else 'starting'} {job.phase} run {job.path}")
        with open(files.open_anew(output), "wb") as file:
            process = subprocess.Popen(
                line, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_starter,
                env=child_environment(),
            )  # fmt: skip
        self._running.append(_Running(job, process, cores, output))

    def _write_job(self, job: Job, failure: str | None) -> None:
        """Says which run of the sweep a folder is; beside it, for what `llmeff train` finds must be empty."""
        arm = self.sweep.every_arm[job.arm]
        place = {
            "name": job.path, "arm": job.arm, "cell": job.cell, "factors": arm.factors, "tuned_as": arm.tuned_as,
            "repeats": self.sweep.repeats(job.arm), "phase": job.phase, "trial": job.trial,
            "seed": job_config(self.sweep, job).seed, "order": job.order,
        }  # fmt: skip
        failed = {} if failure is None else {"failure": failure}
        files.write_text(self._place_of(job), json.dumps(place | failed) + "\n")

    def _place_of(self, job: Job) -> Path:
        own = self.folder / RUNS / job.path
        return own.parent / f"{own.name}{JOB_FILE}"

    def _order(self, jobs: Sequence[Job]) -> None:
        """Puts runs that were begun before seeds were added into the order of the sweep that it is now."""
        for job in jobs:
            path = self._place_of(job)
            if path.is_file() and (place := read(path)).get("order") != job.order:
                files.write_text(path, json.dumps(place | {"order": job.order}) + "\n")

    def _end(self, ended: _Running) -> None:
        own = self.folder / RUNS / ended.job.path
        if (own / schema.RESULT).is_file() and (result := read_run(own).result) is not None:
            self._tell(f"{ended.job.path}: {result.status}")
            return
        lines = ended.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        failure = lines[-1] if lines else f"exit code {ended.process.returncode}"
        self._write_job(ended.job, failure)
        self._tell(f"{ended.job.path}: failed: {failure}")

    def _stop(self) -> None:
        for own in self._running:
            own.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        for own in self._running:
            try:
                own.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                own.process.kill()
        self._running.clear()


def check_cores(sweep: SweepConfig, cores: int) -> None:
    """Refuses a sweep of which a run takes more.

    Raises:
        ConfigError: it names the arm.
    """
    for arm in sweep.arms:
        for cell in sweep.cells():
            config = sweep.run_config(arm, cell, sweep.first_trial(arm), sweep.seeds[0])
            if config.runtime.threads != "auto" and cores_of(config) > cores:
                raise ConfigError(f"--cores {cores}: a run of {arm!r} takes {cores_of(config)} (threads times ranks)")


def cores_of(config: RunConfig) -> int:
    """Threads that a run computes with, in all its processes."""
    threads = config.runtime.threads
    return usable_cores() if threads == "auto" else threads * config.parallel.ranks


def plan_text(sweep: SweepConfig) -> str:
    """How many runs a sweep has, of how many items each, and what they compute in all."""
    from llmeff.plan.price import predict

    trials = tuning_jobs(sweep)
    finals = _finals(sweep, len(trials), lambda arm, cell: sweep.first_trial(arm))
    items, flops = 0, 0.0
    for job in [*trials, *finals]:
        config = job_config(sweep, job)
        items += items_per_step(config) * config.train.steps
        known = config.task.infer_model(config.model, config.data)
        if known is not None and config.train.micro_batch != "auto":
            price = predict(config.model_copy(update={"model": known}))
            flops += price.total("executed_flops") * config.train.steps * config.parallel.ranks
    text = f"{len(trials)} tuning runs and {len(finals)} final runs, {show_count(items)} items in all"
    return text + (f", {show_count(flops, 'FLOP')}" if flops else "")


def _wants_gpu(config: RunConfig) -> bool:
    """Under `auto` as on the machine that writes the jobs."""
    import torch

    device = config.runtime.device
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def write_slurm(sweep: SweepConfig, folder: Path, *, modules: Sequence[str], more: Sequence[str]) -> Path:
    """Writes what submits a sweep to Slurm: an array of trials, then one of final runs, then what ends the sweep.

    The last job runs again what was cut off, writes the ledger and prints the comparison into its log.

    Args:
        sweep: what it is.
        folder: where it is, or will be; all nodes must see it.
        modules: imported by every run.
        more: options of sbatch, for every job.

    Returns:
        the script that submits all of it.

    Raises:
        ConfigError: see `open_sweep`; or an option is none.
    """
    wrong = [option for option in more if not option.startswith("--") or "\n" in option]
    if wrong:
        raise ConfigError(
            f"--sbatch {wrong[0]!r}: give an option of sbatch as it is written, as in --sbatch=--time=2:00:00"
        )
    open_sweep(sweep, folder)
    trials = tuning_jobs(sweep)
    finals = _finals(sweep, len(trials), lambda arm, cell: sweep.first_trial(arm))
    place = folder.resolve() / "slurm"
    line = shlex.join([
        sys.executable, "-P", "-m", "llmeff.cli", "sweep", f"--config={folder.resolve() / SWEEP}", f"--out={folder.resolve()}",
        *(f"--import={module}" for module in modules),
    ])  # fmt: skip
    with files.reported(place):
        place.mkdir(exist_ok=True)
        submit, after = [], ""
        for phase, jobs in (("tuning", trials), ("final", finals), ("ledger", [])):
            if not jobs and phase != "ledger":
                continue
            configs = [job_config(sweep, job) for job in jobs or finals]
            only = f' --only="{phase}:$SLURM_ARRAY_TASK_ID"' if jobs else ""
            text = slurm_job(
                f"{files.safe_name(sweep.name)}-{phase}",
                line + only,
                log=place / (f"{phase}-%a.log" if jobs else f"{phase}.log"),
                cores=max(map(cores_of, configs)),
                gpus=max(config.parallel.ranks if _wants_gpu(config) else 0 for config in configs),
                count=len(jobs) or None,
                more=more,
            )
            files.write_text(place / f"{phase}.sbatch", text)
            submit.append(f"{phase}=$(sbatch --parsable{after} {shlex.quote(str(place / f'{phase}.sbatch'))})\n")
            after = f' --dependency=afterany:"${phase}"'
        script = "#!/bin/bash\nset -euo pipefail\n" + "".join(submit) + 'echo "submitted; the last job is $ledger"\n'
        files.write_text(place / "submit.sh", script)
    return place / "submit.sh"


def write_timing(
    sweep: SweepConfig,
    folder: Path,
    *,
    modules: Sequence[str],
    command: str,
    processes: int = 5,
    rounds: int = 30,
    steps: int = 10,
) -> None:
    """Races the arms against one another as their final runs are, cell by cell, and writes the step times.

    Raises:
        ConfigError: the sweep is not there, its tuning is not done, or see `bench.race`.
    """
    from llmeff.lab.arms import race_runs

    if not (folder / SWEEP).is_file():
        raise ConfigError(f"{folder}: there is no sweep to time; run it first, without --timing")
    open_sweep(sweep, folder)
    found: dict[str, Any] = {"command": command, "step_s": {}, "races": []}
    jobs = [job for job in final_jobs(sweep, folder) if job.number == sweep.seeds[0]]
    for cell in sweep.cells():
        own = sorted((job for job in jobs if job.cell == cell), key=lambda job: job.arm != sweep.baseline)
        if len(own) < 2:
            raise ConfigError(f"{folder}: fewer than two arms have a trial that finished, so there is nothing to race")
        runs = {lane_name(job.arm, job.cell): (as_begun(sweep, folder, job_config(sweep, job)), "ours") for job in own}
        raced = race_runs(
            runs, seed=0, rounds=rounds, steps=steps, warmup_steps=max(steps, _WARMUP_STEPS), processes=processes,
            modules=modules,
        )  # fmt: skip
        found["step_s"] |= raced["step_s"]
        found["races"].append(raced)
    with files.reported(folder / TIMING):
        files.write_text(folder / TIMING, json.dumps(found) + "\n")
    if (folder / LEDGER).is_file():
        facts = read_facts(folder / LEDGER) | {"timing": read_timing(folder / TIMING)}
        write_ledger(folder / LEDGER, read_ledger(folder / LEDGER), facts)
