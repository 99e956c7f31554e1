"""Gated DeltaNet: a delta-rule mixer whose state decays per head."""

from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention import gated_norm
from llmeff.attention.decay import Rates, initial_decays, rates_law, steps_law
from llmeff.attention.delta import DeltaConfig, DeltaMixer
from llmeff.attention.gated_norm import GatedRMSNorm
from llmeff.attention.heads import project, split
from llmeff.attention.mixer import MixerShape
from llmeff.attention.norm import at_least_float32
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, D width, N heads of values, H head width


class GatedDelta(DeltaConfig):
    """Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464), as in Qwen3-Next."""

    gates_heads = True
    fuses: ClassVar[frozenset[str]] = DeltaConfig.fuses | {"gated_rms_norm"}

    name: Literal["gated-deltanet"] = "gated-deltanet"
    initial_rates: Rates = (0.01, 16)
    """(lowest, highest) initial decay rate, see `decay.Rates`. The default is the range of Qwen3-Next."""

    def build(self, shape: MixerShape) -> "GatedDeltaMixer":
        """Builds a layer's mixer."""
        return GatedDeltaMixer(self, shape)

    def log_decay_law(self, shape: MixerShape, tape: Tape, x: Array) -> Array:
        """Records the price of `GatedDeltaMixer.log_decay` on the tape: (B, T, D) to (B, T, N, 1)."""
        own = laws.linear(tape, x, tape.weight("a_proj.weight", shape.num_heads, shape.width))
        steps = steps_law(tape, own, tape.weight("step_bias", shape.num_heads))
        return laws.times(tape, steps, rates_law(tape, shape.num_heads)).view(*x.shape[:2], shape.num_heads, 1)

    def finish_law(self, shape: MixerShape, tape: Tape, out: Array, x: Array) -> Array:
        """Records the price of `GatedDeltaMixer.finish` on the tape: (B, T, N, H) to (B, T, N, H)."""
        gate = project(tape, "g_proj", x, shape.num_heads, shape.head_dim)
        with tape.within("o_norm"):
            return gated_norm.law(tape, out, gate)


class GatedDeltaMixer(DeltaMixer):
    """Module of Gated DeltaNet. The log decay of each head is g = -exp(A) softplus(a x + dt).

    A is `log_rate`, a is `a_proj` and dt is `step_bias`. The scan's output is normalized and gated by silu.
    """

    def __init__(self, config: GatedDelta, shape: MixerShape):
        super().__init__(config, shape)
        self.g_proj = nn.Linear(shape.width, self.value_width, bias=False)
        self.a_proj = nn.Linear(shape.width, shape.num_heads, bias=False)
        self.initial_rates = config.initial_rates
        self.log_rate = nn.Parameter(torch.empty(shape.num_heads))
        self.step_bias = nn.Parameter(torch.empty(shape.num_heads))
        self.o_norm = GatedRMSNorm(shape.head_dim, shape.norm_eps)

    def initial(self) -> dict[str, Tensor]:
        """Draws initial values for the parameters of the decay."""
        return initial_decays(self.initial_rates, self.log_rate, self.step_bias)

    def log_decay(self, x: Tensor, *, fused: bool) -> Tensor:
        """Computes the log decay g, (B, T, N, 1), from x, (B, T, D)."""
        steps = F.softplus(at_least_float32(self.a_proj(x)) + self.step_bias)
        return (-self.log_rate.exp() * steps)[..., None]

    def finish(self, out: Tensor, x: Tensor, *, fused: bool) -> Tensor:
        """Normalizes the scan's output, (B, T, N, H), and gates it by silu of a projection of x."""
        return cast(Tensor, self.o_norm(out, split(self.g_proj(x), self.shape.num_heads), fused=fused))
