"""Reads and replaces the tensors of a module: its parameters, each once, and its buffers."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """Returns a DTensor's local shard on this rank. Returns any other tensor unchanged."""
    share: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return share


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers by name. A shared parameter is listed only under its first name."""
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    state = module.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in module.named_buffers() if name in state}
    return tensors


@torch.no_grad()
def copy_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies the values of `tensors` into the module's tensors that `stored_tensors` lists, in place.

    Raises:
        ValueError: if names or shapes differ.
    """
    stored = stored_tensors(module)
    if stored.keys() != tensors.keys():
        missing, extra = sorted(stored.keys() - tensors.keys()), sorted(tensors.keys() - stored.keys())
        raise ValueError(f"the weights do not fit the model: they lack {missing[:3]}, and the model lacks {extra[:3]}")
    for name, tensor in stored.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}, but the model needs {tuple(tensor.shape)}"
            )
        tensor.copy_(tensors[name])


def empty_on(module: nn.Module, device: str, dtype: torch.dtype | None = None) -> None:
    """Replaces all parameters and buffers by uninitialized tensors on a device. Shared tensors stay shared.

    Args:
        module: the module to change.
        device: the new device.
        dtype: the new dtype of floating-point tensors. None leaves it unchanged.
    """
    moved: dict[Tensor, Any] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor not in moved:
                    empty = torch.empty_like(tensor, device=device, dtype=dtype if tensor.is_floating_point() else None)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                if tensor is not None:
                    table[name] = moved[tensor]


@contextlib.contextmanager
def unmoved_buffers(module: nn.Module) -> Iterator[None]:
    """Context manager that restores the module's buffers at the end of the block.

    For example, a second forward pass over a batch then does not change running statistics.
    """
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, values in before:
            buffer.copy_(values)
