"""Cross-entropy over a vocabulary without the whole logits in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# M tokens, D width, V vocabulary

IGNORED = -100
"""The target of a token that is no part of the loss."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Makes the gradients during forward, a chunk of tokens at a time: never more than one chunk of logits lives."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            target = targets[part]
            logits = (hidden[part] @ weight.T).float()
            log_sum = logits.logsumexp(-1)
            counted = target != IGNORED
            picked = logits.gather(-1, target.clamp(min=0)[:, None])[:, 0]
            total += torch.where(counted, log_sum - picked, 0.0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.sub_(log_sum[:, None]).exp_()
            grad.scatter_add_(-1, target.clamp(min=0)[:, None], torch.full_like(picked, -1.0)[:, None])
            grad.mul_(counted[:, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                if grad.dtype == torch.float32:
                    grad_weight.addmm_(grad.T, hidden[part])
                else:
                    grad_weight += (grad.T @ hidden[part]).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
    """The summed cross-entropy, in nats, of the targets under softmax(hidden @ weight').

    Args:
        hidden: (..., D).
        weight: (V, D), the output embedding.
        targets: (...) int64, `IGNORED` where a token does not count.
        chunk: tokens whose logits live at once; None for all of them.

    Returns:
        a float32 scalar.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if chunk is None:
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    if torch.is_autocast_enabled(hidden.device.type):
        # autocast does not reach inside a Function: its casts are made here, where autograd sees them
        compute = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(compute), weight.to(compute)
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)
    return total
