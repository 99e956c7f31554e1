"""Retention: a mixer whose state decays at a fixed rate per head."""

from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from llmeff.attention import fla, gated_norm, scan_law
from llmeff.attention.gated_norm import GatedRMSNorm
from llmeff.attention.heads import ProjectedMixer, project, repeated, repeated_law, rotate, rotate_law, split
from llmeff.attention.mixer import LayerCache, MixerShape
from llmeff.attention.norm import product_dtype
from llmeff.attention.scan import ScanConfig, mix
from llmeff.core.config import Count
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, D width, N heads, K key-value heads, H head width, V value width


class Retention(ScanConfig):
    """Multi-scale retention (Sun et al. 2023, arXiv 2307.08621)."""

    fuses: ClassVar[frozenset[str]] = frozenset({"gated_rms_norm"})

    name: Literal["retention"] = "retention"
    value_width: Count | Literal["auto"] = "auto"
    """V, width of the values of each head. "auto" means 2 H."""

    def width(self, shape: MixerShape) -> int:
        """Returns V, the width of a head's values, as a number even if the config has "auto"."""
        return 2 * shape.head_dim if self.value_width == "auto" else self.value_width

    def build(self, shape: MixerShape) -> "RetentionMixer":
        """Builds a layer's mixer."""
        return RetentionMixer(self, shape)

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: laws.Batch) -> Array:
        """Records the price of `RetentionMixer.forward` on the tape: (B, T, D) to (B, T, D).

        Variables here live exactly as long as those in `forward`, so that the tape measures the same peak memory.
        """
        num_heads, num_kv_heads, width = shape.num_heads, shape.num_kv_heads, self.width(shape)
        query, gate = (
            project(tape, "q_proj", x, num_heads, shape.head_dim),
            project(tape, "g_proj", x, num_heads, width),
        )
        key = project(tape, "k_proj", x, num_kv_heads, shape.head_dim)
        value = project(tape, "v_proj", x, num_kv_heads, width)
        cos, sin = batch.rotary(shape.head_dim, shape.rope_theta)
        turned = laws.function(tape, rotate_law(tape, query, cos, sin), "nothing")
        query, key = turned, rotate_law(tape, key, cos, sin)
        key, value = repeated_law(tape, key, num_heads), repeated_law(tape, value, num_heads)
        # one number per head, shared by all tokens
        log_decay = Array((*x.shape[:2], num_heads, 1), "float32", tape.elementwise((num_heads,), "float32").storage)
        out = scan_law.law(tape, query, key, value, log_decay, None)
        with tape.within("o_norm"):
            out = gated_norm.law(tape, out, gate).view(*x.shape[:2], num_heads * width)
        return laws.linear(tape, out, tape.weight("o_proj.weight", shape.width, num_heads * width))

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of a float32 state per head."""
        return 4 * shape.num_heads * shape.head_dim * self.width(shape)


class RetentionMixer(ProjectedMixer):
    """Module of retention: S_t = (1 - 2^(-5 - n)) S_(t-1) + k v' in head n (Sun et al. 2023, equations 5 to 8).

    q and k are rotated by position. The output S_t' q is normalized and gated.
    """

    def __init__(self, config: Retention, shape: MixerShape):
        width = config.width(shape)
        super().__init__(shape, value_width=width)
        self.kernel = config.kernel
        self.g_proj = nn.Linear(shape.width, shape.num_heads * width, bias=False)
        self.o_norm = GatedRMSNorm(width, shape.norm_eps)

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Computes the rotary tables, which the layers share."""
        layout.rotary(self.shape.head_dim, self.shape.rope_theta)

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """Mixes the tokens of x, (B, T, D). Returns (B, T, D)."""
        shape = self.shape
        query, gate = split(self.q_proj(x), shape.num_heads), split(self.g_proj(x), shape.num_heads)
        key, value = split(self.k_proj(x), shape.num_kv_heads), split(self.v_proj(x), shape.num_kv_heads)
        cos, sin = (table.transpose(1, 2) for table in layout.rotary(shape.head_dim, shape.rope_theta))
        query, key = rotate(query, cos, sin) * shape.head_dim**-0.5, rotate(key, cos, sin)
        key, value = repeated(key, shape.num_heads), repeated(value, shape.num_heads)
        log_decay = log_decays(query).expand(*query.shape[:3], 1)
        dtype = product_dtype(x)
        fused = fla.fuses(self.kernel, dtype, x.device, cache)
        out = mix(query, key, value, log_decay, None, layout, cache, self.kernel, dtype)
        return cast(Tensor, self.o_proj(self.o_norm(out, gate, fused=fused).flatten(-2)))


def log_decays(query: Tensor) -> Tensor:
    """Returns the log decay of each head, (N, 1), for queries of shape (B, T, N, H)."""
    heads = torch.arange(query.shape[2], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    return torch.log1p(-torch.exp2(-5 - heads))[:, None]
