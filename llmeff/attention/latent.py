"""Multi-head latent attention: the keys and values of all heads are computed from one small vector per token.

Only this latent vector and a rotary key, which all heads share, are cached.
"""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.attention import norm
from llmeff.attention.heads import heads_first_law, rotate, rotate_law, split
from llmeff.attention.mixer import LayerCache, Mixer, MixerConfig, MixerShape
from llmeff.attention.norm import RMSNorm, product_dtype
from llmeff.attention.softmax import attend
from llmeff.core.config import Count
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T new tokens, S cached and new tokens, D width, N heads, H head width, L latent width, R rotary width


class Latent(MixerConfig):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), as in DeepSeek-V3.

    The default latent and rotary widths are those of DeepSeek-V2.
    """

    name: Literal["mla"] = "mla"
    latent: Count | Literal["auto"] = "auto"
    """L, width of the latent vector that a token's keys and values are computed from. "auto" means 4 H."""
    rotary: Count | Literal["auto"] = "auto"
    """R, width of the rotary part of a key, which all heads share. "auto" means H / 2, rounded up to an even number."""
    query_latent: Count | None = None
    """Width of the latent vector that a token's queries are computed from. If None, they are computed directly from the
    input of the layer, as in DeepSeek-V2-Lite."""

    def widths(self, shape: MixerShape) -> tuple[int, int]:
        """Returns L and R, the widths of the latent vector and the rotary part, as numbers even if they are "auto"."""
        latent = 4 * shape.head_dim if self.latent == "auto" else self.latent
        return latent, 2 * -(-shape.head_dim // 4) if self.rotary == "auto" else self.rotary

    def problems(self, shape: MixerShape) -> list[str]:
        """Returns an error if num_kv_heads differs from num_heads, and another error if the rotary width is odd."""
        found = []
        if shape.num_kv_heads != shape.num_heads:
            found.append(
                f"num_kv_heads is {shape.num_kv_heads}, but num_heads is {shape.num_heads}: mla computes keys and "
                "values for every head from its latent vector. Leave num_kv_heads at 'auto'"
            )
        if self.widths(shape)[1] % 2:
            found.append(
                f"mla.rotary is {self.rotary}, but rotary positions rotate pairs of channels. Give an even number"
            )
        return found

    def build(self, shape: MixerShape) -> "LatentMixer":
        """Builds a layer's mixer."""
        return LatentMixer(self, shape)

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: laws.Batch) -> Array:
        """Records the price of `LatentMixer.forward` without a cache on the tape: (B, T, D) to (B, T, D).

        Variables here live exactly as long as those in `forward`, so that the tape measures the same peak memory.
        """
        _, rotary = self.widths(shape)
        tables = batch.rotary(rotary, shape.rope_theta)
        query = self._query_law(shape, tape, x, tables)
        latent, turned = self._latent_law(shape, tape, x, tables)
        mixed = self._expanded_law(shape, tape, query, latent, turned, batch)
        weight = tape.weight("o_proj.weight", shape.width, shape.num_heads * shape.head_dim)
        return laws.linear(tape, mixed, weight)

    def _query_law(self, shape: MixerShape, tape: Tape, x: Array, tables: tuple[Array, Array]) -> Array:
        if self.query_latent is not None:
            down = laws.linear(tape, x, tape.weight("q_down_proj.weight", self.query_latent, shape.width))
            with tape.within("q_norm"):
                x = norm.law(tape, down)
            del down
        turned = rotate_law(
            tape, heads_first_law(tape, "q_rope_proj", x, shape.num_heads, self.widths(shape)[1]), *tables
        )
        return _beside(tape, heads_first_law(tape, "q_up_proj", x, shape.num_heads, shape.head_dim), turned)

    def _latent_law(self, shape: MixerShape, tape: Tape, x: Array, tables: tuple[Array, Array]) -> tuple[Array, Array]:
        latent, rotary = self.widths(shape)
        down = laws.linear(tape, x, tape.weight("kv_down_proj.weight", latent, shape.width))
        with tape.within("kv_norm"):
            normed = norm.law(tape, down)
        del down
        return normed, rotate_law(tape, heads_first_law(tape, "k_rope_proj", x, 1, rotary), *tables)

    def _expanded_law(
        self, shape: MixerShape, tape: Tape, query: Array, latent: Array, turned: Array, batch: laws.Batch
    ) -> Array:
        num_rows, num_heads, num_tokens, width = query.shape
        up = heads_first_law(tape, "k_up_proj", latent, num_heads, shape.head_dim)
        key = _beside(tape, up, laws.view(tape, turned, (num_rows, num_heads, *turned.shape[2:])))
        del up
        value = heads_first_law(tape, "v_up_proj", latent, num_heads, shape.head_dim)
        value = laws.padded(tape, value, query.shape)
        # does not count the zeros that pad the values, because the model does not need them
        model_flops = num_rows * num_heads * num_tokens * (num_tokens + 1) * (width + shape.head_dim)
        mixed = laws.attention(tape, query, key, value, batch.bias(value.dtype), model_flops)
        part = laws.view(tape, mixed, (num_rows, num_heads, num_tokens, shape.head_dim))
        return laws.copy(tape, part).view(num_rows, num_tokens, num_heads * shape.head_dim)

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of the latent vector and the rotary key of every token."""
        return sum(self.widths(shape)) * num_tokens * number_bytes


class LatentMixer(Mixer):
    """Module that implements equations 37 to 47 of DeepSeek-V2, with one submodule per matrix.

    Rotary positions rotate the channels i and i + R / 2 as a pair, as in all mixers of llmeff.
    """

    def __init__(self, config: Latent, shape: MixerShape):
        super().__init__()
        self.shape = shape
        self.latent, self.rotary = config.widths(shape)
        heads, rotary_heads = shape.num_heads * shape.head_dim, shape.num_heads * self.rotary
        given = config.query_latent or shape.width
        self.q_down_proj = nn.Linear(shape.width, given, bias=False) if config.query_latent else None
        self.q_norm = RMSNorm(given, shape.norm_eps) if config.query_latent else None
        self.q_up_proj = nn.Linear(given, heads, bias=False)
        self.q_rope_proj = nn.Linear(given, rotary_heads, bias=False)
        self.kv_down_proj = nn.Linear(shape.width, self.latent, bias=False)
        self.kv_norm = RMSNorm(self.latent, shape.norm_eps)
        self.k_rope_proj = nn.Linear(shape.width, self.rotary, bias=False)
        self.k_up_proj = nn.Linear(self.latent, heads, bias=False)
        self.v_up_proj = nn.Linear(self.latent, heads, bias=False)
        self.o_proj = nn.Linear(heads, shape.width, bias=False)

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Computes the rotary tables, and the attention bias if there are documents or padding."""
        layout.rotary(self.rotary, self.shape.rope_theta)
        layout.bias(layout.positions.shape[-1], dtype)

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """Mixes the tokens of x, (B, T, D). Returns (B, T, D)."""
        tables = layout.rotary(self.rotary, self.shape.rope_theta)
        query = self._query(x, tables)
        latent, turned = self._latent(x, tables)
        kept = None
        if cache is not None:
            kept = cache.recall("latent")
            new = torch.cat((latent, turned[:, 0]), dim=-1).to(product_dtype(x))  # autocast leaves norms in float32
            whole = new if kept is None else torch.cat((kept, new), dim=1)
            cache.keep("latent", whole)
        if kept is None:
            mixed = self._expanded(query, latent, turned, layout)
        elif type(self.k_up_proj) is type(self.v_up_proj) is nn.Linear:
            mixed = self._absorbed(query, whole, layout)
        else:  # only plain matrices can be absorbed into the query, not LoRA or quantized ones
            mixed = self._expanded(query, whole[..., : self.latent], whole[:, None, :, self.latent :], layout)
        return cast(Tensor, self.o_proj(mixed))

    def _query(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Computes the queries, (B, N, T, H + R), from the input of the layer."""
        if self.q_down_proj is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down_proj(x))
        turned = rotate(self._heads(self.q_rope_proj(x)), *tables)
        return torch.cat((self._heads(self.q_up_proj(x)), turned), dim=-1)

    def _latent(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Computes the latent vectors, (B, T, L), and the rotary keys, (B, 1, T, R)."""
        normed = self.kv_norm(self.kv_down_proj(x))
        return normed, rotate(self.k_rope_proj(x)[:, None], *tables)

    def _heads(self, x: Tensor) -> Tensor:
        return split(x, self.shape.num_heads).transpose(1, 2)

    def _expanded(self, query: Tensor, latent: Tensor, turned: Tensor, layout: Layout) -> Tensor:
        """Attends with keys and values of every head. Zero-pads values to the width of keys, as fast kernels need."""
        turned = turned.expand(-1, self.shape.num_heads, -1, -1)
        key = torch.cat((self._heads(self.k_up_proj(latent)), turned), dim=-1)
        value = F.pad(self._heads(self.v_up_proj(latent)), (0, self.rotary))
        mixed = attend(query, key, value, layout)
        # transpose first, so that the gradient has the memory layout that the kernel needs
        return mixed.transpose(1, 2)[..., : self.shape.head_dim].flatten(-2)

    def _absorbed(self, query: Tensor, kept: Tensor, layout: Layout) -> Tensor:
        """Computes the same as `_expanded`, but all heads share one array, `kept`, as both keys and values.

        `kept` is (B, S, L + R): the latent vector and rotary key of each of the S cached and new tokens. Instead of
        the keys, k_up_proj is applied to the queries. Instead of the values, v_up_proj is applied to the result.
        """
        shape = self.shape
        keys = self.k_up_proj.weight.view(shape.num_heads, shape.head_dim, self.latent)
        values = self.v_up_proj.weight.view(shape.num_heads, shape.head_dim, self.latent)
        plain, turned = query.split((shape.head_dim, self.rotary), dim=-1)
        taken = torch.cat((torch.einsum("bnth,nhl->bntl", plain, keys), turned), dim=-1)
        scale = (shape.head_dim + self.rotary) ** -0.5
        mixed = attend(taken, kept[:, None], kept[:, None], layout, scale)[..., : self.latent]
        return torch.einsum("bntl,nhl->btnh", mixed, values).flatten(-2)


def _beside(tape: Tape, left: Array, right: Array) -> Array:
    """Records the price of concatenating two (B, N, T, .) arrays along the last dimension.

    In backward, the gradients of the two arrays are views of one array. Each projection that made one of the two arrays
    copies its view to a dense array.
    """
    return laws.concat(tape, *(laws.view(tape, x, x.shape) for x in (left, right)))
