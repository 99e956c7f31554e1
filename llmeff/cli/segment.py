"""`llmeff segment`: applies a trained model to pictures."""

import argparse
import sys
from pathlib import Path
from typing import Any

from llmeff.cli.options import add_imports


def add(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser("segment", help="apply a trained model to pictures: masks, overlays, scores")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run that has ended")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="pictures, or folders of pictures")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="a new folder for the output")
    parser.add_argument("--masks", type=Path, metavar="MASKS", help="folder of true masks, named like the pictures")
    parser.add_argument(
        "--beside", type=Path, nargs="+", action="extend", default=[], metavar="RUN",
        help="other runs to show next to it",
    )  # fmt: skip
    add_imports(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from llmeff.core.components import load_components
    from llmeff.lab.pictures import segment

    load_components(options.imports)
    text = segment(options.run, options.images, options.out, masks=options.masks, beside=options.beside)
    sys.stdout.write(text + "\n")
    return 0
