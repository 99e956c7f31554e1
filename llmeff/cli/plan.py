"""`llmeff plan`: predicts the price of a run without starting the run."""

import argparse
import json
import sys
from typing import Any

from llmeff.cli.options import add_config, run_config


def add(commands: Any) -> None:
    """Adds this command to the subcommands of the main parser."""
    parser = commands.add_parser("plan", help="predict the cost of a run: parameters, memory by kind, FLOPs")
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print the price as one JSON object")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Runs this command. Returns the exit code."""
    from llmeff.plan.price import plan, show_plan

    planned = plan(run_config(options))
    sys.stdout.write((json.dumps(planned.as_dict()) if options.json else show_plan(planned)) + "\n")
    return 0
