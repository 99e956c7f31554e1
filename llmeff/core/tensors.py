"""A module's stored tensors by name: each parameter once, and the buffers that are saved."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: a DTensor's local share, else the tensor itself."""
    share: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return share


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a shared parameter only by its first name."""
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    state = module.state_dict(keep_vars=True)
    tensors |= {name: buffer for name, buffer in module.named_buffers() if name in state}
    return tensors


@torch.no_grad()
def copy_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies values into the module's tensors, in place.

    Raises:
        ValueError: names or shapes differ.
    """
    stored = stored_tensors(module)
    if stored.keys() != tensors.keys():
        missing, extra = sorted(stored.keys() - tensors.keys()), sorted(tensors.keys() - stored.keys())
        raise ValueError(f"the weights do not fit the model: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, tensor in stored.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])


def empty_on(module: nn.Module, device: str, dtype: torch.dtype | None = None) -> None:
    """Replaces all parameters and buffers by empty tensors on a device; shared ones stay shared.

    Args:
        module: the module to change.
        device: the new device.
        dtype: the new format of floating-point tensors; None: unchanged.
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
    """A block that leaves the module's buffers as they were: running statistics, when a batch is seen once more."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, values in before:
            buffer.copy_(values)
