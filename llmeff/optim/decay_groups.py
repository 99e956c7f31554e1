"""Parameter groups for optimizers that decay matrices and embeddings, but not norms and biases."""

from collections.abc import Mapping
from typing import Any

from llmeff.core.config import NotNegative
from llmeff.core.parameters import UNDECAYED, ParameterInfo, Role
from llmeff.optim.optimizer import OptimizerConfig


class DecayGroupsConfig(OptimizerConfig):
    """Base class of optimizers with two parameter groups, one with weight decay and one without."""

    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices and embeddings, times the learning rate. Norms and biases do not decay."""

    def groups(self, roles: Mapping[str, Role]) -> list[list[str]]:
        """Returns the names of the parameters with weight decay, then of those without. Empty groups are left out."""
        decayed = [name for name, role in roles.items() if role not in UNDECAYED]
        others = [name for name, role in roles.items() if role in UNDECAYED]
        return [names for names in (decayed, others) if names]

    def parameter_groups(self, rows: list[ParameterInfo]) -> list[dict[str, Any]]:
        """Returns the groups with their `weight_decay`, in the form that torch's optimizers take."""
        by_name = {row.name: row for row in rows}
        return [
            {
                "params": [by_name[name].parameter for name in names],
                "weight_decay": self.weight_decay if by_name[names[0]].decayed else 0.0,
            }
            for names in self.groups({row.name: row.role for row in rows})
        ]
