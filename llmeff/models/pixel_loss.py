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
    return F.cross_entropy(wide, labels, weight=weights.to(wide.dtype), ignore_index=IGNORED, reduction="sum")
