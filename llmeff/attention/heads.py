"""Heads as mixers with a state have them: (B, T, N, H), where queries may have more heads than keys and values."""

from functools import partial
from typing import cast

from torch import Tensor

from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# B batch, T tokens, N heads, K key-value heads, H head width


def split(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, N H) to (B, T, N, H)."""
    return cast(Tensor, x.unflatten(-1, (num_heads, -1)))


def repeated(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, K, .) to (B, T, N, .): each head for N / K of the others, as in grouped-query attention."""
    groups = num_heads // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def repeated_law(tape: Tape, x: Array, num_heads: int) -> Array:
    """The price of `repeated`."""
    if num_heads == x.shape[2]:
        return x
    node = None if x.node is None else tape.save((x,), (), partial(_repeated_back, tape, x.shape))
    return tape.elementwise((*x.shape[:2], num_heads, *x.shape[3:]), x.dtype, node)


def _repeated_back(tape: Tape, shape: tuple[int, ...], gradient: Array) -> tuple[Array]:
    return (tape.new(shape, gradient.dtype),)


def project(tape: Tape, name: str, x: Array, num_heads: int, head_dim: int) -> Array:
    """The price of a projection of (B, T, D) and its `split`: (B, T, N, H)."""
    weight = tape.weight(f"{name}.weight", num_heads * head_dim, x.shape[-1])
    return laws.linear(tape, x, weight).view(*x.shape[:-1], num_heads, head_dim)
