"""The contract of what a run trains on."""

from llmeff.core.config import Component, Text


class DataConfig(Component, family="data"):
    """Which data a run trains and evaluates on."""

    name: Text
    """The kind of data."""
