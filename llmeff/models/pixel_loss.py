"""Cross-entropy of pixels over their classes, and its sum weighted by class."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmeff.core.ignored import IGNORED_PIXEL


def pixel_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of each pixel in nats, (B, H, W), with 0 for pixels that do not count.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64; `IGNORED_PIXEL` marks pixels that do not count.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.cross_entropy(logits, labels, ignore_index=IGNORED_PIXEL, reduction="none")
    # torch's own cross-entropy of images has no deterministic form on a GPU
    known = labels.masked_fill(labels == IGNORED_PIXEL, 0)
    losses = -logits.log_softmax(1).gather(1, known[:, None])[:, 0]
    return losses.masked_fill(labels == IGNORED_PIXEL, 0)


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Returns the sum over labelled pixels of class weight times cross-entropy in nats: a scalar, float32 or wider.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64; `IGNORED_PIXEL` marks pixels that do not count.
        weights: (K,), one weight per class.
    """
    at_least_float32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = weights.to(at_least_float32.dtype)
    if torch.are_deterministic_algorithms_enabled():
        return (pixel_losses(at_least_float32, labels) * weights[labels.masked_fill(labels == IGNORED_PIXEL, 0)]).sum()
    return F.cross_entropy(at_least_float32, labels, weight=weights, ignore_index=IGNORED_PIXEL, reduction="sum")
