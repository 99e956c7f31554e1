"""Softmax attention by torch's FlexAttention: on GPUs no pair is computed that a block mask rules out, and no bias is made."""

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
"""Whether a token at one place of its document sees the one at another, both of any shape; a place below 0 is padding."""


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    # made when it is needed, since the compiler's import alone takes seconds
    return torch.compile(function)


def takes(kernel: str, query: Tensor, cache: LayerCache | None) -> bool:
    """Whether FlexAttention computes it: where it was asked for, over whole rows, on a GPU.

    Meters cannot look into it: in a step that is counted, sdpa, which gives the same, takes its place.
    """
    if kernel != "flex" or cache is not None or not query.is_cuda:
        return False
    kernels.ran("attention: torch FlexAttention, counted as sdpa")
    return torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack()


def block_mask(layout: Layout, name: object, sees: Sees) -> BlockMask:
    """Which blocks of pairs are seen at all, made once for all layers that have it.

    Args:
        layout: documents and padding.
        name: of the mask among all of the layout.
        sees: who sees whom.
    """
    return layout.tables(("flex", name), lambda: _make(layout, sees))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """Attention of all tokens of rows to those that they see, of their document.

    Args:
        query: (B, N, T, H).
        key: (B, K, T, H), K divides N.
        value: (B, K, T, H).
        mask: of the rows.

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

    make = _compiled(create_block_mask) if rows.is_cuda else create_block_mask  # fused, it makes no T x T mask
    batch = num_rows if num_rows > 1 else None
    return cast(BlockMask, make(seen, batch, None, num_tokens, num_tokens, device=str(rows.device)))
