"""`llmeff sweep`: runs a sweep, one of its runs, or its timing run, or writes the scripts that submit it to Slurm."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmeff.cli import exits
from llmeff.cli.options import add_config
from llmeff.core.config import ConfigError

if TYPE_CHECKING:
    from llmeff.config.sweep import SweepConfig


def add(commands: Any) -> None:
    """Adds this command to the subcommands of the main parser."""
    parser = commands.add_parser(
        "sweep", help="tune arms with equal budgets, then run them with fresh seeds; continues an unfinished sweep"
    )
    add_config(parser, kind="sweep")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the sweep (default: sweeps/NAME)")
    parser.add_argument("--cores", type=int, metavar="N", help="CPU cores that concurrent runs share (default: all)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="print the numbers of runs, items and FLOPs, then exit")
    instead.add_argument(
        "--timing", action="store_true",
        help="measure the step times of all arms with their final configs; arms take turns; needs an idle machine",
    )  # fmt: skip
    instead.add_argument(
        "--slurm", action="store_true", help="write the scripts that submit the sweep to Slurm as job arrays, then exit"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION",
        help="with --slurm: sbatch option for every job, as in --sbatch=--time=2:00:00 (repeatable)",
    )  # fmt: skip
    instead.add_argument("--only", metavar="PHASE:N", help="execute one run of the sweep, as in tuning:3 or final:0")
    parser.add_argument("--processes", type=int, metavar="N", help="with --timing: fresh processes per arm (5)")
    parser.add_argument("--rounds", type=int, metavar="N", help="with --timing: turns per arm (30)")
    parser.add_argument("--steps", type=int, metavar="N", help="with --timing: steps per turn (10)")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    parser.set_defaults(command=run)


def _sweep_config(options: argparse.Namespace) -> "SweepConfig":
    from llmeff.config.recipes import SWEEPS
    from llmeff.config.sweep import SweepConfig
    from llmeff.core.components import load_components
    from llmeff.core.config import override, read, validate

    load_components(options.imports)
    if options.config is not None:
        data = read(options.config)
    elif options.recipe in SWEEPS:
        data = SWEEPS[options.recipe]().model_dump(mode="json")
    else:
        raise ConfigError(
            SWEEPS.unknown(options.recipe) if options.recipe else
            f"no sweep was given. Give --recipe NAME or --config FILE. Known recipes: {', '.join(SWEEPS.names())}."
        )  # fmt: skip
    return validate(SweepConfig, override(data, options.set))


def _phase_and_number(text: str) -> tuple[str, int]:
    phase, _, number = text.partition(":")
    if phase not in ("tuning", "final") or not number.isdecimal():
        raise ConfigError(f"--only {text!r} is not valid: give tuning:N or final:N, where 0 is the first run")
    return phase, int(number)


def _timing_options(options: argparse.Namespace) -> dict[str, int]:
    """Returns the options for a timing run that the user gave.

    Raises:
        ConfigError: options for a timing run were given without `--timing`, or `--sbatch` without `--slurm`.
    """
    given = {name: value for name in ("processes", "rounds", "steps") if (value := getattr(options, name)) is not None}
    if given and not options.timing:
        raise ConfigError(f"--{next(iter(given))} applies only to a timing run: give --timing too")
    if options.sbatch and not options.slurm:
        raise ConfigError("--sbatch applies only to the jobs that --slurm writes: give --slurm too")
    return given


def run(options: argparse.Namespace) -> int:
    """Runs this command. Returns the exit code."""
    from llmeff.compare.study import read_study
    from llmeff.compare.verdict_table import render_comparison
    from llmeff.core.dist import usable_cores
    from llmeff.lab.slurm import write_slurm
    from llmeff.lab.sweep import Sweep, check_cores, plan_text
    from llmeff.lab.timing import write_timing

    sweep = _sweep_config(options)
    cores = usable_cores() if options.cores is None else options.cores
    timing = _timing_options(options)
    if cores < 1:
        raise ConfigError(f"--cores is {cores}, but it must be at least 1")
    if options.cores is not None:
        check_cores(sweep, cores)
    folder = options.out or Path("sweeps") / sweep.name
    if options.plan:
        sys.stdout.write(plan_text(sweep) + "\n")
        return 0

    if options.slurm:
        script = write_slurm(sweep, folder, modules=options.imports, more=options.sbatch)
        sys.stdout.write(f"bash {shlex.quote(str(script))}\n")
        return 0

    def tell(line: str) -> None:
        if not options.quiet:
            sys.stderr.write(f"llmeff: {line}\n")

    if options.only is not None:
        phase, number = _phase_and_number(options.only)
        one = Sweep(sweep, folder, cores=cores, modules=options.imports, command=options.command_line, tell=tell)
        return 0 if one.run_one(phase, number) else exits.FAILED
    if options.timing:
        write_timing(sweep, folder, modules=options.imports, command=options.command_line, **timing)
    else:
        tell(plan_text(sweep))
        whole = Sweep(sweep, folder, cores=cores, modules=options.imports, command=options.command_line, tell=tell)
        whole.run()
        if failure := whole.failure():
            return exits.fail([failure], exits.FAILED)
    sys.stdout.write(render_comparison(read_study([folder]), "terminal") + "\n")
    return 0
