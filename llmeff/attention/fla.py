"""Functions that call flash-linear-attention's Triton kernels on GPUs: the scan, and the operations around it.

That package is optional. Each function computes the same as llmeff's own PyTorch code, up to rounding.
"""

import importlib
import importlib.metadata
import importlib.util
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor

from llmeff.attention.mixer import LayerCache
from llmeff.core import kernels
from llmeff.core.layout import Layout
from llmeff.core.tested import release

# B batch, T tokens, C channels, N heads, K key width, V value width, W taps

MISSING = 'needs flash-linear-attention 0.6 or newer, with Triton. To install it: pip install "llmeff[fla]"'
LARGEST_KEY = 256
"""Largest key width (K) that flash-linear-attention's delta-rule kernels support."""
FLAW = (
    "refuses per-head decays on Hopper GPUs with Triton 3.4 to 3.7.0, which compute wrong gradients for them. "
    "Use Triton 3.7.1 or newer"
)
_LEAST = (0, 6)
"""Oldest supported version, (major, minor). It is the first that has all kernels in the form used here."""


@cache
def is_installed() -> bool:
    """Whether Triton and a supported version of flash-linear-attention are installed."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("fla") is None:
        return False
    try:
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        return False
    return release(version)[:2] >= _LEAST


@cache
def is_flawed() -> bool:
    """Whether flash-linear-attention refuses per-head decays on this machine's GPU and Triton version (`FLAW`)."""
    if torch.version.hip or not is_installed() or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability()[0] != 9:
        return False
    version: str = importlib.import_module("triton").__version__
    return (3, 4) <= release(version) < (3, 7, 1)


def takes(kernel: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to use flash-linear-attention for this kernel setting, dtype and device, see `ScanConfig.kernel`."""
    if kernel == "torch" or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    return (kernel == "fla" or dtype in (torch.bfloat16, torch.float16)) and is_installed()


def fuses(kernel: str, dtype: torch.dtype, device: torch.device, cache: LayerCache | None) -> bool:
    """Whether flash-linear-attention also computes the operations around the scan: convolution, norms and decays.

    Returns False if there is a cache, because these kernels are used only for whole rows. Before it returns True, it
    notes in the run's record that these kernels are used.
    """
    if cache is not None or not takes(kernel, dtype, device):
        return False
    kernels.ran("around the scan: flash-linear-attention", is_counted=False)
    return True


def can_scan(key: Tensor, value: Tensor, log_decay: Tensor | None, beta: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the scan kernels support these inputs on this machine.

    They do not support odd widths in half precision. If `is_flawed`, they also do not support per-head decays.
    """
    is_odd = key.shape[-1] % 2 == 1 or value.shape[-1] % 2 == 1
    if is_odd and dtype != torch.float32:
        return False
    return not (_name(log_decay, beta, dtype) in ("sum, heads", "delta, heads") and is_flawed())


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
    """Runs the recurrence of `attention.scan` over all tokens.

    Decays, states and beta are float32. Only the kernel for the delta rule without decay takes beta in `dtype`.

    Args:
        query: (B, T, N, K).
        key: (B, T, N, K).
        value: (B, T, N, V).
        log_decay: (B, T, N, 1) or (B, T, N, K). None means no decay.
        beta: (B, T, N). None means no delta rule.
        layout: documents of the rows. Each document has its own state.
        state: (B, N, K, V), the state before the first token, for rows of one document each. None means zeros.
        dtype: dtype of queries, keys and values in the kernel.

    Returns:
        The output, (B, T, N, V), in `dtype`, and the state after the last token, (B, N, K, V). The state is None if the
        layout has documents.
    """
    name = _name(log_decay, beta, dtype)
    given: dict[str, Any] = {"q": query.to(dtype), "k": key.to(dtype), "v": value.to(dtype)}
    if beta is not None:
        given["beta"] = beta.to(dtype) if name == "delta" else beta.float()
        if name == "delta, heads" and log_decay is None:
            log_decay = torch.zeros_like(beta)[..., None]
    if log_decay is not None and name != "sum, fixed":
        given["g"] = log_decay.float() if log_decay.shape[-1] > 1 else log_decay.float()[..., 0]
    documents = layout.documents
    if documents is not None:
        given = {part: x.flatten(0, 1)[None] for part, x in given.items()}
        given["cu_seqlens"] = bounds(layout)
    if log_decay is not None and name == "sum, fixed":
        given["g_gamma"] = log_decay[0, 0, :, 0].float()
    mixed, end = _kernel(name)(
        **given, scale=1.0, initial_state=None if state is None else state.float(),
        output_final_state=documents is None,
    )  # fmt: skip
    return mixed.view_as(value), end


_Name = Literal["sum, fixed", "sum, heads", "sum, channels", "delta", "delta, heads", "delta, channels"]


def _name(log_decay: Tensor | None, beta: Tensor | None, dtype: torch.dtype) -> _Name:
    """Returns the name of the kernel: the kind of recurrence, followed by the kind of decay.

    "sum" is the recurrence without the delta rule. "fixed" is no decay or a constant decay per head, "heads" is a decay
    per head and token, and "channels" is a decay per channel and token. "delta" alone is the delta rule without decay.
    """
    by_channel = log_decay is not None and log_decay.shape[-1] > 1
    if beta is None:
        if by_channel:
            return "sum, channels"
        return "sum, fixed" if log_decay is None or _is_fixed(log_decay) else "sum, heads"
    if by_channel:
        return "delta, channels"
    # the kernel for the delta rule without decay does not support float32
    return "delta" if log_decay is None and dtype != torch.float32 else "delta, heads"


def _is_fixed(log_decay: Tensor) -> bool:
    """Whether all rows and tokens share one decay per channel, which needs no gradient.

    A shared decay is an expanded tensor: its strides over rows and tokens are 0.
    """
    if log_decay.requires_grad:
        return False
    strides = zip(log_decay.shape[:2], log_decay.stride()[:2], strict=True)
    return all(size == 1 or stride == 0 for size, stride in strides)


def _kernel(name: _Name) -> Any:
    match name:
        case "sum, fixed" | "sum, heads":
            from fla.ops.simple_gla import chunk_simple_gla as kernel
        case "sum, channels":
            from fla.ops.gla import chunk_gla as kernel
        case "delta":
            from fla.ops.delta_rule import chunk_delta_rule as kernel
        case "delta, heads":
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule as kernel
        case "delta, channels":
            from fla.ops.kda import chunk_kda as kernel
    return kernel


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """Applies a causal convolution to each channel, within documents, and then silu.

    Args:
        x: (B, T, C).
        weight: (C, W). The last tap belongs to the token itself.
        bias: (C,). None means no bias.
        layout: documents of the rows.

    Returns:
        (B, T, C).
    """
    from fla.modules.causal_conv1d import causal_conv1d

    if layout.documents is None:
        return cast(Tensor, causal_conv1d(x, weight, bias, activation="silu")[0])
    rows = x.flatten(0, 1)[None]
    return cast(Tensor, causal_conv1d(rows, weight, bias, activation="silu", cu_seqlens=bounds(layout))[0].view_as(x))


def unit(x: Tensor) -> Tensor:
    """Scales the last dimension of (..., K) to length 1. Adds 1e-6 under the square root."""
    from fla.modules.norm.l2norm import l2norm

    return cast(Tensor, l2norm(x, eps=1e-6))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns RMSNorm(x) for x of shape (..., V), in the dtype of x."""
    from fla.modules.norm.layernorm import rms_norm as kernel

    return cast(Tensor, kernel(x, weight, None, eps=eps))


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Literal["silu", "sigmoid"]
) -> Tensor:
    """Returns RMSNorm(x) * activation(gate) in the dtype of x. x, gate and the result have shape (..., V)."""
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    return cast(Tensor, rms_norm_gated(x, gate, weight, None, activation=activation, eps=eps))


def channel_decay(x: Tensor, log_rate: Tensor, bias: Tensor) -> Tensor:
    """Returns the log decay -exp(log_rate) * softplus(x + bias) in float32.

    Args:
        x: (B, T, N, K).
        log_rate: (N,).
        bias: (N K,).

    Returns:
        (B, T, N, K).
    """
    from fla.ops.kda.gate import fused_kda_gate

    return cast(Tensor, fused_kda_gate(x, log_rate, bias))


def bounds(layout: Layout) -> Tensor:
    """Returns the start of each document in the concatenated rows, followed by the total number of tokens.

    All layers share the result, because computing it waits for the GPU.
    """
    return layout.tables(("fla",), lambda: _bounds(layout.documents))


def _bounds(documents: Tensor | None) -> Tensor:
    assert documents is not None, "the layout has no documents, so there are no bounds"
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.cat((begins.flatten().nonzero()[:, 0], documents.new_tensor([documents.numel()])))
