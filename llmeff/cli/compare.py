"""`llmeff compare`: lists runs side by side, or compares arms with a baseline."""

import argparse
import sys
from pathlib import Path
from typing import Any

from llmeff.core import log


def add(commands: Any) -> None:
    """Adds this command to the subcommands of the main parser."""
    parser = commands.add_parser("compare", help="list runs side by side, or compare arms with a baseline")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, sweep folders, or ledger files")
    parser.add_argument(
        "--baseline", metavar="ARM", help="arm to compare with (default: the sweep's, or the first arm)"
    )
    parser.add_argument(
        "--metric", metavar="NAME", help="main metric, such as bits_per_byte (default: the sweep's, or the loss)"
    )
    parser.add_argument(
        "--target",
        type=float,
        metavar="VALUE",
        help="report the steps, FLOPs and time until the metric reaches this value (default: the sweep's, or the "
        "best value that every finished baseline run reaches)",
    )
    parser.add_argument("--timing", type=Path, metavar="FILE", help="file of step times from `llmeff sweep --timing`")
    parser.add_argument(
        "--mixed", action="store_true", help="compare runs even if their data or budgets differ, with a note"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the whole comparison to one HTML page")
    parser.add_argument(
        "--format",
        choices=("terminal", "markdown", "csv", "json"),
        default="terminal",
        help="output format (terminal)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the metric over training as a PNG")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Runs this command. Returns the exit code."""
    from llmeff.compare.ledger import read_entries
    from llmeff.compare.report import write_report
    from llmeff.compare.study import is_list, name_of, read_study, write_pictures
    from llmeff.compare.verdict_table import render_comparison

    entries = read_entries(options.runs)
    asked = (options.baseline, options.target, options.metric, options.timing, options.html)
    wants_arms = any(option is not None for option in asked)
    if is_list(options.runs, entries) and not (wants_arms or options.mixed):
        from llmeff.compare.alike import differences
        from llmeff.compare.table import compare, draw, render

        notes = [f"these runs are not comparable: {text}" for text in differences(entries)]
        if options.format == "csv":
            for note in notes:
                log.logger.warning(note)
        sys.stdout.write(render(compare(options.runs), options.format, notes=notes) + "\n")
        if options.plot is not None:
            draw(options.runs, options.plot)
        return 0
    comparison = read_study(
        options.runs, entries, baseline=options.baseline, target=options.target, metric=options.metric,
        timing=options.timing, mixed=options.mixed,
    )  # fmt: skip
    if options.html is not None:
        write_report(comparison, options.html, name_of(options.runs, entries))
    if options.plot is not None:
        write_pictures(comparison, options.plot)
    if options.format == "csv":
        for note in comparison.notes:
            log.logger.warning(note)
    sys.stdout.write(render_comparison(comparison, options.format) + "\n")
    return 0
