"""Cross-entropy over a vocabulary, computed in chunks of tokens so that not all logits are in memory at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmeff.core.ignored import IGNORED_TOKEN
from llmeff.cost import laws
from llmeff.cost.tape import Array, Tape

# M tokens, D width, V vocabulary


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the loss and its gradients in the forward pass, to keep the logits of only one chunk in memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        accumulate_dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulate_dtype, device=hidden.device)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate_dtype) if wants_weight else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            target = targets[part]
            log_probabilities = (hidden[part] @ weight.T).to(accumulate_dtype).log_softmax(-1)
            counted, index = target != IGNORED_TOKEN, target.clamp(min=0)[:, None]
            picked = log_probabilities.gather(-1, index)
            total += torch.where(counted, -picked[:, 0], 0.0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = log_probabilities.exp_()
            grad.scatter_add_(-1, index, torch.full_like(picked, -1.0))
            grad.mul_(counted[:, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                if grad.dtype == accumulate_dtype:
                    torch.addmm(grad_weight, grad.T, hidden[part], out=grad_weight)
                else:
                    grad_weight += (grad.T @ hidden[part]).to(accumulate_dtype)
            del log_probabilities, grad  # otherwise they would stay in memory beside the next chunk's tensors
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # a second derivative would wrongly take the saved gradients for constants
            raise RuntimeError(
                "the chunked cross-entropy supports only first derivatives: call backward without create_graph=True"
            )
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            # Multiply in the loss's format: `grad` is 1 / token count, and its rounding to bf16 would scale all
            # gradients by up to 0.4 %.
            grad_hidden = (grad_hidden.to(grad.dtype) * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


_chunked_cross_entropy: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _ChunkedCrossEntropy.apply


def cross_entropy_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy in nats, summed over the targets: a scalar, float32 or wider.

    Args:
        logits: (..., V).
        targets: (...) int64; `IGNORED_TOKEN` marks tokens that do not count.
    """
    at_least_float32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        at_least_float32.flatten(0, -2), targets.flatten(), ignore_index=IGNORED_TOKEN, reduction="sum"
    )


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
    """Returns the cross-entropy in nats of the targets under softmax(hidden @ weight.T), summed over the tokens.

    Args:
        hidden: (..., D), states before the output embedding.
        weight: (V, D), the output embedding.
        targets: (...) int64; `IGNORED_TOKEN` marks tokens that do not count.
        chunk: number of tokens whose logits are in memory at the same time. None for all tokens.

    Returns:
        A scalar in float32 (float64 if `hidden` is float64).
    """
    if chunk is None:
        return cross_entropy_of_logits(F.linear(hidden, weight), targets)
    if not torch.is_grad_enabled():
        # In a Function, `needs_input_grad` is true for leaves even if gradients are disabled. Detached, they need none.
        hidden, weight = hidden.detach(), weight.detach()
    if torch.is_autocast_enabled(hidden.device.type):
        # autocast does not apply inside a Function, so cast the inputs here, where autograd records the casts
        compute = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(compute), weight.to(compute)
    return _chunked_cross_entropy(hidden.flatten(0, -2), weight, targets.flatten(), chunk)


def law(tape: Tape, hidden: Array, weight: Array, batch: laws.Batch) -> Array:
    """Records the price of `cross_entropy_sum` on the tape, with the workload's `loss_chunk`, and returns the loss."""
    num_tokens, vocabulary = hidden.size // hidden.shape[-1], weight.shape[0]
    if tape.workload.loss_chunk is None:
        logits = laws.linear(tape, hidden.view(num_tokens, hidden.shape[-1]), weight)
        return laws.cross_entropy(tape, laws.cast(tape, logits, tape.precision.logits), batch)
    hidden, weight = laws.autocast(tape, hidden), laws.autocast(tape, weight)
    num_chunk = min(tape.workload.loss_chunk, num_tokens)
    node = tape.save((hidden, weight), (), partial(_law_back, tape, hidden.dtype, weight.dtype))
    grad_hidden = tape.elementwise(hidden.shape, hidden.dtype)
    grad_weight = tape.elementwise(weight.shape, "float32")
    tape.contract(2 * hidden.size * vocabulary)
    tape.execute(4 * hidden.size * vocabulary)
    product = laws.multiplied(tape, (num_chunk, vocabulary), hidden.dtype)
    logits = laws.cast(tape, product, "float32")
    del product
    tape.counts["logits_bytes", "loss"] = logits.storage.num_bytes
    log_probabilities = tape.elementwise(logits.shape, logits.dtype)
    del logits
    if hidden.dtype != "float32":
        half = tape.new(log_probabilities.shape, hidden.dtype), tape.new(weight.shape, hidden.dtype)
        tape.new(weight.shape, "float32")
        del half
    del log_probabilities
    tape.save_output(node, grad_hidden, grad_weight)
    return tape.elementwise((), "float32", node)


def _law_back(
    tape: Tape, hidden: str, weight: str, gradient: Array, grad_hidden: Array, grad_weight: Array
) -> tuple[Array, Array]:
    scaled_hidden = tape.new(grad_hidden.shape, "float32")
    scaled_hidden = laws.cast(tape, scaled_hidden, hidden)
    scaled_weight = tape.new(grad_weight.shape, "float32")
    return scaled_hidden, laws.cast(tape, scaled_weight, weight)
