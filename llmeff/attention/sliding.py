"""Softmax attention over a sliding window, with optional sinks and global tokens that all later tokens see."""

from functools import cache as memoized
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from llmeff.attention import flex
from llmeff.attention.heads import HeadsConfig, HeadsMixer
from llmeff.attention.mixer import LayerCache, MixerShape
from llmeff.attention.softmax import attend, attend_biased
from llmeff.core.config import Count, CountOrZero
from llmeff.core.layout import Layout
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T queries, S keys, N heads, K key-value heads, H head width; M blocks of C queries, G keys per block

LEAST_BLOCK = 16
"""Smallest block, in tokens. Smaller windows use it too, although few of its (query, key) pairs are then visible."""


class Sliding(HeadsConfig):
    """Softmax attention to the last `window` tokens, as in Mistral (Beltagy et al. 2020)."""

    name: Literal["sliding"] = "sliding"
    window: Count = 256
    """Number of tokens that a token sees, including itself."""
    sinks: CountOrZero = 0
    """Number of first tokens of a document that all its later tokens see (Xiao et al. 2023, arXiv 2309.17453)."""
    global_every: Count | None = None
    """Distance in tokens between global tokens, which all later tokens of the document see. None for no global tokens.

    The last of every `global_every` tokens of a document is global. This is the `fixed` pattern of Child et al. 2019,
    and the causal case of global tokens in Longformer and BigBird. The cache grows by one key for each global token."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "Sliding":
        if self.sinks > self.window:
            raise ValueError(
                f"sinks is {self.sinks}, which is more than the window of {self.window} tokens. Give fewer sinks"
            )
        if self.global_every == 1:
            raise ValueError(
                "global_every is 1, which lets every token see all earlier tokens. Use the mixer 'softmax' instead"
            )
        return self

    def build(self, shape: MixerShape) -> "SlidingMixer":
        """Builds a layer's mixer."""
        return SlidingMixer(self, shape)

    @property
    def block(self) -> int:
        """C, the number of tokens in a block.

        Apart from sinks and global tokens, a query sees only tokens of its own block and the previous block.
        """
        return max(self.window, LEAST_BLOCK)

    def num_kept(self, num_tokens: int) -> int:
        """Returns how many of the first `num_tokens` tokens of a document the next token sees."""
        far = max(0, num_tokens - self.window + 1)
        sinks = min(self.sinks, far)
        every = self.global_every
        return num_tokens - far + sinks + (0 if every is None else far // every - sinks // every)

    def mix_law(self, tape: Tape, query: Array, key: Array, value: Array, batch: laws.Batch) -> Array:
        """Records the price of `slide`, which attends block by block, on the tape.

        Variables here live exactly as long as those in `slide`, so that the tape measures the same peak memory.
        """
        num_rows, num_heads, num_tokens, head_dim = query.shape
        if num_tokens <= self.window:
            mixed = laws.attention(tape, query, key, value, batch.bias(value.dtype))
            return laws.joined_heads(tape, mixed)
        num_blocks = _num_blocks(self, num_tokens)
        num_keys = _num_given(self, num_blocks)
        index, bias = batch.tables((self, value.dtype), partial(_blocks_law, self, tape, value))
        missing = num_blocks * self.block - num_tokens
        blocks = (num_rows * num_blocks, num_heads, self.block, head_dim)
        query = laws.padded(tape, query, (num_rows, num_heads, num_tokens + missing, head_dim)).view(*blocks)

        def given(x: Array) -> Array:
            flat = x.view(num_rows * num_tokens, x.shape[1] * head_dim)
            return laws.rows(tape, flat, index).view(num_rows * num_blocks, x.shape[1], num_keys, head_dim)

        model_flops = 4 * num_rows * num_heads * head_dim * _num_pairs(self, num_tokens)
        mixed = laws.attention(tape, query, given(key), given(value), bias, model_flops)
        joined = laws.joined_heads(tape, mixed).view(num_rows, num_tokens + missing, num_heads * head_dim)
        return laws.cut(tape, joined, (num_rows, num_tokens, num_heads * head_dim))

    def cache_bytes(self, shape: MixerShape, num_tokens: int, number_bytes: int) -> int:
        """Returns the bytes of the keys, values and positions that later tokens still see."""
        return self.num_kept(num_tokens) * (2 * shape.num_kv_heads * shape.head_dim * number_bytes + 8)


class SlidingMixer(HeadsMixer):
    """Module of sliding-window attention. Parameters have the same names as in transformers' Mistral."""

    def __init__(self, config: Sliding, shape: MixerShape):
        super().__init__(config, shape)
        self.config = config

    def prepare(self, layout: Layout, num_rows: int, dtype: torch.dtype) -> None:
        """Computes the rotary tables, and the mask or bias of the window."""
        super().prepare(layout, num_rows, dtype)
        num_tokens = layout.positions.shape[-1]
        if num_tokens <= self.config.window:
            layout.bias(num_tokens, dtype)
        elif self.config.kernel == "flex" and layout.positions.is_cuda:
            self._block_mask(layout)
        else:
            _blocks(self.config, layout, num_rows, dtype)

    def _block_mask(self, layout: Layout) -> BlockMask:
        return flex.block_mask(layout, self.config, partial(_sees, self.config))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        """Attends over whole rows if there is no cache. Otherwise, attends to cached and new tokens, block by block."""
        if query.shape[2] > self.config.window and flex.takes(self.config.kernel, query, cache):
            mixed = flex.attend(query, key, value, self._block_mask(layout))
            return mixed.transpose(1, 2).flatten(-2)
        if cache is None:
            return slide(self.config, query, key, value, layout)
        return self._go_on(query, key, value, layout, cache).transpose(1, 2).flatten(-2)

    def _go_on(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, cache: LayerCache) -> Tensor:
        kept = cache.recall("key"), cache.recall("value"), cache.recall("places")
        places = layout.places()[:, layout.past :].expand(query.shape[0], -1)
        num_tokens, mixed = layout.past, []
        for start in range(0, query.shape[2], self.config.block):
            part = slice(start, start + self.config.block)
            keys, values = _after(kept[0], key[:, :, part]), _after(kept[1], value[:, :, part])
            seen = _after(kept[2], places[:, part, None])
            mixed.append(_attend_places(self.config, query[:, :, part], keys, values, places[:, part], seen[..., 0]))
            num_tokens = min(num_tokens + self.config.block, layout.past + query.shape[2])
            kept = _still_seen(self.config, keys, values, seen, num_tokens)
        for name, state in zip(("key", "value", "places"), kept, strict=True):
            assert state is not None
            cache.keep(name, state)
        return torch.cat(mixed, dim=2)


def slide(
    config: Sliding, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float | None = None
) -> Tensor:
    """Computes softmax(scale q k') v over the window, sinks and global tokens of each query, without a T x T matrix.

    Args:
        config: window, sinks and global tokens.
        query: (B, N, T, H).
        key: (B, K, S, H), of the past and new tokens of the layout. K divides N.
        value: (B, K, S, H).
        layout: documents and padding of the batch.
        scale: factor that multiplies the scores. None means 1 / sqrt(H).

    Returns:
        (B, T, N H).
    """
    num_rows, num_tokens = query.shape[0], query.shape[2]
    if key.shape[2] <= config.window:
        return attend(query, key, value, layout, scale).transpose(1, 2).flatten(-2)
    if key.shape[2] > num_tokens:
        places = layout.places()
        mixed = _attend_places(config, query, key, value, places[:, layout.past :], places, scale)
        return mixed.transpose(1, 2).flatten(-2)
    num_blocks = _num_blocks(config, num_tokens)
    index, bias = _blocks(config, layout, num_rows, value.dtype)
    missing = num_blocks * config.block - num_tokens
    query = query.transpose(1, 2)
    if missing:
        query = F.pad(query, (0, 0, 0, 0, 0, missing))
    query = query.reshape(num_rows * num_blocks, config.block, *query.shape[2:]).transpose(1, 2)

    def given(x: Tensor) -> Tensor:
        rows = F.embedding(index, x.transpose(1, 2).flatten(2).flatten(0, 1))
        return rows.view(num_rows * num_blocks, -1, x.shape[1], x.shape[3]).transpose(1, 2)

    mixed = attend_biased(query, given(key), given(value), bias, scale)
    return mixed.transpose(1, 2).reshape(num_rows, num_blocks * config.block, -1)[:, :num_tokens]


def _sees(config: Sliding, query: Tensor, key: Tensor) -> Tensor:
    """Returns for each query and key whether the query sees the key, given their positions in the document.

    Positions of empty slots and padding are negative.
    """
    # only boolean tensors have the size of all pairs
    seen = (key > query - config.window) | _is_far_seen(config, key)
    return seen & (key >= 0) & (key <= query)


def _is_far_seen(config: Sliding, places: Tensor) -> Tensor:
    """Returns whether the tokens at the given positions are sinks or global tokens."""
    is_sink = places < config.sinks
    if config.global_every is None:
        return is_sink
    return is_sink | (places % config.global_every == config.global_every - 1)


def _bias(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the bias that is added to the scores: 0 where a query sees a key, otherwise -inf.

    A query that sees no key is padding. The bias lets it see all keys, because its result is not used.
    """
    sees = sees | ~sees.any(dim=-1, keepdim=True)
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, -torch.inf)


def _attend_places(
    config: Sliding,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_places: Tensor,
    key_places: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Attends to keys in any order. Returns (B, N, T, H).

    The positions of queries, (B or 1, T), and of keys, (B or 1, S), decide which keys a query sees.
    """
    sees = _sees(config, query_places[:, None, :, None], key_places[:, None, None, :])
    return attend_biased(query, key, value, _bias(sees, value.dtype), scale)


def _after(kept: Tensor | None, new: Tensor) -> Tensor:
    return new if kept is None else torch.cat((kept, new), dim=-2)


def _still_seen(
    config: Sliding, key: Tensor, value: Tensor, places: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the keys and values, (B, K, S, H), and positions, (B, S, 1), that later tokens still see.

    Later tokens are all tokens after the first `num_tokens`. Rows with padding have fewer such keys than other rows, so
    they are filled up with keys whose position is -1.
    """
    num_kept = config.num_kept(num_tokens)
    if num_kept == places.shape[1]:
        return key, value, places
    seen = _sees(config, places.amax(dim=1, keepdim=True) + 1, places)[..., 0]
    order = seen.logical_not().sort(dim=-1, stable=True).indices[:, :num_kept]
    rows = order[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    places = places.masked_fill(~seen[..., None], -1).gather(1, order[..., None])
    return key.gather(2, rows), value.gather(2, rows), places


def _num_blocks(config: Sliding, num_tokens: int) -> int:
    """Returns M, the number of blocks."""
    return -(-num_tokens // config.block)


def _num_given(config: Sliding, num_blocks: int) -> int:
    """Returns G, the number of keys that each block attends to.

    These are the keys of the block and of the previous block, the sinks, and the largest possible number of earlier
    global tokens.
    """
    num_far = 0 if num_blocks < 3 else config.sinks + _num_globals(config, num_blocks)
    return min(num_blocks, 2) * config.block + num_far


def _num_globals(config: Sliding, num_blocks: int) -> int:
    """Returns the largest number of global tokens that a row can have before its last two blocks."""
    return 0 if config.global_every is None else (num_blocks - 2) * config.block // config.global_every


def _blocks(config: Sliding, layout: Layout, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the keys that each block attends to, and the bias that is added to their scores, (B M, 1, C, G).

    The keys are indices into the concatenated rows, (B M G,). M is the number of blocks, C the number of tokens in a
    block, and G the number of keys per block.
    """
    key = ("sliding", config.window, config.sinks, config.global_every, num_rows, dtype)
    return layout.tables(key, partial(_make_blocks, config, layout, num_rows, dtype))


def _make_blocks(config: Sliding, layout: Layout, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    places, size = layout.places(), config.block
    num_tokens, device = places.shape[1], places.device
    num_blocks = _num_blocks(config, num_tokens)
    starts = torch.arange(0, num_blocks * size, size, device=device)[:, None]
    near = starts + torch.arange(-size if num_blocks > 1 else 0, size, device=device)
    index, is_given = near[None], (near >= 0) & (near < num_tokens)
    if num_blocks > 2:
        far = _far(config, places, starts)
        # keys in the previous block are included already
        is_given = torch.cat((is_given.expand(len(far), -1, -1), (far >= 0) & (far < starts - size)), dim=-1)
        index = torch.cat((index.expand(len(far), -1, -1), far), dim=-1)
    index = index.clamp(0, num_tokens - 1)

    def of_keys(x: Tensor) -> Tensor:
        return x[:, index[0]] if len(index) == 1 else x.gather(1, index.flatten(1)).view_as(index)

    def of_queries(x: Tensor, empty: int) -> Tensor:
        return F.pad(x, (0, num_blocks * size - num_tokens), value=empty).view(-1, num_blocks, size)

    key_places = torch.where(is_given, of_keys(places), -1)
    sees = _sees(config, of_queries(places, -1)[..., None], key_places[..., None, :])
    if layout.documents is not None:
        sees = sees & (of_queries(layout.documents, -1)[..., None] == of_keys(layout.documents)[..., None, :])
    bias = _bias(sees, dtype).expand(num_rows, -1, -1, -1).flatten(0, 1)[:, None]
    rows = torch.arange(0, num_rows * num_tokens, num_tokens, device=device)[:, None, None]
    return (index + rows).flatten(), bias


def _far(config: Sliding, places: Tensor, starts: Tensor) -> Tensor:
    """Returns the indices of the sinks and global tokens of each block, (B or 1, M, .).

    Blocks begin at `starts`, (M, 1). Only the document of a block's first token can have sinks outside the block,
    because all other documents of the block begin in it.
    """
    first = places[:, starts[:, 0]]
    begins = torch.where(first < 0, places.shape[1], starts[:, 0] - first)
    sinks = begins[..., None] + torch.arange(config.sinks, device=places.device)
    if config.global_every is None:
        return sinks
    number = _num_globals(config, len(starts))
    before = places[:, : (len(starts) - 2) * config.block]
    is_global = (before % config.global_every == config.global_every - 1) & (before >= config.sinks)
    order = is_global.logical_not().sort(dim=-1, stable=True).indices[:, :number]
    order = order.masked_fill(~is_global.gather(1, order), places.shape[1])
    return torch.cat((sinks, order[:, None].expand(-1, len(starts), -1)), dim=-1)


@memoized
def _num_pairs(config: Sliding, num_tokens: int) -> int:
    """Counts the (query, key) pairs of a document of `num_tokens` tokens where the query sees the key."""
    return sum(config.num_kept(before) + 1 for before in range(num_tokens))


def _blocks_law(config: Sliding, tape: Tape, value: Array) -> tuple[Array, Array]:
    num_blocks = _num_blocks(config, value.shape[2])
    num_keys, num_rows = _num_given(config, num_blocks), value.shape[0]
    index = tape.new((num_rows * num_blocks * num_keys,), "int64")
    return index, tape.new((num_rows * num_blocks, 1, config.block, num_keys), value.dtype)
