"""Performer: estimates softmax attention with positive orthogonal random features (FAVOR+)."""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmeff.attention.heads import rotate, rotate_law
from llmeff.attention.kernel import KernelConfig, KernelMixer
from llmeff.attention.mixer import LayerCache, MixerShape
from llmeff.attention.norm import at_least_float32
from llmeff.core.config import Count
from llmeff.core.layout import Layout, begins_in
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, N heads, K key-value heads, H head width, M features


class Performer(KernelConfig):
    """FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794).

    It estimates the output of `Softmax` attention with the same weights and rotary positions.
    """

    gates_heads = True
    name: Literal["performer"] = "performer"
    num_features: Count | Literal["auto"] = "auto"
    """M, number of random features. "auto" means H ln H, rounded up (the order in Theorem 4)."""

    def width(self, head_dim: int) -> int:
        """Returns M, the number of random features, as a number even if the config has "auto"."""
        auto = math.ceil(head_dim * math.log(head_dim))
        return auto if self.num_features == "auto" else self.num_features

    def build(self, shape: MixerShape) -> "PerformerMixer":
        """Builds a layer's mixer."""
        return PerformerMixer(self, shape)

    def features_law(
        self, shape: MixerShape, tape: Tape, query: Array, key: Array, batch: laws.Batch
    ) -> tuple[Array, Array, Array]:
        """Records the price of `PerformerMixer.features` on the tape.

        Saved for backward are the exponentials and, for the term |x|^2 / 2, the keys. The directions are a buffer and
        need no gradient.
        """
        width = self.width(shape.head_dim)
        cos, sin = batch.rotary(shape.head_dim, shape.rope_theta)
        query, key = (
            rotate_law(tape, laws.function(tape, laws.cast(tape, x, "float32"), "nothing"), cos, sin)
            for x in (query, key)
        )
        query, key = _exponents_law(tape, query, width), _exponents_law(tape, key, width, has_lengths=True)
        query, key = laws.shift(tape, query), laws.shift(tape, key)
        largest = tape.elementwise((*key.shape[:-1], 1), "float32")
        return laws.function(tape, query, "output"), laws.function(tape, key, "output"), largest

    def buffer_bytes(self, shape: MixerShape, number_bytes: int) -> int:
        """Returns the bytes of the random directions."""
        return self.width(shape.head_dim) * shape.head_dim * number_bytes

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of a float32 state and sums of weights per head, and of a maximum per key-value head."""
        return 4 * (shape.num_heads * self.width(shape.head_dim) * (shape.head_dim + 1) + shape.num_kv_heads)


class PerformerMixer(KernelMixer):
    """Module of FAVOR+ with the features exp(w_i' x - |x|^2 / 2) (Choromanski et al. 2021, equation 7).

    x is a query or key divided by H^(1/4), and the w_i are random directions. Plain exponentials would overflow or
    underflow. So the largest exponent of each query is subtracted from its exponents. For keys, the largest exponent so
    far in the document is subtracted. Both subtractions cancel in the quotient, so the result does not change, and no
    token depends on a later token.
    """

    directions: Tensor

    def __init__(self, config: Performer, shape: MixerShape):
        super().__init__(config, shape)
        self.register_buffer("directions", torch.empty(config.width(shape.head_dim), shape.head_dim))

    def initial(self) -> dict[str, Tensor]:
        """Draws the random directions. They are saved in checkpoints and not trained."""
        return {"directions": orthogonal(self.directions)}

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Computes the rotary tables, which the layers share."""
        layout.rotary(self.shape.head_dim, self.shape.rope_theta)

    def features(
        self, query: Tensor, key: Tensor, layout: Layout, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes features of queries, (B, T, N, M), and of keys, (B, T, K, M).

        Also returns the logarithm of the factor that multiplies the earlier sums at each token, (B, T, K, 1).
        """
        head_dim = self.shape.head_dim
        cos, sin = (table.transpose(1, 2) for table in layout.rotary(head_dim, self.shape.rope_theta))
        with torch.autocast(query.device.type, enabled=False):
            query, key = (rotate(at_least_float32(x) * head_dim**-0.25, cos, sin) for x in (query, key))
            directions = at_least_float32(self.directions)
            query = exponents(query, directions)
            key = exponents(key, directions, has_lengths=True)
        query = query - query.detach().amax(-1, keepdim=True)
        key, fall = relative(key, layout, cache)
        return query.exp(), key.exp(), fall


def exponents(x: Tensor, directions: Tensor, *, has_lengths: bool = False) -> Tensor:
    """Computes the exponents w_i' x of all directions w_i: (..., H) to (..., M).

    If `has_lengths`, subtracts |x|^2 / 2. Only keys need this, because it cancels for queries.
    """
    if not has_lengths:
        return x @ directions.mT
    return x @ directions.mT - x.square().sum(-1, keepdim=True) / 2


def relative(key: Tensor, layout: Layout, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
    """Subtracts a running maximum from the exponents of each key: the largest exponent so far in its document.

    If this maximum rises at a token, all earlier sums must be multiplied by exp(old maximum - new maximum). The second
    result is the logarithm of this factor. The maximum starts at the value of the document's first key and not at 0,
    because exponents can be far below 0.

    Args:
        key: exponents of the keys, (B, T, K, M).
        layout: documents and padding of the batch. Padding does not count for the maximum.
        cache: stores the largest exponent so far.

    Returns:
        The differences, (B, T, K, M), and the logarithm of the factor that multiplies the earlier sums, (B, T, K, 1).
        Both are at most 0.
    """
    largest = key.detach().amax(-1)
    is_padding = layout.is_padding
    if is_padding is not None:
        largest = largest.masked_fill(is_padding[..., None], -torch.inf)
    if layout.documents is not None:
        largest, fall = _of_documents(largest, layout.documents)
    else:
        before = None if cache is None else cache.recall("largest")
        before = largest[:, 0] if before is None else before
        largest = torch.cat((before[:, None], largest), dim=1).cummax(dim=1).values
        if cache is not None:
            cache.keep("largest", largest[:, -1].clone())
        if is_padding is not None:
            largest = _begun(largest)
        largest, fall = largest[:, 1:], -largest.diff(dim=1)
    return layout.cleared((key - largest[..., None]).flatten(2)).view_as(key), fall[..., None]


def _begun(largest: Tensor) -> Tensor:
    """Replaces each -inf in running maxima, (B, T, K), by the first finite maximum of the same row and head.

    If a row has no finite maximum for a head, replaces -inf by 0.
    """
    first = largest.masked_fill(largest == -torch.inf, torch.inf).amin(dim=1, keepdim=True)
    return largest.maximum(first.masked_fill(first == torch.inf, 0))


def _of_documents(largest: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the running maximum of each document, and the logarithms of the factors that rescale earlier sums.

    Adds an offset to each document, so that all its values exceed those of the previous document. Then a single
    cumulative maximum over the row gives the maxima of all documents.
    """
    begins = begins_in(documents)[..., None]
    own = largest.double()  # float64, because the offsets are far larger than the exponents
    least = own.masked_fill(own == -torch.inf, torch.inf).amin()
    own = own.maximum(least.masked_fill(least == torch.inf, 0))
    lift = begins.cumsum(dim=1) * (own.amax() - own.amin() + 1)
    so_far = ((own + lift).cummax(dim=1).values - lift).to(largest.dtype)
    fall = F.pad(so_far[:, :-1] - so_far[:, 1:], (0, 0, 1, 0))
    return so_far, fall.masked_fill(begins, 0)


def orthogonal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws Gaussian rows that are orthogonal to one another within each block of H rows.

    See Choromanski et al. 2021, section 2.4.

    Args:
        like: tensor of (M, H) with the shape, dtype and device of the result.
        generator: random generator. None means torch's default generator.
    """
    num_rows, width = like.shape
    count = -(-num_rows // width)
    found = torch.linalg.qr(like.new_empty(count, width, width).normal_(generator=generator))
    # LAPACK's signs are not random. Without the signs of R's diagonal, the estimate would be biased (Mezzadri 2007)
    blocks: Tensor = found.Q * found.R.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    lengths: Tensor = torch.empty_like(like).normal_(generator=generator).norm(dim=1, keepdim=True)
    return blocks.flatten(0, 1)[:num_rows] * lengths


def _exponents_law(tape: Tape, x: Array, width: int, *, has_lengths: bool = False) -> Array:
    """Records the price of `exponents` on the tape. The directions need no gradient."""
    flops = 2 * x.size * width
    node = tape.save((x,), (x,) if has_lengths else (), partial(_exponents_back, tape, flops, x.shape))
    tape.contract(flops)
    shape = (*x.shape[:-1], width)
    if not has_lengths:
        return tape.new(shape, x.dtype, node)
    products = tape.new(shape, x.dtype)
    tape.elementwise(x.shape, x.dtype)  # squares
    less = tape.elementwise(shape, x.dtype, node)
    del products
    return less


def _exponents_back(tape: Tape, flops: int, shape: tuple[int, ...], gradient: Array, *saved: Array) -> tuple[Array]:
    tape.execute(flops)
    grad = tape.new(shape, gradient.dtype)
    if saved:
        tape.new(shape, gradient.dtype)
    return (grad,)
