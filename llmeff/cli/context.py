"""`llmeff context`: evaluates trained language models on windows longer than their training length."""

import argparse
import sys
from pathlib import Path
from typing import Any

from llmeff.cli.options import add_imports, check_json, write_with_picture


def add(commands: Any) -> None:
    """Adds this command to the subcommands of the main parser."""
    parser = commands.add_parser(
        "context",
        help="test language models on windows longer than in training: loss by position, loss on repeats, speed",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument(
        "--times", type=int, default=4, metavar="N", help="longest window, as a multiple of the training length (4)"
    )
    parser.add_argument(
        "--gram",
        type=int,
        default=2,
        metavar="N",
        help="length of the repeated n-grams that are scored apart (2: bigrams)",
    )
    parser.add_argument("--split", default="validation", help="split to evaluate (validation)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=2**17,
        metavar="N",
        help="number of tokens to read from the start of the split (131072)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write all results to FILE as JSON, and a plot next to it as .png"
    )
    add_imports(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Runs this command. Returns the exit code."""
    from llmeff.compare.verdict_table import terminal
    from llmeff.core.components import load_components
    from llmeff.lab.long_range import as_json, long_range, picture, tables

    load_components(options.imports)
    check_json(options.out)
    found = long_range(
        options.runs, times=options.times, gram=options.gram, split=options.split, max_tokens=options.max_tokens
    )
    sys.stdout.write(terminal(tables(found)))
    if options.out is not None:
        write_with_picture(options.out, options.command_line, as_json(found), picture(found))
    return 0
