"""Parameters with their roles. Optimizers choose the treatment of a parameter by its role."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

Role = Literal["embedding", "head", "norm", "bias", "matrix", "conv", "fused_heads"]
"""Kind of a parameter. The model declares it, because the shape alone does not determine it.

For example, an embedding is a matrix too.
"""

Sharding = Literal["elementwise", "whole_tensor", "none"]
"""How ranks may divide an optimizer's parameters and state without changing its update.

`elementwise`: at any element. `whole_tensor`: only between tensors. `none`: not at all.
"""

UNDECAYED: frozenset[Role] = frozenset(("norm", "bias"))
"""Roles without weight decay."""


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """A parameter to train, with its name and role."""

    name: str
    """The parameter's name in the model."""
    parameter: nn.Parameter
    """The parameter itself."""
    role: Role
    """The parameter's role, which the model declares."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.parameter.shape)

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies to the parameter."""
        return self.role not in UNDECAYED


def parameter_infos(model: nn.Module, roles: Mapping[str, Role]) -> list[ParameterInfo]:
    """Describes each parameter that requires a gradient, in the model's order. A shared parameter is listed once.

    Args:
        model: the model.
        roles: the role of each parameter, by name. Frozen parameters need a role too.

    Raises:
        ValueError: if a parameter has no role.
    """
    missing = [name for name, _ in model.named_parameters() if name not in roles]
    if missing:
        raise ValueError(f"the model's roles() lacks parameters: {', '.join(missing[:3])} ({len(missing)} in all)")
    return [
        ParameterInfo(name=name, parameter=parameter, role=roles[name])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
