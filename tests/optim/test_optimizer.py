"""What every optimizer must be: the formula of its source, the one that is named, and what it declares."""

import copy
import sys

import pytest
import torch
from torch import nn

from llmeff.core.config import ConfigError
from llmeff.core.parameters import parameter_infos
from llmeff.core.precision import precision
from llmeff.cost.arrays import Weight
from llmeff.optim import SGD, AdamW, AdamW8bit, Lion, Muon, OptimizerConfig
from llmeff.testing import CheckFailed, apart
from llmeff.testing.optimizers import CHECKS, check_formula, check_sharding, proved_sharding
from tests.optim.formulas import FORMULAS, adamw, in_8_bits, tree

NAMES = OptimizerConfig.registry.names()
EXACTLY = {"dtype": torch.float64, "within": 1e-11}
BOUNDS = {
    # the library computes in float32, and a moment within rounding of the middle between two codes takes the other
    "adamw8bit": {"dtype": torch.float32, "within": 1e-3},
    # its iterations in float32
    "muon": {"dtype": torch.float64, "within": 1e-5},
}
"""Of optimizers that compute in a lower format than float64 somewhere."""
VARIANTS = [
    SGD(momentum=0.0),
    SGD(momentum=0.7, nesterov=True),
    AdamW(beta1=0.7, beta2=0.99, eps=1e-3),
    AdamW8bit(beta1=0.7, beta2=0.99, min_8bit_size=1),
    Lion(beta1=0.6, beta2=0.8),
    Muon(momentum=0.8, nesterov=False, ns_steps=4, beta1=0.7, beta2=0.99, ns_format="float32"),
]
"""Beside the defaults of each."""
UPDATES = {
    "adamw": {"torch.AdamW": torch._fused_adamw_},
    "adamw8bit": {"bitsandbytes.AdamW8bit": None},
    "lion": {"pytorch_optimizer.Lion": torch._foreach_sign_},
    "muon": {"llmeff.OrthogonalMomentum": torch.addmm, "torch.AdamW": torch._fused_adamw_},
    "sgd": {"torch.SGD": torch._foreach_add_},
}
"""The classes, and an operation of torch of each, that each one's step must be; None where its kernels are its own."""

every_optimizer = pytest.mark.parametrize("name", NAMES)


def default(name):
    """The optimizer as it comes, computing in float32 where a CPU would take whatever format it is good at."""
    return OptimizerConfig.registry[name]().resolve(is_bfloat16_fast=False)


def test_every_optimizer_has_its_formula():
    assert sorted(FORMULAS) == sorted(UPDATES) == NAMES


@pytest.mark.parametrize("config", [*map(default, NAMES), *VARIANTS], ids=str)
def test_the_update_is_that_of_the_formula(config):
    check_formula(config, FORMULAS[config.name], **BOUNDS.get(config.name, EXACTLY))


@every_optimizer
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_is_what_it_declares(check, name):
    check(default(name))


@every_optimizer
def test_it_declares_all_that_may_be_split(name):
    assert proved_sharding(default(name))[0] == default(name).sharding


@pytest.mark.parametrize("name", [name for name in NAMES if OptimizerConfig.registry[name].sharding != "elementwise"])
def test_a_declaration_that_says_more_than_is_so_fails(name, monkeypatch):
    monkeypatch.setattr(OptimizerConfig.registry[name], "sharding", "elementwise")
    with pytest.raises(
        CheckFailed, match=f"optimizer '{name}' declares sharding 'elementwise', but a slice .* declare 'who"
    ):
        check_sharding(default(name))


def test_the_formula_of_8_bits_is_not_that_of_32():
    """So what is rounded, and where, is seen."""
    with pytest.raises(
        CheckFailed,
        match=r"optimizer 'adamw8bit' with weight_decay 0.0: after 20 steps 'first.tall' differs from the formula by",
    ):
        check_formula(AdamW8bit(), apart(adamw), **BOUNDS["adamw8bit"])


@pytest.mark.parametrize("is_signed", [True, False])
def test_8_bits_are_the_nearest_of_a_dynamic_tree(is_signed):
    """bitsandbytes looks a number up by the nearest of 2^16 even places in [-1, 1] on a CPU: it may miss by half of one."""
    torch.manual_seed(0)
    blocks = torch.randn(8, 256) if is_signed else torch.randn(8, 256).square()
    scales, values = blocks.abs().amax(1, keepdim=True), tree(is_signed)
    found = (in_8_bits(blocks.double(), values).view_as(blocks) / scales).double()
    apart_by = (found - blocks / scales).abs()
    nearest = ((blocks / scales).unsqueeze(-1) - values).abs().amin(-1)
    assert (apart_by - nearest).max() <= 2**-15 + 1e-6
    assert apart_by.max() <= 0.9 / 2 ** (7 - is_signed) / 2 + 2**-15


@every_optimizer
def test_the_update_that_runs_is_the_named_one(name):
    layer = nn.Linear(4, 3)
    optimizer = default(name).build(parameter_infos(layer, {"weight": "matrix", "bias": "bias"}))
    layer(torch.eye(4)).square().sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    kinds = [type(part) for part in getattr(optimizer, "optimizers", [optimizer])]
    assert {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in kinds} == set(UPDATES[name])
    names = {event.name for event in profile.events()}
    assert {f"aten::{operation.__name__}" for operation in UPDATES[name].values() if operation is not None} <= names


@every_optimizer
def test_the_state_beside_a_master_copy_is_that_of_float32(name):
    parts = {"matrix": "mlp", "embedding": "embedding", "norm": "norms"}
    weights = [Weight(role, (96, 64), "bfloat16", part, role=role) for role, part in parts.items()]
    assert default(name).price(weights, precision("bf16_master")) == default(name).price(weights, precision("fp32"))


@every_optimizer
def test_the_price_says_of_which_part_the_state_is(name):
    parts = {"matrix": "mlp", "embedding": "embedding", "norm": "norms"}
    weights = [Weight(role, (96, 64), "float32", part, role=role) for role, part in parts.items()]
    price = default(name).price(weights, precision("fp32"))
    state = price.parts("optimizer_bytes")
    assert set(parts.values()) == set(state) - {"codes"}
    assert price.parts("peak_bytes") == {"optimizer": sum(state.values())}
    assert set(price.parts("executed_flops")) <= {"optimizer"}


def test_tables_of_codes_are_there_if_anything_is_quantized():
    def state(*sizes):
        weights = [Weight(f"w{size}", (size,), "float32", "mlp", role="matrix") for size in sizes]
        return AdamW8bit(min_8bit_size=512).price(weights, precision("fp32")).parts("optimizer_bytes")

    assert state(500, 511) == {"mlp": 2 * 4 * (500 + 511)}
    # two moments of 600 bytes, each in three blocks with a scale, and a table of 256 codes for each
    assert state(600) == {"mlp": 2 * (600 + 3 * 4), "codes": 2 * 256 * 4}
    assert state(512, 600) == {"mlp": 2 * (512 + 2 * 4) + 2 * (600 + 3 * 4), "codes": 2 * 256 * 4}


def test_a_name_that_is_none_is_answered_with_the_nearest():
    known = f"Known: {', '.join(NAMES)}."
    assert OptimizerConfig.registry.unknown("adamv") == f"unknown optimizer 'adamv'. Did you mean 'adamw'? {known}"


@every_optimizer
def test_a_closure_is_asked_once_for_gradients_and_its_loss_is_given_back(name):
    asked, ends = [], []
    roles = {"weight": "matrix", "bias": "bias"}
    torch.manual_seed(0)
    model = nn.Linear(4, 3)

    def loss_of(layer):
        loss = layer(torch.eye(4)).square().sum()
        loss.backward()
        asked.append(loss.detach())
        return loss

    for by_closure in (False, True):
        own = copy.deepcopy(model)
        optimizer = default(name).build(parameter_infos(own, roles))
        if by_closure:
            assert optimizer.step(lambda own=own: loss_of(own)) == asked[0]
        else:
            loss_of(own)
            assert optimizer.step() is None
        ends.append(list(own.parameters()))
    assert len(asked) == 2
    assert all(map(torch.equal, *ends))
    assert not any(map(torch.equal, ends[0], model.parameters()))


@pytest.mark.parametrize(("name", "package"), [("adamw8bit", "bitsandbytes"), ("lion", "pytorch_optimizer")])
def test_a_package_that_is_not_there_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    rows = parameter_infos(nn.Linear(4, 3), {"weight": "matrix", "bias": "bias"})
    with pytest.raises(ConfigError, match=rf'optim "{name}" needs {package}: pip install "llmeff\[optim\]"'):
        default(name).build(rows)
