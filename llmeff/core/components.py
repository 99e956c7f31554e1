"""Users' own components: modules that register themselves when they are imported."""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from llmeff.core.config import ConfigError


def load_components(modules: Sequence[str]) -> None:
    """Imports installed packages by their entry points under `llmeff`, and modules by name, from here too.

    Every process that reads a config calls it first.

    Raises:
        ConfigError: there is no such module.
    """
    for entry in importlib.metadata.entry_points(group="llmeff"):
        entry.load()
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0] and error.name != name:
                raise
            raise ConfigError(f"--import {name}: there is no such module here or on the Python path") from None
