"""`llmeff context`: language models on longer windows than they were trained on."""

import argparse
import sys
from pathlib import Path
from typing import Any

from llmeff.cli.options import add_imports, check_json, write_with_picture


def add(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "context",
        help="test language models on longer windows than their own: loss by position, loss on repeats, speed",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs that have ended")
    parser.add_argument("--times", type=int, default=4, metavar="N", help="longest window, in training lengths (4)")
    parser.add_argument(
        "--gram", type=int, default=2, metavar="N", help="tokens in a row that count as a repeat (2: bigrams)"
    )
    parser.add_argument("--split", default="validation", help="split whose text is read (validation)")
    parser.add_argument("--max-tokens", type=int, default=2**17, metavar="N", help="read the split's first N (131072)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write everything to FILE as JSON, and a picture next to it as .png"
    )
    add_imports(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
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
