"""Loads users' own components: modules that register components when they are imported."""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from llmeff.core.config import ConfigError


class _Here(MetaPathFinder):
    """Finds modules in the working folder: modules that the user named, and modules that these modules import.

    It comes after all other finders on `sys.meta_path`, so a file in the working folder never hides an installed
    package. If a library tries an optional import, such as `tabulate`, it does not find a user's tabulate.py.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.names: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec of a module in the working folder, or None if there is no such module.

        Also returns None unless the user named the module, or a module that this finder found imports it.
        """
        if path is not None or not (fullname in self.names or self._is_asked_from_here()):
            return None
        spec = PathFinder.find_spec(fullname, [self.folder], target)
        if spec is not None:
            self.names.add(fullname)
        return spec

    def _is_asked_from_here(self) -> bool:
        """Returns whether the import statement is in a module that this finder found."""
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _MACHINERY:
            frame = frame.f_back
        return frame.f_globals.get("__name__", "").partition(".")[0] in self.names


_MACHINERY = ("importlib", "_frozen_importlib", "_frozen_importlib_external")
"""Modules of the import system. Their stack frames are between an import statement and the finder."""


def load_components(modules: Sequence[str]) -> None:
    """Loads the `llmeff` entry points of installed packages, then imports the given modules.

    Modules that are not installed are also searched for in the working folder. Every process that reads a config must
    call this first.

    Args:
        modules: dotted names of modules.

    Raises:
        ConfigError: if a module does not exist.
    """
    for entry in importlib.metadata.entry_points(group="llmeff"):
        entry.load()
    if modules:
        _search_here({name.partition(".")[0] for name in modules})
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0] and error.name != name:
                raise
            raise ConfigError(f"--import {name}: no such module in the working folder or on the Python path") from None


def _search_here(names: set[str]) -> None:
    """Makes modules with these top-level names importable from the working folder."""
    here = str(Path.cwd())
    known = next((finder for finder in sys.meta_path if isinstance(finder, _Here) and finder.folder == here), None)
    if known is None:
        known = _Here(here)
        sys.meta_path.append(known)
    known.names |= names
