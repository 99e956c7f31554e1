"""Runs a sweep on this machine: tuning trials, then final runs with fresh seeds; it continues where it stopped.

All state of a sweep is in its folder: `sweep.json`, and one folder for each run. A run that has ended is not run again, one
that was cut off is resumed, and one that failed is tried once more each time the sweep is started.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmeff.compare.ledger import JOB_FILE, LEDGER, LOSS, RUNS, SWEEP, read_sweep, write_ledger
from llmeff.compare.timing import TIMING, read_timing
from llmeff.config.run import RunConfig
from llmeff.config.sweep import Job, SweepConfig, items_per_step, job_config
from llmeff.core import files, log
from llmeff.core.config import ConfigError, read, validate, with_new_names
from llmeff.core.dist import child_environment, usable_cores
from llmeff.core.units import show_count
from llmeff.lab.jobs import as_begun, choice_path, final_jobs, planned_finals, tuning_jobs
from llmeff.record import schema
from llmeff.record.reader import read_run
from llmeff.record.writer import lock, wait_until_free
from llmeff.run.launch import SCRIPT, end_with_starter, going_on, terminable

_SEEDS = frozenset(("seeds", "baseline_seeds", "aa_seeds"))
"""Fields to which seeds may be added in a sweep that has begun."""
_BEFORE = {"metric": LOSS.name, "baseline_seeds": [], "aa_seeds": []}
"""The values of fields that older files of sweeps lack."""
_POLL_S = 0.1
_GRACE_S = 20.0
"""Seconds that interrupted runs have to end."""


def open_sweep(sweep: SweepConfig, folder: Path) -> None:
    """Begins a sweep in a folder, or finds the same sweep there. Seeds may be added to one that is there.

    Raises:
        ConfigError: the folder holds another sweep, and the message names the fields that differ; or it holds other files.
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
    elif folder.is_dir() and not all(child.name.startswith(files.PARTIAL) for child in folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty, and holds no sweep")
    with files.reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(mine, indent=2) + "\n")


@dataclass
class _Running:
    """A run whose process has not been seen to end."""

    job: Job
    process: "subprocess.Popen[bytes]"
    cores: int
    log: Path


class Sweep:
    """A sweep, and the runs of it that this process has running.

    Args:
        sweep: what it is.
        folder: of the sweep, whether or not it is there.
        cores: used by all runs at a time, at most, unless a single run takes more.
        modules: imported by every run, for the components that they register.
        command: that was given, for the ledger.
        tell: called with a line for each run that begins or ends.
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
        """Runs all that is left, and writes the ledger.

        Raises:
            ConfigError: see `open_sweep`.
            KeyboardInterrupt: after all runs have stopped.
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
        """Runs one job. Other processes may run other jobs of the same sweep at the same time.

        Args:
            phase: `tuning` or `final`.
            number: of the job in its phase, from 0.

        Returns:
            whether the run has ended, now or before; true also if there is nothing to run, since no trial of an arm
            finished.

        Raises:
            ConfigError: see `open_sweep`; or the phase has no such job.
            KeyboardInterrupt: after the run has stopped.
        """
        trials = tuning_jobs(self.sweep)
        every = trials if phase == "tuning" else planned_finals(self.sweep)
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
        return (self._run_folder(jobs[number]) / schema.RESULT).is_file()

    def failure(self) -> str | None:
        """Says that no run finished, so that there is nothing to compare, and why; None if one did."""
        entries = read_sweep(self.folder)
        if any(entry.status == "finished" for entry in entries):
            return None
        first = next((entry for entry in entries if entry.diagnosis), entries[0])
        counts = Counter(entry.status for entry in entries)
        shown = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
        return f"{self.folder}: no run of the sweep finished ({shown}); {first.name}: {first.diagnosis or first.status}"

    def write_ledger(self) -> None:
        """Writes every run that was begun into one file, with the step times if there was a timing run."""
        facts = {"sweep": json.loads(self.sweep.model_dump_json()), "command": self._command}
        timing = self.folder / TIMING
        times = {"timing": read_timing(timing)} if timing.is_file() else {}
        write_ledger(self.folder / LEDGER, read_sweep(self.folder), facts | times)

    def run_jobs(self, jobs: Sequence[Job]) -> None:
        """Runs jobs, as many at a time as there are cores for, and returns when all have ended."""
        left = [job for job in jobs if not (self._run_folder(job) / schema.RESULT).is_file()]
        if len(left) < len(jobs):
            self._tell(f"{len(jobs) - len(left)} of {len(jobs)} {jobs[0].phase} runs have ended before")
        waiting = [(job, as_begun(self.sweep, self.folder, job_config(self.sweep, job))) for job in left]
        while waiting or self._running:
            for job, config in list(waiting):  # a run of fewer cores goes before one that must wait for more
                if self._fits(cores := cores_of(config)):
                    waiting.remove((job, config))
                    self._start(job, config, cores)
            time.sleep(_POLL_S)
            self._collect()

    def _fits(self, cores: int) -> bool:
        used = sum(running.cores for running in self._running)
        return not self._running or used + cores <= self._cores

    def _run_folder(self, job: Job) -> Path:
        return self.folder / RUNS / job.path

    def _start(self, job: Job, config: RunConfig, cores: int) -> None:
        folder = self._run_folder(job)
        files.refuse_links(self.folder)
        wait_until_free(folder, _GRACE_S)
        is_begun = (folder / schema.CONFIG).is_file()
        config_path, output_path = (folder.parent / f"{folder.name}.{end}" for end in ("json", "log"))
        with files.reported(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(config_path, config.model_dump_json(indent=2) + "\n")
        self._keep_choice(job)
        self._write_job(job, None)
        given = [going_on(folder)] if is_begun else [f"--config={config_path}"]
        line = [
            sys.executable, str(SCRIPT), *given, f"--out={folder}", "--quiet",
            *(f"--import={module}" for module in self._modules),
        ]  # fmt: skip
        self._tell(f"{'going on with' if is_begun else 'starting'} {job.phase} run {job.path}")
        with open(files.open_anew(output_path), "wb") as file:
            process = subprocess.Popen(
                line, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_starter,
                env=child_environment(),
            )  # fmt: skip
        self._running.append(_Running(job, process, cores, output_path))

    def _keep_choice(self, job: Job) -> None:
        """Writes the settings chosen for a final run's arm, if they are not written yet."""
        if job.phase != "final" or not job.trial:
            return
        path = choice_path(self.sweep, self.folder, job.arm, job.cell)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps(job.trial) + "\n")

    def _write_job(self, job: Job, failure: str | None) -> None:
        """Writes which job a run folder is of, and why it failed.

        The file is beside the folder: `llmeff train` begins a run only in an empty one.
        """
        arm = self.sweep.every_arm[job.arm]
        place = {
            "name": job.path, "arm": job.arm, "cell": job.cell, "factors": arm.factors, "tuned_as": arm.tuned_as,
            "repeats": self.sweep.repeats(job.arm), "phase": job.phase, "trial": job.trial,
            "seed": job_config(self.sweep, job).seed, "order": job.order,
        }  # fmt: skip
        failed = {} if failure is None else {"failure": failure}
        files.write_text(self._job_path(job), json.dumps(place | failed) + "\n")

    def _job_path(self, job: Job) -> Path:
        folder = self._run_folder(job)
        return folder.parent / f"{folder.name}{JOB_FILE}"

    def _order(self, jobs: Sequence[Job]) -> None:
        """Corrects the order of runs that were begun before seeds were added to the sweep."""
        for job in jobs:
            path = self._job_path(job)
            if path.is_file() and (place := read(path)).get("order") != job.order:
                files.write_text(path, json.dumps(place | {"order": job.order}) + "\n")

    def _collect(self) -> None:
        """Takes note of the runs whose processes have ended."""
        for ended in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(ended)
            self._end(ended)

    def _end(self, ended: _Running) -> None:
        folder = self._run_folder(ended.job)
        if (folder / schema.RESULT).is_file() and (result := read_run(folder).result) is not None:
            self._tell(f"{ended.job.path}: {result.status}")
            return
        lines = ended.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        failure = lines[-1] if lines else f"exit code {ended.process.returncode}"
        self._write_job(ended.job, failure)
        self._tell(f"{ended.job.path}: failed: {failure}")

    def _stop(self) -> None:
        """Interrupts the processes of all runs, and kills those that have not ended after `_GRACE_S`."""
        for running in self._running:
            running.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        for running in self._running:
            try:
                running.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
        self._running.clear()


def check_cores(sweep: SweepConfig, cores: int) -> None:
    """Refuses a sweep with a run that takes more than `cores`.

    Raises:
        ConfigError: it names the arm.
    """
    for arm in sweep.arms:
        for cell in sweep.cells():
            config = sweep.run_config(arm, cell, sweep.first_trial(arm), sweep.seeds[0])
            if config.runtime.threads != "auto" and cores_of(config) > cores:
                raise ConfigError(f"--cores {cores}: a run of {arm!r} takes {cores_of(config)} (threads times ranks)")


def cores_of(config: RunConfig) -> int:
    """Cores that a run takes: threads of all its processes; all usable ones if its threads are `auto`."""
    threads = config.runtime.threads
    return usable_cores() if threads == "auto" else threads * config.parallel.ranks


def plan_text(sweep: SweepConfig) -> str:
    """A line with the numbers of runs, items and FLOPs of a sweep, the latter two in all runs together."""
    from llmeff.plan.price import predict

    trials, finals = tuning_jobs(sweep), planned_finals(sweep)
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
