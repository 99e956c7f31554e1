"""The contract of a transform: what is changed in a built model before it is trained, and undone in what is kept of it."""

from torch import nn

from llmeff.core.config import Component, Text


class TransformConfig(Component, family="transform"):
    """A change of a model of any kind, between building it and sharing it out over processes."""

    name: Text
    """The transform's name."""

    def apply(self, model: nn.Module) -> nn.Module:
        """The changed model; what must not be trained is frozen. It may be changed in place.

        Raises:
            ConfigError: it does not fit the model.
        """
        raise NotImplementedError(type(self))

    def fold(self, model: nn.Module) -> nn.Module:
        """The model as it was before, with what was learned in it."""
        raise NotImplementedError(type(self))
