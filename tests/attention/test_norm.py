"""RMSNorm against its formula in float64."""

import pytest
import torch
from torch import Tensor

from llmeff.attention.norm import RMSNorm

EPS = 1e-5


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def inputs(dtype: torch.dtype) -> tuple[Tensor, RMSNorm, Tensor]:
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 16, dtype=torch.float64)).to(dtype).requires_grad_()
    norm = RMSNorm(16, EPS).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return x, norm, torch.randn(2, 5, 16, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_formula(dtype: torch.dtype, rtol: float) -> None:
    x, norm, grad = inputs(dtype)
    y = norm(x)
    found = (y, *torch.autograd.grad(y, (x, norm.weight), grad))
    x64, weight64 = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    y64 = formula(x64, weight64)
    expected = (y64, *torch.autograd.grad(y64, (x64, weight64), grad.double()))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= rtol * theirs.norm()


def test_gradcheck() -> None:
    x, norm, _ = inputs(torch.float64)
    assert torch.autograd.gradcheck(norm, (x,))


def test_only_the_input_and_one_number_a_row_are_kept() -> None:
    x, norm, _ = inputs(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    assert sum(tensor.numel() for tensor in kept) == x.numel() + norm.weight.numel() + 2 * 5


def test_a_second_derivative_is_refused() -> None:
    x, norm, grad = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="supports only first derivatives"):
        torch.autograd.grad(norm(x), x, grad, create_graph=True)
