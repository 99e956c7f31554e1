"""The timing run of a sweep: its arms race against one another as their final runs are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmeff.compare.ledger import LEDGER, SWEEP, read_facts, read_ledger, write_ledger
from llmeff.compare.timing import TIMING, read_timing, timing_name
from llmeff.config.sweep import SweepConfig, job_config
from llmeff.core import files
from llmeff.core.config import ConfigError
from llmeff.lab.arms import race_runs
from llmeff.lab.jobs import as_begun, final_jobs
from llmeff.lab.sweep import open_sweep

_WARMUP_STEPS = 6
"""At least: by then the steps that the loop counts and meters are over."""


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
    """Races the arms against one another, cell by cell, and writes the step times.

    Args:
        sweep: what it is.
        folder: of the sweep, whose tuning is done.
        modules: imported in every process.
        command: that was given, for the record.
        processes: as in `bench`.
        rounds: as in `bench`.
        steps: as in `bench`.

    Raises:
        ConfigError: the sweep is not there, its tuning is not done, or see `race_runs`.
    """
    if not (folder / SWEEP).is_file():
        raise ConfigError(f"{folder}: there is no sweep to time; run it first, without --timing")
    open_sweep(sweep, folder)
    found: dict[str, Any] = {"command": command, "step_s": {}, "races": []}
    jobs = [job for job in final_jobs(sweep, folder) if job.number == sweep.seeds[0]]
    jobs.sort(key=lambda job: job.arm != sweep.baseline)
    for cell in sweep.cells():
        runs = {
            timing_name(job.arm, job.cell): (as_begun(sweep, folder, job_config(sweep, job)), "ours")
            for job in jobs
            if job.cell == cell
        }
        if len(runs) < 2:
            raise ConfigError(f"{folder}: fewer than two arms have a trial that finished, so there is nothing to race")
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
