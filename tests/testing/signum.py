"""An optimizer outside the package: Signum, the sign of momentum (Bernstein et al. 2018, algorithm 1)."""

from typing import Literal

import torch
from torch.optim import Optimizer

from llmeff.core.precision import BYTES
from llmeff.optim.decay_groups import DecayGroupsConfig
from llmeff.optim.optimizer import state_price


class SignOfMomentum(Optimizer):
    def __init__(self, groups, lr, beta):
        super().__init__(groups, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                self.update(parameter, state["momentum"], group)

    def update(self, parameter, momentum, group):
        momentum.lerp_(parameter.grad, 1 - group["beta"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(momentum.sign(), alpha=group["lr"])


class Signum(DecayGroupsConfig):
    sharding = "elementwise"

    name: Literal["outside-signum"] = "outside-signum"
    lr: float = 1e-3
    beta: float = 0.9

    def build(self, rows):
        return SignOfMomentum(self.parameter_groups(rows), self.lr, self.beta)

    def price(self, weights, precision):
        return state_price(weights, lambda weight: weight.size * BYTES["float32"])


def formula(config, given):
    weight, momentum = given.weight, torch.zeros_like(given.weight)
    for gradient, rate in zip(given.gradients, given.rates, strict=True):
        momentum = config.beta * momentum + (1 - config.beta) * gradient
        decay = config.weight_decay if given.is_decayed else 0.0
        weight = weight - rate * (momentum.sign() + decay * weight)
    return weight
