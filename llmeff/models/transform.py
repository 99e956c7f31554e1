"""The contract of a transform, which changes a built model before training and is folded back before the model is saved."""

from torch import nn

from llmeff.core.config import Component, Text


class TransformConfig(Component, family="transform"):
    """A change of a model, made after building it and before distributing it over processes."""

    name: Text
    """The transform's name."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Changes the model, possibly in place, and freezes what is not trained.

        Raises:
            ConfigError: the transform does not fit the model.
        """
        raise NotImplementedError(type(self))

    def fold(self, model: nn.Module) -> nn.Module:
        """Restores the model's original structure, with what was learned in its weights."""
        raise NotImplementedError(type(self))
