"""Mamba-2 against transformers' own module, with its weights."""

import pytest
import torch
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from llmeff.attention import Mamba2
from llmeff.attention.mixer import MixerShape
from llmeff.core.layout import Layout

INNER, STATE = 48, 16


def pair(groups):
    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=24, num_heads=6, head_dim=8, state_size=STATE, n_groups=groups, num_hidden_layers=1, chunk_size=32
    )
    theirs = Mamba2Mixer(config, 0)
    with torch.no_grad():
        theirs.norm.weight.normal_()
        theirs.D.normal_()
    shape = MixerShape(width=24, num_heads=3, num_kv_heads=groups, head_dim=8, rope_theta=1e4, norm_eps=1e-5)
    ours = Mamba2(state_width=STATE).build(shape)
    width = groups * STATE
    gate, value, key, query, steps = theirs.in_proj.weight.split((INNER, INNER, width, width, 6))
    order = torch.arange(INNER + 2 * width).split((INNER, width, width))
    order = torch.cat(order[::-1])
    tensors = {
        "q_proj.weight": query, "k_proj.weight": key, "v_proj.weight": value, "g_proj.weight": gate,
        "a_proj.weight": steps, "conv.weight": theirs.conv1d.weight[order], "conv.bias": theirs.conv1d.bias[order],
        "log_rate": theirs.A_log, "step_bias": theirs.dt_bias, "skip": theirs.D, "o_norm.weight": theirs.norm.weight,
        "o_proj.weight": theirs.out_proj.weight,
    }  # fmt: skip
    ours.load_state_dict({name: x.detach().clone() for name, x in tensors.items()})
    return ours, theirs


@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_that_of_transformers(groups):
    ours, theirs = pair(groups)
    x = torch.randn(2, 90, 24, requires_grad=True)
    found, expected = ours(x, Layout.plain(90, x.device)), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    above = torch.randn_like(found)
    own = torch.autograd.grad((found * above).sum(), [x, ours.log_rate, ours.step_bias, ours.skip, ours.o_norm.weight])
    other = torch.autograd.grad(
        (expected * above).sum(), [x, theirs.A_log, theirs.dt_bias, theirs.D, theirs.norm.weight]
    )
    for mine, yours in zip(own, other, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_is_that_of_transformers():
    ours, theirs = pair(1)
    x, padding = torch.randn(2, 12, 24), torch.ones(2, 12, dtype=torch.bool)
    padding[0, :5] = False
    layout = Layout(positions=torch.arange(12)[None], padding=padding)
    found, expected = ours(x, layout), theirs(x, attention_mask=padding.long())
    torch.testing.assert_close(found[padding], expected[padding], rtol=1e-4, atol=1e-5)
