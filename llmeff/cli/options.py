"""Options that several commands share: the config of a run or a sweep, the user's own components, and output files."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmeff.core.config import ConfigError

if TYPE_CHECKING:
    from llmeff.config.run import RunConfig


def add_config(parser: argparse.ArgumentParser, kind: str = "run") -> None:
    """Adds `--recipe`, `--config`, `--set` and `--import`.

    Args:
        parser: the parser of the command.
        kind: what the config describes, `run` or `sweep`.
    """
    source = parser.add_mutually_exclusive_group()
    default = " (default: `default`)" if kind == "run" else ""
    source.add_argument("--recipe", metavar="NAME", help=f"name of a built-in {kind} recipe{default}")
    source.add_argument("--config", type=Path, metavar="FILE", help=f"config file of the {kind}, TOML or JSON")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="set one field of the config (repeatable)"
    )
    add_imports(parser)


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Adds `--import`."""
    parser.add_argument(
        "--import", action="append", default=[], dest="imports", metavar="MODULE",
        help="import MODULE, which registers your own components (repeatable)",
    )  # fmt: skip


def run_config(options: argparse.Namespace) -> "RunConfig":
    """Returns the validated config of the run that the options of `add_config` describe.

    Raises:
        ConfigError: the recipe is unknown, the config file cannot be read, or the config is invalid.
    """
    from llmeff.config.recipes import RECIPES
    from llmeff.config.run import RunConfig
    from llmeff.core.components import load_components
    from llmeff.core.config import override, read, validate
    from llmeff.run.launch import supplied

    load_components(options.imports)
    if options.config is not None:
        data = read(options.config)
    else:
        name = options.recipe or "default"
        if name not in RECIPES:
            raise ConfigError(RECIPES.unknown(name))
        data = RECIPES[name]().model_dump(mode="json")
    return validate(RunConfig, supplied(override(data, options.set)))


def check_json(out: Path | None) -> None:
    """Checks that the name of the output file, if there is one, ends in .json.

    Raises:
        ConfigError: the name has another ending.
    """
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--out {out}: this command writes JSON, so give a file name that ends in .json")


def write_with_picture(out: Path, command_line: str, result: Mapping[str, Any], png: bytes) -> None:
    """Writes a result and the command that made it as JSON, and its plot next to it as .png.

    Args:
        out: the JSON file. The plot has the same name with the ending .png.
        command_line: the command that made the result.
        result: the result.
        png: the plot.

    Raises:
        ConfigError: a file cannot be written.
    """
    from llmeff.core.files import reported, write_bytes, write_text

    with reported(out):
        write_text(out, json.dumps({"command": command_line, **result}, indent=1) + "\n")
        write_bytes(out.with_suffix(".png"), png)
