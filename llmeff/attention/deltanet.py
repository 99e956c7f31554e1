"""DeltaNet: a delta-rule mixer whose state does not decay."""

from typing import ClassVar, Literal

from torch import Tensor

from llmeff.attention import fla, norm
from llmeff.attention.delta import DeltaConfig, DeltaMixer
from llmeff.attention.mixer import MixerShape
from llmeff.attention.norm import RMSNorm
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, D width, N heads of values, H head width


class DeltaNet(DeltaConfig):
    """DeltaNet (Schlag et al. 2021, arXiv 2102.11174).

    The convolution and norms are those of Yang et al. 2024 (arXiv 2406.06484).
    """

    fuses: ClassVar[frozenset[str]] = DeltaConfig.fuses | {"rms_norm"}

    name: Literal["deltanet"] = "deltanet"

    def build(self, shape: MixerShape) -> "DeltaNetMixer":
        """Builds a layer's mixer."""
        return DeltaNetMixer(self, shape)

    def log_decay_law(self, shape: MixerShape, tape: Tape, x: Array) -> None:
        """Returns None, because the state does not decay."""

    def finish_law(self, shape: MixerShape, tape: Tape, out: Array, x: Array) -> Array:
        """Records the price of `DeltaNetMixer.finish` on the tape: (B, T, N, H) to (B, T, N, H)."""
        with tape.within("o_norm"):
            return laws.cast(tape, norm.law(tape, out), x.dtype)


class DeltaNetMixer(DeltaMixer):
    """Module of DeltaNet. It normalizes the output of the scan and applies no gate."""

    def __init__(self, config: DeltaNet, shape: MixerShape):
        super().__init__(config, shape)
        self.o_norm = RMSNorm(shape.head_dim, shape.norm_eps)

    def log_decay(self, x: Tensor, *, fused: bool) -> None:
        """Returns None, because the state does not decay."""

    def finish(self, out: Tensor, x: Tensor, *, fused: bool) -> Tensor:
        """Normalizes the scan's output, (B, T, N, H), and returns it in the dtype of x."""
        normed: Tensor = fla.rms_norm(out, self.o_norm.weight, self.o_norm.eps) if fused else self.o_norm(out)
        return normed.to(x.dtype)
