"""Chunked cross-entropy against the plain one."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmeff.core.ignored import IGNORED_TOKEN
from llmeff.models.cross_entropy import cross_entropy_sum

TOKENS, WIDTH, VOCABULARY = (3, 11), 16, 37


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(*TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, TOKENS)
    targets[0, 3:] = IGNORED_TOKEN
    targets[2, ::2] = IGNORED_TOKEN
    return hidden, weight, targets


def loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> tuple[Tensor, ...]:
    loss = cross_entropy_sum(hidden, weight, targets, chunk)
    mean = loss / (targets != IGNORED_TOKEN).sum()
    return loss.detach(), *torch.autograd.grad(mean, (hidden, weight))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("chunk", [1, 5, 11, 33, 1000])
def test_a_chunk_changes_memory_not_the_loss(chunk: int) -> None:
    found, expected = loss_and_gradients(*inputs(), chunk), loss_and_gradients(*inputs(), None)
    assert relative(found[0], expected[0]) < 1e-6
    assert relative(found[1], expected[1]) < 3e-7
    assert relative(found[2], expected[2]) < 3e-7


@pytest.mark.parametrize("chunk", [None, 5])
def test_float64_stays_float64(chunk: int | None) -> None:
    found = loss_and_gradients(*inputs(torch.float64), chunk)
    hidden, weight, targets = inputs(torch.float64)
    log_probabilities = (hidden @ weight.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = -log_probabilities[targets != IGNORED_TOKEN].sum()
    assert {tensor.dtype for tensor in found} == {torch.float64}
    assert relative(found[0], expected.detach()) < 1e-14


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_gradient_alone(wanted: str) -> None:
    hidden, weight, targets = inputs()
    expected = loss_and_gradients(hidden, weight, targets, None)[1 if wanted == "hidden" else 2]
    if wanted == "hidden":
        hidden, weight = hidden, weight.detach()
    else:
        hidden, weight = hidden.detach(), weight
    loss = cross_entropy_sum(hidden, weight, targets, 4) / (targets != IGNORED_TOKEN).sum()
    (found,) = torch.autograd.grad(loss, hidden if wanted == "hidden" else weight)
    assert relative(found, expected) < 3e-7


@pytest.mark.parametrize("chunk", [None, 5])
def test_no_target_counts(chunk: int | None) -> None:
    hidden, weight, targets = inputs()
    loss = cross_entropy_sum(hidden, weight, torch.full_like(targets, IGNORED_TOKEN), chunk)
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_bf16_autocast() -> None:
    expected = loss_and_gradients(*inputs(), None)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(*inputs(), 5)
        plain = loss_and_gradients(*inputs(), None)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 3
    assert relative(found[0], plain[0]) < 1e-6
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) < 1e-2


def test_bf16_gradients_are_scaled_by_one_over_the_count_unrounded() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    (summed,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, targets, 5), hidden)
    (scaled,) = torch.autograd.grad(cross_entropy_sum(hidden, weight, targets, 5) * 0.7519, hidden)
    assert torch.equal(scaled, (summed.float() * 0.7519).bfloat16())


class _CountProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def test_without_gradients_only_the_logits_are_computed() -> None:
    hidden, weight, targets = inputs()
    expected = cross_entropy_sum(hidden, weight, targets, None)
    with torch.no_grad(), _CountProducts() as count:
        found = cross_entropy_sum(hidden, weight, targets, 11)
    assert relative(found, expected.detach()) < 1e-6
    assert count.products == 3


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, targets = inputs()
    loss = cross_entropy_sum(hidden, weight, targets, 5)
    with pytest.raises(RuntimeError, match="supports only first derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)
