"""Sets the learning rate of any optimizer, and counts the bytes of its state."""

import torch
from torch.optim import Optimizer

from llmeff.core.tensors import local


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Sets each parameter group's learning rate to `factor` times its peak. Returns the new rate of the first group.

    The peak is stored in the group as `peak_lr`. If there is none yet, the group's current rate becomes the peak.
    """
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def state_bytes(optimizer: Optimizer) -> int:
    """Returns the bytes of the tensors in the optimizer's state on this rank. Each storage counts once."""
    storages = (
        local(value).untyped_storage()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
