"""The recurrence of all mixers with a state, step by step for decoding and in chunks for training.

A state S of shape (K, V) passes from token to token. At each token, the state decays, the old value of the token's key
is removed (the delta rule), the new value of the key is added, and a query reads the state:

    S_t = (I - beta_t k_t k_t') diag(exp(g_t)) S_(t-1) + beta_t k_t v_t',    o_t = S_t' q_t

Without beta nothing is removed and values are added unscaled: S_t = diag(exp(g_t)) S_(t-1) + k_t v_t'.

In a chunk of C tokens, everything that does not depend on earlier chunks is computed by matrix products (Yang et al.
2024, arXiv 2312.06635 and 2406.06484; 2412.06464 with decay). Only the state passes from chunk to chunk. In formulas,
c_t is the sum of g from the start of the chunk to token t.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from llmeff.attention import fla
from llmeff.attention.mixer import LayerCache, MixerConfig, MixerShape
from llmeff.attention.norm import at_least_float32
from llmeff.core import kernels
from llmeff.core.layout import Layout

# B batch, N heads, T tokens, K key width, V value width, M chunks, C tokens of a chunk, S tokens of a block of a chunk

CHUNK = 64
"""C, number of tokens in a chunk."""
SEGMENT = 1024
"""Number of tokens that are computed at once, and recomputed in backward. Only states between segments are saved."""
BLOCK = 16
"""S, number of tokens over which per-channel decays are multiplied into the keys. A larger block could overflow."""
LEAST = -5.0
"""Lower bound of a per-channel g, at which 0.7 % of the state remains. With it, exp(-LEAST * BLOCK) fits in float32."""


class ScanConfig(MixerConfig):
    """Base config of mixers that use this recurrence."""

    kernel: Literal["auto", "torch", "fla"] = "auto"
    """Implementation of the recurrence.

    "torch" is llmeff's own implementation, for all devices. "fla" is flash-linear-attention, for whole sequences on
    GPUs. It falls back to torch on CPUs, with `runtime.deterministic` (because Triton chooses kernels by timing), for
    odd widths in half precision, and for decays that fla refuses. "auto" means fla if it is installed and products are
    in half precision, otherwise torch. `linear` and `performer`, whose sums are float32, use fla only if this field is
    "fla". Prices always assume torch."""
    gates_heads: ClassVar[bool] = False
    """Whether each head has a decay that changes from token to token."""
    fuses: ClassVar[frozenset[str]] = frozenset()
    """Functions in `llmeff.attention.fla`, apart from the scan, that the mixer can use."""

    def missing_requirements(self, shape: MixerShape, *, on_cpu: bool) -> list[str]:
        """Reports why kernel 'fla' cannot run: a missing package, a run on the CPU, or a flawed version of Triton."""
        if self.kernel != "fla":
            return []
        found = [] if fla.is_installed() else [f"mixer {self.name!r}: kernel 'fla' {fla.MISSING}"]
        if on_cpu:
            found.append(f"mixer {self.name!r}: kernel 'fla' runs only on GPUs, but this run is on the CPU; use 'auto'")
        elif self.gates_heads and fla.is_flawed():
            found.append(f"mixer {self.name!r}: kernel 'fla' {fla.FLAW}, or kernel 'auto'")
        return found


def mix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    layout: Layout,
    cache: LayerCache | None,
    kernel: str = "torch",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Runs the recurrence over the tokens of a batch: in chunks, or in one step for one token after a cached state.

    Computes in float32 or wider, unless flash-linear-attention runs it in `dtype`.

    Args:
        query: (B, T, N, K).
        key: (B, T, N, K).
        value: (B, T, N, V).
        log_decay: (B, T, N, 1), or (B, T, N, K) with values of at least `LEAST`. None means no decay.
        beta: (B, T, N). None means no delta rule.
        layout: documents and padding of the batch. Each document has its own state, and padding changes no state.
        cache: stores the state. None in training.
        kernel: see `ScanConfig.kernel`.
        dtype: dtype of queries, keys and values in flash-linear-attention, whose decays and states are float32.

    Returns:
        (B, T, N, V).
    """
    with torch.autocast(key.device.type, enabled=False):
        if log_decay is not None:
            log_decay = layout.cleared(log_decay.flatten(2)).view_as(log_decay)
        key = layout.cleared(key.flatten(2)).view_as(key)
        state = None if cache is None else cache.recall("state")
        is_whole = key.shape[1] > 1 and (cache is None or layout.documents is None)
        by_fla = is_whole and fla.takes(kernel, dtype, key.device)
        if by_fla and fla.can_scan(key, value, log_decay, beta, dtype):
            kernels.ran("scan: flash-linear-attention", is_counted=False)
            mixed, state = fla.scan(query, key, value, log_decay, beta, layout, state, dtype)
        else:
            kernels.ran("scan: torch")
            mixed, state = _mix_by_torch(query, key, value, log_decay, beta, documents=layout.documents, state=state)
    if cache is not None:
        cache.keep("state", cast(Tensor, state))
    return mixed


def _mix_by_torch(*given: Tensor | None, documents: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes `mix` with `step` or `scan`, in float32 or wider.

    Args:
        given: query, key, value, log_decay and beta, as `mix` takes them.
        documents: documents of the layout.
        state: state before the first token. None means zeros.

    Returns:
        The output, (B, T, N, V), and the state after the last token.
    """
    rows: list[Any] = [None if x is None else at_least_float32(x.transpose(1, 2)) for x in given]
    if state is not None and rows[1].shape[2] == 1:
        one: list[Any] = [*(None if x is None else x[:, :, 0] for x in rows), state]
        mixed, state = step(*one)
        mixed = mixed[:, :, None]
    else:
        mixed, state = scan(*rows, documents=documents, state=state)
    return mixed.transpose(1, 2), state


def step(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence for one token.

    Args:
        query: (B, N, K).
        key: (B, N, K).
        value: (B, N, V).
        log_decay: g, (B, N, K), or (B, N, 1) if all channels of a head share it. None means no decay.
        beta: (B, N). None means no delta rule.
        state: (B, N, K, V), the state after the previous token. It is not modified.

    Returns:
        The output, (B, N, V), and the state after the token, (B, N, K, V).
    """
    if log_decay is not None:
        state = state * log_decay.exp()[..., None]
    if beta is not None:
        value = beta[..., None] * (value - torch.einsum("bnk,bnkv->bnv", key, state))
    state = state + key[..., None] * value[..., None, :]
    return torch.einsum("bnk,bnkv->bnv", query, state), state


def scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    documents: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
    segment: int = SEGMENT,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over all tokens in chunks. Saves only its arguments and one state per segment for backward.

    Args:
        query: (B, N, T, K).
        key: (B, N, T, K).
        value: (B, N, T, V).
        log_decay: g, at most 0. (B, N, T, 1) if all channels of a head share it, or (B, N, T, K), at least `LEAST`.
            None means no decay.
        beta: (B, N, T). None means no delta rule.
        documents: (B, T). Each document is contiguous and starts with a state of 0. None means one document per row.
        state: (B, N, K, V), the state before the first token. It belongs to the first document. None means zeros.
        chunk: C. It must be a multiple of `BLOCK` if decays are per channel.
        segment: number of tokens that are computed at once. It must be a multiple of C.

    Returns:
        The output, (B, N, T, V), and the state of the last document after the last token, (B, N, K, V).
    """
    if state is None:
        state = value.new_zeros((*value.shape[:2], key.shape[-1], value.shape[-1]))
    if torch.compiler.is_compiling():
        return _followed((chunk, segment), documents, query, key, value, log_decay, beta, state)
    return _scan((chunk, segment), documents, query, key, value, log_decay, beta, state)


def _followed(sizes: tuple[int, int], documents: Tensor | None, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes the scan in a form that torch.compile can trace. The compiler then decides which tensors to save."""
    *rows, state = given
    assert rows[2] is not None
    assert state is not None
    mixed = []
    for index, part in enumerate(_segments(rows[2].shape[2], sizes[1])):
        own: list[Any] = [*(None if x is None else x[:, :, part] for x in rows), state]
        out, state = _segment(sizes[0], _part(documents, part, index), *own)
        mixed.append(out)
    return torch.cat(mixed, dim=2), state


class _Scan(torch.autograd.Function):
    """Computes segments one after another. Each segment starts from the final state of the previous segment."""

    @staticmethod
    def forward(
        ctx: Any, sizes: tuple[int, int], documents: Tensor | None, *given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        *rows, state = given
        value = rows[2]
        assert value is not None
        assert state is not None
        batch, heads, length, width = value.shape
        out, states = (
            value.new_empty(batch, length, heads, width).transpose(1, 2),
            [],
        )  # the memory layout that mixers use next
        for index, part in enumerate(_segments(value.shape[2], sizes[1])):
            states.append(state)
            own: list[Any] = [*(None if x is None else x[:, :, part] for x in rows), state]
            out[:, :, part], state = _segment(sizes[0], _part(documents, part, index), *own)
        ctx.sizes = sizes
        ctx.save_for_backward(documents, *rows, *states)
        return out, state

    @staticmethod
    def backward(ctx: Any, above: Tensor, above_state: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a second derivative would treat recomputed values as constants
            raise RuntimeError("the scan supports only first derivatives: call backward without create_graph=True")
        documents, *saved = ctx.saved_tensors
        rows, states = saved[:5], saved[5:]
        needed = [x is not None and need for x, need in zip(rows, ctx.needs_input_grad[2:], strict=False)]
        gradients = [torch.empty_like(x) if need else None for x, need in zip(rows, needed, strict=True)]
        for index, part in reversed(list(enumerate(_segments(above.shape[2], ctx.sizes[1])))):
            own: list[Any] = [None if x is None else x[:, :, part].detach() for x in rows]
            own.append(states[index].detach())
            leaves = [x.requires_grad_() for x, need in zip(own, (*needed, True), strict=True) if need]
            with torch.enable_grad():
                # the output is not needed again, only its graph
                ends = list(map(get_gradient_edge, _segment(ctx.sizes[0], _part(documents, part, index), *own)))
            # one copy here avoids a copy in each product
            *found, above_state = torch.autograd.grad(ends, leaves, (above[:, :, part].contiguous(), above_state))
            del ends
            for gradient in gradients:
                if gradient is not None:
                    gradient[:, :, part] = found.pop(0)
        return None, None, *gradients, above_state


_scan: Callable[..., tuple[Tensor, Tensor]] = _Scan.apply


def _segments(length: int, segment: int) -> list[slice]:
    return [slice(start, start + segment) for start in range(0, length, segment)]


def _part(documents: Tensor | None, part: slice, index: int) -> Tensor | None:
    """Returns the documents of the tokens of a segment, preceded by the document of the token before the segment."""
    if documents is None:
        return None
    first = part.start - 1 if index else 0
    return torch.cat((documents[:, first : first + 1], documents[:, part]), dim=1)


def _segment(
    chunk: int,
    documents: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes `scan` for one segment in a form that autograd can trace.

    The first column of `documents` is the document of the initial state.
    """
    length = key.shape[2]
    missing = -length % chunk
    query, key, value = (_chunks(x, missing, chunk) for x in (query, key, value))
    decay = None if log_decay is None else _chunks(log_decay, missing, chunk).cumsum(-2)
    sees = _causal(documents, missing, chunk, query.device)
    borders = None
    if documents is not None:
        borders = [x.to(value.dtype) for x in _borders(documents, missing, chunk)]

    read, kept = query, key
    carry = None
    if decay is not None:
        read, kept = query * decay.exp(), key * (decay[..., -1:, :] - decay).exp()
        carry = decay[..., -1, :, None].exp()
    if borders is not None:
        reaches, stays, goes_on = borders
        read, kept = read * reaches, kept * stays
        carry = goes_on if carry is None else carry * goes_on
    taken, erased = value, None
    if beta is not None:
        beta = _chunks(beta[..., None], missing, chunk)
        found = key if decay is None else key * decay.exp()
        found = found if borders is None else found * borders[0]
        overlap = (beta * _pairs(key, key, decay, sees)).tril(-1)
        solved = torch.linalg.solve_triangular(
            overlap, beta * torch.cat((value, found), dim=-1), upper=False, unitriangular=True
        )
        taken, erased = solved[..., : value.shape[-1]], solved[..., value.shape[-1] :]
    states, end, taken = _hand_on(kept, taken, carry, erased, state)
    mixed = _pairs(query, key, decay, sees) @ taken + read @ states
    return mixed.flatten(2, 3)[:, :, :length], end


def _chunks(x: Tensor, missing: int, chunk: int) -> Tensor:
    """Splits (B, N, T, .) into chunks, (B, N, M, C, .). Zeros that fill the last chunk do not change the state."""
    # one copy here avoids a copy in each product
    x = F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return cast(Tensor, x.unflatten(2, (-1, chunk)))


def _parts(documents: Tensor, missing: int, chunk: int) -> Tensor:
    """Drops the first column of documents, (B, 1 + T), and splits the rest into chunks, (B, M, C).

    Pads the last chunk with the id of the last document.
    """
    own = documents[:, 1:]
    return cast(Tensor, torch.cat((own, own[:, -1:].expand(-1, missing)), dim=1).unflatten(1, (-1, chunk)))


def _causal(documents: Tensor | None, missing: int, chunk: int, device: torch.device) -> Tensor:
    """Returns the mask of the tokens that each token sees in its chunk: (C, C), or (B, 1, M, C, C) with documents."""
    sees = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    if documents is None:
        return sees
    parts = _parts(documents, missing, chunk)
    return (sees & (parts[..., None] == parts[..., None, :]))[:, None]


def _borders(documents: Tensor, missing: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns boolean masks that stop the state at document borders in each chunk.

    Returns:
        Three masks. (B, 1, M, C, 1): True if a token reads the state before its chunk. (B, 1, M, C, 1): True if a token
        adds to the state after its chunk. (B, 1, M, 1, 1): True if the state before a chunk is carried over into the
        state after the chunk.
    """
    parts = _parts(documents, missing, chunk)
    last = parts[..., -1]
    before = torch.cat((documents[:, :1], last[:, :-1]), dim=1)
    reaches = (parts == before[..., None])[:, None, ..., None]
    stays = (parts == last[..., None])[:, None, ..., None]
    return reaches, stays, (before == last)[:, None, :, None, None]


def _pairs(rows: Tensor, keys: Tensor, decay: Tensor | None, sees: Tensor) -> Tensor:
    """Returns the weight of each pair of tokens (t, s) in a chunk, (B, N, M, C, C).

    It is the sum over channels of rows_t exp(c_t - c_s) keys_s if t sees s, otherwise 0. c is `decay`, the sum of
    the log decays from the start of the chunk.
    """
    if decay is None:
        return (rows @ keys.mT).masked_fill(~sees, 0)
    if decay.shape[-1] == 1:
        between = (decay - decay.mT).masked_fill(~sees, -torch.inf)
        return (rows @ keys.mT) * between.exp()
    blocks = []
    for start in range(0, decay.shape[-2], BLOCK):
        end = start + BLOCK
        base = decay[..., start : start + 1, :]
        own = rows[..., start:end, :] * (decay[..., start:end, :] - base).exp()
        theirs = keys[..., :end, :] * (base - decay[..., :end, :]).exp()
        blocks.append(F.pad(own @ theirs.mT, (0, decay.shape[-2] - end)))
    return torch.cat(blocks, dim=-2).masked_fill(~sees, 0)


class _HandOn(torch.autograd.Function):
    """Passes the state from chunk to chunk: U_i = u_i - w_i S_i, S_(i+1) = a_i S_i + k_i' U_i.

    u is `values`, w is `erased`, a is `carry` and k is `keys`. Autograd would record every step of the loop. The
    loop of this backward computes only gradients that depend on later chunks. All other gradients are computed after
    the loop, for all chunks at once.
    """

    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, values: Tensor, carry: Tensor | None, erased: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_chunks = keys.shape[2]
        states = state.new_empty((*state.shape[:2], num_chunks, *state.shape[2:]))
        added = None if erased is not None else keys.mT @ values
        taken = values.clone() if erased is not None else values
        for index in range(num_chunks):
            states[:, :, index] = state
            if erased is not None:
                taken[:, :, index].sub_(erased[:, :, index] @ state)
                new = keys[:, :, index].mT @ taken[:, :, index]
            else:
                assert added is not None
                new = added[:, :, index]
            state = state + new if carry is None else torch.addcmul(new, state, carry[:, :, index])
        ctx.save_for_backward(keys, taken, carry, erased, states)
        if erased is None:
            ctx.mark_non_differentiable(taken)
            # otherwise autograd would allocate zeros of the size of all values as the gradient of `taken`
            ctx.set_materialize_grads(False)
        return states, state, taken

    @staticmethod
    def backward(
        ctx: Any, above_states: Tensor, above_end: Tensor | None, above_taken: Tensor
    ) -> tuple[Tensor | None, ...]:
        keys, taken, carry, erased, states = ctx.saved_tensors
        after = torch.empty_like(states)  # gradients of the state after each chunk
        grad_taken = None if erased is None else above_taken.clone()
        gradient = torch.zeros_like(states[:, :, 0]) if above_end is None else above_end
        for index in reversed(range(states.shape[2])):
            after[:, :, index] = gradient
            before = above_states[:, :, index]
            if grad_taken is not None:
                grad_taken[:, :, index] += keys[:, :, index] @ gradient
                before = before - erased[:, :, index].mT @ grad_taken[:, :, index]
            gradient = before + gradient if carry is None else torch.addcmul(before, gradient, carry[:, :, index])
        grad_keys = taken @ after.mT
        grad_values = keys @ after if grad_taken is None else grad_taken
        grad_erased = None if grad_taken is None else -(grad_taken @ states.mT)
        grad_carry = None
        if carry is not None and ctx.needs_input_grad[2]:
            grad_carry = (states * after).sum_to_size(carry.shape)
        return grad_keys, grad_values, grad_carry, grad_erased, gradient


_apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _HandOn.apply


def _hand_on(
    keys: Tensor, values: Tensor, carry: Tensor | None, erased: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Passes the state from chunk to chunk, see `_HandOn`.

    Returns:
        The states before each chunk, (B, N, M, K, V), the state after the last chunk, and the values that the chunks
        add to the state, (B, N, M, C, V).
    """
    states, end, taken = _apply(keys, values, carry, erased, state)
    return states, end, values if erased is None else taken
