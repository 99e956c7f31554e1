"""`llmeff segment`: what a trained model makes of pictures."""

import argparse
import sys
from pathlib import Path
from typing import Any

from llmeff.cli.options import add_imports


def add(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser("segment", help="what a trained model makes of pictures: masks, overlays, scores")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run that has ended")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="pictures, and folders of them")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="a new folder for what is made")
    parser.add_argument("--masks", type=Path, metavar="MASKS", help="a folder with the truth, by the pictures' names")
    parser.add_argument(
        "--beside", type=Path, nargs="+", action="extend", default=[], metavar="RUN",
        help="other runs to set beside it",
    )  # fmt: skip
    add_imports(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from llmeff.core.components import load_components
    from llmeff.lab.pictures import segment

    load_components(options.imports)
    told = segment(options.run, options.images, options.out, masks=options.masks, beside=options.beside)
    sys.stdout.write(told + "\n")
    return 0
