"""A sweep under Slurm: the batch scripts of its jobs, and the script that submits them."""

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
    """Writes what submits a sweep to Slurm: an array of trials, then one of final runs, then a job that ends the sweep.

    The last job runs again what was cut off, writes the ledger and prints the comparison into its log.

    Args:
        sweep: what it is.
        folder: of the sweep, whether or not it is there; all nodes must see it.
        modules: imported by every run.
        more: options of sbatch for every job.

    Returns:
        the script that submits all of it.

    Raises:
        ConfigError: see `open_sweep`; or an option does not begin with --.
    """
    wrong = [option for option in more if not option.startswith("--") or "\n" in option]
    if wrong:
        raise ConfigError(
            f"--sbatch {wrong[0]!r}: give an option of sbatch as it is written, as in --sbatch=--time=2:00:00"
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
    """The command line that runs the sweep in a folder."""
    return shlex.join([
        sys.executable, "-P", "-m", "llmeff.cli", "sweep", f"--config={folder / SWEEP}", f"--out={folder}",
        *(f"--import={module}" for module in modules),
    ])  # fmt: skip


def _submit_script(scripts: Path, phases: Sequence[str]) -> str:
    """A shell script that submits the batch script of each phase; each waits for the one before."""
    lines, after = [], ""
    for phase in phases:
        lines.append(f"{phase}=$(sbatch --parsable{after} {shlex.quote(str(scripts / f'{phase}.sbatch'))})\n")
        after = f' --dependency=afterany:"${phase}"'
    return "#!/bin/bash\nset -euo pipefail\n" + "".join(lines) + 'echo "submitted; the last job is $ledger"\n'


def _gpus_of(config: RunConfig) -> int:
    """GPUs of a run; `auto` means what it means on the machine that writes the scripts."""
    device = config.runtime.device
    wants_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return config.parallel.ranks if wants_gpu else 0
