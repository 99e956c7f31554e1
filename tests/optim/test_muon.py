"""Muon is torch's on matrices and AdamW elsewhere; its price is what its iterations execute and its moments take."""

import copy

import pytest
import torch
from torch import nn

from llmeff.core.meters import count_flops
from llmeff.core.optimizer_state import state_bytes
from llmeff.core.parameters import ParameterInfo, parameter_infos
from llmeff.core.precision import precision
from llmeff.cost.arrays import Weight
from llmeff.optim import Muon
from llmeff.optim.newton_schulz import OrthogonalMomentum, orthogonalize

SETTINGS = Muon(lr=0.01, momentum=0.9, weight_decay=0.3, beta1=0.8, beta2=0.9)
AS_TORCH = SETTINGS.model_copy(update={"ns_format": "bfloat16"})
KINDS = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.3, "num_iterations": 5}
ROLES = {"0.weight": "embedding", "1.weight": "norm", "1.bias": "bias", "2.weight": "matrix", "3.weight": "head"}


def model_and_rows() -> tuple[nn.Module, list[ParameterInfo]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 6, bias=False), nn.Linear(6, 7, bias=False))
    return model, parameter_infos(model, ROLES)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(7)).square().sum().backward()
        optimizer.step()


def test_each_parameter_has_its_own_optimizer_to_the_last_bit():
    ours, rows = model_and_rows()
    theirs = copy.deepcopy(ours)
    embedding, norm, matrix, head = theirs
    muon = torch.optim.Muon([matrix.weight], 0.01, 0.3, 0.9, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [embedding.weight, head.weight], "weight_decay": 0.3},
        {"params": [norm.weight, norm.bias], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), fused=True)
    train(ours, AS_TORCH.build(rows))
    for _ in range(5):
        theirs.zero_grad()
        theirs(torch.arange(7)).square().sum().backward()
        muon.step()
        adamw.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7)])
def test_on_a_cpu_the_iterations_are_those_in_float64_but_for_rounding(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    y = x.double() / x.double().norm()
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    found = orthogonalize(x, 5, "float32")
    assert torch.allclose(found, y.float(), atol=2e-6)
    assert found.dtype == torch.float32
    assert (torch.linalg.svdvals(found) - 1).abs().max() < 0.35
    assert torch.equal(orthogonalize(torch.zeros(shape), 5, "float32"), torch.zeros(shape))


def test_iterations_in_float64_stay_there():
    x = torch.randn(4, 6, dtype=torch.float64)
    assert orthogonalize(x, 5, "float32").dtype == torch.float64


@pytest.mark.parametrize(
    ("flags", "decided"),
    [({"avx2"}, "float32"), ({"avx512_bf16"}, "float32"), ({"avx512_bf16", "amx_bf16"}, "bfloat16")],
)
def test_auto_is_bfloat16_where_the_cpu_has_amx(flags, decided, monkeypatch):
    monkeypatch.setattr("llmeff.optim.muon.multiplies_bfloat16", lambda device: device != "cpu" or "amx_bf16" in flags)
    torch.manual_seed(0)
    found = []
    for ns_format in ("auto", decided):
        model, rows = model_and_rows()
        train(model, SETTINGS.model_copy(update={"ns_format": ns_format}).build(rows))
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_is_given_is_not_decided_anew():
    for given in ("float32", "bfloat16"):
        muon = Muon(ns_format=given)
        assert [muon.resolve(is_bfloat16_fast=fast).ns_format for fast in (False, True)] == [given, given]
    assert [Muon().resolve(is_bfloat16_fast=fast).ns_format for fast in (False, True)] == ["float32", "bfloat16"]


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"a parameter has the shape \(3,\)"):
        OrthogonalMomentum([nn.Parameter(torch.zeros(3))], **KINDS, iteration_format="float32")


@pytest.mark.parametrize("shape", [(6, 3, 7, 7), (16, 2, 1, 1)])
def test_a_convolution_is_the_matrix_of_its_patches_to_the_last_bit(shape):
    torch.manual_seed(0)
    convolution = nn.Parameter(torch.randn(shape))
    matrix = nn.Parameter(convolution.detach().flatten(1).clone())
    torchs = nn.Parameter(matrix.detach().clone())
    optimizers = [
        OrthogonalMomentum([convolution], **KINDS, iteration_format="bfloat16"),
        OrthogonalMomentum([matrix], **KINDS, iteration_format="bfloat16"),
        torch.optim.Muon([torchs], 0.02, 0.3, 0.9, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        convolution.grad = torch.randn(shape)
        matrix.grad, torchs.grad = (convolution.grad.flatten(1).clone() for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(convolution.detach().flatten(1), matrix.detach())
        assert torch.equal(matrix, torchs)
    assert optimizers[0].state[convolution]["momentum_buffer"].shape == shape


def test_convolutions_are_made_orthogonal_and_the_last_is_not():
    roles = {
        "0.weight": "conv",
        "0.bias": "bias",
        "1.weight": "norm",
        "1.bias": "norm",
        "2.weight": "head",
        "2.bias": "bias",
    }
    model = nn.Sequential(nn.Conv2d(3, 6, 5), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 1))
    rows = parameter_infos(model, roles)
    optimizer = SETTINGS.build(rows)
    for row in rows:
        row.parameter.grad = torch.randn(row.shape)
    assert SETTINGS.groups(roles) == [["0.weight"], ["2.weight"], ["0.bias", "1.weight", "1.bias", "2.bias"]]
    parts = {"conv": "convolutions", "head": "head", "norm": "norms", "bias": "convolutions"}
    weights = [Weight(row.name, row.shape, "float32", parts[row.role], role=row.role) for row in rows]
    price = SETTINGS.price(weights, precision("fp32"))
    assert price.total("executed_flops") == count_flops(optimizer.step) > 0
    assert price.total("optimizer_bytes") == state_bytes(optimizer)
    kinds = {row.name: set(optimizer.state[row.parameter]) for row in rows}
    assert kinds["0.weight"] == {"momentum_buffer"}
    assert kinds["2.weight"] == {"exp_avg", "exp_avg_sq", "step"}


def test_state_and_groups_are_those_of_the_parts():
    model, rows = model_and_rows()
    optimizer = SETTINGS.build(rows)
    assert len(optimizer.state) == 0
    train(model, optimizer, 1)
    assert set(optimizer.state) == set(model.parameters())
    assert optimizer.state[model[2].weight].keys() == {"momentum_buffer"}
    assert optimizer.state[model[0].weight].keys() == {"exp_avg", "exp_avg_sq", "step"}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model)
    train(model, optimizer, 1)
    assert all(map(torch.equal, model.parameters(), before.parameters()))


@pytest.mark.parametrize("role", ["matrix", "norm"])
def test_a_rank_may_own_one_kind_alone(role):
    model, rows = model_and_rows()
    own = [row for row in rows if row.role == role]
    optimizer = SETTINGS.build(own)
    train(model, optimizer, 1)
    assert set(optimizer.state) == {row.parameter for row in own}


def test_the_price_is_what_a_step_takes():
    model, rows = model_and_rows()
    optimizer = SETTINGS.build(rows)
    train(model, optimizer, 1)
    parts = {"embedding": "embedding", "head": "head", "matrix": "mlp", "norm": "norms", "bias": "norms"}
    price = SETTINGS.price(
        [Weight(row.name, row.shape, "float32", parts[row.role], role=row.role) for row in rows], precision("fp32")
    )
    assert price.total("optimizer_bytes") == state_bytes(optimizer)
    assert price.total("executed_flops") == count_flops(optimizer.step)
