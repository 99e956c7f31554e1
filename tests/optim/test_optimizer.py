"""What every optimizer must be: the one that is named, convergent, repeatable, and as large as it says."""

import pytest
import torch
from torch import nn

from llmeff.core.optimizer_state import state_bytes
from llmeff.core.precision import precision
from llmeff.core.table import Row, table
from llmeff.cost.arrays import Weight
from llmeff.optim import OptimizerConfig

CONVERGENT = {
    "adamw": {"lr": 0.05, "weight_decay": 0.0},
    "adamw8bit": {"lr": 0.05, "weight_decay": 0.0, "min_8bit_size": 1},
    "lion": {"lr": 0.003, "weight_decay": 0.0},
    "muon": {"lr": 0.01, "weight_decay": 0.0},
    "sgd": {"lr": 0.02},
}
"""With which each reaches the minimum of the quadratic below."""
UPDATES = {
    "adamw": {"torch.AdamW": torch._fused_adamw_},
    "adamw8bit": {"bitsandbytes.AdamW8bit": None},
    "lion": {"pytorch_optimizer.Lion": torch._foreach_sign_},
    "muon": {"llmeff.OrthogonalMomentum": torch.addmm, "torch.AdamW": torch._fused_adamw_},
    "sgd": {"torch.SGD": torch._foreach_add_},
}
"""The classes, and an operation of torch of each, that each one's step must be; None where its kernels are its own."""

ROLES = {"weight": "matrix", "bias": "bias"}

every_optimizer = pytest.mark.parametrize("name", OptimizerConfig.registry.names())


def train(name, steps, **settings):
    """Fits a layer to another by least squares, which is a quadratic in its parameters."""
    torch.manual_seed(0)
    layer, target = nn.Linear(4, 3), nn.Linear(4, 3)
    inputs = torch.eye(4)
    optimizer = OptimizerConfig.registry[name](**settings).build(table(layer, ROLES))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(inputs) - target(inputs)).square().sum()
        loss.backward()
        optimizer.step()
    return layer, optimizer, loss.item()


def test_the_tables_are_complete():
    names = OptimizerConfig.registry.names()
    assert sorted(CONVERGENT) == sorted(UPDATES) == names


@every_optimizer
def test_the_groups_that_are_stated_are_those_that_are_built(name):
    roles = {"conv": "conv", "first.weight": "matrix", "first.bias": "bias", "norm": "norm", "last.weight": "head"}
    rows = [Row(name=own, parameter=nn.Parameter(torch.zeros(2, 2)), role=role) for own, role in roles.items()]
    names = {row.parameter: row.name for row in rows}
    config = OptimizerConfig.registry[name]()
    built = [[names[parameter] for parameter in group["params"]] for group in config.build(rows).param_groups]
    assert config.groups(roles) == built


@every_optimizer
def test_it_converges_on_a_quadratic(name):
    first = train(name, 1)[2]
    assert train(name, 600, **CONVERGENT[name])[2] < 1e-4 * first


@every_optimizer
def test_it_does_the_same_twice(name):
    one, other = train(name, 10)[0], train(name, 10)[0]
    assert all(map(torch.equal, one.parameters(), other.parameters()))


@every_optimizer
def test_the_update_that_runs_is_the_named_one(name):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer = train(name, 1)[1]
    kinds = [type(part) for part in getattr(optimizer, "optimizers", [optimizer])]
    assert {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in kinds} == set(UPDATES[name])
    names = {event.name for event in profile.events()}
    assert {f"aten::{operation.__name__}" for operation in UPDATES[name].values() if operation is not None} <= names


@every_optimizer
def test_its_rate_is_the_peak(name):
    assert {group["lr"] for group in train(name, 1, lr=0.25)[1].param_groups} == {0.25}


@every_optimizer
def test_its_state_is_as_large_as_predicted(name):
    layer, optimizer, _ = train(name, 1)
    weights = [
        Weight(key, tuple(tensor.shape), "float32", "layer", role=ROLES[key])
        for key, tensor in layer.named_parameters()
    ]
    price = OptimizerConfig.registry[name]().price(weights, precision("fp32"))
    assert price.total("optimizer_bytes") == price.total("peak_bytes") == state_bytes(optimizer)
