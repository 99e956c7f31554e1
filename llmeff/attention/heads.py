"""Heads as mixers with a state have them: (B, T, N, H), where queries may have more heads than keys and values."""

from torch import Tensor

# B batch, T tokens, N heads, K key-value heads, H head width


def split(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, N H) to (B, T, N, H)."""
    return x.unflatten(-1, (num_heads, -1))


def repeated(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, K, .) to (B, T, N, .): each head for N / K of the others, as in grouped-query attention."""
    groups = num_heads // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)
