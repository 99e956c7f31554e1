"""The contract of a model's config."""

from collections.abc import Iterator
from functools import singledispatch
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from llmeff.core.config import Component, Count, Text
from llmeff.core.table import Role
from llmeff.cost.arrays import Array, Weight
from llmeff.cost.keeping import Keeping
from llmeff.cost.laws import Batch
from llmeff.cost.price import Price
from llmeff.cost.step import price_step, weights
from llmeff.cost.tape import Tape
from llmeff.cost.workload import Workload
from llmeff.data.tokenizer import Tokenizer


class ModelConfig(Component, family="model"):
    """Which model a run trains."""

    name: Text
    """The model's name."""

    def build(self) -> nn.Module:
        """The module, initialized from torch's default generator."""
        raise NotImplementedError(type(self))

    def problems(self, workload: Workload, built: nn.Module | None = None) -> Iterator[str]:
        """What a step asks for that the model cannot do. What is merely unwise is a warning.

        Args:
            workload: the step.
            built: what `build` gave; None: nothing is built yet, and asked for is what the config alone tells.
        """
        yield from ()

    def law(self, tape: Tape, batch: Batch) -> Array:
        """The price of a micro-batch's forward in training, to its summed loss."""
        raise NotImplementedError(type(self))

    def weights(self) -> list[Weight]:
        """The trained parameters, by their names in the module."""
        return weights(self.law)

    def roles(self) -> dict[str, Role]:
        """What each trained parameter is, by its name in the module."""
        with torch.device("meta"):
            module = self.build()
        roles: dict[str, Role] = module.roles()  # type: ignore[operator]  # a method of every language model
        return {name: roles[name] for name, parameter in module.named_parameters() if parameter.requires_grad}

    def price(self, workload: Workload, keeping: Keeping | None = None) -> Price:
        """What an optimizer step costs, without the optimizer.

        Args:
            workload: what the step does.
            keeping: what becomes of weights and gradients; None: one process alone keeps them.
        """
        return price_step(self.law, workload, keeping)


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

    def tokenizer_problems(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Why the model cannot be trained on a tokenizer's ids, beside how many these are."""
        yield from ()

    def chunks_logits(self) -> bool:
        """Whether the loss can be made of a few tokens' logits at a time."""
        return True


@singledispatch
def save_model(model: nn.Module, folder: Path, *, max_length: int, end_id: int) -> None:
    """Writes a model as config.json and safetensors; each kind of model registers how.

    Args:
        model: the trained model.
        folder: made if absent.
        max_length: the longest sequence, in tokens, that it was trained on.
        end_id: the token that begins and ends a document.
    """
    raise NotImplementedError(type(model))
