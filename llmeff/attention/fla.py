"""The scan by flash-linear-attention's Triton kernels, where that package is installed: the same recurrence on GPUs."""

import importlib.metadata
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmeff.core.layout import Layout

# B batch, T tokens, N heads, K key width, V value width

MISSING = 'needs flash-linear-attention 0.6 or newer, with Triton: pip install "llmeff[fla]"'
LARGEST_KEY = 256
"""K, the most that its delta rules take."""
_LEAST = (0, 6)
"""The oldest version that has all kernels as they are called here."""


@cache
def is_installed() -> bool:
    """Whether the package can be used."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("fla") is None:
        return False
    try:
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) >= _LEAST


def scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    layout: Layout,
    state: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """All tokens; decays, beta and states in float32.

    Args:
        query: (B, T, N, K).
        key: (B, T, N, K).
        value: (B, T, N, V).
        log_decay: (B, T, N, 1) or (B, T, N, K); None: 0.
        beta: (B, T, N); None: there is no delta rule.
        layout: documents have a state each.
        state: (B, N, K, V) before the first token, where each row is one document; None: 0.
        dtype: of queries, keys and values.

    Returns:
        (B, T, N, V) of that dtype, and the state after the last token, (B, N, K, V); None where rows hold several documents.
    """
    given: dict[str, Any] = {"q": query.to(dtype), "k": key.to(dtype), "v": value.to(dtype)}
    if beta is not None:
        given["beta"] = beta.float()
        if log_decay is None:  # its delta rule without decay takes no float32
            log_decay = torch.zeros_like(beta)[..., None]
    if log_decay is not None:
        given["g"] = log_decay.float() if log_decay.shape[-1] > 1 else log_decay.float()[..., 0]
    documents = layout.documents
    if documents is not None:
        given = {name: x.flatten(0, 1)[None] for name, x in given.items()}
        given["cu_seqlens"] = bounds(layout)
    mixed, end = _kernel(log_decay, beta)(
        **given, scale=1.0, initial_state=None if state is None else state.float(),
        output_final_state=documents is None,
    )  # fmt: skip
    return mixed.view_as(value), end


def _kernel(log_decay: Tensor | None, beta: Tensor | None) -> Any:
    by_channel = log_decay is not None and log_decay.shape[-1] > 1
    if beta is None and by_channel:
        from fla.ops.gla import chunk_gla as kernel
    elif beta is None:
        from fla.ops.simple_gla import chunk_simple_gla as kernel
    elif by_channel:
        from fla.ops.kda import chunk_kda as kernel
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as kernel
    return kernel


def bounds(layout: Layout) -> Tensor:
    """Where documents begin in all rows one after another, and the end: made once for all layers, since it waits for the GPU."""
    return layout.tables(("fla",), lambda: _bounds(layout.documents))


def _bounds(documents: Tensor | None) -> Tensor:
    assert documents is not None, "rows of one document each have no bounds"
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.cat((begins.flatten().nonzero()[:, 0], documents.new_tensor([documents.numel()])))
