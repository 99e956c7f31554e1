"""Common parts of delta-rule mixers: each token replaces the value that the state stores for the token's key."""

from abc import abstractmethod
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from llmeff.attention import fla, scan_law, short_conv
from llmeff.attention.heads import project, repeated, repeated_law, split
from llmeff.attention.mixer import LayerCache, Mixer, MixerShape
from llmeff.attention.norm import product_dtype
from llmeff.attention.scan import ScanConfig, mix
from llmeff.attention.short_conv import ShortConv
from llmeff.core.config import Count
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, D width, N heads of values, K heads of queries and keys, H head width


class DeltaConfig(ScanConfig):
    """Base config of delta-rule mixers. Values have `num_heads` heads; queries and keys have `num_kv_heads` heads."""

    fuses: ClassVar[frozenset[str]] = frozenset({"short_conv", "unit"})

    conv: Count = 4
    """Width in tokens of the short convolution over queries, keys and values."""

    def missing_requirements(self, shape: MixerShape, *, on_cpu: bool) -> list[str]:
        """Returns the errors that `ScanConfig` finds, and an error if head_dim is too large for kernel 'fla'."""
        found = super().missing_requirements(shape, on_cpu=on_cpu)
        if self.kernel == "fla" and shape.head_dim > fla.LARGEST_KEY:
            found.append(
                f"mixer {self.name!r}: kernel 'fla' supports a head_dim of at most {fla.LARGEST_KEY}, "
                f"but head_dim is {shape.head_dim}"
            )
        return found

    def log_decay_law(self, shape: MixerShape, tape: Tape, x: Array) -> Array | None:
        """Records the price of `DeltaMixer.log_decay` on the tape. Returns None if the state does not decay."""
        raise NotImplementedError(type(self))

    def finish_law(self, shape: MixerShape, tape: Tape, out: Array, x: Array) -> Array:
        """Records the price of `DeltaMixer.finish` on the tape."""
        raise NotImplementedError(type(self))

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: laws.Batch) -> Array:
        """Records the price of `DeltaMixer.forward` on the tape: (B, T, D) to (B, T, D).

        Variables here live exactly as long as those in `forward`, so that the tape measures the same peak memory.
        """
        num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        given = (("q_proj", num_kv_heads), ("k_proj", num_kv_heads), ("v_proj", num_heads))
        parts = [project(tape, name, x, num, head_dim).view(*x.shape[:2], num * head_dim) for name, num in given]
        joined = laws.concat(tape, *parts)
        del parts
        with tape.within("conv"):
            mixed = short_conv.law(tape, joined, self.conv)
        del joined
        query, key, value = laws.split(tape, mixed, *((*x.shape[:2], num, head_dim) for _, num in given))
        query, key = laws.function(tape, unit_law(tape, query), "nothing"), unit_law(tape, key)
        query, key = repeated_law(tape, query, num_heads), repeated_law(tape, key, num_heads)
        log_decay = self.log_decay_law(shape, tape, x)
        beta = laws.linear(tape, x, tape.weight("b_proj.weight", num_heads, shape.width))
        beta = laws.function(tape, beta, "output")
        out = scan_law.law(tape, query, key, value, log_decay, beta, is_convolved=not tape.workload.packed)
        out = self.finish_law(shape, tape, out, x).view(*x.shape[:2], num_heads * head_dim)
        return laws.linear(tape, out, tape.weight("o_proj.weight", shape.width, num_heads * head_dim))

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of a float32 state per head, and of the last input tokens of the convolution."""
        channels = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        return 4 * shape.num_heads * shape.head_dim**2 + channels * (self.conv - 1) * number_bytes


class DeltaMixer(Mixer):
    """Base class of delta-rule mixers: S_t = (I - beta k k') diag(exp(g)) S_(t-1) + beta k v', with output S_t' q.

    q, k and v pass through a short convolution. Then q and k are scaled to length 1, and q is divided by sqrt(H),
    where H is the width of a head.

    Args:
        config: the mixer's config.
        shape: the dimensions of the layer.
    """

    def __init__(self, config: DeltaConfig, shape: MixerShape):
        super().__init__()
        is_too_wide = shape.head_dim > fla.LARGEST_KEY
        self.kernel = "torch" if config.kernel == "auto" and is_too_wide else config.kernel
        self.shape = shape
        self.value_width, key_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.width, key_width, bias=False)
        self.k_proj = nn.Linear(shape.width, key_width, bias=False)
        self.v_proj = nn.Linear(shape.width, self.value_width, bias=False)
        self.b_proj = nn.Linear(shape.width, shape.num_heads, bias=False)
        self.conv = ShortConv(2 * key_width + self.value_width, config.conv)
        self.o_proj = nn.Linear(self.value_width, shape.width, bias=False)

    @abstractmethod
    def log_decay(self, x: Tensor, *, fused: bool) -> Tensor | None:
        """Computes the log decay g.

        Args:
            x: (B, T, D), the input of the layer.
            fused: whether to use flash-linear-attention's kernels, as `fla.fuses` decides.

        Returns:
            g, (B, T, N, 1) or (B, T, N, H). None if the state does not decay.
        """

    @abstractmethod
    def finish(self, out: Tensor, x: Tensor, *, fused: bool) -> Tensor:
        """Normalizes the scan's output, and applies a gate if the mixer has one.

        Args:
            out: (B, T, N, H), the output of the scan.
            x: (B, T, D), the input of the layer, from which the gate is computed.
            fused: whether to use flash-linear-attention's kernels, as `fla.fuses` decides.

        Returns:
            (B, T, N, H).
        """

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """Mixes the tokens of x, (B, T, D). Returns (B, T, D)."""
        shape, dtype = self.shape, product_dtype(x)
        fused = fla.fuses(self.kernel, dtype, x.device, cache)
        mixed = self.conv(
            torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1), layout, cache, fused=fused
        )
        heads = split(mixed, 2 * shape.num_kv_heads + shape.num_heads)
        query, key, value = heads.split((shape.num_kv_heads, shape.num_kv_heads, shape.num_heads), dim=2)
        of_length_1 = fla.unit if fused else unit
        query, key = of_length_1(query) * shape.head_dim**-0.5, of_length_1(key)
        query, key = repeated(query, shape.num_heads), repeated(key, shape.num_heads)
        out = mix(
            query,
            key,
            value,
            self.log_decay(x, fused=fused),
            self.b_proj(x).sigmoid(),
            layout,
            cache,
            self.kernel,
            dtype,
        )
        return cast(Tensor, self.o_proj(self.finish(out, x, fused=fused).flatten(-2)))


def unit(x: Tensor) -> Tensor:
    """Scales the last dimension of (..., H) to length 1. Adds 1e-6 under the square root, as the GPU kernels do."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def unit_law(tape: Tape, x: Array) -> Array:
    """Records the price of `unit` on the tape."""
    node = tape.save((x,), (x, x), partial(_unit_back, tape))
    square = tape.elementwise(x.shape, x.dtype)
    inverse = tape.elementwise((*x.shape[:-1], 1), x.dtype)
    del square
    tape.save_output(node, inverse, inverse)
    return tape.elementwise(x.shape, x.dtype, node)


def _unit_back(tape: Tape, gradient: Array, *_: Array) -> tuple[Array]:
    direct = tape.new(gradient.shape, gradient.dtype)
    along = tape.new(gradient.shape, gradient.dtype), tape.new(gradient.shape, gradient.dtype)
    del along
    return (direct,)
