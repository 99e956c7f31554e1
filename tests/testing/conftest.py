"""Components that are registered for one test, and gone after it."""

import importlib
import sys

import pytest

from llmeff.attention import MixerConfig
from llmeff.optim import OptimizerConfig

collect_ignore = ["counting.py", "sigmoid.py", "signum.py"]
"""Imported by tests alone, since what it registers would be there for all."""


@pytest.fixture
def outside():
    """Imports a module of `tests.testing` as a user's own, with what it registers."""
    before = {kind: set(kind.registry.names()) for kind in (MixerConfig, OptimizerConfig)}
    yield lambda name: importlib.import_module(f"tests.testing.{name}")
    for kind, names in before.items():
        for name in set(kind.registry.names()) - names:
            del kind.registry._entries[name]
    for file in collect_ignore:
        sys.modules.pop(f"tests.testing.{file.removesuffix('.py')}", None)
