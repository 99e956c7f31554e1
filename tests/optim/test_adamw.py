"""AdamW is the algorithm of its paper, to the last bit torch's, with no decay of norms and biases."""

import copy

import pytest
import torch
from torch import nn

from llmeff.core.config import ConfigError, validate
from llmeff.core.parameters import ParameterInfo, parameter_infos
from llmeff.optim import AdamW

SETTINGS = AdamW(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)


def model_and_rows() -> tuple[nn.Module, list[ParameterInfo]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    roles = {"0.weight": "embedding", "1.weight": "norm", "1.bias": "bias", "2.weight": "matrix", "2.bias": "bias"}
    return model, parameter_infos(model, roles)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[list[torch.Tensor]]:
    """The gradients of each step."""
    gradients = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(7)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        optimizer.step()
    return gradients


def test_the_update_is_torchs_to_the_last_bit():
    ours, rows = model_and_rows()
    theirs = copy.deepcopy(ours)
    groups = [
        {"params": [theirs[0].weight, theirs[2].weight], "weight_decay": 0.3},
        {"params": [theirs[1].weight, theirs[1].bias, theirs[2].bias], "weight_decay": 0.0},
    ]
    train(ours, SETTINGS.build(rows), 5)
    train(theirs, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6, fused=True), 5)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_the_update_is_the_papers():
    model, rows = model_and_rows()
    expected = [parameter.detach().double().clone() for parameter in model.parameters()]
    first, second = ([torch.zeros_like(weight) for weight in expected] for _ in range(2))
    for step, gradients in enumerate(train(model, SETTINGS.build(rows), 5), start=1):
        for place, (row, gradient) in enumerate(zip(rows, gradients, strict=True)):
            weight, gradient = expected[place], gradient.double()
            first[place] = 0.8 * first[place] + 0.2 * gradient
            second[place] = 0.9 * second[place] + 0.1 * gradient**2
            scaled = (first[place] / (1 - 0.8**step)) / ((second[place] / (1 - 0.9**step)).sqrt() + 1e-6)
            decay = 0.3 if row.role in ("embedding", "matrix") else 0.0
            expected[place] = weight - 0.01 * (scaled + decay * weight)
    for parameter, weight in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-6, atol=1e-6)


def test_a_model_without_norms_and_biases_has_one_group():
    layer = nn.Linear(3, 2, bias=False)
    assert len(SETTINGS.build(parameter_infos(layer, {"weight": "matrix"})).param_groups) == 1


@pytest.mark.parametrize("field", ["beta1", "beta2"])
def test_a_decay_of_one_forgets_nothing_and_is_refused(field):
    with pytest.raises(ConfigError, match=f"{field}: Input should be less than 1 "):
        validate(AdamW, {field: 1.0})
