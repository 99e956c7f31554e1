"""What the loop reads of and sets in any optimizer."""

import torch
from torch import nn

from llmeff.core.optimizer_state import set_learning_rate, state_bytes


def test_rates_are_scaled_from_their_peaks():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 0.25)])
    for factor in (0.5, 1.0, 0.1):
        assert set_learning_rate(optimizer, factor) == 0.5 * factor
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 0.25 * factor]


def test_state_bytes_are_of_all_tensors():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert state_bytes(optimizer) == 0
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 4 * (6 + 2) + 2 * 4  # two moments, and a step counter a parameter
