"""The recurrence of all mixers with a state, step by step for decoding and in chunks for training.

A state S of (K, V) passes from token to token. At each token it decays, drops its old value for the key (the delta rule),
adds the key with its new value, and is read by a query:

    S_t = (I - beta_t k_t k_t') diag(exp(g_t)) S_(t-1) + beta_t k_t v_t',    o_t = S_t' q_t

Without beta nothing is dropped and values are added whole: S_t = diag(exp(g_t)) S_(t-1) + k_t v_t'. Within a chunk of C
tokens, where c_t is the sum of g from its start to t, everything that does not depend on earlier chunks is a matrix product
(Yang et al. 2024, arXiv 2312.06635 and 2406.06484; 2412.06464 with decay). Between chunks only the state is passed on.
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
"""C, tokens of a chunk."""
SEGMENT = 1024
"""Tokens whose chunks are computed at once, and recomputed in backward. Only the states between segments are saved."""
BLOCK = 16
"""S, tokens over which per-channel decays are folded into the keys. A larger block could overflow."""
LEAST = -5.0
"""Lower bound of a per-channel g, so that exp(-LEAST * BLOCK) fits in float32. It leaves 0.7 % of the state."""


class ScanConfig(MixerConfig):
    """A mixer that uses the recurrence."""

    kernel: Literal["auto", "torch", "fla"] = "auto"
    """Implementation of the recurrence. torch: this package's own, anywhere. fla: flash-linear-attention for whole sequences
    on GPUs; torch on CPUs, with `runtime.deterministic` (Triton chooses its kernels by timing), and for odd widths and decays
    that fla refuses. auto: fla if it is installed and products are in half precision, otherwise torch; a mixer with float32
    sums uses fla only if `kernel` is fla. Prices are those of torch."""
    gates_heads: ClassVar[bool] = False
    """Whether each head has a decay that changes from token to token."""
    fuses: ClassVar[frozenset[str]] = frozenset()
    """Operations besides the scan that flash-linear-attention computes, by their names in `llmeff.attention.fla`."""

    def missing_requirements(self, shape: MixerShape, *, on_cpu: bool) -> list[str]:
        """Reports a missing package, or a missing GPU for it."""
        if self.kernel != "fla":
            return []
        found = [] if fla.is_installed() else [f"mixer {self.name!r}: kernel 'fla' {fla.MISSING}"]
        if on_cpu:
            found.append(f"mixer {self.name!r}: kernel 'fla' runs only on GPUs, but this run is on the CPU; use 'auto'")
        elif self.gates_heads and fla.is_flawed():
            found.append(f"mixer {self.name!r}: kernel 'fla' {fla.FLAW}; or use 'auto'")
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
    """A batch's tokens through the recurrence: in chunks, or by one step after a state that was kept.

    In float32 or wider, unless flash-linear-attention does it in `dtype`.

    Args:
        query: (B, T, N, K).
        key: (B, T, N, K).
        value: (B, T, N, V).
        log_decay: (B, T, N, 1), or (B, T, N, K) and then at least `LEAST`; None: 0.
        beta: (B, T, N); None: there is no delta rule.
        layout: documents have a state each, and padding changes none.
        cache: keeps the state.
        kernel: of `ScanConfig`.
        dtype: of queries, keys and values in flash-linear-attention; decays and states are float32 there too.

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
    """`mix` by `step` or `scan`, in float32 or wider.

    Args:
        given: query, key, value, log_decay and beta, as `mix` takes them.
        documents: of the layout.
        state: before the first token; None: 0.

    Returns:
        (B, T, N, V) and the state after the last token.
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
    """Advances by one token.

    Args:
        query: (B, N, K).
        key: (B, N, K).
        value: (B, N, V).
        log_decay: g, (B, N, K), or (B, N, 1) if a head's channels share one; None: 0.
        beta: (B, N); None: no delta rule.
        state: (B, N, K, V), after the previous token; not modified.

    Returns:
        (B, N, V), and the state after the token, (B, N, K, V).
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
    """Scans all tokens in chunks. For backward only the arguments and one state per segment are saved.

    Args:
        query: (B, N, T, K).
        key: (B, N, T, K).
        value: (B, N, T, V).
        log_decay: g, at most 0. (B, N, T, 1) if a head's channels share one, or (B, N, T, K), then at least `LEAST`;
            None: 0.
        beta: (B, N, T); None: no delta rule.
        documents: (B, T); each document is contiguous, and the state starts at 0 in each. None: one document per row.
        state: (B, N, K, V) before the first token, part of the first document. None: 0.
        chunk: C; a multiple of `BLOCK` if decays are per channel.
        segment: tokens computed at once; a multiple of C.

    Returns:
        (B, N, T, V), and the state of the last document after the last token, (B, N, K, V).
    """
    if state is None:
        state = value.new_zeros((*value.shape[:2], key.shape[-1], value.shape[-1]))
    if torch.compiler.is_compiling():
        return _followed((chunk, segment), documents, query, key, value, log_decay, beta, state)
    return _scan((chunk, segment), documents, query, key, value, log_decay, beta, state)


def _followed(sizes: tuple[int, int], documents: Tensor | None, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_scan` in a form that torch.compile can trace; the compiler decides what is saved and what is recomputed."""
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
    """Computes segments one after another; each starts from the final state of the one before."""

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
        )  # memory layout that mixers use next
        for index, part in enumerate(_segments(value.shape[2], sizes[1])):
            states.append(state)
            own: list[Any] = [*(None if x is None else x[:, :, part] for x in rows), state]
            out[:, :, part], state = _segment(sizes[0], _part(documents, part, index), *own)
        ctx.sizes = sizes
        ctx.save_for_backward(documents, *rows, *states)
        return out, state

    @staticmethod
    def backward(ctx: Any, above: Tensor, above_state: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # recomputed values would count as constants
            raise RuntimeError("the scan can be differentiated only once, not twice (create_graph=True)")
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
            # one copy here saves one in each product
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
    """The documents of a segment, preceded by that of the token before it."""
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
    """`scan` of one segment in a form that autograd can trace; `documents` begins with the state's document."""
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
    """(B, N, T, .) to (B, N, M, C, .), padded with zeros, which neither decay nor add."""
    # one copy here saves one in each product
    x = F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return cast(Tensor, x.unflatten(2, (-1, chunk)))


def _parts(documents: Tensor, missing: int, chunk: int) -> Tensor:
    """(B, 1 + T) documents to (B, M, C); padding belongs to the last document."""
    own = documents[:, 1:]
    return cast(Tensor, torch.cat((own, own[:, -1:].expand(-1, missing)), dim=1).unflatten(1, (-1, chunk)))


def _causal(documents: Tensor | None, missing: int, chunk: int, device: torch.device) -> Tensor:
    """Which tokens of its chunk each token sees: (C, C), or (B, 1, M, C, C) with documents."""
    sees = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    if documents is None:
        return sees
    parts = _parts(documents, missing, chunk)
    return (sees & (parts[..., None] == parts[..., None, :]))[:, None]


def _borders(documents: Tensor, missing: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """What crosses document borders in each chunk.

    Returns:
        Whether the state before the chunk reaches each token, and whether each token stays in the state after the chunk,
        both (B, 1, M, C, 1), and whether the state before continues into the state after, (B, 1, M, 1, 1).
    """
    parts = _parts(documents, missing, chunk)
    last = parts[..., -1]
    before = torch.cat((documents[:, :1], last[:, :-1]), dim=1)
    reaches = (parts == before[..., None])[:, None, ..., None]
    stays = (parts == last[..., None])[:, None, ..., None]
    return reaches, stays, (before == last)[:, None, :, None, None]


def _pairs(rows: Tensor, keys: Tensor, decay: Tensor | None, sees: Tensor) -> Tensor:
    """(B, N, M, C, C): sum over channels of rows_t exp(c_t - c_s) keys_s if t sees s, else 0."""
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
    """States from chunk to chunk: U_i = u_i - w_i S_i, S_(i+1) = a_i S_i + k_i' U_i.

    Autograd would record every step of the loop. Here backward is a loop with as many products, and the gradient of each
    input takes a single product over all chunks.
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
            ctx.set_materialize_grads(False)  # its gradient would be zeros of the size of all values
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
    """States before each chunk, (B, N, M, K, V), the state after the last, and the values that chunks add, (B, N, M, C, V)."""
    states, end, taken = _apply(keys, values, carry, erased, state)
    return states, end, values if erased is None else taken
