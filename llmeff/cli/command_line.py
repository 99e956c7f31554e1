"""Entry point of `llmeff`: parses the arguments, runs the command, and turns errors into one message and an exit code.

Commands import their dependencies only when they run, so that `--help` is fast.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from llmeff import __version__
from llmeff.cli import bench, compare, context, exits, plan, segment, sweep, train
from llmeff.core import log
from llmeff.core.config import ConfigError
from llmeff.core.dist import keep_folder_off_paths, world

_COMMANDS = (train, plan, sweep, compare, segment, context, bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name.

    Args:
        arguments: the command-line arguments without the program name. None to read `sys.argv`.

    Returns:
        The exit code: 0 on success, 1 if a run failed, 2 if the input is wrong (one error, and no file is touched), or
        130 on Ctrl-C.
    """
    if arguments is None:
        keep_folder_off_paths()
        arguments = sys.argv[1:]
    options = _parser().parse_args(arguments)
    options.command_line = shlex.join(["llmeff", *arguments])
    log.configure(quiet=getattr(options, "quiet", False))
    try:
        code: int = options.command(options)
    except ConfigError as error:
        return exits.fail(error.problems, exits.BAD_INPUT)
    except KeyboardInterrupt:
        if world().is_main:
            sys.stderr.write(log.complaint(["interrupted"]))
        return exits.INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmeff",
        description="A training harness and laboratory for the efficiency of large language models.",
    )
    parser.add_argument("--version", action="version", version=f"llmeff {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser
