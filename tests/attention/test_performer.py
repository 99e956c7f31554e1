"""Performer: what its features estimate, and that no number is too large for it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from llmeff.attention import Performer, Softmax
from llmeff.attention.heads import rotate
from llmeff.attention.mixer import MixerShape
from llmeff.attention.performer import exponents, orthogonal
from llmeff.core.layout import Layout, places_in

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


def long_keys(num_tokens):
    """Tokens and a mixer whose keys are about 60 long, so that their exponents are about -700; and queries that are not."""
    _, performer = pair(64, 0.3)
    x = 1 + 0.05 * torch.randn(2, num_tokens, 12)
    with torch.no_grad():
        key = performer.k_proj(x).unflatten(-1, (2, 6))
        performer.k_proj.weight *= 60 / key.norm(dim=-1).mean()
    return performer, x.requires_grad_()


@torch.no_grad()
def by_logarithms(performer, x):
    """The same in float64, from the logarithm of every pair's weight."""
    performer, x = copy.deepcopy(performer).double(), x.double()
    layout = Layout.plain(x.shape[1], x.device)
    cos, sin = (table.transpose(1, 2) for table in layout.rotary(6, 1e4))
    query, key, value = (
        proj(x).unflatten(-1, (-1, 6)) for proj in (performer.q_proj, performer.k_proj, performer.v_proj)
    )
    query, key = (rotate(own * 6**-0.25, cos, sin) for own in (query, key))
    query = exponents(query, performer.directions)
    key = exponents(key, performer.directions, has_lengths=True).repeat_interleave(2, dim=2)
    logs = (query[:, :, None] + key[:, None]).logsumexp(-1)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    weights = logs.masked_fill(later[..., None], -torch.inf).softmax(dim=2)
    mixed = torch.einsum("btsn,bsnh->btnh", weights, value.repeat_interleave(2, dim=2))
    return performer.o_proj(mixed.flatten(-2))


def test_long_keys_do_not_vanish():
    performer, x = long_keys(100)
    out, exact = performer(x, Layout.plain(100, x.device)), by_logarithms(performer, x)
    assert exact.norm(dim=-1).min() > 0.01
    assert (out - exact).norm() <= 1e-4 * exact.norm()
    out.square().sum().backward()
    assert x.grad.isfinite().all()


def test_large_queries_and_keys_are_weighed_as_their_logarithms_say():
    """About 16 long both, after which what a query and a key have in common may be less than float32 can tell."""
    _, performer = pair(64, 1.0)
    x = 3 * torch.randn(2, 100, 12)
    exact = by_logarithms(performer, x)
    assert (performer(x, Layout.plain(100, x.device)) - exact).norm() <= 1e-5 * exact.norm()


def test_the_largest_numbers_do_not_overflow():
    _, performer = pair(64, 1.0)
    x = (8 * torch.randn(2, 100, 12)).requires_grad_()
    performer(x, Layout.plain(100, x.device)).square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("is_last", [False, True])
def test_keys_are_relative_to_those_of_their_own_document(is_last):
    """A document of long keys beside one of short keys, whose exponents are larger by about 700."""
    performer, x = long_keys(20)
    short = torch.randn(2, 15, 12) / 60
    parts = (short, x) if is_last else (x, short)
    lengths = torch.tensor([part.shape[1] for part in parts])
    documents = torch.repeat_interleave(torch.arange(2), lengths).expand(2, -1)
    packed = performer(torch.cat(parts, dim=1), Layout(positions=places_in(documents), documents=documents))
    alone = torch.cat([performer(part, Layout.plain(part.shape[1], part.device)) for part in parts], dim=1)
    assert alone.norm(dim=-1).min() > 1e-4
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-6)


def test_padding_before_long_keys_changes_nothing():
    performer, x = long_keys(20)
    padding = torch.ones(2, 25, dtype=torch.bool)
    padding[:, :5] = False
    positions = (padding.long().cumsum(-1) - 1).clamp(min=0)
    padded = performer(F.pad(x, (0, 0, 5, 0)), Layout(positions=positions, padding=padding))
    alone = performer(x, Layout.plain(20, x.device))
    torch.testing.assert_close(padded[:, 5:], alone, rtol=1e-4, atol=1e-6)
