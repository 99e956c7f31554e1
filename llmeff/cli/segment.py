"""`llmeff segment`: segments pictures with a trained model."""

import argparse
import sys
from pathlib import Path
from typing import Any

from llmeff.cli.options import add_imports


def add(commands: Any) -> None:
    """Adds this command to the subcommands of the main parser."""
    parser = commands.add_parser("segment", help="segment pictures with a trained model: masks, overlays, scores")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="pictures, or folders of pictures")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help="output folder; must be new or empty"
    )
    parser.add_argument(
        "--masks", type=Path, metavar="MASKS", help="folder of true masks with the names of the pictures"
    )
    parser.add_argument(
        "--beside", type=Path, nargs="+", action="extend", default=[], metavar="RUN",
        help="other runs to show and score next to RUN",
    )  # fmt: skip
    add_imports(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Runs this command. Returns the exit code."""
    from llmeff.core.components import load_components
    from llmeff.lab.pictures import segment

    load_components(options.imports)
    text = segment(options.run, options.images, options.out, masks=options.masks, beside=options.beside)
    sys.stdout.write(text + "\n")
    return 0
