"""Named runs and sweeps: functions that return a RunConfig or a SweepConfig."""

from collections.abc import Callable

from llmeff.config.run import RunConfig
from llmeff.config.sweep import SweepConfig
from llmeff.core.registry import Registry

RECIPES: Registry[Callable[[], RunConfig]] = Registry("recipe")
"""All runs by name."""
SWEEPS: Registry[Callable[[], SweepConfig]] = Registry("sweep")
"""All sweeps by name."""


def recipe(function: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """Registers a run under its function's name, with dashes instead of underscores."""
    RECIPES.add(_name(function), function)
    return function


def sweep_recipe(function: Callable[[], SweepConfig]) -> Callable[[], SweepConfig]:
    """Registers a sweep in the same way."""
    SWEEPS.add(_name(function), function)
    return function


def _name(function: Callable[[], object]) -> str:
    return function.__name__.replace("_", "-")
