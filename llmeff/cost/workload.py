"""What one optimizer step is asked to do, as far as it decides the price."""

from dataclasses import dataclass
from typing import Literal

from llmeff.core.cpu import InstructionSet
from llmeff.core.precision import Precision, PrecisionName, precision

Kernel = Literal["flash", "math"]
"""How softmax attention is computed: `flash` never makes the (T, T) weights (torch's flash, memory-efficient and CPU
kernels); `math` is plain matrix products."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step of one rank, on token sequences or images."""

    num_sequences: int
    """B, sequences (or images) in a micro-batch."""
    num_tokens: int
    """T, tokens in a sequence (or pixels in an image)."""
    image_size: tuple[int, int] | None = None
    """H and W; None: there are no images."""
    num_micro_batches: int = 1
    """Micro-batches in a step."""
    precision_name: PrecisionName = "fp32"
    """The number formats."""
    recompute: bool = False
    """Only each layer's input is kept for backward."""
    loss_chunk: int | None = None
    """Tokens whose logits live at once; None for all."""
    packed: bool = False
    """Rows hold several documents, which do not see one another."""
    kernel: Kernel = "flash"
    """Of softmax attention."""
    num_threads: int = 1
    """Of a rank, where it computes on a CPU; they choose among the kernels of convolutions."""
    instruction_set: InstructionSet | None = None
    """That oneDNN takes of that CPU, by which convolutions are computed; None: not known."""
    on_cpu: bool = True
    """Ranks talk by gloo, which puts parts together and takes sums apart in copies of its own, and what is offloaded lies
    in the same memory as all else."""

    @property
    def precision(self) -> Precision:
        """The number formats, spelt out."""
        return precision(self.precision_name)
