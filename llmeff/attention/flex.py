"""Softmax attention by torch's FlexAttention. On GPUs it skips blocks that the mask rules out and needs no bias."""

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
"""(query places, key places) to whether the query sees the key. Places are positions in a document; below 0 is padding."""


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    # on demand, since importing the compiler takes seconds
    return torch.compile(function)


def takes(kernel: str, query: Tensor, cache: LayerCache | None) -> bool:
    """Whether to use FlexAttention: if configured, for whole rows on a GPU.

    Meters cannot look into it, so in a counted step sdpa takes its place; it computes the same.
    """
    if kernel != "flex" or cache is not None or not query.is_cuda:
        return False
    kernels.ran("attention: torch FlexAttention, counted as sdpa")
    return torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack()


def block_mask(layout: Layout, name: object, sees: Sees) -> BlockMask:
    """The blocks of pairs that are seen at all; made once for all layers that share the mask.

    Args:
        layout: documents and padding.
        name: key of the mask in the layout's tables.
        sees: which queries see which keys.
    """
    return layout.tables(("flex", name), lambda: _make(layout, sees))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Attention of all tokens to those tokens of their document that they see.

    Args:
        query: (B, N, T, H).
        key: (B, K, T, H); K divides N.
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

    make = _compiled(create_block_mask) if rows.is_cuda else create_block_mask  # compiled, it makes no T x T mask
    batch = num_rows if num_rows > 1 else None
    return cast(BlockMask, make(seen, batch, None, num_tokens, num_tokens, device=str(rows.device)))
