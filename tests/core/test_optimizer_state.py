"""An optimizer's state by name: put back, training goes on to the last bit, whatever order the parameters have."""

import copy

import pytest
import torch
from torch import nn

from llmeff.core.optimizer_state import load_named_state, named_state, set_learning_rate, state_bytes
from llmeff.core.table import Row

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "adamw, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "factored": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "empty": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "numbers": lambda parameters: torch.optim.ASGD(parameters, lr=0.1),
}


def rows_of(model: nn.Module) -> list[Row]:
    return [Row(name=name, parameter=parameter, role="matrix") for name, parameter in model.named_parameters()]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_state_put_back_goes_on_to_the_last_bit(build):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build(model.parameters())
    step(model, optimizer)
    step(model, optimizer)
    tensors, others = copy.deepcopy(named_state(optimizer, rows_of(model)))

    again = copy.deepcopy(model)
    resumed = build(reversed(list(again.parameters())))
    load_named_state(resumed, rows_of(again), tensors, others)
    step(model, optimizer)
    step(again, resumed)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_what_is_put_back_is_a_copy():
    model = nn.Linear(3, 2)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer)
    tensors, others = copy.deepcopy(named_state(optimizer, rows_of(model)))
    before = copy.deepcopy(tensors)
    load_named_state(optimizer, rows_of(model), tensors, others)
    step(model, optimizer)
    assert all(torch.equal(tensors[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("bigs::exp_avg", "state of 'bigs', which is no trained parameter"),
        ("weight::exp_avg", r"weight::exp_avg has shape \(3, 2\), not \(2, 3\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(key, message):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=message):
        load_named_state(OPTIMIZERS["adamw"](model.parameters()), rows_of(model), {key: torch.zeros(3, 2)}, {})


def test_rates_are_scaled_from_their_peaks():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 0.25)])
    for factor in (0.5, 1.0, 0.1):
        assert set_learning_rate(optimizer, factor) == 0.5 * factor
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 0.25 * factor]


def test_state_bytes_are_of_all_tensors():
    model = nn.Linear(3, 2)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    assert state_bytes(optimizer) == 0
    step(model, optimizer)
    assert state_bytes(optimizer) == 2 * 4 * (6 + 2) + 2 * 4  # two moments, and a step counter a parameter
