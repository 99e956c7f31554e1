"""Runs a sweep on this machine: tuning trials, then final runs with fresh seeds.

All state of a sweep is in its folder: `sweep.json`, and one folder for each run. If the sweep is started again, it skips
runs that have ended, resumes runs that were cut off, and tries failed runs once more.
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
"""Fields to which more seeds may be added after the sweep has begun."""
_BEFORE = {"metric": LOSS.name, "baseline_seeds": [], "aa_seeds": []}
"""Values of the fields that are missing in older `sweep.json` files."""
_POLL_S = 0.1
_GRACE_S = 20.0
"""Seconds that interrupted runs have to end."""


def open_sweep(sweep: SweepConfig, folder: Path) -> None:
    """Begins a sweep in a folder, or checks that the folder already contains this sweep. Seeds may be added to it.

    Raises:
        ConfigError: the folder contains a different sweep, or other files. The message names the fields that differ.
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
                f"{folder}: contains another sweep. These fields differ: {', '.join(changed)}. Give another --out, or the "
                "same sweep (only seeds may be added to it)"
            )
    elif folder.is_dir() and not all(child.name.startswith(files.PARTIAL) for child in folder.iterdir()):
        raise ConfigError(f"{folder}: the folder is not empty and contains no sweep. Give another --out")
    with files.reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(mine, indent=2) + "\n")


@dataclass
class _Running:
    """A run that this sweep has started, and whose process was still running at the last check."""

    job: Job
    process: "subprocess.Popen[bytes]"
    cores: int
    log: Path


class Sweep:
    """Runs the jobs of a sweep, and keeps track of the runs that this process has started.

    Args:
        sweep: config of the sweep.
        folder: folder of the sweep, which need not exist.
        cores: maximum number of cores that all runs use at the same time. If a single run needs more, it runs alone.
        modules: names of modules that every run imports, for the components that they register.
        command: the command line that the user gave, which is recorded in the ledger.
        tell: called with a line of text whenever a run begins or ends.
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
        """Runs all jobs that have not ended yet, and writes the ledger.

        Raises:
            ConfigError: the folder cannot be used for this sweep (see `open_sweep`).
            KeyboardInterrupt: on Ctrl-C or SIGTERM, after all runs have stopped.
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
            number: index of the job in its phase, from 0.

        Returns:
            True if the run has ended with a result, now or earlier. Also true if there is nothing to run, because an arm
            has no finished trial.

        Raises:
            ConfigError: the folder cannot be used for this sweep (see `open_sweep`), or the phase has no such job.
            KeyboardInterrupt: on Ctrl-C or SIGTERM, after the run has stopped.
        """
        trials = tuning_jobs(self.sweep)
        every = trials if phase == "tuning" else planned_finals(self.sweep)
        if number >= len(every):
            raise ConfigError(f"--only {phase}:{number}: there are {len(every)} {phase} runs, numbered from 0")
        open_sweep(self.sweep, self.folder)
        jobs = trials if phase == "tuning" else final_jobs(self.sweep, self.folder)
        if number >= len(jobs):
            log.logger.warning(
                "%s run %d: there is nothing to run, because some arms have no finished trial", phase, number
            )
            return True
        try:
            with terminable():
                self.run_jobs([jobs[number]])
        finally:
            self._stop()
        return (self._run_folder(jobs[number]) / schema.RESULT).is_file()

    def failure(self) -> str | None:
        """Returns an error message if no run finished, so that there is nothing to compare. Otherwise returns None."""
        entries = read_sweep(self.folder)
        if any(entry.status == "finished" for entry in entries):
            return None
        first = next((entry for entry in entries if entry.diagnosis), entries[0])
        counts = Counter(entry.status for entry in entries)
        shown = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
        return f"{self.folder}: no run of the sweep finished ({shown}). For example, {first.name}: {first.diagnosis or first.status}"

    def write_ledger(self) -> None:
        """Writes the ledger: every run that has begun and, if there was a timing run, the step times."""
        facts = {"sweep": json.loads(self.sweep.model_dump_json()), "command": self._command}
        timing = self.folder / TIMING
        times = {"timing": read_timing(timing)} if timing.is_file() else {}
        write_ledger(self.folder / LEDGER, read_sweep(self.folder), facts | times)

    def run_jobs(self, jobs: Sequence[Job]) -> None:
        """Runs jobs, as many at a time as the cores allow. Returns when all have ended. Skips jobs that ended earlier."""
        left = [job for job in jobs if not (self._run_folder(job) / schema.RESULT).is_file()]
        if len(left) < len(jobs):
            self._tell(f"{len(jobs) - len(left)} of {len(jobs)} {jobs[0].phase} runs have already ended")
        waiting = [(job, as_begun(self.sweep, self.folder, job_config(self.sweep, job))) for job in left]
        while waiting or self._running:
            for job, config in list(waiting):  # a run that fits may start before an earlier one that needs more cores
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
        self._tell(f"{'continuing with' if is_begun else 'starting'} {job.phase} run {job.path}")
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
        """Writes a file that describes the job of a run and, if the run failed, gives the reason of the failure.

        The file is beside the run's folder and not in it, because `llmeff train` begins a run only in an empty folder.
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
        """Corrects the recorded `order` of runs that began before seeds were added to the sweep."""
        for job in jobs:
            path = self._job_path(job)
            if path.is_file() and (place := read(path)).get("order") != job.order:
                files.write_text(path, json.dumps(place | {"order": job.order}) + "\n")

    def _collect(self) -> None:
        """Reports the runs whose processes have ended, and removes them from the list of running ones."""
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
        """Sends SIGTERM to the processes of all runs, and kills those that have not ended after `_GRACE_S` seconds."""
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
    """Checks that no run of a sweep needs more than `cores`. Runs whose threads are `auto` are not checked.

    Raises:
        ConfigError: a run needs more cores. The message names its arm.
    """
    for arm in sweep.arms:
        for cell in sweep.cells():
            config = sweep.run_config(arm, cell, sweep.first_trial(arm), sweep.seeds[0])
            if config.runtime.threads != "auto" and cores_of(config) > cores:
                raise ConfigError(
                    f"--cores {cores}: a run of arm {arm!r} needs {cores_of(config)} cores (threads times ranks). Give "
                    "at least as many, or reduce runtime.threads"
                )


def cores_of(config: RunConfig) -> int:
    """Returns the number of cores that a run needs: threads times ranks, or all usable cores if its threads are `auto`."""
    threads = config.runtime.threads
    return usable_cores() if threads == "auto" else threads * config.parallel.ranks


def plan_text(sweep: SweepConfig) -> str:
    """Returns a line with the number of runs of a sweep, and the total items and FLOPs of all runs together."""
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
    text = f"{len(trials)} tuning runs and {len(finals)} final runs, {show_count(items)} items in total"
    return text + (f", {show_count(flops, 'FLOP')}" if flops else "")
