"""Optimizers that are no part of the package and keep what they count in their groups, as several libraries do."""

from typing import Literal

import torch

from llmeff.core.config import Flag
from tests.testing.signum import SignOfMomentum, Signum


class CountsInGroups(SignOfMomentum):
    def __init__(self, groups, lr, beta, keeps_object):
        super().__init__(groups, lr, beta)
        self.defaults["keeps_object"] = keeps_object
        for group in self.param_groups:
            group["weight_sum"] = 0.0
            if keeps_object:
                group["history"] = {"object": object()}

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["weight_sum"] += group["lr"] ** 2
            group["largest"] = torch.maximum(group.get("largest", torch.tensor(-1.0)), torch.tensor(group["lr"]))
        super().step()

    def update(self, parameter, momentum, group):
        rate = 1 / (1 + group["step"]) + group["weight_sum"] + float(group["largest"])
        momentum.lerp_(parameter.grad, 1 - group["beta"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(momentum / (momentum.abs() + 1e-3), alpha=group["lr"] * rate)


class Counting(Signum):
    name: Literal["outside-counting"] = "outside-counting"
    keeps_object: Flag = False

    def build(self, rows):
        return CountsInGroups(self.parameter_groups(rows), self.lr, self.beta, self.keeps_object)
