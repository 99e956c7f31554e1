"""Base classes of model configs, and `save_model`."""

from collections.abc import Iterator
from functools import singledispatch
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmeff.core.config import Component, Count, Text
from llmeff.core.layout import Layout
from llmeff.core.parameters import Role
from llmeff.cost.arrays import NUM_BYTES, Array, Weight
from llmeff.cost.image_laws import Images
from llmeff.cost.laws import Batch
from llmeff.cost.price import Price
from llmeff.cost.step import price_step, weights
from llmeff.cost.strategy_law import StrategyLaw
from llmeff.cost.tape import Tape
from llmeff.cost.workload import Workload
from llmeff.models.pixel_loss import weighted_loss


class ModelConfig(Component, family="model"):
    """The model that a run trains."""

    name: Text
    """The model's name."""

    def build(self) -> nn.Module:
        """Builds the module, initialized from torch's default generator."""
        raise NotImplementedError(type(self))

    def problems(self, workload: Workload, built: nn.Module | None = None) -> Iterator[str]:
        """Yields a message for everything that a step needs and the model does not support.

        For settings that work but are unwise, only logs a warning.

        Args:
            workload: the step.
            built: the module from `build`. None to check only the config.
        """
        yield from ()

    def statistics_scope(self) -> Literal["nothing", "micro-batch", "ranks"]:
        """Returns the rows over which the model computes batch statistics.

        Returns:
            "nothing" if it computes none, "micro-batch" for a rank's micro-batch, or "ranks" for the micro-batches of
            all ranks together. With batch statistics, the result of a step depends on how its rows are split into
            micro-batches. With "micro-batch", it also depends on the number of ranks.
        """
        return "nothing"

    def batch(self, tape: Tape) -> Any:
        """Returns the shapes of a micro-batch, without values, as input of `law`. The tape counts its memory."""
        return Batch(tape)

    def law(self, tape: Tape, batch: Any) -> Array:
        """Records the price of a micro-batch's training forward pass on the tape, and returns the summed loss."""
        raise NotImplementedError(type(self))

    def example(self, workload: Workload) -> dict[str, Any]:
        """Returns a micro-batch of placeholder values, to price a model that has no law by tracing a step."""
        raise NotImplementedError(type(self))

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Returns the summed loss of a micro-batch from `example`, as in a training step.

        Args:
            model: the module from `build`, possibly transformed.
            batch: the micro-batch from `example`.
        """
        raise NotImplementedError(type(self))

    def weights(self) -> list[Weight]:
        """Returns the trained parameters, with their names in the module."""
        return weights(self.law, self.batch)

    def buffer_bytes(self, number_bytes: int) -> int:
        """Returns the bytes of a rank's buffers, which stay in memory during the whole run.

        Args:
            number_bytes: bytes per element of the parameters. Buffers have the same dtype.
        """
        return 0

    def roles(self) -> dict[str, Role]:
        """Returns the role of each trained parameter by its name in the module."""
        with torch.device("meta"):
            module = self.build()
        roles: dict[str, Role] = module.roles()  # type: ignore[operator]  # a method of every language model
        return {name: roles[name] for name, parameter in module.named_parameters() if parameter.requires_grad}

    def price(self, workload: Workload, strategy_law: StrategyLaw | None = None) -> Price:
        """Returns the price of an optimizer step, without the optimizer's state and update.

        Args:
            workload: the step.
            strategy_law: what a strategy keeps and sends. None for one process that keeps all weights and gradients.
        """
        kept = self.buffer_bytes(NUM_BYTES[workload.precision.parameters])
        buffers = Price({("frozen_bytes", "buffers"): kept, ("peak_bytes", "buffers"): kept})
        return price_step(self.law, workload, strategy_law, self.batch) + buffers


class ImageModelConfig(ModelConfig):
    """A model that assigns a class to every pixel of an image."""

    num_classes: Count | Literal["auto"] = "auto"
    """K, number of classes. auto: the number of classes in the data."""

    def classes(self) -> int:
        """Returns K, the number of classes.

        Raises:
            ValueError: `num_classes` is still "auto".
        """
        if self.num_classes == "auto":
            raise ValueError("num_classes is auto: it must be resolved from the data before the model is built")
        return self.num_classes

    def batch(self, tape: Tape) -> Images:
        """Returns the shapes of images and labels, without values, as input of `law`. The tape counts their memory."""
        return Images(tape)

    def example(self, workload: Workload) -> dict[str, Any]:
        """Returns placeholder images (B, 3, H, W), labels (B, H, W) and class weights (K,)."""
        assert workload.image_size is not None, "a model of images needs a workload of images"
        num, size = workload.num_sequences, workload.image_size
        return {
            "images": torch.zeros(num, 3, *size),
            "labels": torch.zeros(num, *size, dtype=torch.int64),
            "weights": torch.ones(self.classes()),
        }

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Returns the cross-entropy of all pixels, weighted by class and summed."""
        return weighted_loss(model(batch["images"]), batch["labels"], batch["weights"])

    def least_size(self) -> int:
        """Returns the smallest image side that the model supports, in pixels."""
        return 1

    def problems(self, workload: Workload, built: nn.Module | None = None) -> Iterator[str]:
        """Yields a message if images are too small, or if the precision gives weights another dtype than images."""
        size, least = workload.image_size, self.least_size()
        if built is None and workload.precision.master is not None:
            yield (
                f"model {self.name!r} does not support precision {workload.precision_name!r}, because images and "
                "running statistics would need the dtype of its weights: use 'bf16'"
            )
        if built is None and size is not None and min(size) < least:
            yield (
                f"model {self.name!r} needs images of at least {least} pixels a side, but these have {size[0]} x {size[1]}: "
                "set data.size or a larger data.augment.crop"
            )


class LanguageModelConfig(ModelConfig):
    """A model of token sequences."""

    vocab_size: Count | Literal["auto"] = "auto"
    """V, size of the vocabulary. auto: the size of the tokenizer's vocabulary."""

    def vocabulary(self) -> int:
        """Returns V, the size of the vocabulary.

        Raises:
            ValueError: `vocab_size` is still "auto".
        """
        if self.vocab_size == "auto":
            raise ValueError("vocab_size is auto: it must be resolved from the tokenizer before the model is built")
        return self.vocab_size

    def example(self, workload: Workload) -> dict[str, Any]:
        """Returns placeholder tokens and targets, (B, T) each, with a layout if rows hold several documents."""
        tokens = torch.zeros(workload.num_sequences, workload.num_tokens, dtype=torch.int64)
        layout = None
        if workload.packed:
            layout = Layout(positions=torch.zeros_like(tokens), documents=torch.zeros_like(tokens))
        return {
            "tokens": tokens,
            "layout": layout,
            "targets": torch.zeros_like(tokens),
            "loss_chunk": workload.loss_chunk,
        }

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Returns the summed loss that the model computes."""
        loss: Tensor = model(**batch)
        return loss

    def tokenizer_folder(self) -> Path | None:
        """Returns the folder of the tokenizer that the weights were trained with, or None if there is none."""
        return None

    def chunks_logits(self) -> bool:
        """Returns whether the loss can be computed from the logits of a few tokens at a time."""
        return True


@singledispatch
def save_model(model: nn.Module, folder: Path, *, max_length: int, end_id: int) -> None:
    """Writes a model as config.json and safetensors. Each class of models registers its own writer.

    Args:
        model: the trained model.
        folder: folder to write to; created if it does not exist.
        max_length: longest sequence in tokens that the model was trained on.
        end_id: id of the token that begins and ends a document.
    """
    raise NotImplementedError(type(model))
