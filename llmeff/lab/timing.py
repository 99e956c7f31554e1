"""The timing run of a sweep: races the arms against one another, with the settings of their final runs."""

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
"""Minimum number of warm-up steps. They include the slow steps in which the loop counts FLOPs and measures memory."""


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
    """Races the arms of each cell against one another. Writes the step times, and adds them to the ledger if it exists.

    Args:
        sweep: the sweep.
        folder: folder of the sweep, whose tuning must be complete.
        modules: names of modules that every process imports.
        command: the command line that the user gave, which is recorded.
        processes: as in `bench`.
        rounds: as in `bench`.
        steps: as in `bench`.

    Raises:
        ConfigError: the folder contains no sweep or another one, fewer than two arms of a cell have a finished trial, or the
            race failed (see `race_runs`).
    """
    if not (folder / SWEEP).is_file():
        raise ConfigError(f"{folder}: there is no sweep to time. Run it first, without --timing")
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
            raise ConfigError(
                f"{folder}: fewer than two arms have a finished trial, but a timing run compares at least two. "
                "Complete the sweep first, without --timing"
            )
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
