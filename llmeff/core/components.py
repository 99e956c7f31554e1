"""Users' own components: modules that register themselves on import."""

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
    """Finds modules in the working folder: those that the user named, and those that they import, at any time.

    It comes after all other finders, so nothing there hides an installed package. Libraries do not find there what they
    try to import and can do without (a tabulate.py).
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.names: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module's spec; None if it is not in the folder or was not asked for from here."""
        if path is not None or not (fullname in self.names or self._is_asked_from_here()):
            return None
        spec = PathFinder.find_spec(fullname, [self.folder], target)
        if spec is not None:
            self.names.add(fullname)
        return spec

    def _is_asked_from_here(self) -> bool:
        """Whether the import statement is in a module that was found here."""
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _MACHINERY:
            frame = frame.f_back
        return frame.f_globals.get("__name__", "").partition(".")[0] in self.names


_MACHINERY = ("importlib", "_frozen_importlib", "_frozen_importlib_external")
"""Modules whose frames lie between an import and its finder."""


def load_components(modules: Sequence[str]) -> None:
    """Imports installed packages by their `llmeff` entry points, and modules by name, also from the working folder.

    Every process that reads a config must call it first.

    Raises:
        ConfigError: there is no such module.
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
            raise ConfigError(f"--import {name}: there is no such module here or on the Python path") from None


def _search_here(names: set[str]) -> None:
    """Makes modules of these names importable from the working folder."""
    here = str(Path.cwd())
    known = next((finder for finder in sys.meta_path if isinstance(finder, _Here) and finder.folder == here), None)
    if known is None:
        known = _Here(here)
        sys.meta_path.append(known)
    known.names |= names
