"""Interface of training data."""

from llmeff.core.config import Component, Text


class DataConfig(Component, family="data"):
    """The data that a run trains and evaluates on."""

    name: Text
    """The kind of data."""
