"""An optimizer's state by parameter name, so that it outlives the order and the number of processes it was made in."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmeff.core.table import Row

_BETWEEN = "::"


def named_state(optimizer: Optimizer, rows: list[Row]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as tensors, keyed `<parameter>::<kind>`, and what is no tensor, keyed alike."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for row in rows:
        for kind, value in optimizer.state.get(row.parameter, {}).items():
            (tensors if isinstance(value, Tensor) else others)[f"{row.name}{_BETWEEN}{kind}"] = value
    return tensors, others


def load_named_state(optimizer: Optimizer, rows: list[Row], tensors: dict[str, Tensor], others: dict[str, Any]) -> None:
    """Puts a state back.

    Raises:
        ValueError: it is of a parameter that is not there, or of another shape.
    """
    parameters = {row.name: row.parameter for row in rows}
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for key, value in (tensors | others).items():
        name, _, kind = key.rpartition(_BETWEEN)
        if name not in parameters:
            raise ValueError(f"optimizer state of {name!r}, which is no trained parameter of this model")
        parameter = parameters[name]
        if isinstance(value, Tensor):
            if value.dim() and value.numel() == parameter.numel() and value.shape != parameter.shape:
                raise ValueError(f"{key} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
            group = groups[parameter]
            beside = value.dim() or group.get("fused") or group.get("capturable")  # where torch keeps step counters
            value = value.to(parameter.device if beside else "cpu", copy=True)
        optimizer.state[parameter][kind] = value


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Scales every group's peak rate, kept in `peak_lr`; returns the first group's new rate."""
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of all tensors in the state."""
    return sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
