"""The table of parameters: one row each, in order, with the role that the model gives."""

import pytest
from torch import nn

from llmeff.core.parameters import parameter_infos


def tied():
    model = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 5))
    model[2].weight = model[0].weight
    roles = {"0.weight": "embedding", "1.weight": "norm", "1.bias": "bias", "2.bias": "bias"}
    return model, roles


def test_one_row_a_parameter_and_a_shared_one_once():
    model, roles = tied()
    rows = parameter_infos(model, roles)
    assert [(row.name, row.role, row.shape) for row in rows] == [
        ("0.weight", "embedding", (5, 3)),
        ("1.weight", "norm", (3,)),
        ("1.bias", "bias", (3,)),
        ("2.bias", "bias", (5,)),
    ]
    assert [row.decayed for row in rows] == [True, False, False, False]
    assert rows[0].parameter is model[2].weight


def test_frozen_parameters_have_no_row():
    model, roles = tied()
    model[1].requires_grad_(False)
    assert [row.name for row in parameter_infos(model, roles)] == ["0.weight", "2.bias"]


def test_every_parameter_needs_a_role():
    model, roles = tied()
    del roles["1.bias"], roles["2.bias"]
    with pytest.raises(ValueError, match=r"roles\(\) lacks parameters: 1\.bias, 2\.bias \(2 in all\)"):
        parameter_infos(model, roles)
