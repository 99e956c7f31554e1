"""Base class of transforms, which change a built model before training and are merged into it before it is saved."""

from torch import nn

from llmeff.core.config import Component, Text


class TransformConfig(Component, family="transform"):
    """A change of a model, applied after it is built and before it is distributed over processes."""

    name: Text
    """The transform's name."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Changes the model, possibly in place, and freezes parameters that are not trained. Returns the changed model.

        Raises:
            ConfigError: the transform cannot be applied to the model.
        """
        raise NotImplementedError(type(self))

    def fold(self, model: nn.Module) -> nn.Module:
        """Restores the model's original structure, and merges the learned changes into its weights."""
        raise NotImplementedError(type(self))
