"""The contract of a model's config."""

from typing import Literal

from torch import nn

from llmeff.core.config import Component, Count, Text


class ModelConfig(Component, family="model"):
    """Which model a run trains."""

    name: Text
    """The model's name."""

    def build(self) -> nn.Module:
        """The module, initialized from torch's default generator."""
        raise NotImplementedError(type(self))


class LanguageModelConfig(ModelConfig):
    """A model of token sequences."""

    vocab_size: Count | Literal["auto"] = "auto"
    """V. auto: the tokenizer's."""

    def vocabulary(self) -> int:
        """V as a number.

        Raises:
            ValueError: it is still to be resolved from a tokenizer.
        """
        if self.vocab_size == "auto":
            raise ValueError("vocab_size is auto: it must be resolved from the tokenizer before the model is built")
        return self.vocab_size
