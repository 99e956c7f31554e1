"""What one optimizer step does, as far as its price depends on it."""

from dataclasses import dataclass
from typing import Literal

from llmeff.core.cpu import InstructionSet
from llmeff.core.precision import Precision, PrecisionName, precision

Kernel = Literal["flash", "math"]
"""How softmax attention is computed. `flash`: without the (T, T) weights (torch's flash, memory-efficient and CPU
kernels). `math`: by plain matrix products."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step of one rank, on token sequences or images."""

    num_sequences: int
    """B, sequences (or images) in a micro-batch."""
    num_tokens: int
    """T, tokens in a sequence (or pixels in an image)."""
    image_size: tuple[int, int] | None = None
    """(H, W) of an image; None: there are no images."""
    num_micro_batches: int = 1
    """Micro-batches in a step."""
    precision_name: PrecisionName = "fp32"
    """The number formats."""
    recompute: bool = False
    """Whether only each layer's input is kept, and backward runs the layer again."""
    loss_chunk: int | None = None
    """Tokens whose logits live at once; None: all."""
    packed: bool = False
    """Whether rows hold several documents, which do not see one another."""
    kernel: Kernel = "flash"
    """How softmax attention is computed."""
    num_threads: int = 1
    """CPU threads of a rank; kernels of attention and convolutions depend on them."""
    instruction_set: InstructionSet | None = None
    """The CPU's instruction set that oneDNN uses for convolutions; None: unknown."""
    on_cpu: bool = True
    """Whether the model is on a CPU. Ranks then communicate by gloo, which copies what it gathers and scatters, and
    what is offloaded is in the same memory as the model."""

    @property
    def precision(self) -> Precision:
        """The number formats of `precision_name`."""
        return precision(self.precision_name)
