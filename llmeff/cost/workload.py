"""The description of an optimizer step from which its price is computed."""

from dataclasses import dataclass
from typing import Literal

from llmeff.core.cpu import InstructionSet
from llmeff.core.precision import Precision, PrecisionName, precision

Kernel = Literal["flash", "math"]
"""Kernel of softmax attention. `flash` stands for torch's flash, memory-efficient and CPU kernels, which do not store
the (T, T) attention weights. `math` uses plain matrix products."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step of one rank, on token sequences or images."""

    num_sequences: int
    """B, the number of sequences (or images) in a micro-batch."""
    num_tokens: int
    """T, the number of tokens in a sequence (or pixels in an image)."""
    image_size: tuple[int, int] | None = None
    """(H, W) of an image. None if the model reads no images."""
    num_micro_batches: int = 1
    """Number of micro-batches in a step."""
    precision_name: PrecisionName = "fp32"
    """Name of the precision, which determines the dtypes."""
    recompute: bool = False
    """Whether activation checkpointing keeps only each layer's input, so that backward runs the layer again."""
    loss_chunk: int | None = None
    """Number of tokens whose logits are in memory at once. None if all logits are."""
    packed: bool = False
    """Whether a row has several documents, which do not attend to each other."""
    kernel: Kernel = "flash"
    """Kernel of softmax attention."""
    num_threads: int = 1
    """CPU threads of a rank. The memory of attention and convolution kernels depends on it."""
    instruction_set: InstructionSet | None = None
    """The CPU's instruction set that oneDNN uses for convolutions. None if unknown."""
    on_cpu: bool = True
    """Whether the model is on a CPU. Then ranks communicate by gloo, which copies the tensors that it gathers and
    scatters, and offloaded tensors share the model's memory."""

    @property
    def precision(self) -> Precision:
        """The dtypes of `precision_name`."""
        return precision(self.precision_name)
