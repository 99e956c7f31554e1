"""Cross-entropy over the classes of pixels, weighted by class."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmeff.data.image_source import IGNORED


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The sum over labelled pixels of weight times cross-entropy, in nats; a scalar, float32 or wider.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64, IGNORED where a pixel does not count.
        weights: (K,).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if torch.are_deterministic_algorithms_enabled():  # of images, torch's own adds up in any order on a GPU
        counted = labels != IGNORED
        known = labels.masked_fill(~counted, 0)
        losses = -wide.log_softmax(1).gather(1, known[:, None])[:, 0] * weights.to(wide.dtype)[known]
        return losses.masked_fill(~counted, 0).sum()
    return F.cross_entropy(wide, labels, weight=weights.to(wide.dtype), ignore_index=IGNORED, reduction="sum")
