"""`llmeff plan`: the price of a run, without starting it."""

import argparse
import json
import sys
from typing import Any

from llmeff.cli.options import add_config, run_config


def add(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser("plan", help="predict what a run will cost: parameters, memory by kind, FLOPs")
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print the price as one JSON object")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from llmeff.plan.price import plan, show_plan

    planned = plan(run_config(options))
    sys.stdout.write((json.dumps(planned.as_dict()) if options.json else show_plan(planned)) + "\n")
    return 0
