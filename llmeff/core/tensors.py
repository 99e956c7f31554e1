"""A module's stored tensors by name: each parameter once, and the buffers that are saved."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: a DTensor's share, or the tensor."""
    share: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return share


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, a shared one under its first name only, and persistent buffers."""
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
    own = stored_tensors(module)
    if own.keys() != tensors.keys():
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        raise ValueError(f"the weights do not fit the model: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])


def empty_on(module: nn.Module, device: str, dtype: torch.dtype | None = None) -> None:
    """Puts empty tensors on a device in the place of all parameters and buffers; shared ones stay shared.

    Args:
        module: whose.
        device: where.
        dtype: of those of floating point; None: as they are.
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
    """A block after which the module's buffers are what they were: running statistics, where a batch is seen once more."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, values in before:
            buffer.copy_(values)
