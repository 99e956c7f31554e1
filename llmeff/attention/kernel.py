"""Common parts of kernelized attention, which replaces the exponential of softmax by a product of features."""

from abc import abstractmethod
from functools import partial
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from llmeff.attention import scan_law
from llmeff.attention.heads import ProjectedMixer, project, repeated, repeated_law, split
from llmeff.attention.mixer import LayerCache, MixerShape
from llmeff.attention.norm import at_least_float32
from llmeff.attention.scan import ScanConfig, mix
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, D width, N heads, K key-value heads, H head width, M features

_SMALLEST = 1e-30
"""Lower bound of the sum of weights. With it, the output of padding is 0 instead of 0 / 0."""


class KernelConfig(ScanConfig):
    """Base config of mixers that use features of queries and keys instead of softmax."""

    def features_law(
        self, shape: MixerShape, tape: Tape, query: Array, key: Array, batch: laws.Batch
    ) -> tuple[Array, Array, Array | None]:
        """Records the price of `KernelMixer.features` on the tape. Returns arrays for its three results."""
        raise NotImplementedError(type(self))

    def law(self, shape: MixerShape, tape: Tape, x: Array, batch: laws.Batch) -> Array:
        """Records the price of `KernelMixer.forward` on the tape: (B, T, D) to (B, T, D).

        Variables here live exactly as long as those in `forward`, so that the tape measures the same peak memory.
        """
        num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        value = project(tape, "v_proj", x, num_kv_heads, head_dim)
        query = project(tape, "q_proj", x, num_heads, head_dim)
        key = project(tape, "k_proj", x, num_kv_heads, head_dim)
        query, key, log_decay = self.features_law(shape, tape, query, key, batch)
        key, counted = repeated_law(tape, key, num_heads), repeated_law(tape, _count_law(tape, value), num_heads)
        log_decay = None if log_decay is None else repeated_law(tape, log_decay, num_heads)
        out = scan_law.law(tape, query, key, counted, log_decay, None)
        out = laws.cast(tape, _quotient_law(tape, out), value.dtype).view(*x.shape[:2], num_heads * head_dim)
        return laws.linear(tape, out, tape.weight("o_proj.weight", shape.width, num_heads * head_dim))


class KernelMixer(ProjectedMixer):
    """Base class of kernelized attention with features phi and psi (Katharopoulos et al. 2020, equation 9).

    o_t = (sum over s <= t of phi(q_t)' psi(k_s) v_s) / (sum over s <= t of phi(q_t)' psi(k_s))

    The denominator comes from a column of ones that is appended to the values.
    """

    def __init__(self, config: KernelConfig, shape: MixerShape):
        super().__init__(shape)
        self.kernel = config.kernel

    @abstractmethod
    def features(
        self, query: Tensor, key: Tensor, layout: Layout, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Computes positive features of queries and keys, in float32 or wider.

        Args:
            query: (B, T, N, H).
            key: (B, T, K, H).
            layout: positions, documents and padding of the batch.
            cache: stores values of earlier tokens that the features depend on, such as a running maximum.

        Returns:
            phi(q), (B, T, N, M); psi(k), (B, T, K, M); and the logarithm of the factor that multiplies the earlier sums
            at each token, (B, T, K, 1), or None if the sums are not rescaled.
        """

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """Mixes the tokens of x, (B, T, D). Returns (B, T, D)."""
        num_kv_heads = self.shape.num_kv_heads
        value = split(self.v_proj(x), num_kv_heads)
        query, key = split(self.q_proj(x), self.shape.num_heads), split(self.k_proj(x), num_kv_heads)
        query, key, log_decay = self.features(query, key, layout, cache)
        out = weighed(query, key, value, log_decay, layout, cache, self.kernel)
        return cast(Tensor, self.o_proj(out.flatten(-2)))


def weighed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    layout: Layout,
    cache: LayerCache | None,
    kernel: str = "torch",
) -> Tensor:
    """Returns for each query the mean of the visible values, weighted by products of query and key features.

    Args:
        query: features of the queries, (B, T, N, M).
        key: features of the keys, (B, T, K, M).
        value: (B, T, K, H).
        log_decay: (B, T, K, 1), see `KernelMixer.features`.
        layout: documents and padding of the batch.
        cache: stores the weighted sums over earlier tokens.
        kernel: see `ScanConfig.kernel`.

    Returns:
        (B, T, N, H).
    """
    num_heads = query.shape[2]
    key, sums = repeated(key, num_heads), repeated(counted(value), num_heads)
    log_decay = None if log_decay is None else repeated(log_decay, num_heads)
    out = mix(query, key, sums, log_decay, None, layout, cache, kernel)
    out = out[..., :-1] / out[..., -1:].clamp(min=_SMALLEST)
    return out.to(value.dtype)


def counted(value: Tensor) -> Tensor:
    """Appends a column of ones to the values: (B, T, K, H) to (B, T, K, H + 1), in float32 or wider.

    The scan sums this column too, which gives the sum of the weights.
    """
    return F.pad(at_least_float32(value), (0, 1), value=1.0)


def _count_law(tape: Tape, value: Array) -> Array:
    """Records the price of `counted` on the tape."""
    value = laws.cast(tape, value, "float32")
    node = tape.save((value,), (), partial(_count_back, tape, value.shape))
    return tape.elementwise((*value.shape[:-1], value.shape[-1] + 1), value.dtype, node)


def _count_back(tape: Tape, shape: tuple[int, ...], gradient: Array) -> tuple[Array]:
    return (tape.new(shape, gradient.dtype),)


def _quotient_law(tape: Tape, out: Array) -> Array:
    """Records the price of dividing the weighted sums by the sums of weights. Backward needs both."""
    node = tape.save((out,), (out, out), partial(_quotient_back, tape))
    sums = tape.elementwise((*out.shape[:-1], 1), out.dtype)
    tape.save_output(node, sums)
    return tape.elementwise((*out.shape[:-1], out.shape[-1] - 1), out.dtype, node)


def _quotient_back(tape: Tape, gradient: Array, out: Array, *_: Array) -> tuple[Array]:
    above = tape.new(gradient.shape, gradient.dtype)
    below = tape.new(gradient.shape, gradient.dtype)
    del below
    whole = tape.new(out.shape, out.dtype)
    del above
    tape.new(out.shape, out.dtype)
    return (whole,)
