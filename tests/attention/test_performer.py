"""Performer: what its features estimate, and that no number is too large for it."""

import pytest
import torch

from llmeff.attention import Performer, Softmax
from llmeff.attention.mixer import MixerShape
from llmeff.attention.performer import orthogonal
from llmeff.core.layout import Layout

SHAPE = MixerShape(width=12, num_heads=4, num_kv_heads=2, head_dim=6, rope_theta=1e4, norm_eps=1e-5)


def pair(num_features, std):
    torch.manual_seed(0)
    softmax = Softmax().build(SHAPE)
    performer = Performer(num_features=num_features).build(SHAPE)
    for parameter in softmax.parameters():
        torch.nn.init.normal_(parameter, 0, std)
    performer.load_state_dict(softmax.state_dict() | performer.initial())
    return softmax, performer


@torch.no_grad()
def error(num_features):
    """Of what is mixed, relative, over several draws of tokens and directions."""
    found = []
    for seed in range(8):
        softmax, performer = pair(num_features, 0.1)
        torch.manual_seed(1 + seed)
        performer.load_state_dict(softmax.state_dict() | performer.initial())
        x, layout = torch.randn(2, 30, 12), Layout.plain(30, torch.device("cpu"))
        expected = softmax(x, layout)
        found.append(((performer(x, layout) - expected).norm() / expected.norm()) ** 2)
    return float(torch.stack(found).mean().sqrt())


def test_it_estimates_softmax_attention_with_its_weights():
    """Without bias: the error falls with the root of the number of features, to an eighth of it with 64 times as many."""
    few, many = error(64), error(4096)
    assert many < 0.02
    assert many < few / 5


def test_directions_point_to_all_sides_alike():
    torch.manual_seed(0)
    directions = orthogonal(torch.empty(12_000, 6, dtype=torch.float64))
    deviation = 12_000**-0.5
    assert directions.mean(0).abs().max() < 4 * deviation
    torch.testing.assert_close(
        directions.mT @ directions / 12_000, torch.eye(6, dtype=torch.float64), atol=6 * deviation, rtol=0
    )


def test_directions_are_at_right_angles_within_a_block_and_as_long_as_those_of_a_gaussian():
    torch.manual_seed(0)
    directions = orthogonal(torch.empty(3000, 6, dtype=torch.float64))
    products = directions[:6] @ directions[:6].T
    torch.testing.assert_close(products, products.diag().diag())
    assert directions.square().sum(-1).mean() == pytest.approx(6, rel=0.05)


def test_large_numbers_neither_overflow_nor_vanish():
    _, performer = pair(64, 1.0)
    x = (8 * torch.randn(2, 100, 12)).requires_grad_()
    out = performer(x, Layout.plain(100, x.device))
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    exact = performer.double()(x.double(), Layout.plain(100, x.device))
    assert (out - exact).norm() <= 1e-3 * exact.norm()
