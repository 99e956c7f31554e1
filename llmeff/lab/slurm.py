"""Writes the batch scripts for a sweep under Slurm, and the script that submits them."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llmeff.compare.ledger import SWEEP
from llmeff.config.run import RunConfig
from llmeff.config.sweep import SweepConfig, job_config
from llmeff.core import files
from llmeff.core.config import ConfigError
from llmeff.lab.jobs import planned_finals, tuning_jobs
from llmeff.lab.sweep import cores_of, open_sweep
from llmeff.run.launch import slurm_job


def write_slurm(sweep: SweepConfig, folder: Path, *, modules: Sequence[str], more: Sequence[str]) -> Path:
    """Writes the batch scripts of a sweep, and a script that submits them to Slurm.

    The scripts are for an array of trials, an array of final runs, and a last job. The last job continues runs that were cut off,
    writes the ledger and prints the comparison into its log.

    Args:
        sweep: the sweep.
        folder: folder of the sweep, which need not exist. All nodes must have access to it.
        modules: names of modules that every run imports.
        more: sbatch options for every job.

    Returns:
        The path of the script that submits all jobs.

    Raises:
        ConfigError: the folder cannot be used for this sweep (see `open_sweep`), or an option does not begin with --.
    """
    wrong = [option for option in more if not option.startswith("--") or "\n" in option]
    if wrong:
        raise ConfigError(
            f"--sbatch {wrong[0]!r}: give an sbatch option with its leading --, as in --sbatch=--time=2:00:00"
        )
    open_sweep(sweep, folder)
    trials, finals = tuning_jobs(sweep), planned_finals(sweep)
    scripts = folder.resolve() / "slurm"
    command = _command(folder.resolve(), modules)
    arrays = {
        phase: [job_config(sweep, job) for job in jobs] for phase, jobs in (("tuning", trials), ("final", finals))
    }
    texts = {
        phase: slurm_job(
            f"{files.safe_name(sweep.name)}-{phase}",
            f'{command} --only="{phase}:$SLURM_ARRAY_TASK_ID"',
            log=scripts / f"{phase}-%a.log",
            cores=max(map(cores_of, configs)),
            gpus=max(map(_gpus_of, configs)),
            count=len(configs),
            more=more,
        )
        for phase, configs in arrays.items()
        if configs
    }
    texts["ledger"] = slurm_job(
        f"{files.safe_name(sweep.name)}-ledger",
        command,
        log=scripts / "ledger.log",
        cores=max(map(cores_of, arrays["final"])),
        gpus=max(map(_gpus_of, arrays["final"])),
        count=None,
        more=more,
    )
    with files.reported(scripts):
        scripts.mkdir(exist_ok=True)
        for phase, text in texts.items():
            files.write_text(scripts / f"{phase}.sbatch", text)
        files.write_text(scripts / "submit.sh", _submit_script(scripts, list(texts)))
    return scripts / "submit.sh"


def _command(folder: Path, modules: Sequence[str]) -> str:
    """Returns the command line that runs the sweep in a folder."""
    return shlex.join([
        sys.executable, "-P", "-m", "llmeff.cli", "sweep", f"--config={folder / SWEEP}", f"--out={folder}",
        *(f"--import={module}" for module in modules),
    ])  # fmt: skip


def _submit_script(scripts: Path, phases: Sequence[str]) -> str:
    """Returns a shell script that submits the batch script of each phase. Each phase waits for the previous one."""
    lines, after = [], ""
    for phase in phases:
        lines.append(f"{phase}=$(sbatch --parsable{after} {shlex.quote(str(scripts / f'{phase}.sbatch'))})\n")
        after = f' --dependency=afterany:"${phase}"'
    return "#!/bin/bash\nset -euo pipefail\n" + "".join(lines) + 'echo "submitted; the last job is $ledger"\n'


def _gpus_of(config: RunConfig) -> int:
    """Returns the number of GPUs of a run. Device `auto` is resolved on the machine that writes the scripts."""
    device = config.runtime.device
    wants_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return config.parallel.ranks if wants_gpu else 0
