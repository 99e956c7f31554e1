"""One process: a step is the plain PyTorch step, to the last bit, and what is saved goes on as if never stopped."""

import copy

import pytest
import torch
from torch import nn

from llmeff.config.run import RunConfig
from llmeff.core.config import ConfigError, validate
from llmeff.core.parameters import ParameterInfo, Role, parameter_infos
from llmeff.core.precision import precision
from llmeff.parallel import Single, Strategy, StrategyInputs

CPU = torch.device("cpu")
INPUTS = torch.linspace(-1, 1, 20).view(5, 4)


class Tied(nn.Module):
    """A shared weight, a buffer, and every role."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.outer = nn.Linear(4, 4, bias=False)
        self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.outer(self.norm(self.inner(x)).relu()).square().mean()


ROLES = {"inner.weight": "matrix", "inner.bias": "bias", "norm.weight": "norm", "norm.bias": "bias"}


def adamw(rows: list[ParameterInfo]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([row.parameter for row in rows], lr=0.05, fused=True)


def parts(
    model: nn.Module, roles: dict[str, Role] = ROLES, name: str = "fp32", device: torch.device = CPU
) -> StrategyInputs:
    return StrategyInputs(
        model=model,
        parameter_infos=lambda model: parameter_infos(model, roles),
        optimizer=adamw,
        device=device,
        precision=precision(name),
        micro_batch=5,
        num_micro_batches=2,
        clip_norm=None,
    )


def tied(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Tied()


def single(name: str = "fp32", seed: int = 0) -> tuple[nn.Module, Strategy]:
    model = tied(seed)
    return model, Single().build(parts(model, name=name))


def step(strategy: Strategy, max_norm: float | None = 0.1) -> tuple[float, float]:
    """Loss and norm of a step of two equal micro-batches."""
    total = 0.0
    for _ in range(2):
        loss = strategy.model(INPUTS) / 2
        strategy.backward(loss)
        total += loss.item()
    norm = strategy.clip(max_norm)
    assert strategy.step()
    return total, float(norm)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("max_norm", [0.1, None])
def test_a_step_is_the_plain_step_to_the_last_bit(name, max_norm):
    ours, strategy = single(name)
    theirs = tied()
    rows = parameter_infos(theirs, ROLES)
    optimizer = adamw(rows)
    for _ in range(3):
        loss, norm = step(strategy, max_norm)
        expected_loss = 0.0
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                share = theirs(INPUTS)
            (share.float() / 2).backward()
            expected_loss += (share.float() / 2).item()
        expected_norm = torch.nn.utils.clip_grad_norm_([row.parameter for row in rows], max_norm or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        assert (loss, norm) == (expected_loss, float(expected_norm))
        assert same(ours, theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


def test_bf16_computes_in_bf16_and_hands_out_fp32():
    model, strategy = single("bf16")
    seen = []
    model.inner.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    assert strategy.model(INPUTS).dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_clip_returns_the_norm_before_and_leaves_the_norm_after():
    model, strategy = single()
    strategy.backward(strategy.model(INPUTS))
    gradients = [parameter.grad for parameter in model.parameters()]
    before = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
    assert float(strategy.clip(None)) == pytest.approx(float(before))
    assert float(strategy.clip(float(before) / 2)) == pytest.approx(float(before))
    assert float(strategy.clip(None)) == pytest.approx(float(before) / 2, rel=1e-4)


def test_a_skipped_step_changes_no_weight_and_leaves_no_gradient():
    model, strategy = single()
    before = copy.deepcopy(model)
    strategy.backward(strategy.model(INPUTS))
    strategy.skip()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_alone_there_is_nothing_to_reduce():
    _, strategy = single()
    value = torch.tensor([1, 2])
    assert torch.equal(strategy.reduce_sum(value), value)
    assert strategy.loss_scale is None
    assert strategy.world.ranks == 1


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_is_saved_goes_on_as_if_never_stopped(tmp_path, name):
    model, strategy = single(name)
    step(strategy)
    step(strategy)
    strategy.save(tmp_path)
    again, resumed = single(name, seed=1)
    step(resumed)
    resumed.load(tmp_path)
    assert same(model, again)
    assert step(strategy) == step(resumed)
    assert same(model, again)


def test_a_shared_weight_is_saved_once(tmp_path):
    model, strategy = single()
    assert "outer.weight" not in strategy.state_dict()
    assert strategy.state_dict().keys() == model.state_dict().keys() - {"outer.weight"}


def test_the_state_of_another_model_is_refused(tmp_path):
    single()[1].save(tmp_path)
    torch.manual_seed(0)
    other = nn.Linear(4, 4)
    strategy = Single().build(parts(other, {"weight": "matrix", "bias": "bias"}))
    with pytest.raises(ValueError, match="the weights do not fit the model"):
        strategy.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"precision": "bf16_master"},
            "precision 'bf16_master' does not work with parallel 'single'. Allowed: 'fp32', 'bf16'",
        ),
        (
            {"parallel": {"name": "single", "ranks": 2}},
            "ranks is 2, but strategy 'single' has only one process: use ranks = 1",
        ),
    ],
)
def test_what_one_process_cannot_do_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(RunConfig, settings)


@pytest.mark.gpu
def test_fp16_scales_its_loss_and_the_scale_is_saved(tmp_path):
    device = torch.device("cuda")
    strategy = Single().build(parts(tied().to(device), name="fp16", device=device))
    before = strategy.loss_scale
    for _ in range(2):
        strategy.backward(strategy.model(INPUTS.to(device)))
        assert strategy.clip(1.0).isfinite()
        assert strategy.step()
    strategy.save(tmp_path)
    strategy.backward(strategy.model(INPUTS.to(device)) * torch.inf)
    strategy.clip(1.0)
    assert not strategy.step()
    assert strategy.loss_scale == before / 2
    strategy.load(tmp_path)
    assert strategy.loss_scale == before
