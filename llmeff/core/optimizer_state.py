"""What can be read from and set in any optimizer: its learning rate, and the bytes of its state."""

import torch
from torch.optim import Optimizer

from llmeff.core.tensors import local


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Sets every group's rate to `factor` times its peak, kept in `peak_lr`; returns the first group's new rate."""
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of this process's part of all tensors in the state; each storage counts once."""
    storages = (
        local(value).untyped_storage()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
