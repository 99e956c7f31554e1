"""Parameters with their roles, by which an optimizer decides how to treat them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

Role = Literal["embedding", "head", "norm", "bias", "matrix", "conv", "fused_heads"]
"""What a parameter is. The model says so, since a shape does not tell (an embedding is a matrix too)."""

Sharding = Literal["elementwise", "whole_tensor", "none"]
"""What an optimizer lets ranks split without changing the update: any slice, only whole tensors, or nothing."""

UNDECAYED: frozenset[Role] = frozenset(("norm", "bias"))
"""Roles that weight decay leaves alone."""


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """One parameter."""

    name: str
    parameter: nn.Parameter
    role: Role

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.parameter.shape)

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies."""
        return self.role not in UNDECAYED


def parameter_infos(model: nn.Module, roles: Mapping[str, Role]) -> list[ParameterInfo]:
    """Describes each trained parameter, in the model's order. A shared parameter occurs once.

    Raises:
        ValueError: a parameter has no role.
    """
    missing = [name for name, _ in model.named_parameters() if name not in roles]
    if missing:
        raise ValueError(f"parameters without a role: {', '.join(missing[:3])} ({len(missing)} in all)")
    return [
        ParameterInfo(name=name, parameter=parameter, role=roles[name])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
