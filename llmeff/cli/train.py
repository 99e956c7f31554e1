"""`llmeff train`: trains a model, either in this process or in processes that it starts."""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmeff.cli import exits
from llmeff.cli.options import add_config, run_config
from llmeff.core import log
from llmeff.core.config import ConfigError
from llmeff.core.dist import is_launched, world
from llmeff.core.files import refuse_links

if TYPE_CHECKING:
    from llmeff.config.run import RunConfig


def add(commands: Any) -> None:
    """Adds this command to the subcommands of the main parser."""
    parser = commands.add_parser("train", help="train a model, and record its measured cost next to the predicted cost")
    add_config(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint in --out")
    parser.add_argument(
        "--restart-from-scratch", action="store_true", dest="anew",
        help="start the unfinished run in --out again from step 0, and move its records to DIR/discarded-N; "
        "with --resume, only if there is no complete checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N",
        help="restart the run up to N times if it ends abnormally (0)",
    )  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="print the config as JSON, then exit")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(command=run)


def _go_on_from(options: argparse.Namespace) -> None:
    """Sets the options of a run that is resumed or restarted.

    If no recipe or config file is named, uses the run's own config.

    Raises:
        ConfigError: `--out` is missing or is not a run's folder, or the folder contains a symbolic link.
    """
    flag = "--resume" if options.resume else "--restart-from-scratch"
    if options.out is None:
        raise ConfigError(f"{flag} needs --out DIR, where DIR is the folder of the run to continue")
    saved = options.out / "config.json"
    if not saved.is_file():
        raise ConfigError(f"{flag}: {options.out} contains no config.json, so there is no run to continue")
    refuse_links(options.out)
    if options.recipe or options.config:
        return
    options.config = saved
    if any(setting.split("=")[0].split(".")[0].strip() == "parallel" for setting in options.set):
        # The saved values were resolved for the old number of ranks. The user's own settings come later and win.
        options.set = ["train.micro_batch=auto", "runtime.threads=auto", *options.set]


def _free_folder(name: str) -> Path:
    """Returns runs/NAME or, if it exists already, the first of runs/NAME-2, runs/NAME-3, ... that does not exist."""
    folder, number = Path("runs") / name, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def run(options: argparse.Namespace) -> int:
    """Runs this command. Returns the exit code."""
    if options.restarts < 0:
        raise ConfigError(f"--restarts is {options.restarts}, but it must be 0 or more")
    given = _arguments(options)
    if options.resume or options.anew:
        _go_on_from(options)
    config = run_config(options)
    if options.print_config:
        sys.stdout.write(config.model_dump_json(indent=2) + "\n")
        return 0
    folder = options.out or _free_folder(config.name)
    if options.restarts and is_launched():
        raise ConfigError(
            "--restarts works only without a launcher: if a launcher starts llmeff train, the launcher must restart it"
        )
    if not is_launched() and (config.parallel.ranks > 1 or options.restarts):
        return _start(options, config, folder, given)
    with log.engines_apart() if config.parallel.joins else contextlib.nullcontext():
        return _train_here(options, config, folder)


def _arguments(options: argparse.Namespace) -> list[str]:
    """Returns the user's options, to be passed on to the training processes. Leaves out `--out` and resume flags."""
    given = [f"--{name}={value}" for name in ("recipe", "config") if (value := getattr(options, name)) is not None]
    given += [f"--set={setting}" for setting in options.set] + [f"--import={module}" for module in options.imports]
    return given + [f"--{name}" for name in ("quiet", "json") if getattr(options, name)]


def _start(options: argparse.Namespace, config: "RunConfig", folder: Path, given: list[str]) -> int:
    """Starts the training processes and waits for them. Returns the exit code."""
    from llmeff.run import launch
    from llmeff.run.prepare import check_world

    check_world(config, is_started=False)
    asked = launch.first_flags(folder, resume=options.resume, anew=options.anew, is_restarted=options.restarts > 0)

    def start(how: Sequence[str]) -> list[str]:
        return launch.command(config, [*given, f"--out={folder}", *(how or asked)])

    def tell(line: str) -> None:
        if not (options.quiet or options.json):
            sys.stderr.write(f"llmeff: starting {line}\n")

    return launch.run(start, folder, restarts=options.restarts, tell=tell)


def _train_here(options: argparse.Namespace, config: "RunConfig", folder: Path) -> int:
    """Trains in this process, which is the only one of the run or was started by a launcher. Returns the exit code."""
    from llmeff.core import group
    from llmeff.run.loop import DivergedError, train

    try:
        is_silent = options.quiet or options.json
        result = train(config, folder, resume=options.resume, anew=options.anew, is_silent=is_silent)
    except DivergedError as failure:
        return exits.fail([str(failure)], exits.FAILED)
    group.disconnect()
    if options.json and world().is_main:
        log.out().write(json.dumps(result.model_dump(mode="json")) + "\n")
        log.out().flush()
    return 0
