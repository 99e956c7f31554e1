"""Softmax attention with torch's FlexAttention. On GPUs it skips fully masked blocks and needs no bias tensor."""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llmeff.attention.mixer import LayerCache
from llmeff.core import kernels
from llmeff.core.layout import Layout

# B batch, T tokens, N heads, K key-value heads, H head width

Sees = Callable[[Tensor, Tensor], Tensor]
"""Function of (query places, key places) that returns whether each query sees each key.

A place is the position of a token in its document. Negative places are padding.
"""


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    # compiled at the first use, because importing the compiler takes seconds
    return torch.compile(function)


def takes(kernel: str, query: Tensor, cache: LayerCache | None) -> bool:
    """Whether to use FlexAttention: only if `kernel` is "flex", for whole rows (no cache) on a GPU.

    FLOP counters cannot see inside FlexAttention. A step whose FLOPs are counted uses sdpa, which computes the same.
    """
    if kernel != "flex" or cache is not None or not query.is_cuda:
        return False
    kernels.ran("attention: torch FlexAttention, counted as sdpa")
    return torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack()


def block_mask(layout: Layout, name: object, sees: Sees) -> BlockMask:
    """Returns the mask of the blocks that have at least one visible (query, key) pair.

    It is built once and shared by all layers with the same `name`.

    Args:
        layout: documents and padding of the batch.
        name: key under which the layout stores the mask.
        sees: function that decides which queries see which keys.
    """
    return layout.tables(("flex", name), lambda: _make(layout, sees))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Attends from each token to the tokens that the block mask lets it see.

    Args:
        query: (B, N, T, H).
        key: (B, K, T, H). K divides N.
        value: (B, K, T, H).
        mask: block mask of the rows.

    Returns:
        (B, N, T, H).
    """
    run = _compiled(flex_attention) if query.is_cuda else flex_attention
    return cast(Tensor, run(query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1]))


def _make(layout: Layout, sees: Sees) -> BlockMask:
    places = layout.places()
    documents = torch.zeros_like(places) if layout.documents is None else layout.documents
    rows, documents = torch.broadcast_tensors(places, documents)
    num_rows, num_tokens = rows.shape

    def seen(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = row if num_rows > 1 else torch.zeros_like(row)
        same: Tensor = documents[row, query] == documents[row, key]
        return same & sees(rows[row, query], rows[row, key])

    make = _compiled(create_block_mask) if rows.is_cuda else create_block_mask  # compiled, it allocates no T x T mask
    batch = num_rows if num_rows > 1 else None
    return cast(BlockMask, make(seen, batch, None, num_tokens, num_tokens, device=str(rows.device)))
