"""What is read of and set in any optimizer: the learning rate, and the bytes of its state."""

import torch
from torch.optim import Optimizer

from llmeff.core.tensors import local


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Scales every group's peak rate, kept in `peak_lr`; returns the first group's new rate."""
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes that this process has of all tensors in the state, each storage once."""
    storages = (
        local(value).untyped_storage()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
